"""The order in which TPU kernels visit tiles: a table in scalar memory that both grids and index maps read.

A kernel's output rows (query blocks forward, key blocks for dk and dv) are visited one after the other, each in
as many steps as its tiles fill, `slots` of them a step, and at least one, which writes zeros where there are none.
So a grid has as many steps as there is work, whatever the width of the lists and however uneven they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.block_sparse.lists import Lists
from pallas_kernels.flash.tiles import div, rem

WORDS = 128 * 1024  # of the table a call takes: half of the chips' 1 MiB of scalar memory


class Tiles(NamedTuple):
    """Per list unit: what to visit for each output row, one row's tiles after the other's."""

    other: Int[Array, "U E"]  # number of the other block
    masked: Bool[Array, "U E"]
    start: Int[Array, "U R"]  # where a row's tiles lie
    count: Int[Array, "U R"]


class Table(NamedTuple):
    words: Int[Array, "U n"]  # per step: the row and its flags, then a word per slot; see `Step`
    steps: Int[Array, "U"]  # how many are used


def of_queries(lists: Lists) -> Tiles:
    """Rows are query blocks, the others key blocks; a unit is a list of one batch row."""
    batch, heads, rows, width = lists.block.shape
    flat = lambda x: x.reshape(batch * heads, -1)
    start = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * width, (batch * heads, rows))
    return Tiles(flat(lists.block), flat(lists.masked), start, flat(lists.count))


def of_keys(lists: Lists, units: int, rows: int) -> Tiles:
    """Rows are key blocks, the others (list of the unit, query block): the lists turned round by one sort.

    Args:
      units: list units of one batch row, each with L / units lists whose queries read the same keys.
      rows: key blocks.
    """
    batch, heads, blocks, width = lists.block.shape
    flat = lambda x: x.reshape(batch * units, -1)
    used = jnp.arange(width) < lists.count[..., None]
    key = flat(jnp.where(used, lists.block, rows))
    other = jnp.arange(heads // units * blocks, dtype=jnp.int32)
    other = jnp.broadcast_to(other[:, None], (batch * units, other.size, width)).reshape(key.shape)
    key, other, masked = jax.lax.sort((key, other, flat(lists.masked)), num_keys=2, is_stable=False)
    edges = jax.vmap(jnp.searchsorted, in_axes=(0, None))(key, jnp.arange(rows + 1, dtype=jnp.int32))
    edges = edges.astype(jnp.int32)
    return Tiles(other, masked, edges[:, :-1], edges[:, 1:] - edges[:, :-1])


def bound(rows: int, tiles: int, slots: int) -> int:
    """Steps that visits to `tiles` tiles of `rows` rows take at most."""
    return tiles // slots + rows


def table(tiles: Tiles, slots: int, size: int) -> Table:
    """The steps of all units.

    Args:
      size: steps there is room for.
    """
    rows = tiles.start.shape[1]
    steps = jnp.maximum(div(tiles.count + (slots - 1), slots), 1)
    end = jnp.cumsum(steps, axis=1, dtype=jnp.int32)
    s = jnp.arange(size, dtype=jnp.int32)
    row = jax.vmap(lambda e: jnp.searchsorted(e, s, side="right"))(end).astype(jnp.int32)
    live = row < rows  # steps past a unit's last stay on its last row and do nothing
    row = jnp.minimum(row, rows - 1)
    of_row = lambda x: jnp.take_along_axis(x, row, axis=1)
    first, last = s == of_row(end - steps), s == of_row(end) - 1
    slot = jnp.arange(slots, dtype=jnp.int32)
    n = (s - of_row(end - steps))[..., None] * slots + slot  # [U, S, M]
    used = live[..., None] & (n < of_row(tiles.count)[..., None])
    place = jnp.where(used, of_row(tiles.start)[..., None] + n, _held(tiles, slot)[jnp.arange(len(row))[:, None], row])
    place = jnp.clip(place, 0, tiles.other.shape[1] - 1).reshape(len(row), -1)
    pick = lambda x: jnp.take_along_axis(x, place, axis=1).reshape(used.shape).astype(jnp.int32)
    entry = pick(tiles.other) * 4 + pick(tiles.masked) * 2 + used
    head = row * 4 + (live & first) * 2 + (live & last)
    words = jnp.concatenate([head[..., None], entry], axis=2)
    return Table(words.reshape(len(row), -1), end[:, -1])


def _held(tiles: Tiles, slot: Int[Array, "M"]) -> Int[Array, "U R M"]:
    """Where the last tile lies that each slot got up to and in a row: to repeat it costs no transfer."""
    count = tiles.count[..., None]
    last = tiles.start[..., None] + slot + div(count - 1 - slot, slot.size) * slot.size
    rows = jnp.arange(count.shape[1], dtype=jnp.int32)[:, None]
    return jnp.take_along_axis(last, jax.lax.cummax(jnp.where(count > slot, rows, 0), axis=1), axis=1)


class Step:
    """One step of the table, inside a kernel or an index map."""

    def __init__(self, words: Any, unit: Any, s: Any, size: int, slots: int):
        self.words, self.at = words, (unit * size + s) * (slots + 1)
        self.row, self.first, self.last = _parts(words[self.at])

    def other(self, slot: int) -> Any:
        """The other block of a slot's tile."""
        return _parts(self.words[self.at + 1 + slot])[0]

    def each(self, slot: int, tile: Callable[[bool], None]) -> None:
        """Run `tile(needs a mask)` if the slot holds one."""
        _, masked, used = _parts(self.words[self.at + 1 + slot])
        pl.when(used & masked)(lambda: tile(True))
        pl.when(used & ~masked)(lambda: tile(False))


def _parts(word: Any) -> tuple[Any, Any, Any]:
    """A number and two flags."""
    return div(word, 4), rem(div(word, 2), 2) == 1, rem(word, 2) == 1


def per_call(units: int, words: int) -> int:
    """Units whose tables fit in scalar memory together, so many that calls are alike; 0: not even one."""
    return max((n for n in range(1, units + 1) if units % n == 0 and n * words <= WORDS), default=0)


def over_units(table: Table, call: Callable[[Array, Array, Array, int], Any]) -> Any:
    """`call(number of the first unit [1], their words, steps, how many)` for as many units as fit; joined."""
    units, words = table.words.shape
    size = per_call(units, words)
    first = jnp.arange(0, units, size, dtype=jnp.int32)[:, None]
    flat, count = table.words.reshape(-1, size * words), jnp.max(table.steps.reshape(-1, size), axis=1)
    if size == units:
        return call(first[0], flat[0], count[0], units)
    out = jax.lax.map(lambda x: call(x[0], x[1], x[2], size), (first, flat, count))
    return jax.tree.map(lambda x: x.reshape(units, *x.shape[2:]), out)
