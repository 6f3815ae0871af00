"""The TPU kernels of softplus rows: tiles of φ in VMEM, tiles nobody sees skipped, memory for rows only.

Forward: one kernel takes the sum and the maximum of φ over each row, a second weighs the values. log N is folded into
the queries before. The backward pass is in `tpu_backward`. Everything is f32, as p multiplies errors of φ.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxattn.masks import Visibility, count_visible
from jaxattn.rope import Alibi, PositionBias
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.tiles import LANES, POSITION, SEGMENT, Plan, Spans, column, dot, row
from pallas_kernels.softplus.reference import row_terms
from pallas_kernels.softplus.tpu_backward import backward
from pallas_kernels.softplus.tpu_tiles import (
    ORDER,
    Rule,
    block_sizes,
    blocked,
    by_query,
    estimate,
    fetched,
    phi,
    query_inputs,
    rows_of,
    weights,
)
from pallas_kernels.softplus.tpu_tiles import unfit as unfit


def softplus_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int,
    bias: PositionBias | None = None,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Float[Array, "B T H V"]:
    """See `pallas_kernels.softplus.softplus_attention`. Kept for the backward pass: q, k, v, o and six numbers a row.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, bias):
        raise NotImplementedError(f"softplus_attention: {reason}")
    interpret = interpret_for("softplus_attention", "tpu")
    batch, length, heads, _ = q.shape
    keys, v_dim, kind = k.shape[1], v.shape[3], v.dtype
    block_q, block_k = block_sizes(q, k, v, block_q, block_k)
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions, length),
        q_segments=wide(vis.q_segments, length),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    )
    vis = vis.pad_rows(-length % block_q).pad_columns(-keys % block_k)
    count = count_visible(vis)  # [B, t]
    plan = Plan(
        score=Score("identity", "none"),  # tiles of plain scores
        scale=1.0,
        block_q=block_q,
        block_k=block_k,
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        bias=None if bias is None else type(bias),
        buckets=getattr(bias, "buckets", 0),
        factors=1,
        sharing=0,
        stats=False,
        interpret=interpret,
    )
    q, k, v = (blocked(x.astype(jnp.float32), n) for x, n in ((q, block_q), (k, block_k), (v, block_k)))
    q = q * (scale * jnp.log(jnp.maximum(count, 1).astype(jnp.float32)))[:, None, :, None]
    slopes = bias.slopes if isinstance(bias, Alibi) else jnp.ones((heads,))
    o = _attend(Rule(plan, p, exempt), q, k, v, vis, count, slopes.astype(jnp.float32))
    return jnp.swapaxes(o, 1, 2)[:, :length, :, :v_dim].astype(kind)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility, count: Array, slopes: Array) -> Array:
    """[B,H,T,D] times scale · log N, [B,K,S,D], [B,K,S,V] in whole blocks to [B,H,T,V]."""
    return _forward(rule, q, k, v, vis, count, slopes)[0]


def _forward(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility, count: Array, slopes: Array):
    plan, inputs = rule.plan, query_inputs(rule.plan, vis, slopes)
    batch, heads, length, _ = q.shape
    m = inverse = jnp.zeros((batch, heads, 1, length), jnp.float32)
    if rule.p is not None:
        numbers = rows_of(q)
        total, top = pl.pallas_call(
            partial(_measure_kernel, plan),
            grid_spec=by_query(
                plan, q, k, [], [1, 1], scratch=[pltpu.VMEM((plan.block_q, LANES), jnp.float32)] * 2, values=None
            ),
            out_shape=[numbers, numbers],
            compiler_params=ORDER,
            cost_estimate=estimate(plan, q, k, v, products=(1, 0), moved=fetched(q, numbers, numbers), again=(k,)),
            interpret=plan.interpret,
            name="softplus_measure",
        )(*inputs.scalars, q, k, *inputs.places)
        m, inverse = row_terms(count[:, None, None], total, top, rule.exempt)
    v_dim = v.shape[3]
    out, numbers = jax.ShapeDtypeStruct((*q.shape[:3], v_dim), jnp.float32), rows_of(q)
    o, mass = pl.pallas_call(
        partial(_weigh_kernel, rule),
        grid_spec=by_query(
            plan,
            q,
            k,
            [2],
            [v_dim, 1],
            scratch=[
                pltpu.VMEM((plan.block_q, v_dim), jnp.float32),
                pltpu.VMEM((plan.block_q, LANES), jnp.float32),
                pltpu.VMEM((2, plan.block_q, LANES), jnp.float32),
            ],
            values=v,
        ),
        out_shape=[out, numbers],
        compiler_params=ORDER,
        cost_estimate=estimate(plan, q, k, v, products=(1, 1), moved=fetched(q, out, numbers), again=(k, v)),
        interpret=plan.interpret,
        name="softplus_weigh",
    )(*inputs.scalars, q, k, v, jnp.concatenate([m, inverse], axis=2), *inputs.places)
    return o, (q, k, v, vis, count, slopes, o, m, inverse, mass)


def _measure_kernel(plan: Plan, table, prefix, slopes, q, k, q_at, k_at, total, top, sums, tops, at):
    b, h, i, j = (pl.program_id(n) for n in range(4))

    @pl.when(j == 0)
    def start():
        sums[...], tops[...] = jnp.zeros_like(sums), jnp.zeros_like(tops)  # φ >= 0
        for n in (POSITION, SEGMENT):
            at[n] = column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        x, _, _ = phi(dot(q[...], k[...], (1, 1)), masked, prefix[b], slopes[h], *here, plan)
        sums[...] += jnp.sum(x, axis=1, keepdims=True)
        tops[...] = jnp.maximum(tops[...], jnp.max(x, axis=1, keepdims=True))

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        total[...], top[...] = row(sums[:, :1]), row(tops[:, :1])


def _weigh_kernel(rule: Rule, table, prefix, slopes, q, k, v, terms, q_at, k_at, o, mass, acc, sums, stats, at):
    b, h, i, j = (pl.program_id(n) for n in range(4))

    @pl.when(j == 0)
    def start():
        acc[...], sums[...] = jnp.zeros_like(acc), jnp.zeros_like(sums)
        for n in (0, 1):
            stats[n], at[n] = column(terms[n : n + 1]), column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        x, _, _ = phi(dot(q[...], k[...], (1, 1)), masked, prefix[b], slopes[h], *here, rule.plan)
        w, _ = weights(x, stats[0][:, :1], stats[1][:, :1], rule.p)
        sums[...] += jnp.sum(w, axis=1, keepdims=True)
        acc[...] += dot(w, v[...], (1, 0))

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        z = sums[:, :1]
        o[...] = acc[...] / jnp.where(z == 0, 1.0, z)
        mass[...] = row(z)


def _backward(rule: Rule, saved: Any, do: Array) -> tuple[Array, Array, Array, None, None, Array]:
    dq, dk, dv, d_slopes = backward(rule, saved, do)
    return dq, dk, dv, None, None, d_slopes


_attend.defvjp(_forward, _backward)
