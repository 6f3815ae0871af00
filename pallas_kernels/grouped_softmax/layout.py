"""Keys in slots: one slot of registers' rows for each landmark block, its landmark in the slot's last row.

Packed documents start anywhere in a row and end inside blocks. With queries and keys sorted together by document
and position, the blocks of a document are neighbouring slots, and all that a query needs to know is three numbers:
the first slot of its document, its own slot, and how many ordinary tokens of its own slot are not after it.

How many slots there are is in the data: S / L where documents are long, up to S + T where each is one token. Static
memory is for one page of them, a quarter more than S / L, and there is a pass over every page that is in use: one
pass as long as documents average two blocks or more.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import GLOBAL, PADDING, Visibility
from pallas_kernels.flash.tiles import LANES, div, rem, spans

FIRST, OWN, SEEN = 0, 1, 2  # rows of `Places.of_query`
NOWHERE = 1 << 30  # beyond any slot, and twice this fits in 32 bits


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled."""

    block: int  # L
    slot: int  # rows of a slot, at least L
    slots: int  # of a tile of keys
    tiles: int  # of a page
    block_q: int
    group: int  # query heads of one key head
    scale: float
    aligned: int | None
    interpret: Any

    @property
    def tile(self) -> int:
        """Rows of a tile of keys."""
        return self.slot * self.slots

    @property
    def page(self) -> int:
        """Slots of a page."""
        return self.slots * self.tiles

    def visits(self, queries: int, keys: int) -> int:
        """How many tiles one head visits at most if its row is one document, as far as that is known."""
        rows, step = queries // self.block_q, self.block * self.slots
        columns = -(-keys // step)
        if self.aligned is None:
            return rows * columns
        return sum(min(columns, -(-((i + 1) * self.block_q + self.aligned) // step)) for i in range(rows))


class Places(NamedTuple):
    """Where keys are, and which of them queries see."""

    of_key: Array  # [B, S]: slot · rows of a slot + row; NOWHERE for keys that nobody may see
    of_query: Array  # [B, 3, T]: FIRST > OWN for queries that see nothing
    count: Array  # []: slots of the row that has most


class Page(NamedTuple):
    """Some of the slots."""

    at: Array  # [B, S]: row of each key in the page, out of range where it is elsewhere
    source: Array  # [B, rows]: the key in each row, S where there is none
    tokens: Array  # [B, slots, 1, LANES]: ordinary tokens of each slot, -1 if it has no landmark
    of_query: Array  # [B, 3, T]: slots counted from the page's first


def places(vis: Visibility, plan: Plan) -> Places:
    """Sort queries and keys together, number the landmark blocks met, and sort back."""
    keys = vis.k_positions.shape[1]
    last = jnp.iinfo(jnp.int32).max
    both = lambda k, q: jnp.concatenate([k, q], axis=1)
    unseen = (vis.k_segments == PADDING) | (vis.k_segments == GLOBAL)
    segments = both(jnp.where(unseen, last, vis.k_segments), jnp.where(vis.q_segments == PADDING, last, vis.q_segments))
    # One number for two: a query comes after the key of its position. Few operands, as sorts compile slowly.
    order = both(2 * vis.k_positions, 2 * vis.q_positions + 1)
    index = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    segments, order, index = jax.lax.sort((segments, order, index), dimension=1, num_keys=2, is_stable=False)
    live, key, positions = segments != last, index < keys, div(order, 2)
    landmark = rem(positions, plan.block) == plan.block - 1
    document = _changes(segments)
    begins = document | _changes(div(positions, plan.block))
    ordinary = live & key & ~landmark
    slot, total = jax.lax.cumsum(jnp.stack([begins & live, ordinary]).astype(jnp.int32), axis=2)
    slot, before = slot - 1, total - ordinary
    first, before = jax.lax.cummax(jnp.stack([jnp.where(document, slot, 0), jnp.where(begins, before, 0)]), axis=2)
    seen = total - before  # ordinary tokens of this block so far
    at = jnp.where(live, slot * plan.slot + jnp.where(landmark, plan.slot - 1, seen - 1), NOWHERE)
    first, own = jnp.where(live, first, NOWHERE), jnp.where(live, slot, -1)
    back = jax.vmap(lambda index, x: jnp.zeros_like(x).at[index].set(x, unique_indices=True))
    of_query = jnp.stack([back(index, x)[:, keys:] for x in (first, own, seen)], axis=1)
    return Places(back(index, at)[:, :keys], of_query, jnp.max(slot) + 1)


def _changes(x: Int[Array, "B n"]) -> Bool[Array, "B n"]:
    return jnp.concatenate([jnp.ones_like(x[:, :1], bool), x[:, 1:] != x[:, :-1]], axis=1)


def default_page(keys: int, block: int) -> int:
    """Slots of one document of all keys and a quarter more; one for a query past a block that is full."""
    return -(-5 * keys // (4 * block)) + 1


def pages(place: Places, plan: Plan) -> Int[Array, ""]:
    """How many pages are in use."""
    return div(place.count + plan.page - 1, plan.page)


def page(place: Places, plan: Plan, n: Int[Array, ""]) -> Page:
    """The slots n · plan.page and after."""
    keys, rows = place.of_key.shape[1], plan.page * plan.slot
    at = place.of_key - n * rows
    at = jnp.where((at < 0) | (at >= rows), rows, at)
    index = jnp.arange(keys, dtype=jnp.int32)
    source = jax.vmap(lambda at: jnp.full((rows,), keys, jnp.int32).at[at].set(index, mode="drop"))(at)
    full = (source < keys).reshape(-1, plan.page, plan.slot)
    tokens = jnp.sum(full[..., :-1], axis=-1, dtype=jnp.int32)
    tokens = jnp.where(full[..., -1], tokens, -1)[:, :, None, None]
    from_here = jnp.stack([n * plan.page, n * plan.page, jnp.zeros_like(n)])[:, None]
    tokens = jnp.broadcast_to(tokens, (*tokens.shape[:3], LANES))
    return Page(at, source, tokens, place.of_query - from_here)


def rows(x: Float[Array, "B K n D"], index: Int[Array, "B m"]) -> Float[Array, "B K m D"]:
    """The rows at `index`, zero where it is out of range."""
    return jax.vmap(lambda x, i: x.at[:, i].get(mode="fill", fill_value=0))(x, index)


def tables(here: Page, plan: Plan) -> tuple[Int[Array, "n"], Int[Array, "m"]]:
    """`spans` of a page's tiles that queries of a block may see, and of the blocks of queries for each tile."""
    blocks = here.of_query.reshape(*here.of_query.shape[:2], -1, plan.block_q)
    first, last = jnp.min(blocks[:, FIRST], axis=-1), jnp.max(blocks[:, OWN], axis=-1)
    begin = jnp.arange(plan.tiles, dtype=jnp.int32) * plan.slots
    tiles = (begin <= last[..., None]) & (begin + plan.slots > first[..., None])  # [B, I, J]
    masked = jnp.zeros_like(tiles)
    return spans(tiles, masked), spans(jnp.swapaxes(tiles, 1, 2), jnp.swapaxes(masked, 1, 2))


def cost(plan: Plan, q: Array, keys: int, k: Array, v: Array, *, products: tuple[int, int], moved: int):
    """Work of the tiles visited in one page.

    Args:
      keys: S.
      products: matrix products a tile does over the key dim and over the value dim.
      moved: bytes of everything that is read or written once.
    """
    tiles = q.shape[0] * q.shape[1] * plan.visits(q.shape[2], keys)
    scores = tiles * plan.block_q * plan.tile
    again = plan.tile * (k.shape[3] * k.dtype.itemsize + v.shape[3] * v.dtype.itemsize)
    return pl.CostEstimate(
        flops=2 * scores * (products[0] * k.shape[3] + products[1] * v.shape[3]),
        transcendentals=scores,
        bytes_accessed=moved + tiles * again,
    )
