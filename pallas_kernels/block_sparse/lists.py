"""Lists of key blocks: making them, reporting on them, and reducing them to what a backend must visit."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from pallas_kernels.flash.tiles import certain, reachable


class Lists(NamedTuple):
    """Tiles to visit, each once: the first `count` entries of a row, in ascending order."""

    block: Int[Array, "B L I N"]  # unused entries are 0
    masked: Bool[Array, "B L I N"]  # some query of the tile does not see some key
    count: Int[Array, "B L I"]


def block_lists(mask: Bool[Array, "B L I J"], width: int) -> Int[Array, "B L I N"]:
    """Numbers of the True blocks of each row, the highest first, then -1.

    A row with more than `width` of them keeps the highest: the nearest to the diagonal where attention is causal.

    Raises:
      ConfigError: width < 1.
    """
    if width < 1:
        raise ConfigError(f"width is {width} but a list needs room for at least 1 block.")
    count = mask.shape[-1]
    listed = jnp.sort(jnp.where(mask, jnp.arange(count, dtype=jnp.int32), -1), axis=-1)
    highest = jnp.flip(listed[..., max(0, count - width) :], axis=-1)
    return jnp.pad(highest, ((0, 0), (0, 0), (0, 0), (0, max(0, width - count))), constant_values=-1)


def density(blocks: Int[Array, "B L I N"], vis: Visibility, *, block_q: int, block_k: int) -> Float[Array, "B L"]:
    """Listed tiles as a share of the tiles that `vis` lets somebody see; sparsity is 1 - density."""
    vis = in_blocks(vis, blocks.shape[0], block_q, block_k)
    whole = jnp.sum(reachable(vis, block_q, block_k), axis=(1, 2))
    used = jnp.sum(usable(blocks, vis, block_q, block_k).count, axis=-1)
    return used / jnp.maximum(whole, 1)[:, None].astype(jnp.float32)


def check(q: Array, k: Array, blocks: Array, block_q: int, block_k: int) -> None:
    """Refuse lists that do not belong to these arrays.

    Raises:
      ConfigError: a block size below 1, or another number of list heads or query blocks than there must be.
    """
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size < 1:
            raise ConfigError(f"{name} is {size} but must be at least 1.")
    heads, kv_heads = q.shape[2], k.shape[2]
    if blocks.shape[1] not in (1, kv_heads, heads):
        raise ConfigError(
            f"blocks has {blocks.shape[1]} list heads: give one list for all heads (1), one per key head "
            f"({kv_heads}) or one per query head ({heads})."
        )
    rows = -(-q.shape[1] // block_q)
    if blocks.shape[2] != rows:
        raise ConfigError(
            f"blocks has {blocks.shape[2]} rows but {q.shape[1]} queries in blocks of {block_q} make {rows}: give one "
            "list per query block."
        )


def in_blocks(vis: Visibility, batch: int, block_q: int, block_k: int) -> Visibility:
    """Every array [batch, ·], padded to whole blocks."""
    wide = lambda x: jnp.broadcast_to(x, (batch, x.shape[1])).astype(jnp.int32)
    vis = dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions),
        q_segments=wide(vis.q_segments),
        k_positions=wide(vis.k_positions),
        k_segments=wide(vis.k_segments),
    )
    return vis.pad_rows(-vis.q_positions.shape[1] % block_q).pad_columns(-vis.k_positions.shape[1] % block_k)


def usable(blocks: Int[Array, "B L I N"], vis: Visibility, block_q: int, block_k: int) -> Lists:
    """The entries that some query can see: unused, foreign, unseen and repeated ones are dropped.

    Args:
      vis: in whole blocks, see `in_blocks`.
    """
    none = vis.k_positions.shape[1] // block_k  # one past the last block
    tiles, whole = (f(vis, block_q, block_k)[:, None] for f in (reachable, certain))
    listed = (blocks >= 0) & (blocks < none)
    listed &= jnp.take_along_axis(tiles, jnp.where(listed, blocks, 0), axis=3)
    ordered = jnp.sort(jnp.where(listed, blocks, none).astype(jnp.int32), axis=-1)
    again = jnp.pad(ordered[..., 1:] == ordered[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    ordered = jnp.sort(jnp.where(again, none, ordered), axis=-1)
    used = ordered < none
    block = jnp.where(used, ordered, 0)
    masked = ~jnp.take_along_axis(whole, block, axis=3)
    return Lists(block, masked, jnp.sum(used, axis=-1, dtype=jnp.int32))
