"""Choosing blocks of keys for blocks of queries: what methods that read a prompt sparsely have in common.

A mask [B, H, I, J] says which of J blocks of keys each of I blocks of queries reads; blocks of both have one size b and
begin at a row's first token (`first_live`, `turned`), so that padding in front cuts no block otherwise. Blocks above
the diagonal are listed for nobody.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import PADDING


def first_live(segments: Int[Array, "B T"]) -> Int[Array, "B"]:
    """Index of each row's first token that is no padding; 0 in a row of padding."""
    return jnp.argmax(segments != PADDING, axis=1).astype(jnp.int32)


def turned(x: Array, by: Int[Array, "B"]) -> Array:
    """Rows [B, T, ...] with what lies at index `by` in front, and what was in front of it at the end."""
    at = (jnp.arange(x.shape[1]) + by[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)


def pooled(x: Array, block: int, axis: int = -1) -> Array:
    """Sums over blocks of an axis, the last of which may be short."""
    axis %= x.ndim
    pad = [(0, -x.shape[n] % block if n == axis else 0) for n in range(x.ndim)]
    return jnp.sum(jnp.pad(x, pad).reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis=axis + 1)


def most(x: Float[Array, "*n J"], count: int | Int[Array, "*m"]) -> Bool[Array, "*n J"]:
    """Which are among the `count` largest of their row; of equals the first are."""
    order = jnp.argsort(-x, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return rank < jnp.expand_dims(jnp.asarray(count), -1)


def causal(rows: int) -> Bool[Array, "I J"]:
    """The blocks on and below the diagonal."""
    return jnp.arange(rows) <= jnp.arange(rows)[:, None]


def ranked(scores: Float[Array, "*n I J"]) -> Float[Array, "*n I J"]:
    """Scores in which the first block and the query's own are the largest, and all above the diagonal the least."""
    at = jnp.arange(scores.shape[-1])
    first = (at == at[:, None]) | (at == 0)
    return jnp.where(causal(len(at)), jnp.where(first, jnp.inf, scores), -jnp.inf)


def lines(columns: Bool[Array, "*n J"], diagonals: Bool[Array, "*n J"]) -> Bool[Array, "*n I J"]:
    """The blocks that hold whole blocks of columns and of diagonals.

    Diagonal block m is the pairs whose offset, query minus key, is from m·b to m·b + b - 1. They lie in two blocks of
    every row of blocks, I - m and I - m - 1.
    """
    at = jnp.arange(columns.shape[-1])
    offset = at[:, None] - at
    across = diagonals | jnp.pad(diagonals[..., :-1], [(0, 0)] * (diagonals.ndim - 1) + [(1, 0)])
    return (columns[..., None, :] | across[..., jnp.maximum(offset, 0)]) & (offset >= 0)
