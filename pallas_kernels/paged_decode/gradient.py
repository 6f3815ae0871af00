"""Fast backends of inference ops have no gradient and say so, instead of a zero or an error from inside JAX."""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _refusing(backend: str, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return arrays


def _forward(backend: str, arrays: tuple[Array, ...]):
    raise NotImplementedError(
        f"paged_decode: backend {backend!r} has no gradient, as decoding needs none: use 'reference', or train with "
        "`flash`."
    )


_refusing.defvjp(_forward, lambda backend, saved, d: (d,))


def without_gradient(backend: str, *arrays: Array) -> tuple[Array, ...]:
    """The arrays as they are; differentiating through them raises NotImplementedError."""
    return _refusing(backend, arrays)
