"""The equation in f32 with the whole T×S matrix, and who is listed as one more mask."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import Visibility, visible
from pallas_kernels.flash.reference import dense_scores, dense_stats, dense_weights
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.score import Score


def listed(
    blocks: Int[Array, "B L I N"], queries: int, keys: int, block_q: int, block_k: int
) -> Bool[Array, "B L T S"]:
    """Whether key j's block is in the list of query t's block."""
    count = -(-keys // block_k)
    tiles = jnp.any(blocks[..., None] == jnp.arange(count), axis=3)  # [B, L, I, J]
    return jnp.repeat(jnp.repeat(tiles, block_q, axis=2), block_k, axis=3)[:, :, :queries, :keys]


def block_sparse_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    blocks: Int[Array, "B L I N"],
    block_q: int,
    block_k: int,
    scale: float,
    stats: bool = True,
    key_bias: Float[Array, "b n S"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o = weights @ v, all in f32; result in v's dtype. With `flash`'s statistic of each row."""
    batch, length, heads, _ = q.shape
    may = listed(blocks, length, k.shape[1], block_q, block_k)
    see = visible(vis)[:, None] & jnp.repeat(may, heads // blocks.shape[1], axis=1)  # [B, H, T, S]
    s = dense_scores(q, k, vis, scale=scale, key_bias=key_bias)
    if score.activation == "exp":  # rows of which every key is hidden see nothing
        see &= ~(s <= FLOOR)
    fold = lambda x: x.reshape(batch * heads, *x.shape[2:])  # a mask per head: heads as further rows of the batch
    args = fold(s)[:, None], fold(see), score
    v_all = jnp.repeat(v, heads // v.shape[2], axis=2).astype(jnp.float32)
    o = jnp.einsum("bhts,bshv->bthv", dense_weights(*args).reshape(s.shape), v_all).astype(v.dtype)
    return o, jnp.swapaxes(dense_stats(*args).reshape(batch, heads, length), 1, 2)
