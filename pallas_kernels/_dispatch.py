"""Choosing a backend: `auto` may choose, a named backend never falls back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxattn.errors import ConfigError

BACKENDS = ("auto", "reference", "xla", "gpu", "tpu")


def resolve(
    op: str, backend: str, implementations: Mapping[str, Callable[..., Any]], default: str
) -> Callable[..., Any]:
    """The implementation of `op` for `backend`.

    Raises:
      ConfigError: the name is no backend at all.
      NotImplementedError: a backend the op does not have; never replaced by another one.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not known: choose one of {', '.join(BACKENDS)}.")
    name = default if backend == "auto" else backend
    if name not in implementations:
        have = ", ".join(implementations)
        raise NotImplementedError(f"{op} has no {name!r} backend; it has {have}.")
    return implementations[name]
