"""What the TPU kernel reads for a list of pages: blocks of rows that a transfer may address, and which rows count.

Rows of memory come in tiles of 8 (f32) or 16 (16-bit floats), and transfers address whole tiles. Pages of several
tiles are read tile-aligned as they are or in parts; a page below a tile, down to one token, is read as the tile
around it, in which all other rows are hidden.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.tiles import LANES, div

WIDEST = 256  # rows of a unit
MOST = 1024  # rows of a chunk
LEAST = 256


@dataclasses.dataclass(frozen=True)
class Units:
    """How pages are cut: units of `rows` tokens, `entries` of which make the chunk that is computed at once."""

    page: int
    rows: int
    entries: int

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return self.rows * self.entries

    @property
    def turned(self) -> int:
        """Rows of a unit that need an angle of their own: one where a single row counts, whichever it is."""
        return 1 if self.page == 1 else self.rows

    @property
    def parts(self) -> int:
        """Units of a page."""
        return max(1, self.page // self.rows)

    def view(self, pages: Float[Array, "N K P page D"]) -> Float[Array, "N K U rows D"]:
        """The same memory in units."""
        pools, heads, count, page, dim = pages.shape
        return pages.reshape(pools, heads, count * page // self.rows, self.rows, dim)


def tile(itemsize: int) -> int:
    """Rows of a register."""
    return 32 // itemsize


def units(page: int, pages: int, itemsize: int) -> Units | None:
    """How to read pages of this size, or None where tiles and pages overlap."""
    least = tile(itemsize)
    if page % least == 0:
        fitting = [n for n in range(least, min(page, WIDEST) + 1, least) if page % n == 0]
        rows = max(n for n in fitting if math.lcm(n, LANES) <= MOST)
    elif least % page == 0 and (pages * page) % least == 0:
        rows = least
    else:
        return None
    whole = math.lcm(rows, LANES)
    return Units(page, rows, whole * max(1, LEAST // whole) // rows)


@dataclasses.dataclass(frozen=True)
class Lists:
    """What to read for each split X of the list, for 1 or K key heads: [B, k, X, ...]."""

    table: Int[Array, "B k X entries"]  # units; -1: not read
    bias: Float[Array, "B k X chunks rows"]  # NEVER: hidden
    slots: Int[Array, "B k X chunks rows"]
    positions: Int[Array, "B r X chunks turned"] | None
    visits: Int[Array, "B k X"]  # chunks that hold anything


def lists(
    cut: Units,
    tables: Int[Array, "B k n"],
    lengths: Int[Array, "B l t"] | None,
    key_bias: Float[Array, "B b slots"] | None,
    key_positions: Int[Array, "B r slots"] | None,
    splits: int,
) -> Lists:
    """The kernel's inputs from those of the op."""
    page, rows = cut.page, cut.rows
    batch, _, count = tables.shape
    if page >= rows:  # several units a page
        whole = tables[..., None] * cut.parts + jnp.arange(cut.parts)
        table = jnp.where(tables[..., None] >= 0, whole, -1).reshape(batch, -1, count * cut.parts)
        inside = jnp.broadcast_to(jnp.arange(rows), (*table.shape, rows))  # place in the unit's part of the list
        width = rows
    else:  # the tile around a page
        at = jnp.maximum(tables, 0).astype(jnp.int32) * page
        unit = div(at, rows)
        table = jnp.where(tables >= 0, unit, -1)
        inside = jnp.arange(rows) - (at - unit * rows)[..., None]
        width = page
    slots = jnp.arange(table.shape[2])[:, None] * width + inside
    live = (table[..., None] >= 0) & (inside >= 0) & (inside < width)
    if lengths is not None:
        live = live & (slots < jnp.max(lengths, axis=2)[..., None, None])
    bias = jnp.where(live, 0.0 if key_bias is None else _spread(key_bias.astype(jnp.float32), inside, width), NEVER)
    positions = key_positions
    if positions is not None:
        positions = positions[..., None] if cut.turned == 1 else _spread(positions, inside, width)

    size = -(-table.shape[2] // (splits * cut.entries)) * cut.entries  # entries of a split
    short = splits * size - table.shape[2]
    split = lambda x, value: jnp.pad(
        x, ((0, 0), (0, 0), (0, short), *((0, 0),) * (x.ndim - 3)), constant_values=value
    ).reshape(*x.shape[:2], splits, -1, *((x.shape[3] * cut.entries,) if x.ndim == 4 else ()))
    read = jnp.any(bias > NEVER / 2, axis=3)
    heads = read.shape[1]
    table = jnp.where(read, jnp.broadcast_to(table, read.shape), -1).astype(jnp.int32)
    table = split(table, -1)
    order = jnp.arange(1, size + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(table >= 0, order, 0), axis=-1)
    slots = jnp.broadcast_to(slots, (batch, heads, *slots.shape[2:]))
    return Lists(
        table=table,
        bias=split(bias, NEVER),
        slots=split(slots.astype(jnp.int32), 0),
        positions=None if positions is None else split(positions, 0),
        visits=jnp.maximum(div(last + (cut.entries - 1), cut.entries), 1),
    )


def _spread(x: Array, inside: Int[Array, "B k entries rows"], width: int) -> Array:
    """Numbers of the slots [B, x, slots] as rows of the units [B, x or k, entries, rows]; 0 outside of the list."""
    x = x.reshape(*x.shape[:2], -1, width)
    if width == inside.shape[3]:
        return x
    choose = inside[..., None] == jnp.arange(width)
    return jnp.sum(jnp.where(choose, x[..., None, :], jnp.zeros((), x.dtype)), axis=-1)
