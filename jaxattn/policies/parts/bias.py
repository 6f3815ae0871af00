"""Numbers per key and head whose head axes differ: one for all, one per key head, one per query head."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def joined(
    a: Float[Array, "*a"], b: Float[Array, "*b"], how: Callable[[Array, Array], Array], *, heads: int
) -> Float[Array, "*c"]:
    """how(a, b) of arrays [..., 1 or K or H, S], where H = `heads` is a multiple of K."""
    if 1 < a.shape[-2] != b.shape[-2] > 1:
        spread = lambda x: jnp.repeat(x, heads // x.shape[-2], axis=-2)
        a, b = spread(a), spread(b)
    return how(a, b)
