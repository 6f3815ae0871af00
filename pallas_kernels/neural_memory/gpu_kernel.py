"""The Hopper kernel of a linear memory, forwards: one warpgroup has 64 rows of a block's M and S in its registers.

Every visit (see `gpu_plan`) finds M, S and the weights F that gradients are taken at, D rows of the columns that the
block of threads has; with rows q, k, v of a tile, zero for tokens of other visits, and the numbers per token of
`Coefficients`,

    U = 2 (k F - v)        y = read_m · q M + read_s · q S + (G ∘ q kᵀ) U
    M <- keep · M + add · S + kᵀ (write_m · U)        S <- carry · S + kᵀ (write_s · U)

Sums, M and S are f32; what products read of them, and of U, is bfloat16. The next tiles are fetched meanwhile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.neural_memory.gpu_plan import (
    ADD,
    CARRY,
    FIELDS,
    FINAL,
    FIRST,
    FLAGS,
    FROZEN,
    GROUP,
    KEEP,
    LAST,
    READ_M,
    READ_S,
    ROWS,
    SLOT,
    TILE,
    VISIT,
    WRITE_M,
    WRITE_S,
    Coefficients,
    Plan,
    Visits,
)
from pallas_kernels.neural_memory.xla import GROUPS

STAGES = 2  # tiles under way


def scan(
    plan: Plan,
    at: Visits,
    c: Coefficients,
    q: Array,
    k: Array,
    v: Array,
    start: Array,
    memory: tuple[Array, Array, Array],
    *,
    keep: bool,
) -> tuple[Array, tuple[Array, Array, Array], tuple[Array, Array] | None]:
    """y [B, N · 64, H, V], M, S and F after the row, and with `keep` all visits' M and S [B, H, slots, D, V] in bf16.

    Args:
      q, k, v: bfloat16.
      start, memory: M_0 [H, D, V]; M, S and F before the row [B, H, D, V].
    """
    (batch, length, heads, rows), columns = q.shape, v.shape[3]
    bf16 = jnp.bfloat16
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    out = [jax.ShapeDtypeStruct((batch, length, heads, columns), bf16), *[f32(batch, heads, rows, columns)] * 3]
    if keep:
        out += [jax.ShapeDtypeStruct((batch, heads, plan.slots, rows, columns), bf16)] * 2
    arrays = (q, k, v, start, *memory, c.G.astype(bf16), numbers(c, at), c.ends.reshape(-1), at.count.reshape(-1))
    y, M, S, F, *kept = mg.launch(
        mg.Launch(
            "neural_memory_forward",
            grid={"column": columns // plan.columns, "head": heads, "batch": batch},
            threads=rows // ROWS,
            interpret=plan.interpret,
            cost=plan.cost(rows, columns, batch * heads, 5, 1, 1, (*arrays, *out)),
        ),
        partial(_kernel, plan),
        out,
        [
            plan.operand(STAGES, TILE, rows),
            plan.operand(STAGES, TILE, rows),
            plan.operand(STAGES, TILE, plan.columns),
            plan.operand(STAGES, TILE, TILE),
            mg.plain(STAGES, 5, TILE),
            *[plan.operand(1, rows, plan.columns)] * 3,
            *[plan.operand(1, TILE, plan.columns)] * 4,
            mg.barriers(STAGES, 5),
            mg.barriers(1, rows // ROWS),
            *([plan.operand(TILE, TILE)] if plan.staged else []),
        ],
        *arrays,
        at.table.reshape(-1),
    )
    F = jnp.where(at.renewed[:, None, None, None], F, memory[2])
    return y, (M, S, F), (kept[0], kept[1]) if keep else None


def numbers(c: Coefficients, at: Visits) -> Array:
    """[B, H, N, 5, 64]: `c.rows` and the tokens' visits."""
    visit = jnp.broadcast_to(at.marks[:, None, :, 1:2], (*c.rows.shape[:3], 1, TILE))
    return jnp.concatenate([c.rows, visit], axis=3)


