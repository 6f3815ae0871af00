"""The backward Hopper kernel: visits from the last to the first, the gradients of M and S in registers.

With the M, S and F that a visit found, kept by the forward pass, and the names of `gpu_kernel`, X' after the visit,

    A = q kᵀ        dA = G ∘ (dy Uᵀ)        dG = A ∘ (dy Uᵀ)
    dU = (G ∘ A)ᵀ dy + write_m · k dM' + write_s · k dS'        dP = 2 dU        dv = -dP
    dq = read_m · dy Mᵀ + read_s · dy Sᵀ + dA k
    dk = dP Fᵀ + dAᵀ q + write_m · U dM'ᵀ + write_s · U dS'ᵀ
    dM = keep · dM' + qᵀ (read_m · dy)        dS = add · dM' + carry · dS' + qᵀ (read_s · dy)        dF = dF' + kᵀ dP

Each warpgroup has 64 rows of the state, hence 64 columns of dq and dk; what all of a visit's rows need, the first and
the last one share out between them. A block of threads has some columns of the state: dq, dk and the gradients of the
rates' side are sums over blocks, formed in XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.neural_memory.gpu_kernel import Place, all_met, numbers
from pallas_kernels.neural_memory.gpu_plan import (
    ADD,
    CARRY,
    FINAL,
    FIRST,
    KEEP,
    READ_M,
    READ_S,
    ROWS,
    TILE,
    WRITE_M,
    WRITE_S,
    Coefficients,
    Plan,
    Visits,
)
from pallas_kernels.neural_memory.gpu_shared import Shared, errors, scores
from pallas_kernels.neural_memory.xla import GROUPS


def backward(
    plan: Plan, at: Visits, c: Coefficients, saved: Any, dy: Array, d_memory: tuple[Array, Array, Array]
) -> tuple[Coefficients, Array, Array, Array, Array, tuple[Array, Array, Array]]:
    """Gradients of c, q, k, v, M_0 and the first M, S and F."""
    q, k, v, (kept_M, kept_S) = saved
    batch, _, heads, rows = q.shape
    columns = v.shape[3]
    wgs, blocks = rows // ROWS, columns // plan.columns
    stages = 2 if wgs == 1 else 1  # tiles under way; there is shared memory for no more
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    part = jax.ShapeDtypeStruct((blocks, *q.shape), q.dtype if blocks == 1 else jnp.float32)
    out = [
        part,
        part,
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        f32(blocks, *c.G.shape),
        f32(blocks, wgs, *c.rows.shape),
        f32(blocks, batch, heads, plan.tiles * plan.groups, 3, rows),
        *[f32(batch, heads, rows, columns)] * 4,
    ]
    arrays = (q, k, v, dy.astype(v.dtype), kept_M, kept_S, *d_memory, c.G.astype(v.dtype), numbers(c, at))
    arrays = (*arrays, c.ends.reshape(-1), at.count)
    dq, dk, dv, dG, d_rows, d_ends, d_start, dM, dS, dF = mg.launch(
        mg.Launch(
            "neural_memory_backward",
            grid={"column": blocks, "head": heads, "batch": batch},
            threads=wgs,
            interpret=plan.interpret,
            cost=plan.cost(rows, columns, batch * heads, 11, 3, 2, (*arrays, *out)),
        ),
        partial(_kernel, plan, stages),
        out,
        [
            *[plan.operand(stages, TILE, rows)] * 2,
            *[plan.operand(stages, TILE, plan.columns)] * 2,
            plan.operand(stages, TILE, TILE),
            mg.plain(stages, 5, TILE),
            *[plan.operand(1, rows, plan.columns)] * 5,
            plan.operand(1, TILE, plan.columns),
            *[plan.operand(1, TILE, TILE)] * 2,
            *[plan.operand(1, TILE, plan.columns)] * 3,
            mg.operand(rows, plan.columns, dtype=jnp.float32),
            mg.plain(wgs, 4, TILE),
            mg.barriers(stages, 6),
            mg.barriers(1, 3),
            mg.barriers(1, wgs),
        ],
        *arrays,
        at.table.reshape(-1),
    )
    d_ends = jnp.sum(d_ends, axis=(0, 5)).reshape(c.ends.shape)
    d_ends = jnp.where(at.there[:, None, ..., None], d_ends, 0.0)
    d_c = Coefficients(jnp.sum(dG, axis=0), jnp.sum(d_rows, axis=(0, 1)), d_ends)
    dq, dk = (jnp.sum(x, axis=0, dtype=jnp.float32).astype(q.dtype) for x in (dq, dk))
    return d_c, dq, dk, dv, jnp.sum(d_start, axis=0), (dM, dS, dF)


def _kernel(plan: Plan, stages: int, q, k, v, dy, kept_M, kept_S, dM, dS, dF, G, tokens, ends, count, table, *rest):
    dq, dk, dv, dG, d_rows, d_ends, d_start, first_dM, first_dS, first_dF, *rest = rest
    tiles, (*operands, dF_s, sums, full, found, met) = rest[:6], rest[6:]
    q_s, k_s, v_s, dy_s, G_s, tokens_s = tiles
    batch, head, block, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "column", "wg"))
    columns = pl.ds(block * plan.columns, plan.columns)
    wgs = q_s.shape[2] // ROWS
    rows = pl.ds(wg * ROWS, ROWS)
    here = lambda ref: ref.at[batch, head, rows, columns]
    meet = partial(all_met, met, wgs)
    visits = count[batch]

    def fetch(n: Any, slot: Any) -> None:
        where = pl.ds(n * TILE, TILE)
        mg.fetch(q.at[batch, where, head], q_s.at[slot], full.at[slot])
        mg.fetch(k.at[batch, where, head], k_s.at[slot], full.at[slot])
        mg.fetch(v.at[batch, where, head, columns], v_s.at[slot], full.at[slot])
        mg.fetch(dy.at[batch, where, head, columns], dy_s.at[slot], full.at[slot])
        mg.fetch(G.at[batch, head, n], G_s.at[slot], full.at[slot])
        mg.fetch(tokens.at[batch, head, n], tokens_s.at[slot], full.at[slot])

    def fetch_state(at: Place, t: Shared) -> None:
        mg.fetch(kept_M.at[batch, head, at.slot, :, columns], t.M, found.at[0])
        mg.fetch(kept_S.at[batch, head, at.slot, :, columns], t.S, found.at[0])
        mg.fetch(kept_M.at[batch, head, at.frozen, :, columns], t.F, found.at[0])

    for n in range(max(0, plan.tiles - stages), plan.tiles):
        pl.when(wg == 0)(partial(fetch, n, n % stages))
    mg.put(here(d_start), mg.zeros(ROWS, plan.columns))
    dF_s[rows] = mg.get(here(dF))

    def visit(back: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        i = visits - 1 - back
        at = Place(plan, batch, head, i, table, ends)
        slot = jax.lax.rem(at.tile, jnp.int32(stages))
        opens, closes = at.flag(FINAL), at.flag(FIRST)
        where = pl.ds(at.tile * TILE, TILE)
        dM, dS = carry
        views = [Shared(at, slot, tiles, operands, phase) for phase in range(4)]
        old = views[0]
        pl.when(wg == 0)(lambda: fetch_state(at, old))
        old.dM[rows] = mg.laid(dM.astype(old.dM.dtype))
        old.dS[rows] = mg.laid(dS.astype(old.dS.dtype))

        @pl.when(opens)
        def begin():
            mg.wait(full.at[slot])
            for which in range(4):
                sums[wg, which] = mg.per_row(0.0)

        mg.wait(found.at[0])
        for which, d, ref in ((KEEP, dM, old.M), (ADD, dM, old.S), (CARRY, dS, old.S)):
            share = jnp.sum(d * mg.get(ref.at[rows]).astype(jnp.float32), axis=1)
            mg.put_rows(d_ends.at[block, batch, head, at.place, which, rows], share)

        def merged(new: Array, ref: Any) -> Array:
            """What this visit and those to the same tile before it say."""
            if plan.single:
                return jnp.where(old.member(new), new, 0.0)
            before = jax.lax.cond(opens, lambda: mg.zeros(*new.shape), lambda: mg.get(ref).astype(jnp.float32))
            return jnp.where(old.member(new), new, before)

        def d_errors(t: Shared) -> None:
            dU = t.scaled(mg.product(t.k, t.dM), WRITE_M)
            dU += t.scaled(mg.product(t.k, t.dS), WRITE_S)
            dU = mg.accumulate(dU, mg.turned(t.W), t.dy, staged=plan.staged)
            dP = jnp.where(t.member(dU), 2.0 * dU, 0.0)
            t.dP[...] = mg.laid(dP.astype(t.dP.dtype))
            target = dv.at[batch, where, head, columns]
            mg.put(target, merged(-dP, target).astype(dv.dtype))

        def d_scores(t: Shared, A: Array) -> None:
            dW = mg.product(t.dy, mg.turned(t.U))
            t.dA[...] = mg.laid((dW * mg.get(t.G).astype(jnp.float32)).astype(t.dA.dtype))
            target = dG.at[block, batch, head, at.tile]
            mg.put(target, merged(A.astype(jnp.float32) * dW, target))

        if wgs == 1:
            errors(views[0])
            A = scores(views[0])
            meet()
            d_errors(views[1])
            d_scores(views[1], A)
            meet()
        else:

            @pl.when(wg == 0)
            def of_errors():
                errors(views[0])
                meet()
                d_errors(views[1])
                meet()

            @pl.when(wg == wgs - 1)
            def of_scores():
                A = scores(views[0])
                meet()
                d_scores(views[1], A)
                meet()

            if wgs > 2:  # who is between them waits

                @pl.when((wg > 0) & (wg < wgs - 1))
                def of_neither():
                    meet()
                    meet()

        def from_rows(t: Shared, first: int) -> None:
            """dq and dk of as many rows of the state as the block has columns; 64 at once take 64 more registers."""
            own = pl.ds(wg * ROWS + first, plan.columns)
            of_own = lambda ref: mg.turned(ref.at[own])
            own_q, own_k = t.q.at[:, own], t.k.at[:, own]

            def from_state(which: int, a: Any, b: Any, mine: Any) -> Array:
                """A number per token times a bᵀ, and its own gradient; others' stay."""
                x = mg.product(a, of_own(b))
                new = jnp.sum(x * mg.get(mine).astype(jnp.float32), axis=1)
                before = mg.load_rows(sums.at[wg, which])
                sums[wg, which] = jnp.where(t.mine(), new + before if first else new, before)
                mg.publish()  # in order, for the sake of registers
                return t.scaled(x, which)

            new = from_state(READ_M, t.dy, t.M, own_q)
            new += from_state(READ_S, t.dy, t.S, own_q)
            new = mg.accumulate(new, t.dA, own_k, staged=plan.staged)
            target = dq.at[block, batch, where, head, own]
            mg.put(target, merged(new, target).astype(dq.dtype))
            new = from_state(WRITE_M, t.U, t.dM, own_k)
            new += from_state(WRITE_S, t.U, t.dS, own_k)
            new = mg.accumulate(new, t.dP, of_own(t.F), staged=plan.staged)
            new = mg.accumulate(new, mg.turned(t.dA), own_q, staged=plan.staged)
            target = dk.at[block, batch, where, head, own]
            mg.put(target, merged(new, target).astype(dk.dtype))

        for first in range(0, ROWS, plan.columns):
            from_rows(views[2], first)

        t = views[3]
        q_turned, k_turned = (mg.turned(ref.at[:, rows]) for ref in (t.q, t.k))
        dF = mg.accumulate(mg.get(dF_s.at[rows]), k_turned, t.dP, staged=plan.staged)
        dS = mg.accumulate(dM * at.end(ADD) + dS * at.end(CARRY), q_turned, t.read_S, staged=plan.staged)
        dM = mg.accumulate(dM * at.end(KEEP), q_turned, t.read_M, staged=plan.staged)
        meet()  # everyone has read what is overwritten next

        @pl.when(closes)
        def close():
            mg.begin_store(sums.at[wg], d_rows.at[block, wg, batch, head, at.tile])
            mg.settle()
            before = at.tile - stages
            pl.when((wg == 0) & (before >= 0))(lambda: fetch(before, slot))

        none = lambda: mg.zeros(ROWS, plan.columns)
        dM, dF = jax.lax.cond(at.kind > 0, lambda dM, dF: (dM + dF, none()), lambda *x: x, dM, dF)
        dF_s[rows] = mg.laid(dF)

        @pl.when(at.kind == GROUPS - 1)
        def restart():
            mg.put(here(d_start), mg.get(here(d_start)) + dM)

        dM, dS = jax.lax.cond(at.kind == GROUPS - 1, lambda *_: (none(), none()), lambda *x: x, dM, dS)
        return dM, dS

    dM, dS = jax.lax.fori_loop(jnp.int32(0), visits, visit, (mg.get(here(dM)), mg.get(here(dS))))
    own = pl.ds(jax.lax.axis_index("wg") * ROWS, ROWS)  # asked again: it would be held in registers from the start
    mg.put(first_dM.at[batch, head, own, columns], dM)
    mg.put(first_dS.at[batch, head, own, columns], dS)
    mg.store((dF_s.at[own], first_dF.at[batch, head, own, columns]))
