"""What the forward and backward kernels for TPUs share: settings, layouts, and which tiles to visit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from jaxattn import masks
from jaxattn.masks import GLOBAL, PADDING, Visibility
from pallas_kernels.flash.score import Score

LANES = 128  # row statistics sit in VMEM as columns, repeated over one register's lanes
POSITION, SEGMENT = 0, 1  # rows of the arrays `places`
Places = tuple[Array, Array]  # positions and segments of a tile's queries or keys, as a row or a column


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernel is compiled."""

    score: Score
    scale: float
    block_q: int
    block_k: int
    group: int  # query heads of one key head
    causal: bool
    window: int | None
    has_prefix: bool
    aligned: int | None
    bias: type | None  # of the position bias
    buckets: int
    factors: int  # numbers of the position bias per query head
    sharing: int  # query heads that share a head of the key bias; 0: there is none
    stats: bool  # whether the number kept per row is a result, with a gradient
    interpret: Any

    def tiles(self, queries: int, keys: int) -> int:
        """How many tiles one head visits at most, as far as positions and segments need not be looked at."""
        rows, columns = queries // self.block_q, keys // self.block_k
        if self.aligned is None:
            return rows * columns
        seen = [min(columns, -(-((i + 1) * self.block_q + self.aligned) // self.block_k)) for i in range(rows)]
        if self.window is not None:  # with keys in front that everyone sees
            near = -(-(self.block_q + self.window) // self.block_k) + 1 + -(-self.aligned // self.block_k)
            seen = [min(near, n) for n in seen]
        return sum(seen)


def div(n: Any, by: int) -> Any:
    """n // by of a grid index; `//` on traced numbers asks the attached device how to take a sign."""
    return jax.lax.div(n, jnp.int32(by))


def rem(n: Any, by: int) -> Any:
    """n % by of a grid index."""
    return jax.lax.rem(n, jnp.int32(by))


def places(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B 2 T"]:
    """Positions and segments as one input."""
    return jnp.stack([positions, segments], axis=1).astype(jnp.int32)


def column(row: Array) -> Array:
    """[1, n] along lanes to [n, LANES] along sublanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Array) -> Array:
    """[n, 1] along sublanes to [1, n] along lanes."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product with f32 sums; f32 operands are multiplied exactly, not in bf16 as is the device's custom."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def sees(q_at: Places, k_at: Places, prefix: Any, plan: Any) -> Array:
    """`jaxattn.masks.visible` for one tile, by the rules of any op's plan."""
    return masks.sees(q_at, k_at, prefix if plan.has_prefix else None, causal=plan.causal, window=plan.window)


def reachable(vis: Visibility, block_q: int, block_k: int) -> Bool[Array, "B I J"]:
    """Tiles in which some query may see some key: never False where one does, seldom True where none does."""
    q, k = _Range(vis.q_positions, vis.q_segments, block_q), _Range(vis.k_positions, vis.k_segments, block_k)
    across, down = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    allowed = jnp.ones(jnp.broadcast_shapes(across(q.low).shape, down(k.low).shape), bool)
    if vis.causal:
        allowed &= down(k.low) <= across(q.high)
    if vis.window is not None:
        allowed &= across(q.low) - down(k.high) < vis.window
        if not vis.causal:
            allowed &= down(k.low) - across(q.high) < vis.window
    if vis.prefix_len is not None:
        allowed |= down(k.low) < vis.prefix_len[:, None, None]
    allowed &= (across(q.first) <= down(k.last)) & (down(k.first) <= across(q.last))
    allowed &= across(q.live) & down(k.live)
    allowed |= down(k.has_global) & across(q.last > PADDING)
    if vis.aligned is not None:
        i, j = jnp.arange(allowed.shape[1])[:, None], jnp.arange(allowed.shape[2])
        allowed &= j * block_k <= (i + 1) * block_q - 1 + vis.aligned
    return allowed


def certain(vis: Visibility, block_q: int, block_k: int) -> Bool[Array, "B I J"]:
    """Tiles in which every query sees every key: never True where one does not. They need no mask."""
    q, k = _Range(vis.q_positions, vis.q_segments, block_q), _Range(vis.k_positions, vis.k_segments, block_k)
    across, down = (lambda x: x[:, :, None]), (lambda x: x[:, None, :])
    allowed = across(q.whole) & down(k.whole) & (across(q.first) == down(k.first))
    if vis.causal:
        allowed &= down(k.high) <= across(q.low)
    if vis.window is not None:
        allowed &= across(q.high) - down(k.low) < vis.window
        if not vis.causal:
            allowed &= down(k.high) - across(q.low) < vis.window
    return allowed


class _Range:
    """Extremes over each block of what is not padding."""

    def __init__(self, positions: Int[Array, "B T"], segments: Int[Array, "B T"], block: int):
        pos, seg = (x.reshape(x.shape[0], -1, block) for x in (positions, segments))
        live = seg != PADDING
        limit = jnp.iinfo(jnp.int32).max // 2  # half, so that differences do not overflow
        low = lambda x: jnp.min(jnp.where(live, x, limit), axis=-1)
        high = lambda x: jnp.max(jnp.where(live, x, -limit), axis=-1)
        self.low, self.high = low(pos), high(pos)
        self.first, self.last = low(seg), high(seg)
        self.whole = jnp.all(live, axis=-1) & (self.first == self.last)
        self.live, self.has_global = jnp.any(live, axis=-1), jnp.any(seg == GLOBAL, axis=-1)


def spans(tiles: Bool[Array, "B I J"], whole: Bool[Array, "B I J"]) -> Int[Array, "n"]:
    """Per block i: the tiles [0, a) and [first, last] hold all of `tiles`, [from, to] are in `whole`; flat.

    Two runs, because keys that everyone sees come in front and the rest is near the diagonal. Tiles outside
    are neither fetched nor computed.
    """
    count = tiles.shape[2]
    j = jnp.arange(count, dtype=jnp.int32)
    front = jnp.sum(jnp.cumprod(tiles.astype(jnp.int32), axis=-1), axis=-1)
    rest = tiles & (j >= front[..., None])
    first = jnp.min(jnp.where(rest, j, count), axis=-1)
    last = jnp.max(jnp.where(rest, j, -1), axis=-1)
    first, last = jnp.where(last < 0, front, first), jnp.where(last < 0, front - 1, last)
    end = jnp.max(jnp.where(whole, j, -1), axis=-1)
    start = jnp.max(jnp.where(~whole & (j < end[..., None]), j, -1), axis=-1) + 1
    return jnp.stack([front, first, last, start, end], axis=-1).astype(jnp.int32).reshape(-1)


class Spans:
    """One block's entry of the `spans` table, inside a kernel or an index map."""

    SIZE = 5

    def __init__(self, table: Any, block: Any):
        self.front, self.first, self.last, self.start, self.end = (table[self.SIZE * block + n] for n in range(5))

    def holds(self, j: Any) -> Any:
        return (j < self.front) | ((j >= self.first) & (j <= self.last))

    def whole(self, j: Any) -> Any:
        """Whether all of tile j is visible, so that it needs no mask."""
        return (j >= self.start) & (j <= self.end)

    def fetch(self, j: Any) -> Any:
        """The block to load at step j; an unvisited step repeats a neighbour, which costs no transfer."""
        near = jnp.maximum(jnp.minimum(jnp.maximum(j, self.first), self.last), 0)
        return jnp.where(j < self.front, j, near)

    def each(self, j: Any, tile: Callable[[bool], None]) -> None:
        """Run `tile(needs a mask)` if tile j is visited at all."""
        pl.when(self.whole(j))(lambda: tile(False))
        pl.when(self.holds(j) & ~self.whole(j))(lambda: tile(True))


def tables(vis: Visibility, plan: Plan) -> tuple[Int[Array, "n"], Int[Array, "m"]]:
    """`spans` for blocks of queries over keys, and for blocks of keys over queries."""
    tiles, whole = (f(vis, plan.block_q, plan.block_k) for f in (reachable, certain))
    return spans(tiles, whole), spans(jnp.swapaxes(tiles, 1, 2), jnp.swapaxes(whole, 1, 2))


def cost(plan: Plan, q: Array, k: Array, v: Array, *, products: tuple[int, int], moved: int) -> pl.CostEstimate:
    """Work of the tiles visited.

    Args:
      products: matrix products a tile does over the key dim and over the value dim.
      moved: bytes of everything that is read or written once.
    """
    batch, heads, queries, dim = q.shape
    tiles = batch * heads * plan.tiles(queries, k.shape[2])
    scores = tiles * plan.block_q * plan.block_k
    exponents = 2 if plan.score.power != 1.0 else 1
    again = plan.block_k * (dim * k.dtype.itemsize + v.shape[3] * v.dtype.itemsize)
    return pl.CostEstimate(
        flops=2 * scores * (products[0] * dim + products[1] * v.shape[3]),
        transcendentals=0 if plan.score.activation in ("relu", "identity") else scores * exponents,
        bytes_accessed=moved + tiles * again,
    )
