"""Which block of each array a step of the TPU kernels works on, and how blocks of folded heads are read."""

from __future__ import annotations

from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.block_sparse.plan import Plan
from pallas_kernels.block_sparse.steps import Step
from pallas_kernels.flash.tiles import column, div, rem

ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
TURNED_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"))


class Maps:
    """Which blocks of its arrays a step of the forward and of the dq kernel reads: grid (unit, copy, step).

    Rows of the plan are query blocks, their entries key blocks.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def here(self, first: Any, words: Any) -> tuple[Any, Any, Step]:
        """`where` the kernel is."""
        return self.where(pl.program_id(0), pl.program_id(1), pl.program_id(2), first, words)

    def where(self, u: Any, c: Any, s: Any, first: Any, words: Any) -> tuple[Any, Any, Step]:
        """Batch row, chunk of query heads, and the step."""
        plan, unit = self.plan, first[0] + u
        chunk = rem(unit, plan.lists) * plan.copies + c
        return div(unit, plan.lists), chunk, Step(words, u, s, plan.size, plan.slots)

    def query(self, *shape: int, tokens_last: bool = False) -> pl.BlockSpec:
        """A block of [B, C, F, T, ·] or [B, C, F, ·, T]."""

        def index(u, c, s, first, words, prefix):
            batch, chunk, step = self.where(u, c, s, first, words)
            return (batch, chunk, 0, 0, step.row) if tokens_last else (batch, chunk, 0, step.row, 0)

        return pl.BlockSpec((None, None, self.plan.fold, *shape), index)

    def result(self, *shape: int, tokens_last: bool = False) -> pl.BlockSpec:
        """As `query`, of this call's units."""

        def index(u, c, s, first, words, prefix):
            row = self.where(u, c, s, first, words)[2].row
            return (u, c, 0, 0, row) if tokens_last else (u, c, 0, row, 0)

        return pl.BlockSpec((None, None, self.plan.fold, *shape), index)

    def query_places(self) -> pl.BlockSpec:
        def index(u, c, s, first, words, prefix):
            batch, _, step = self.where(u, c, s, first, words)
            return batch, 0, step.row

        return pl.BlockSpec((None, 2, self.plan.tile.block_q), index)

    def key(self, dim: int, *, slot: int) -> pl.BlockSpec:
        """A block of [B, K, S, ·]."""

        def index(u, c, s, first, words, prefix):
            batch, chunk, step = self.where(u, c, s, first, words)
            return batch, div(chunk * self.plan.fold, self.plan.tile.group), step.other(slot), 0

        return pl.BlockSpec((None, None, self.plan.tile.block_k, dim), index)

    def key_bias(self, *, slot: int) -> pl.BlockSpec:
        """A block of [B, n, 1, S]."""

        def index(u, c, s, first, words, prefix):
            batch, chunk, step = self.where(u, c, s, first, words)
            return batch, div(chunk * self.plan.fold, self.plan.tile.sharing), 0, step.other(slot)

        return pl.BlockSpec((None, None, 1, self.plan.tile.block_k), index)

    def key_places(self, *, slot: int) -> pl.BlockSpec:
        def index(u, c, s, first, words, prefix):
            batch, _, step = self.where(u, c, s, first, words)
            return batch, 0, step.other(slot)

        return pl.BlockSpec((None, 2, self.plan.tile.block_k), index)


class TurnedMaps:
    """Which blocks of its arrays a step of the dk and dv kernel reads: grid (unit, key head of it, step, turn).

    Rows of the plan are key blocks.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def here(self, first: Any, words: Any) -> tuple[Any, Any, Step]:
        """`where` the kernel is."""
        return self.where(pl.program_id(0), pl.program_id(1), pl.program_id(2), first, words)

    def where(self, u: Any, c: Any, s: Any, first: Any, words: Any) -> tuple[Any, Any, Step]:
        """Batch row, key head, and the step."""
        plan, unit = self.plan, first[0] + u
        head = rem(unit, plan.units_turned) * plan.copies_turned + c
        return div(unit, plan.units_turned), head, Step(words, u, s, plan.size_turned, plan.slots_turned)

    def key(self, dim: int) -> pl.BlockSpec:
        """A block of [B, K, S, ·]."""

        def index(u, c, s, t, first, words, prefix):
            batch, head, step = self.where(u, c, s, first, words)
            return batch, head, step.row, 0

        return pl.BlockSpec((None, None, self.plan.tile.block_k, dim), index)

    def result(self, dim: int) -> pl.BlockSpec:
        """As `key`, of this call's units."""
        index = lambda u, c, s, t, first, words, prefix: (u, c, self.where(u, c, s, first, words)[2].row, 0)
        return pl.BlockSpec((None, None, self.plan.tile.block_k, dim), index)

    def chunk(self, head: Any, entry: Any, t: Any) -> Any:
        """The chunk of query heads of a step's entry (list of the unit, query block) at a turn."""
        plan = self.plan
        return head * (plan.tile.group // plan.fold) + div(entry, plan.rows) * plan.turns + t

    def key_bias(self, *, slot: int) -> pl.BlockSpec:
        """A block of [B, n, 1, S], which belongs to the query heads of the slot."""

        def index(u, c, s, t, first, words, prefix):
            batch, head, step = self.where(u, c, s, first, words)
            chunk = self.chunk(head, step.other(slot), t)
            return batch, div(chunk * self.plan.fold, self.plan.tile.sharing), 0, step.row

        return pl.BlockSpec((None, None, 1, self.plan.tile.block_k), index)

    def key_bias_result(self) -> pl.BlockSpec:
        """A block of the gradients of a key head's biases, [units, key heads of it, biases, S]."""
        index = lambda u, c, s, t, first, words, prefix: (u, c, 0, self.where(u, c, s, first, words)[2].row)
        return pl.BlockSpec((None, None, self.plan.biases, self.plan.tile.block_k), index)

    def key_places(self) -> pl.BlockSpec:
        def index(u, c, s, t, first, words, prefix):
            batch, _, step = self.where(u, c, s, first, words)
            return batch, 0, step.row

        return pl.BlockSpec((None, 2, self.plan.tile.block_k), index)

    def query(self, *shape: int, slot: int, tokens_last: bool = False) -> pl.BlockSpec:
        """A block of [B, C, F, T, ·] or [B, C, F, ·, T]."""

        def index(u, c, s, t, first, words, prefix):
            batch, head, step = self.where(u, c, s, first, words)
            entry = step.other(slot)
            chunk, i = self.chunk(head, entry, t), rem(entry, self.plan.rows)
            return (batch, chunk, 0, 0, i) if tokens_last else (batch, chunk, 0, i, 0)

        return pl.BlockSpec((None, None, self.plan.fold, *shape), index)

    def query_places(self, *, slot: int) -> pl.BlockSpec:
        def index(u, c, s, t, first, words, prefix):
            batch, _, step = self.where(u, c, s, first, words)
            return batch, 0, rem(step.other(slot), self.plan.rows)

        return pl.BlockSpec((None, 2, self.plan.tile.block_q), index)


def folded(block: Any) -> Array:
    """[F, t, d] as F·t rows."""
    return block[...].reshape(-1, block.shape[-1])


def columns(to: Any, blocks: list[Any]) -> None:
    """The rows of each [n, t] as columns [t, LANES] of `to`, one block below the other."""
    for f, block in enumerate(blocks):
        count, size = block.shape
        for n in range(count):
            to[n, f * size : (f + 1) * size] = column(block[n : n + 1])
