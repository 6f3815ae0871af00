"""Choosing a backend: `auto` may choose, a named backend never falls back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxattn.errors import ConfigError
from pallas_kernels import _interpret

BACKENDS = ("auto", "reference", "xla", "gpu", "tpu")
KERNELS = ("gpu", "tpu")  # backends named after the one platform they run on


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
    unfit = unfit or {}
    name = backend
    if backend == "auto":
        fitting = [n for n in KERNELS if n in implementations and not unfit.get(n)]
        name = _interpret.platform() if fitting else default
        name = name if name in fitting else default
    if name not in implementations:
        have = ", ".join(implementations)
        raise NotImplementedError(f"{op} has no {name!r} backend; it has {have}.")
    if reason := unfit.get(name):
        raise NotImplementedError(f"{op}: {reason}")
    return implementations[name]


def interpret_for(op: str, platform: str) -> Any:
    """`pallas_call(interpret=)` for a kernel that runs on `platform` only.

    Raises:
      NotImplementedError: the kernel would be compiled for another platform.
    """
    mode = _interpret.mode()
    if mode is False and _interpret.platform() != platform:
        raise NotImplementedError(
            f"{op}: backend {platform!r} was asked for but this process computes on {_interpret.platform()!r}: use "
            f"'auto' or 'xla', or simulate the kernel inside pallas_kernels._interpret.interpreted(), or compile it "
            f"ahead of time inside pallas_kernels._interpret.compiling_for({platform!r})."
        )
    return mode
