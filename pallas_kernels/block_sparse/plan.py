"""What the TPU kernels know before they are compiled, and which calls they cannot serve."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxattn.masks import Visibility
from pallas_kernels.block_sparse import steps
from pallas_kernels.flash import tiles
from pallas_kernels.flash.score import Score

LARGEST = 512  # tokens of a block, and rows or columns of scores worked on in a step
WIDEST = 1024  # bytes of a head; above, half as much, so that f32 members with a p-norm still fit in VMEM
DTYPES = (jnp.float32, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call.

    Three units: a list of a batch row holds the query blocks' tiles; `fold` query heads that share a list and a
    key head are rows of one tile ("chunk"); turned round, a unit is the lists of the key heads that share them.
    """

    tile: tiles.Plan
    heads: int
    kv_heads: int
    lists: int
    fold: int
    slots: int  # tiles a step of the forward and the dq kernel works on
    slots_turned: int  # of the dk and dv kernel
    rows: int  # query blocks
    columns: int  # key blocks
    tiles: int  # that one list can hold at most

    @property
    def copies(self) -> int:
        """Chunks that share a list."""
        return self.heads // self.lists // self.fold

    @property
    def units_turned(self) -> int:
        """Units of one batch row in the dk and dv kernel."""
        return min(self.lists, self.kv_heads)

    @property
    def copies_turned(self) -> int:
        """Key heads that share a unit."""
        return self.kv_heads // self.units_turned

    @property
    def biases(self) -> int:
        """Key biases of one key head: one for each of its query heads where they have their own, and so no `fold`."""
        return self.tile.group if own_biases(self.tile.sharing, self.tile.group) else 1

    @property
    def turns(self) -> int:
        """Chunks of one key head that share each list."""
        return self.tile.group // self.fold // (self.lists // self.units_turned)

    @property
    def size(self) -> int:
        """Steps of a unit at most."""
        return steps.bound(self.rows, self.tiles, self.slots)

    @property
    def size_turned(self) -> int:
        """As `size`, for the dk and dv kernel."""
        return steps.bound(self.columns, self.tiles * (self.lists // self.units_turned), self.slots_turned)

    @property
    def words(self) -> int:
        """Scalar memory the larger of the two tables of one unit needs."""
        return max(self.size * (self.slots + 1), self.size_turned * (self.slots_turned + 1))

    def cost(self, k: Array, v: Array, units: int, *, products: tuple[int, int], once: Any, again: int) -> Any:
        """Work of `units` lists if all are as long as they can be, as a grid that depends on data may be.

        Args:
          products: matrix products a tile does over the key dim and over the value dim.
          once: arrays of the whole call that are read or written once.
          again: bytes read for every tile.
        """
        share = units / (once[0].shape[0] * self.lists)
        visits = units * self.tiles * (self.heads // self.lists)
        entries = visits * self.tile.block_q * self.tile.block_k
        exponents = 2 if self.tile.score.power != 1.0 else 1
        return pl.CostEstimate(
            flops=2 * entries * (products[0] * k.shape[-1] + products[1] * v.shape[-1]),
            transcendentals=0 if self.tile.score.activation in ("relu", "identity") else entries * exponents,
            bytes_accessed=int(share * size_of(*once)) + visits // self.fold * again,
        )


def size_of(*arrays: Any) -> int:
    """Bytes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def make_plan(
    q: Array,
    k: Array,
    v: Array,
    vis: Visibility,
    score: Score,
    blocks: Array,
    block_q: int,
    block_k: int,
    scale: float,
    stats: bool,
    interpret: Any,
    key_bias: Array | None = None,
) -> Plan:
    """The plan of a call."""
    heads, kv_heads, lists = q.shape[2], k.shape[2], blocks.shape[1]
    group, rows, columns = heads // kv_heads, blocks.shape[2], -(-k.shape[1] // block_k)
    most = _most(q, k, v)
    sharing = 0 if key_bias is None else heads // key_bias.shape[1]
    shared = 1 if own_biases(sharing, group) else math.gcd(group, heads // lists)
    fold = max(n for n in range(1, shared + 1) if shared % n == 0 and (n == 1 or n * block_q <= most))
    seen = [columns] * rows
    if vis.aligned is not None:
        seen = [min(columns, -(-((i + 1) * block_q + vis.aligned) // block_k)) for i in range(rows)]
    tile = tiles.Plan(
        score=score,
        scale=float(scale),
        block_q=block_q,
        block_k=block_k,
        group=group,
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        bias=None,
        buckets=0,
        factors=0,
        sharing=sharing,
        stats=stats,
        interpret=interpret,
    )
    return Plan(
        tile=tile,
        heads=heads,
        kv_heads=kv_heads,
        lists=lists,
        fold=fold,
        slots=max(1, most // block_k),
        slots_turned=max(1, most // (fold * block_q)),
        rows=rows,
        columns=columns,
        tiles=sum(min(blocks.shape[3], n) for n in seen),
    )


def own_biases(sharing: int, group: int) -> bool:
    """Whether query heads of one key head have key biases of their own."""
    return 0 < sharing < group


def _most(q: Array, k: Array, v: Array) -> int:
    """Rows or columns of scores a step works on."""
    wide = max(q.shape[3] * max(q.dtype.itemsize, k.dtype.itemsize), v.shape[3] * v.dtype.itemsize)
    return LARGEST if wide <= WIDEST else LARGEST // 2


def unfit(
    q: Array,
    k: Array,
    v: Array,
    vis: Visibility,
    blocks: Array,
    block_q: int,
    block_k: int,
    key_bias: Array | None = None,
) -> str | None:
    """Why the TPU kernels cannot serve a call, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    most = _most(q, k, v)
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size % tiles.LANES or size > most:
            return (
                f"backend 'tpu' reads whole registers of {tiles.LANES} tokens, at most {most} of heads this wide, but "
                f"{name} is {size}: choose a multiple of {tiles.LANES} up to {most} or use 'xla'."
            )
    words = make_plan(q, k, v, vis, Score(), blocks, block_q, block_k, 1.0, False, False, key_bias).words
    if words > steps.WORDS:
        return (
            f"backend 'tpu' keeps one list head's tiles in {steps.WORDS} words of scalar memory but blocks of shape "
            f"{blocks.shape} need {words}: choose larger blocks or shorter lists or use 'xla'."
        )
    return None
