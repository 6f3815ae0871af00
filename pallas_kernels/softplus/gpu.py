"""The Hopper kernels of softplus rows: one block of threads walks twice over the keys that its queries see.

The first walk takes the sum and the maximum of φ over each row, the second weighs the values. As in `flash` two
warpgroups of 64 queries compute and a third fetches, which the widest values have no registers for. log N multiplies
the products in f32. The backward pass is in `gpu_backward`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxattn.masks import Visibility, count_visible
from jaxattn.rope import PositionBias
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.gpu import blocked
from pallas_kernels.flash.gpu_tiles import (
    BLOCK,
    STAGES,
    WGS,
    Plan,
    Tile,
    Visit,
    column_tile,
    masked,
    nbytes,
    operands,
    places,
    visits,
    whoami,
)
from pallas_kernels.flash.gpu_warpgroups import fetcher, share_out, threads
from pallas_kernels.flash.score import Score
from pallas_kernels.softplus.gpu_backward import backward
from pallas_kernels.softplus.gpu_tiles import Rule, cost, softplus, walk_from, weights
from pallas_kernels.softplus.gpu_tiles import unfit as unfit
from pallas_kernels.softplus.reference import TINY, UNIFORM

SCALE, COUNT = 0, 1  # rows of what is known of a query: scale · log N, and N
M, INVERSE, MASS = range(3)  # rows of what is kept of it


def softplus_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int,
    bias: PositionBias | None = None,
) -> Float[Array, "B T H V"]:
    """See `pallas_kernels.softplus.softplus_attention`. Kept for the backward pass: q, k, v, o and five numbers a row.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, bias):
        raise NotImplementedError(f"softplus_attention: {reason}")
    interpret = mg.mode(interpret_for("softplus_attention", "gpu"))
    batch, length, heads, _ = q.shape
    keys, v_dim = k.shape[1], v.shape[3]
    plan = Plan(
        score=Score("identity", "none"),  # masked scores are finite, and φ and σ of them 0
        scale=1.0,
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        stats=False,
        staged=mg.simulated(),
        interpret=interpret,
    )
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions, length),
        q_segments=wide(vis.q_segments, length),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    )
    vis = vis.pad_rows(-length % BLOCK).pad_columns(-keys % BLOCK)
    count = count_visible(vis).astype(jnp.float32)
    known = jnp.stack([scale * jnp.log(jnp.maximum(count, 1.0)), count], axis=1)
    o = _attend(Rule(plan, p, exempt), blocked(q), blocked(k), blocked(v), vis, known)
    return o[:, :length, :, :v_dim].astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility, known: Array) -> Array:
    """[B,T,H,D], [B,S,K,D], [B,S,K,V] in whole blocks, and [B,2,T], to [B,T,H,V]."""
    return _forward(rule, q, k, v, vis, known)[0]


def _forward(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility, known: Array) -> tuple[Array, Any]:
    plan, (batch, length, heads, dim) = rule.plan, q.shape
    v_dim, steps = v.shape[3], length // BLOCK
    block_k = column_tile(dim, v_dim)  # φ and w of 128 keys do not fit in registers
    operand = operands(block_k)
    more = [operand(WGS, mg.ROWS, v_dim)] if v_dim != dim else []  # for o where q's place does not fit
    more += [operand(WGS, mg.ROWS, block_k)] if plan.staged else []
    out = [
        jax.ShapeDtypeStruct((batch, length, heads, v_dim), v.dtype),
        jax.ShapeDtypeStruct((batch, heads, 3, length), jnp.float32),
    ]
    walks = 1 if rule.p is None else 2
    o, kept = mg.launch(
        mg.Launch(
            "softplus_forward",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=threads(v_dim),
            interpret=plan.interpret,
            cost=cost(
                rule, q, k, v, block=(BLOCK, block_k), products=(walks, 1), exponents=walks,
                moved=nbytes(q, *out), again=[walks * 2 * block_k * dim, 2 * block_k * v_dim],
            ),
        ),
        partial(_forward_kernel, rule, steps),
        out,
        [
            operand(WGS, mg.ROWS, dim),
            operand(STAGES, block_k, dim),
            operand(STAGES, block_k, v_dim),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            mg.plain(STAGES, 2, block_k, dtype=jnp.int32),
            mg.plain(WGS, 2, mg.ROWS),
            mg.plain(WGS, 3, mg.ROWS),
            mg.barriers(WGS, 3),  # q, its places and what is known of it, of each computing warpgroup
            mg.barriers(STAGES, 2),  # k and its places
            mg.barriers(STAGES),  # v
            mg.barriers(STAGES, WGS),
            mg.barriers(STAGES, WGS),
            *more,
        ],
        visits(vis, BLOCK, block_k),
        vis.prefix_len if plan.has_prefix else jnp.zeros((batch,), jnp.int32),
        q,
        k,
        v,
        places(vis.q_positions, vis.q_segments),
        places(vis.k_positions, vis.k_segments),
        known,
    )  # fmt: skip
    return o, (q, k, v, vis, known, o, kept)


