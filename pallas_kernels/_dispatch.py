"""Choosing a backend: `auto` may choose, a named backend never falls back."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxattn.errors import ConfigError
from pallas_kernels import _interpret

BACKENDS = ("auto", "reference", "xla", "gpu", "tpu")
KERNELS = ("gpu", "tpu")  # backends named after the one platform they run on

Choices = dict[str, dict[str, str]]  # op -> backend -> why
_record: contextvars.ContextVar[Choices | None] = contextvars.ContextVar("backend choices", default=None)


def resolve(
    op: str,
    backend: str,
    implementations: Mapping[str, Callable[..., Any]],
    default: str,
    unfit: Mapping[str, str | None] | None = None,
) -> Callable[..., Any]:
    """The implementation of `op` for `backend`; "auto" is the platform's own kernel if it fits, else `default`.

    Args:
      unfit: why a backend cannot serve this call, by its name; missing or None where it can.

    Raises:
      ConfigError: the name is no backend at all.
      NotImplementedError: a backend the op does not have or that cannot serve this call; never replaced.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not known: choose one of {', '.join(BACKENDS)}.")
    name, why = (backend, "named") if backend != "auto" else _automatic(implementations, default, unfit or {})
    if name not in implementations:
        have = ", ".join(implementations)
        raise NotImplementedError(f"{op} has no {name!r} backend; it has {have}.")
    if reason := (unfit or {}).get(name):
        raise NotImplementedError(f"{op}: {reason}")
    note(op, name, why)
    return implementations[name]


def _automatic(
    implementations: Mapping[str, Callable[..., Any]], default: str, unfit: Mapping[str, str | None]
) -> tuple[str, str]:
    """The backend that "auto" means here, and why."""
    kernels = [name for name in KERNELS if name in implementations]
    if not kernels:
        return default, "it has no other kernel"
    platform = _interpret.platform()
    if platform in kernels and not unfit.get(platform):
        return platform, f"this is a {platform}"
    if platform in kernels:
        return default, f"{unfit[platform]}"
    return default, f"no kernel for {platform}"


def note(op: str, backend: str, why: str) -> None:
    """Tell whoever is `recording` which backend an op got."""
    if (record := _record.get()) is not None:
        record.setdefault(op, {}).setdefault(backend, why)


@contextlib.contextmanager
def recording() -> Iterator[Choices]:
    """Collects which backend every op traced inside gets, and why: op -> backend -> reason."""
    record: Choices = {}
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def may_be_kernel() -> bool:
    """Whether ops traced now can become kernels that only one kind of device runs."""
    return _interpret.mode() is not False or _interpret.platform() in KERNELS


def interpret_for(op: str, platform: str) -> Any:
    """`pallas_call(interpret=)` for a kernel that runs on `platform` only.

    Raises:
      NotImplementedError: the kernel would be compiled for another platform.
    """
    mode = _interpret.mode()
    if mode is False and _interpret.platform() != platform:
        raise NotImplementedError(
            f"{op}: backend {platform!r} was asked for but this process computes on {_interpret.platform()!r}: use "
            f"'auto' or 'xla', or simulate the kernel inside pallas_kernels.interpreted(), or compile it ahead of "
            f"time inside pallas_kernels.compiling_for({platform!r})."
        )
    return mode
