"""How a call of the neural memory is laid out for its TPU kernels: tiles of tokens, padding, VMEM, work."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.neural_memory.reference import Weights
from pallas_kernels.neural_memory.tpu_tile import NOBODY
from pallas_kernels.neural_memory.xla import GROUPS, groups_of

LANES, SUBLANES = 128, 8
TILE = 128  # tokens at once, at most; a shorter chunk makes shorter tiles
BLOCK = 128  # tokens between two states kept for the backward pass, about
KINDS = 3  # of what a layer holds: M, S, frozen
UNTOLD = 12 * 2**20  # bytes of VMEM that no compiler need be told of
SMALL = 15 * 2**20  # of the 16 MiB that v4 has; blocks are shortened for it, down to half
VMEM = 36 * 2**20  # bytes of VMEM needed at most; a third more is asked for, of the 64 MiB that v5p and 7x have


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled."""

    size: int  # tokens of a tile
    rows: int  # those and padding
    tiles: int  # of a block
    widths: tuple[int, ...]  # of the memory's layers, from the key dim to the value dim, padded
    read_after_write: bool
    interpret: Any

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """[i, o] of every layer."""
        return tuple(pairwise(self.widths))

    @property
    def vmem_limit(self) -> int | None:
        """`vmem_limit_bytes` for the compiler, None where its own will do."""
        need = vmem(self.widths, self.rows, self.tiles)
        return None if need <= UNTOLD else need * 4 // 3

    def cost(
        self, shape: tuple[int, ...], *, gradient: bool, once: int, per_row: int, per_head: int
    ) -> pl.CostEstimate:
        """Work of [batch, heads, tiles] that hold one group of tokens each, as a long document's do.

        Args:
          gradient: the backward kernel: tiles are written again, but a block's last, and the step's gradient is two
            steps and the products' own.
          once, per_row, per_head: numbers that are read or written once, for every row and for every head.
        """
        batch, heads, count = shape[:3]
        n, layers = self.rows, self.layers
        weights, hidden = (sum(i * o for i, o in x) for x in (layers, layers[1:]))
        rates = 2 * n**3 * (1 if self.read_after_write else 3)
        write = rates + 2 * n * (weights + hidden) + 4 * n * weights
        read = sum(4 * n * i * o + 2 * n * n * (i + o) for i, o in layers)
        gelu = n * sum(self.widths[1:-1])
        again = count - count // self.tiles if gradient else 0
        steps = count * (3 * (write + read) + 4 * n**3 if gradient else write + read)
        return pl.CostEstimate(
            flops=batch * heads * (steps + again * write),
            transcendentals=batch * heads * (2 * count + again) * gelu,
            bytes_accessed=4 * (once + batch * per_row + heads * per_head),
        )


def up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def wide(dim: int) -> int:
    """A width that registers hold without remainder."""
    return 64 if dim <= 64 else up(dim, LANES)