def _forward_kernel(rule: Rule, steps: int, table, prefix, q, k, v, q_at, k_at, known, o, kept, *scratch):
    q_s, k_s, v_s, q_at_s, k_at_s, known_s, kept_s, ready, k_full, v_full, k_free, v_free, *more = scratch
    plan, measured = rule.plan, rule.p is not None
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    block_k = k_s.shape[1]
    i = steps - 1 - jax.lax.axis_index("block")  # the longest rows first
    visit = Visit(table, b * steps + i)
    turn = visit.count if measured else jnp.int32(0)  # where the second walk begins, which needs the values

    def queries() -> None:
        for n in range(WGS):
            rows = pl.ds(i * BLOCK + n * mg.ROWS, mg.ROWS)
            mg.fetch(q.at[b, rows, h], q_s.at[n], ready.at[n])
            mg.fetch(q_at.at[b, :, rows], q_at_s.at[n], ready.at[n])
            mg.fetch(known.at[b, :, rows], known_s.at[n], ready.at[n])

    def keys_and_values(n: Any, slot: Any) -> None:
        head = jax.lax.div(h, jnp.int32(plan.group))
        keys = pl.ds(visit.tile(jnp.where(n < turn, n, n - turn)) * block_k, block_k)
        mg.fetch(k.at[b, keys, head], k_s.at[slot], k_full.at[slot])
        mg.fetch(k_at.at[b, :, keys], k_at_s.at[slot], k_full.at[slot])

        @pl.when(n >= turn)
        def values():
            pl.when(n - turn >= STAGES)(lambda: mg.wait(v_free.at[slot]))
            mg.fetch(v.at[b, keys, head], v_s.at[slot], v_full.at[slot])

    def compute(ahead: Callable[[Any], None]) -> None:
        rows = pl.ds(i * BLOCK + wg * mg.ROWS, mg.ROWS)
        stage = more[-1].at[wg] if plan.staged else None
        mg.wait(ready.at[wg])
        factor, count = (mg.load_rows(known_s.at[wg, n]) for n in (SCALE, COUNT))

        def scores(hides: bool, n: Any, slot: Any) -> Tile:
            me = whoami(wg, q_s.shape[2], v_s.shape[2])
            ahead(n)
            mg.wait(k_full.at[slot])
            s = mg.product(q_s.at[me], mg.turned(k_s.at[slot])) * mg.down(factor, block_k)
            return masked(s, q_at_s.at[me], k_at_s.at[slot], prefix[b], plan) if hides else s

        def measure(hides: bool, n: Any, slot: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            total, top = carry
            s = scores(hides, n, slot)
            mg.arrive(k_free.at[slot])
            phi, _ = softplus(s)
            return total + jnp.sum(phi, axis=1), jnp.maximum(top, jnp.max(phi, axis=1))

        def weigh(m: Array, inverse: Array, hides: bool, n: Any, slot: Any, carry: tuple[Array, Array]) -> Any:
            acc, mass = carry
            s = scores(hides, n, slot)
            mg.arrive(k_free.at[slot])
            w, _ = weights(softplus(s)[0], mg.down(m, block_k), mg.down(inverse, block_k), rule.p)
            mass += jnp.sum(w, axis=1)
            mg.wait(v_full.at[slot])
            acc = mg.add_product(acc, w.astype(v_s.dtype), v_s.at[slot], stage)
            mg.arrive(v_free.at[slot])
            return acc, mass

        m = inverse = mg.per_row(0.0)
        if measured:
            start = mg.per_row(0.0), mg.per_row(0.0)  # φ >= 0
            total, top = walk_from(0, visit, measure, start)
            m, inverse = _row_terms(count, total, top, rule.exempt)
        start = mg.zeros(mg.ROWS, v_s.shape[2]), mg.per_row(0.0)
        acc, mass = walk_from(turn, visit, partial(weigh, m, inverse), start)
        z = jnp.where(mass == 0.0, 1.0, mass)
        o_s = q_s if q_s.shape == (*q_s.shape[:2], v_s.shape[2]) else more[0]
        o_s[wg] = (acc * mg.down(1.0 / z, acc.shape[1])).astype(o.dtype)
        for n, x in ((M, m), (INVERSE, inverse), (MASS, mass)):
            kept_s[wg, n] = x
        mg.store((o_s.at[wg], o.at[b, rows, h]), (kept_s.at[wg], kept.at[b, h, :, rows]))

    share_out(wg, v_s.shape[2], turn + visit.count, k_free, queries, keys_and_values, compute)
    mg.drain(v_free, visit.count, behind=turn, when=wg == fetcher(v_s.shape[2]))


def _row_terms(count: Array, total: Array, top: Array, exempt: int) -> tuple[Array, Array]:
    """`reference.row_terms` for numbers per row in registers."""
    m = jnp.where(count <= float(exempt), 0.0, total / jnp.maximum(count, 1.0))
    gap = top - m
    flat = (gap <= UNIFORM * top) | (top < TINY)
    return jnp.where(flat, 0.0, m), jnp.where(flat, 0.0, 1.0 / jnp.where(flat, 1.0, gap))


def _backward(rule: Rule, saved: Any, do: Array) -> tuple[Array, Array, Array, None, None]:
    return *backward(rule, saved, do), None, None


_attend.defvjp(_forward, _backward)