def _kernel(plan: Plan, q, k, v, start, M, S, F, G, tokens, ends, count, table, y, last_M, last_S, last_F, *rest):
    split = len(rest) - 14 - plan.staged
    kept, (q_s, k_s, v_s, G_s, tokens_s, *rest) = rest[:split], rest[split:]
    operands, (full, met, *stage) = rest[:7], rest[7:]
    batch, head, block, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "column", "wg"))
    columns = pl.ds(block * plan.columns, plan.columns)
    wgs = q_s.shape[2] // ROWS
    rows = pl.ds(wg * ROWS, ROWS)
    here = lambda ref: ref.at[batch, head, rows, columns]
    meet = partial(all_met, met, wgs)

    def fetch(n: Any, slot: Any) -> None:
        where = pl.ds(n * TILE, TILE)
        mg.fetch(q.at[batch, where, head], q_s.at[slot], full.at[slot])
        mg.fetch(k.at[batch, where, head], k_s.at[slot], full.at[slot])
        mg.fetch(v.at[batch, where, head, columns], v_s.at[slot], full.at[slot])
        mg.fetch(G.at[batch, head, n], G_s.at[slot], full.at[slot])
        mg.fetch(tokens.at[batch, head, n], tokens_s.at[slot], full.at[slot])

    def save(slot: Any, *sources: Any) -> None:
        for ref, source in zip(kept, sources, strict=False):
            mg.begin_store(source.at[rows], ref.at[batch, head, slot, rows, columns])

    for n in range(min(STAGES, plan.tiles)):
        pl.when(wg == 0)(partial(fetch, n, n))
    F_s = operands[2].at[0]
    F_s[rows] = mg.laid(mg.get(here(F)).astype(F_s.dtype))
    mg.publish()
    save(plan.slots - 1, F_s)

    def visit(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        at = Place(plan, batch, head, i, table, ends)
        slot = jax.lax.rem(at.tile, jnp.int32(STAGES))
        M_s, S_s, F_s, U_s, to_M, to_S, y_s = (x.at[at.nought(0)] for x in operands)
        M, S = jax.lax.cond(
            at.kind == GROUPS - 1,
            lambda _: (mg.get(start.at[head, rows, columns]), mg.zeros(ROWS, plan.columns)),
            lambda carry: carry,
            carry,
        )
        mg.settle(read=True)  # what is overwritten now has been copied
        M_s[rows] = mg.laid(M.astype(M_s.dtype))
        S_s[rows] = mg.laid(S.astype(S_s.dtype))

        @pl.when(at.kind > 0)
        def renew():
            F_s[rows] = mg.laid(M.astype(F_s.dtype))

        pl.when(at.flag(LAST))(lambda: mg.put(here(last_F), M))
        meet()
        save(at.slot, M_s, S_s)

        @pl.when(at.flag(FIRST))
        def begin():
            mg.wait(full.at[slot])
            pl.when(wg == wgs - 1)(lambda: clear(y_s))

        number = lambda which: mg.down(mg.load_rows(tokens_s.at[slot, which]), plan.columns)
        member = lambda: number(VISIT) == at.group.astype(jnp.float32)

        def errors() -> None:
            U = mg.product(k_s.at[slot], F_s) - mg.get(v_s.at[slot]).astype(jnp.float32)
            U = jnp.where(member(), 2.0 * U, 0.0)
            for ref, part in ((U_s, U), (to_M, U * number(WRITE_M)), (to_S, U * number(WRITE_S))):
                ref[...] = mg.laid(part.astype(ref.dtype))
            meet()

        def answers() -> None:
            inside = mg.product(q_s.at[slot], mg.turned(k_s.at[slot]))
            inside = (inside * mg.get(G_s.at[slot]).astype(jnp.float32)).astype(U_s.dtype)
            read = mg.product(q_s.at[slot], M_s) * number(READ_M)
            read += mg.product(q_s.at[slot], S_s) * number(READ_S)
            if wgs > 1:
                meet()
            read = mg.add_product(read, inside, U_s, *stage)
            y_s[...] = mg.laid(jnp.where(member(), read, mg.get(y_s).astype(jnp.float32)).astype(y_s.dtype))

        pl.when(wg == 0)(errors)
        if wgs > 2:  # who is between them waits
            pl.when((wg > 0) & (wg < wgs - 1))(meet)
        pl.when(wg == wgs - 1)(answers)
        turned = mg.turned(k_s.at[slot, :, rows])
        M = mg.accumulate(M * at.end(KEEP) + S * at.end(ADD), turned, to_M, staged=plan.staged)
        S = mg.accumulate(S * at.end(CARRY), turned, to_S, staged=plan.staged)
        meet()  # everyone has read what is overwritten next
        target = y.at[batch, pl.ds(at.tile * TILE, TILE), head, columns]
        done, more = at.flag(FINAL), at.tile + STAGES < plan.tiles
        pl.when(done & (wg == wgs - 1))(lambda: mg.begin_store(y_s, target))
        pl.when(done & (wg == 0) & more)(lambda: fetch(at.tile + STAGES, slot))
        return M, S

    M, S = jax.lax.fori_loop(jnp.int32(0), count[batch], visit, (mg.get(here(M)), mg.get(here(S))))
    mg.put(here(last_M), M)
    mg.put(here(last_S), S)
    mg.settle()


def clear(ref: Any) -> None:
    ref[...] = mg.laid(jnp.zeros(ref.shape, ref.dtype))


def all_met(barrier: Any, count: int) -> None:
    """All `count` warpgroups are here, and each one's stores to shared memory are visible to all."""
    mg.publish()
    if count > 1:
        mg.arrive(barrier)
        mg.wait(barrier)


class Place:
    """The i-th visit of a row, read from device memory."""

    def __init__(self, plan: Plan, batch: Any, head: Any, i: Any, table: Any, ends: Any):
        first = (batch * plan.tiles * plan.groups + i) * FIELDS
        where, self.slot, self.frozen, self.flags = (table[first + which] for which in (GROUP, SLOT, FROZEN, FLAGS))
        self.place = where
        self.tile, self.group = (f(where, jnp.int32(plan.groups)) for f in (jax.lax.div, jax.lax.rem))
        self.kind = jax.lax.rem(self.group, jnp.int32(GROUPS))
        row = (batch * jax.lax.axis_size("head") + head) * plan.tiles * plan.groups + where
        self.end = lambda which: ends[row * 3 + which]

    def flag(self, which: int) -> Any:
        return (self.flags & which) != 0

    def nought(self, which: int) -> Any:
        """0, as the compiler cannot know: places of shared memory that it does know it would hold in registers."""
        return jnp.minimum((self.place, self.flags, self.slot, self.frozen)[which], 0)