def tokens_of_a_tile(chunk: int, length: int, tile: int) -> int:
    """At most a chunk; where one tile cannot hold it, an equal part of it if it has one that is large enough."""
    if min(chunk, length) <= tile:
        return min(chunk, length)
    return next((n for n in range(tile, tile // 2, -1) if chunk % n == 0), tile)


def vmem(widths: tuple[int, ...], rows: int, tiles: int) -> int:
    """Bytes of VMEM that the backward kernel needs, the larger one.

    Twice (a block in use and one in flight): M_0 and its gradient, a block's first state, the gradients of the first
    and the last state. Once: a state a tile and two more, and about three states of intermediates.
    """
    weights = 4 * sum(i * up(o, LANES) for i, o in pairwise(widths))
    tokens = 4 * rows * (4 * up(widths[0], LANES) + 4 * up(widths[-1], LANES) + 2 * KINDS * LANES)
    intermediates = 4 * rows * 8 * sum(up(w, LANES) for w in widths) + 4 * rows * 16 * up(rows, LANES)
    return weights * (2 * (2 + 3 * KINDS) + KINDS * (tiles + 5)) + 2 * tiles * tokens + intermediates


def layout(
    start: Weights,
    length: int,
    *,
    chunk: int,
    read_after_write: bool = True,
    interpret: Any = False,
    tile: int = TILE,
    block: int = BLOCK,
) -> Plan:
    """The plan of a call; `fits` says whether it can run."""
    size = tokens_of_a_tile(chunk, length, tile)
    rows = up(size, SUBLANES)
    widths = tuple(wide(w) for w in (start[0].shape[1], *(w.shape[2] for w in start)))
    most = max(1, min(block // rows, -(-length // size)))
    possible = lambda least, budget: [m for m in range(most, least - 1, -1) if vmem(widths, rows, m) <= budget]
    tiles = (*possible((most + 1) // 2, SMALL), *possible(1, VMEM), 1)[0]
    return Plan(size, rows, tiles, widths, read_after_write, interpret)


def fits(plan: Plan) -> bool:
    """Whether both kernels fit into VMEM."""
    return vmem(plan.widths, plan.rows, plan.tiles) <= VMEM


def cut(x: Array, plan: Plan, fill: float | int = 0.0) -> Array:
    """[B, T, ...] to [B, N, n, ...]: whole blocks of tiles, each filled up to `rows`."""
    x = _pad(x, 1, -x.shape[1] % plan.size, fill)
    x = _pad(x.reshape(x.shape[0], -1, plan.size, *x.shape[2:]), 2, plan.rows - plan.size, fill)
    return _pad(x, 1, -x.shape[1] % plan.tiles, fill)


def uncut(x: Array, plan: Plan, length: int) -> Array:
    """The inverse of `cut`."""
    x = x[:, :, : plan.size]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def widen(x: Array, axes: dict[int, int]) -> Array:
    """Zeros behind x, up to a width per axis."""
    for axis, width in axes.items():
        x = _pad(x, axis, width - x.shape[axis], 0.0)
    return x


def _pad(x: Array, axis: int, by: int, fill: float | int) -> Array:
    return jnp.pad(x, [(0, by if a == axis else 0) for a in range(x.ndim)], constant_values=fill)


def places(
    segments: Int[Array, "B T"], segment: Int[Array, "B"], count: Int[Array, "B"], plan: Plan, chunk: int
) -> tuple[Array, Array, Array, Array]:
    """Where each group of a tile ends [B, blocks, 1, 3 tiles], marks of tokens [B, N, 3, n], count and segment after.

    Marks: the section inside the tile (counts up where a chunk begins), the group, whether it is a section's first.
    """
    groups, begins, count, segment = groups_of(segments, segment, count, chunk=chunk, size=plan.size)
    live = jnp.moveaxis(groups.live, 2, 0)  # [B, N, 3, size]
    order = jnp.arange(plan.size)
    last = jnp.max(jnp.where(live, order, NOBODY), axis=-1).astype(jnp.int32)
    last = _pad(last, 1, -last.shape[1] % plan.tiles, NOBODY)
    last = last.reshape(last.shape[0], -1, 1, GROUPS * plan.tiles)
    begins = jnp.moveaxis(begins, 1, 0)
    section = jnp.cumsum(begins, axis=-1)
    number = jnp.arange(GROUPS)[:, None] - NOBODY
    group = jnp.sum(jnp.where(live, number, 0), axis=2) + NOBODY
    first = begins | (order == 0)
    marks = jnp.stack([section, group, first], axis=2).astype(jnp.float32)
    edge = [(0, 0), (0, 0), (0, 0), (0, plan.rows - plan.size)]
    marks = jnp.pad(marks, edge, constant_values=NOBODY)  # a section of their own: nobody's
    return last, _pad(marks, 1, -marks.shape[1] % plan.tiles, NOBODY), count, segment


def empty(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An f32 output of a kernel."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def numbers(*arrays: Any) -> int:
    """How many there are in all."""
    return sum(x.size for x in arrays)
