"""How a call of the neural memory is laid out for its Hopper kernels: tiles of 64 tokens and the visits to each.

A visit is a group of tokens of one tile that share the weights they were entered with and those their gradients are
taken at (see `xla`). A chunk shorter than a tile gives the tile several of them, one after the other. The rates' side
of a tile (`tpu_tile.rates_of`), 64 numbers a token and head, is computed here in XLA, and so is its gradient: the
kernels know matrices and numbers per token only.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import nbytes
from pallas_kernels.neural_memory.tpu_plan import tokens_of_a_tile
from pallas_kernels.neural_memory.tpu_tile import NOBODY, rates_of
from pallas_kernels.neural_memory.xla import GROUPS, groups_of

TILE = 64  # tokens; the rows of a product
ROWS = 64  # of M and S in one warpgroup
# Of the memory, the values and the reads in one block of threads, by the rows a memory has: three warpgroups have only
# 168 registers a thread, and no room for more in shared memory.
COLUMNS = {64: 64, 128: 64, 192: 32}
# What there is for every token: how much of M and of S it reads; what is left at its group's end of its error in M and
# in S, both negative; its visit.
READ_M, READ_S, WRITE_M, WRITE_S, VISIT = range(5)
# What there is for every visit: its tile and group as one number, where its first M and S are kept, where the M is kept
# that gradients are taken at, and flags: whether it is its tile's first or final one, and the row's last to renew M.
FIELDS = 4
GROUP, SLOT, FROZEN, FLAGS = range(FIELDS)
FIRST, FINAL, LAST = 1, 2, 4
KEEP, ADD, CARRY = range(3)  # and, of each head, how M and S go on: M' = KEEP · M + ADD · S, S' = CARRY · S


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled.

    staged: products read their left operand from shared memory, as the simulator wants it.
    """

    columns: int  # of the memory in one block of threads
    size: int  # tokens of a part of a tile, at most a chunk
    tiles: int
    whole: bool  # no padding in front or between, one document, nothing before it: one visit a part
    read_after_write: bool
    staged: bool
    interpret: Any

    @property
    def parts(self) -> int:
        """Of a tile."""
        return TILE // self.size

    @property
    def groups(self) -> int:
        """Visits to a tile, at most."""
        return GROUPS * self.parts

    @property
    def slots(self) -> int:
        """States that are kept of a head: in a part at most two groups do not begin with M_0.

        Behind them: M_0, and the weights that gradients are taken at before the first boundary.
        """
        return self.tiles * self.parts * (1 if self.whole else 2) + 2

    @property
    def single(self) -> bool:
        """Whether every tile is visited once."""
        return self.whole and self.parts == 1

    @property
    def operand(self) -> Any:
        """Shared memory for operands of products, which the block's columns fill in one piece."""
        return partial(mg.operand, swizzle=2 * self.columns)

    def cost(self, rows: int, columns: int, heads: int, state: int, scores: int, inside: int, moved: tuple[Any, ...]):
        """Work of one visit to every part of a tile, as a long document's.

        Args:
          rows, columns: of the memory; heads: of all of the batch.
          state, scores, inside: products of each block of threads of `rows` and its columns, of `rows` and a tile's
            tokens, and of a tile's tokens and its columns, all for every token of a tile.
          moved: everything that is read or written once.
        """
        blocks = heads * self.tiles * self.parts * (columns // self.columns)
        each = rows * (state * self.columns + scores * TILE) + inside * TILE * self.columns
        flops = 2 * blocks * TILE * each
        return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=nbytes(*moved))


class Visits(NamedTuple):
    """Which groups of tokens there are. Integers; nothing here has a gradient."""

    count: Array  # [B]
    table: Array  # [B, N · groups, 4], in order, those that there are first
    marks: Array  # [B, N, 3, 64], see `tpu_tile.rates_of`
    last: Array  # [B, N, groups], the last token of each, 0 where there is none
    own_last: Array  # [B, N, 64], of each token's
    renewed: Array  # [B], whether a chunk began in this row
    there: Array  # [B, N, groups], which there are


class Coefficients(NamedTuple):
    """The rates' side of all tiles; see `gpu_kernel` for what they multiply."""

    G: Array  # [B, H, N, 64, 64], negative
    rows: Array  # [B, H, N, 4, 64]
    ends: Array  # [B, H, N, groups, 3]


