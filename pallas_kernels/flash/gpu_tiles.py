"""What the forward and backward kernels for Hopper share: settings, which tiles to visit, masks and activations.

A tile of scores lies in the registers of one warpgroup: 64 rows, either queries (forward, dq) or keys (dk, dv).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.tiles import certain, reachable, sees, spans

LOG2E = math.log2(math.e)
NEVER = -1e30  # a masked score of an elementwise activation; all of them and their slopes are 0 there
WIDTHS = (64, 128, 192, 256)  # head dims the kernels have; others are padded
WGS = 2  # computing warpgroups of a block of threads
BLOCK = WGS * mg.ROWS  # queries (forward, dq) or keys (dk, dv) of a block of threads
STAGES = 2  # tiles under way
PIECE = 32  # columns that are masked at once, so that what is read for them fits in registers
POSITION, SEGMENT = 0, 1  # rows of the arrays `places`
Tile = Float[Array, "m n"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled. Ops that visit other tiles overwrite the methods.

    staged: products read their left operand from shared memory, as the simulator wants it.
    biases, bias, buckets: see `gpu_biases`.
    """

    OP: ClassVar[str] = "flash"  # in the names of the kernels

    score: Score
    scale: float
    group: int  # query heads of one key head
    causal: bool
    window: int | None
    has_prefix: bool
    aligned: int | None
    stats: bool  # whether the number kept per row is a result, with a gradient
    staged: bool
    interpret: Any
    biases: int = dataclasses.field(default=0, kw_only=True)  # heads of the key bias of a key head; 0: there is none
    bias: type | None = dataclasses.field(default=None, kw_only=True)  # of the position bias
    buckets: int = dataclasses.field(default=0, kw_only=True)

    @property
    def added(self) -> bool:
        """Whether anything but a constant is added to scores."""
        return self.biases > 0 or self.bias is not None

    @property
    def factor(self) -> float:
        """What q·k is multiplied by, in front of 2^x or of an elementwise activation."""
        return self.scale * LOG2E if self.score.activation == "exp" else self.scale

    @property
    def shift(self) -> float:
        """What is added to that."""
        return self.score.logit_bias * LOG2E if self.score.activation == "exp" else self.score.logit_bias

    @property
    def plain(self) -> bool:
        """Whether rows have no number at all: weights are what they are, and their sum is not asked for."""
        return self.score.activation != "exp" and self.score.normaliser == "none" and not self.stats

    @property
    def turns(self) -> int:
        """Heads of a group that share the entries of a table by key: the dk, dv kernel goes through it for each."""
        return self.group

    def visit(self, table: Any, at: tuple[Any, Any, Any], size: tuple[int, int]) -> Visit:
        """What a block of threads visits.

        Args:
          at: row of the batch, head, and block of queries or keys.
          size: heads, and blocks of a head.
        """
        batch, _, block = at
        return Visit(table, batch * size[1] + block)

    def query_tile(self, entry: Any) -> tuple[Any, Any]:
        """Of an entry of a table by key: the first head in the group, and the tile of queries."""
        return 0, entry

    def tiles(self, queries: int, keys: int, block_q: int, block_k: int) -> int:
        """How many tiles one head visits at most, as far as positions and segments need not be looked at."""
        return sum(self.seen(queries, keys, block_q, block_k))

    def seen(self, queries: int, keys: int, block_q: int, block_k: int) -> list[int]:
        """`tiles` of each block of queries."""
        blocks, columns = queries // block_q, keys // block_k
        if self.aligned is None:
            return [columns] * blocks
        seen = [min(columns, -(-((i + 1) * block_q + self.aligned) // block_k)) for i in range(blocks)]
        if self.window is not None:  # with keys in front that everyone sees
            near = -(-(block_q + self.window) // block_k) + 1 + -(-self.aligned // block_k)
            seen = [min(near, n) for n in seen]
        return seen

    def cost(
        self, q: Array, k: Array, v: Array, block: tuple[int, int], products: tuple[int, int], moved: int, again: int
    ):
        """Work of a kernel on tiles of `block`.

        Args:
          products: matrix products a tile does over the key dim and over the value dim.
          moved: bytes of everything that is read or written once.
          again: bytes that are fetched for every tile.
        """
        tiles = q.shape[0] * q.shape[2] * self.tiles(q.shape[1], k.shape[1], *block)
        scores = tiles * block[0] * block[1]
        return pl.CostEstimate(
            flops=2 * scores * (products[0] * q.shape[3] + products[1] * v.shape[3]),
            transcendentals=scores * ((self.score.activation not in ("relu", "identity")) + (self.buckets > 0)),
            bytes_accessed=moved + tiles * again,
        )


def wide(dim: int, v_dim: int) -> bool:
    """Whether a kernel must save registers and shared memory."""
    return max(dim, v_dim) > 128


def key_tile(dim: int, v_dim: int) -> int:
    """Keys of a tile in the forward pass: fewer of wide heads, two tiles of which would not fit."""
    return column_tile(dim, v_dim) if wide(dim, v_dim) else BLOCK


def column_tile(dim: int, v_dim: int) -> int:
    """Keys (dq) or queries (dk, dv) of a tile in the backward pass."""
    return 64 if dim + v_dim <= 384 else 32


def operands(tile: int) -> Any:
    """`mg.operand` of kernels whose tiles have so many keys or queries, over which products sum."""
    return partial(mg.operand, swizzle=min(mg.SWIZZLE, 2 * tile))


def whoami(wg: Any, dim: int, v_dim: int, *, busy: bool = False) -> Any:
    """`wg`, which kernels for wide heads, and those with much else to compute, ask for again in every step.

    What does not change is computed before the loop, and the addresses of all parts of a wide operand would hold
    their registers all the time: 34 of a thread in dq, and dk would spill.
    """
    return jax.lax.axis_index("wg") if busy or wide(dim, v_dim) else wg


def nbytes(*arrays: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def places(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B 2 T"]:
    """Positions and segments as one input."""
    return jnp.stack([positions, segments], axis=1).astype(jnp.int32)


def visits(vis: Visibility, block_q: int, block_k: int, *, by_key: bool = False) -> Int[Array, "n"]:
    """The table of `Visit` for blocks of queries over keys, or for blocks of keys over queries."""
    tiles, whole = (f(vis, block_q, block_k) for f in (reachable, certain))
    return spans(*((jnp.swapaxes(x, 1, 2) for x in (tiles, whole)) if by_key else (tiles, whole)))


class Visit:
    """The tiles of one block in the order a kernel goes through them: first `whole` ones without a mask, then the rest.

    Two loops, because a mask that is applied now and then holds its registers all the time.
    """

    SIZE = 5

    def __init__(self, table: Any, block: Any):
        self.front, self.first, last, self.start, end = (table[self.SIZE * block + n] for n in range(self.SIZE))
        self.count = self.front + last - self.first + 1
        self.whole = jnp.maximum(end - self.start + 1, 0)

    def tile(self, n: Any) -> Any:
        """The n-th tile."""
        before = jnp.where(self.start < self.front, self.start, self.start - self.first + self.front)
        rest = n - self.whole
        rest = jnp.where(rest < before, rest, rest + self.whole)
        rest = jnp.where(rest < self.front, rest, rest - self.front + self.first)
        return jnp.where(n < self.whole, self.start + n, rest)


def masked(s: Tile, q_at: Any, k_at: Any, prefix: Any, plan: Plan, *, by_key: bool = False) -> Tile:
    """Scores in which what nobody sees is replaced, a few columns at a time for the sake of registers.

    Args:
      q_at, k_at: refs [2, n] of a tile's queries and keys.
      by_key: rows are keys.
    """

    def hide(s: Tile, at: int) -> Tile:
        return veiled(s, *readers(q_at, k_at, at, *s.shape, by_key=by_key), prefix, plan)

    return in_pieces(hide, s)


def in_pieces(change: Callable[[Tile, int], Tile], s: Tile, size: int = PIECE) -> Tile:
    """`change(columns, number of the first)` of `size` columns at a time."""
    piece = lambda at: jax.lax.slice(s, (0, at), (s.shape[0], at + size))
    return jnp.concatenate([change(piece(at), at) for at in range(0, s.shape[1], size)], axis=1)


def readers(
    q_at: Any, k_at: Any, at: int, rows: int, columns: int, *, by_key: bool = False
) -> tuple[Callable[[int], Tile], Callable[[int], Tile]]:
    """Functions that read positions or segments of the queries and of the keys of some columns of a tile."""
    of_row, of_column = (k_at, q_at) if by_key else (q_at, k_at)
    row = lambda n: mg.down(mg.load_rows(of_row.at[n]), columns)
    column = lambda n: mg.across(mg.load_columns(of_column.at[n, pl.ds(at, columns)]), rows)
    return (column, row) if by_key else (row, column)


def veiled(s: Tile, q: Callable[[int], Tile], k: Callable[[int], Tile], prefix: Any, plan: Plan) -> Tile:
    """Scores in which what nobody sees is replaced; q, k: see `readers`."""
    see = sees((q(POSITION), q(SEGMENT)), (k(POSITION), k(SEGMENT)), prefix, plan)
    return jnp.where(see, s, -jnp.inf if plan.score.activation == "exp" else NEVER)


def exponents(plan: Plan, s: Tile, hide: Callable[[Tile], Tile]) -> tuple[Tile, float]:
    """Masked scores and a positive factor, so that exp(scores) is 2^(factor · s + plan.shift)."""
    return (hide(s), plan.factor) if plan.factor > 0 and not plan.added else (hide(s * plan.factor), 1.0)


def logits(plan: Plan, s: Tile, hide: Callable[[Tile], Tile]) -> Tile:
    """Masked scores of an elementwise activation."""
    return hide(s * plan.factor + plan.shift)


def sigmoid(s: Tile) -> Tile:
    """From 2^x and a division: the hardware's tanh is wrong by 2^-11, which is more than a small weight."""
    return 1.0 / (1.0 + jnp.exp2(s * -LOG2E))


def elu1(s: Tile) -> Tile:
    return jnp.where(s > 0.0, s + 1.0, jnp.exp2(jnp.minimum(s, 0.0) * LOG2E))


WEIGHTS: dict[str, Callable[[Tile], Tile]] = {
    "sigmoid": sigmoid,
    "elu1": elu1,
    "relu": lambda s: jnp.maximum(s, 0.0),
    "identity": lambda s: jnp.where(s > NEVER / 2, s, 0.0),
}
SLOPES: dict[str, Callable[[Tile, Tile], Tile]] = {  # from scores and their weights
    "sigmoid": lambda s, w: w * (1.0 - w),
    "elu1": lambda s, w: jnp.where(s > 0.0, 1.0, w),
    "relu": lambda s, w: jnp.where(s > 0.0, 1.0, 0.0),
    "identity": lambda s, w: jnp.where(s > NEVER / 2, 1.0, 0.0),
}


def ring(start: Any, stop: Any, body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """`carry = body(n, slot, carry)` for n = start ... stop - 1; tile n lies in buffer `slot`."""
    step = lambda n, carry: body(n, jax.lax.rem(n, jnp.int32(STAGES)), carry)
    return jax.lax.fori_loop(start, stop, step, carry)


def walk(whole: Any, count: Any, body: Callable[[bool, Any, Any, Any], Any], carry: Any) -> Any:
    """`carry = body(needs a mask, n, slot, carry)` over all tiles of a block."""
    carry = ring(jnp.int32(0), whole, partial(body, False), carry)
    return ring(whole, count, partial(body, True), carry)


def refill(n: Any, slot: Any, free: Any, fetch: Callable[[Any, Any], None]) -> None:
    """`fetch(n, slot)` as soon as every computing warpgroup is done with what the buffer held."""
    pl.when(n >= STAGES)(lambda: mg.wait(free.at[slot]))
    fetch(n, slot)


class Feed:
    """The first warpgroup keeps the buffers filled."""

    def __init__(self, wg: Any, count: Any, free: Any, fetch: Any):
        self.wg, self.count, self.free, self.fetch = wg, count, free, fetch

    def start(self) -> None:
        for n in range(STAGES - 1):
            pl.when((self.wg == 0) & (n < self.count))(partial(self.fetch, jnp.int32(n), jnp.int32(n)))

    def ahead(self, n: Any) -> None:
        """At the start of step n: waits for the others to finish step n - 1, whose buffer is next."""
        new = n + (STAGES - 1)
        slot = jax.lax.rem(new, jnp.int32(STAGES))
        pl.when((self.wg == 0) & (new < self.count))(lambda: refill(new, slot, self.free, self.fetch))

    def finish(self) -> None:
        """Behind the last step."""
        mg.drain(self.free, self.count, when=self.wg == 0)
