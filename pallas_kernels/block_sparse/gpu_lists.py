"""Lists as the tables that `flash`'s kernels for Hopper walk over: the tiles of each block of threads, each once.

A table has a head of three words per block of threads (where its entries begin, how many need no mask, how many
there are) and behind it the entries, those without a mask first.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxattn.masks import Visibility
from pallas_kernels.block_sparse.lists import Lists, usable
from pallas_kernels.flash import gpu_tiles
from pallas_kernels.flash.tiles import div, rem

WORDS = 3  # of a block of threads in the head of a table


@dataclasses.dataclass(frozen=True)
class Plan(gpu_tiles.Plan):
    """All that is known before the kernels are compiled."""

    OP: ClassVar[str] = "block_sparse"

    kv_heads: int
    lists: int
    width: int  # of the lists
    block_q: int
    block_k: int
    query_tiles: int  # of the dk, dv kernel

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def units(self) -> int:
        """Tables by key of one row of the batch, each of the lists whose queries read the same key heads."""
        return min(self.lists, self.kv_heads)

    @property
    def turns(self) -> int:
        return self.group // (self.lists // self.units)

    def visit(self, table: Any, at: tuple[Any, Any, Any], size: tuple[int, int]) -> Listed:
        batch, head, block = at
        return Listed(table, (batch * size[0] + head) * size[1] + block)

    def query_tile(self, entry: Any) -> tuple[Any, Any]:
        return div(entry, self.query_tiles) * self.turns, rem(entry, self.query_tiles)

    def seen(self, queries: int, keys: int, block_q: int, block_k: int) -> list[int]:
        """As many as are listed, if all lists are full."""
        most = self.width * (self.block_k // block_k)
        return [min(n, most) for n in super().seen(queries, keys, block_q, block_k)]


class Listed(gpu_tiles.Visit):
    """The entries of a block of threads. One is read when its tile is fetched, most often from a cached line."""

    def __init__(self, table: Any, block: Any):
        self.table = table
        self.start, self.whole, self.count = (table[WORDS * block + n] for n in range(WORDS))

    def tile(self, n: Any) -> Any:
        """The n-th entry."""
        return self.table[self.start + n]


def by_query(plan: Plan, blocks: Int[Array, "B L I N"], vis: Visibility, tile_q: int, tile_k: int) -> Int[Array, "n"]:
    """The table of every query head's blocks of `tile_q` queries; entries are tiles of keys."""
    lists = in_tiles(plan, blocks, vis, tile_q, tile_k)
    used = jnp.arange(lists.block.shape[3]) < lists.count[..., None]
    order = jnp.where(used, lists.masked.astype(jnp.int32), 2)
    _, entries = jax.lax.sort((order, lists.block), num_keys=2)
    rows, width = entries.shape[2:]
    start = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * width, lists.count.shape)
    return _table(start, jnp.sum(order == 0, axis=3), lists.count, entries, plan.heads)


def by_key(plan: Plan, blocks: Int[Array, "B L I N"], vis: Visibility, tile_q: int, tile_k: int) -> Int[Array, "n"]:
    """The table of every key head's blocks of `tile_k` keys: the lists turned round by one sort.

    Entries are (list of the unit, tile of queries) as one number.
    """
    lists = in_tiles(plan, blocks, vis, tile_q, tile_k)
    batch, heads, rows, width = lists.block.shape
    columns, shared = vis.k_positions.shape[1] // tile_k, heads // plan.units
    flat = lambda x: x.reshape(batch, plan.units, -1)
    used = jnp.arange(width) < lists.count[..., None]
    key = flat(jnp.where(used, 2 * lists.block + lists.masked, 2 * columns))
    entries = jnp.broadcast_to(jnp.arange(shared * rows, dtype=jnp.int32)[:, None], (shared * rows, width))
    entries = jnp.broadcast_to(entries.reshape(-1), key.shape)
    key, entries = jax.lax.sort((key, entries), num_keys=2)
    ends = jnp.arange(2 * columns + 1, dtype=jnp.int32)
    edges = jax.vmap(jax.vmap(lambda key: jnp.searchsorted(key, ends)))(key).astype(jnp.int32)
    first, middle, last = edges[..., :-1:2], edges[..., 1::2], edges[..., 2::2]
    return _table(first, middle - first, last - first, entries, plan.kv_heads)


def in_tiles(plan: Plan, blocks: Int[Array, "B L I N"], vis: Visibility, tile_q: int, tile_k: int) -> Lists:
    """What can be seen of the listed blocks, as lists of tiles for every tile of queries.

    Args:
      vis: in whole tiles, see `lists.in_blocks`.
    """
    keys, parts = vis.k_positions.shape[1], plan.block_k // tile_k
    listed = (blocks >= 0) & (blocks < -(-keys // plan.block_k))
    first = jnp.where(listed, blocks, -1).astype(jnp.int32) * parts
    tile = (first[..., None] + jnp.arange(parts, dtype=jnp.int32)).reshape(*blocks.shape[:3], -1)  # unused: negative
    tile = jnp.repeat(tile, plan.block_q // tile_q, axis=2)[:, :, : vis.q_positions.shape[1] // tile_q]
    return usable(tile, vis, tile_q, tile_k)


def _table(
    start: Int[Array, "B U R"],
    whole: Int[Array, "B U R"],
    count: Int[Array, "B U R"],
    entries: Int[Array, "B U ..."],
    heads: int,
) -> Int[Array, "n"]:
    """The table of `heads` heads, which share the entries of their units.

    Args:
      start: where entries begin among those of the unit.
    """
    batch, units, rows = start.shape
    unit = jnp.arange(batch * units, dtype=jnp.int32).reshape(batch, units, 1)
    start = start + unit * (entries.size // unit.size) + WORDS * batch * heads * rows
    head = jnp.repeat(jnp.stack([start, whole, count], axis=3), heads // units, axis=1)
    return jnp.concatenate([head.reshape(-1), entries.reshape(-1)]).astype(jnp.int32)