def layout(length: int, rows: int, *, chunk: int, **options: Any) -> Plan:
    """The plan of a call; `rows` of the memory, `options` see `Plan`."""
    size = tokens_of_a_tile(chunk, length, TILE)
    return Plan(columns=COLUMNS[rows], size=size, tiles=-(-length // (size * (TILE // size))), **options)


def cut(x: Array, plan: Plan, fill: float | int = 0.0) -> Array:
    """[B, T, ...] to [B, N · 64, ...]: whole tiles, filled up where parts do not."""
    used = plan.size * plan.parts
    x = _pad(x, 1, -x.shape[1] % used, fill)
    if used == TILE:
        return x
    x = _pad(x.reshape(x.shape[0], -1, used, *x.shape[2:]), 2, TILE - used, fill)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def uncut(x: Array, plan: Plan, length: int) -> Array:
    """The inverse of `cut`."""
    used = plan.size * plan.parts
    if used != TILE:
        x = x.reshape(x.shape[0], -1, TILE, *x.shape[2:])[:, :, :used]
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x[:, :length]


def _pad(x: Array, axis: int, by: int, fill: float | int) -> Array:
    return jnp.pad(x, [(0, by if a == axis else 0) for a in range(x.ndim)], constant_values=fill)


def visits(
    segments: Int[Array, "B T"], segment: Int[Array, "B"], count: Int[Array, "B"], plan: Plan, chunk: int
) -> tuple[Visits, Array, Array]:
    """The visits of a row, and count and segment after it."""
    groups, begins, count, segment = groups_of(segments, segment, count, chunk=chunk, size=plan.size)
    parts = lambda x: _pad(x, 1, plan.tiles * plan.parts - x.shape[1], 0).reshape(
        x.shape[0], plan.tiles, plan.parts, *x.shape[2:]
    )
    live = parts(jnp.moveaxis(groups.live, 2, 0))  # [B, N, parts, 3, size]
    first = parts(jnp.moveaxis(begins, 1, 0)) | (jnp.arange(plan.size) == 0)
    batch = live.shape[0]
    token = jnp.arange(plan.parts * plan.size, dtype=jnp.int32).reshape(plan.parts, 1, plan.size)
    last = jnp.max(jnp.where(live, token, NOBODY), axis=-1).reshape(batch, plan.tiles, plan.groups)
    there = last > NOBODY
    there |= ~jnp.any(there, axis=2, keepdims=True) & (jnp.arange(plan.groups) == 0)  # every tile is visited
    number = jnp.arange(plan.groups, dtype=jnp.int32)
    own = jnp.max(jnp.where(live, number.reshape(plan.parts, GROUPS, 1), NOBODY), axis=3)
    own = own.reshape(batch, plan.tiles, -1)
    section = jnp.cumsum(first.reshape(own.shape), axis=2)
    marks = jnp.stack([section, own, first.reshape(own.shape)], axis=2).astype(jnp.float32)
    marks = _pad(marks, 3, TILE - marks.shape[3], NOBODY)
    own_last = jnp.take_along_axis(last, jnp.maximum(own, 0), axis=2)
    own_last = _pad(jnp.maximum(own_last, 0), 2, TILE - own_last.shape[2], 0)
    table, renewed = _table(there, number, plan)
    found = Visits(
        there.sum(axis=(1, 2), dtype=jnp.int32), table, marks, jnp.maximum(last, 0), own_last, renewed, there
    )
    return found, count, segment


def _table(there: Array, number: Array, plan: Plan) -> tuple[Array, Array]:
    """`Visits.table` and `.renewed` from which groups there are, [B, N, groups]."""
    kind = jax.lax.rem(number, jnp.int32(GROUPS))
    part = jnp.arange(plan.tiles, dtype=jnp.int32)[:, None] * plan.parts + jax.lax.div(number, jnp.int32(GROUPS))
    slot = part if plan.whole else 2 * part + kind
    slot = jnp.broadcast_to(jnp.where(kind == GROUPS - 1, plan.slots - 2, slot), there.shape)
    flat = lambda x: x.reshape(there.shape[0], -1)
    place = jnp.arange(flat(there).shape[1], dtype=jnp.int32)
    newest = jax.lax.cummax(jnp.where(flat(there & (kind > 0)), place, NOBODY), axis=1)
    frozen = jnp.take_along_axis(flat(slot), jnp.maximum(newest, 0), axis=1)
    frozen = jnp.where(newest > NOBODY, frozen, plan.slots - 1)
    order = jnp.cumsum(there, axis=2)
    flags = FIRST * (order == 1) + FINAL * (order == order[..., -1:])
    flags = flat(flags) + LAST * (place == newest[:, -1:])
    fields = jnp.stack([jnp.broadcast_to(place, flags.shape), flat(slot), frozen, flags.astype(jnp.int32)], axis=2)
    sort = jnp.argsort(~flat(there), axis=1, stable=True)
    return jnp.take_along_axis(fields, sort[..., None], axis=1), newest[:, -1] > NOBODY


def coefficients(rates: Float[Array, "B H N 3 64"], at: Visits, plan: Plan) -> Coefficients:
    """From η, θ and α; padding has (1, 0, 0)."""
    tiles = jax.vmap(lambda r, m: rates_of(r, m, plan.read_after_write))
    c = jax.vmap(jax.vmap(tiles, (0, None)))(rates, at.marks)
    of_last = lambda x: jnp.take_along_axis(x, at.last[:, None, ..., None], axis=3)
    member = at.marks[:, None, :, 1] > NOBODY

    def written(x: Array) -> Array:
        """The rows of an [n, n] that belong to the last tokens of the columns' groups."""
        row = jnp.take_along_axis(x, at.own_last[:, None, :, None, :], axis=3)[..., 0, :]
        return -jnp.where(member, row, 0.0)

    rows = jnp.stack([c.beta[..., 0], c.f[..., 0], written(c.G_after), written(c.n_after)], axis=3)
    ends = jnp.concatenate([of_last(x) for x in (c.beta_after, c.f_after, c.m_after)], axis=4)
    return Coefficients(-c.G, rows, ends)
