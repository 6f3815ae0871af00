"""The two backward kernels of softplus rows on TPUs.

With w = (max(φ - m, 0) f)^p, z = Σ w and o = Σ w v / z, the gradient that reaches φ is

    dφ_ij = g_ij + t_i,    g_ij = dw/dφ · (do_i·v_j - do_i·o_i) / z_i,    t_i = -Σ_j g_ij / N_i

where t is the gradient of the row's mean, which couples all keys of a row; 0 where the offset is no mean. It is known
at the end of a row only, so the dq kernel sums Σ g σ k and Σ σ k side by side and adds them up then, and hands t to
the kernel of dk and dv. σ = softplus'.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxattn.rope import Alibi
from pallas_kernels.flash.biases import basis
from pallas_kernels.flash.tiles import LANES, POSITION, SEGMENT, Spans, column, div, dot, rem, row, tables
from pallas_kernels.softplus.tpu_tiles import (
    ORDER,
    Rule,
    by_query,
    estimate,
    fetched,
    phi,
    query_inputs,
    rows_of,
    weights,
)

M, INVERSE, D_MASS, PER_KEY, D_TOTAL = range(5)  # rows of numbers; PER_KEY is 1 / N, or 0 where m is no mean


def backward(rule: Rule, saved: Any, do: Array) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv and the gradient of the slopes."""
    q, k, v, vis, count, slopes, o, m, inverse, mass = saved
    z = jnp.where(mass == 0, 1.0, mass)
    d_acc = do / jnp.swapaxes(z, 2, 3)
    d_mass = -jnp.sum(d_acc * o, axis=-1)[:, :, None]
    count = jnp.broadcast_to(count[:, None, None], m.shape)
    fixed = (count <= rule.exempt) | (inverse == 0)
    per_key = jnp.where(fixed, 0.0, 1.0 / jnp.maximum(count, 1).astype(jnp.float32))
    numbers = jnp.concatenate([m, inverse, d_mass, per_key], axis=2)
    by_row, by_column = tables(vis, rule.plan)
    dq, d_total, slope_rows = _dq(rule, query_inputs(rule.plan, vis, slopes, by_row), q, k, v, d_acc, numbers)
    numbers = jnp.concatenate([numbers, d_total], axis=2)
    dk, dv = _dk_dv(rule, query_inputs(rule.plan, vis, slopes, by_column), q, k, v, d_acc, numbers)
    return dq, dk, dv, jnp.sum(slope_rows, axis=(0, 2, 3))


def _through(rule: Rule, s: Array, see: Array, x: Array, d_w: Array, m: Array, inverse: Array):
    """w, g and σ of a tile, 0 where masked."""
    w, pull = weights(x, m, inverse, rule.p)
    slope = jnp.where(see, jax.nn.sigmoid(s), 0.0)
    return w, pull(jnp.where(see, d_w, 0.0))[0], slope


def _dq(rule: Rule, inputs: Any, q: Array, k: Array, v: Array, d_acc: Array, numbers: Array):
    plan, dim, one = rule.plan, q.shape[3], rows_of(q)
    tall = lambda width: pltpu.VMEM((plan.block_q, width), jnp.float32)
    return pl.pallas_call(
        partial(_dq_kernel, rule),
        grid_spec=by_query(
            plan,
            q,
            k,
            [4],
            [dim, 1, 1],
            scratch=[tall(dim), tall(dim), *[tall(LANES)] * 3, pltpu.VMEM((4, plan.block_q, LANES), jnp.float32)],
            values=v,
            query_values=v.shape[3],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), one, one],
        compiler_params=ORDER,
        cost_estimate=estimate(
            plan, q, k, v, products=(3, 1), moved=fetched(q, q, d_acc, numbers, one, one), again=(k, v)
        ),
        interpret=plan.interpret,
        name="softplus_dq",
    )(*inputs.scalars, q, k, v, d_acc, numbers, *inputs.places)


def _dq_kernel(
    rule: Rule, table, prefix, slopes, q, k, v, d_acc, numbers, q_at, k_at,
    dq, d_total, slope_row, with_g, plain, sums, slope_g, slope_plain, stats, at,
):  # fmt: skip
    b, h, i, j = (pl.program_id(n) for n in range(4))

    @pl.when(j == 0)
    def start():
        for total in (with_g, plain, sums, slope_g, slope_plain):
            total[...] = jnp.zeros_like(total)
        for n in range(4):
            stats[n] = column(numbers[n : n + 1])
        for n in (POSITION, SEGMENT):
            at[n] = column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        x, s, see = phi(dot(q[...], k[...], (1, 1)), masked, prefix[b], slopes[h], *here, rule.plan)
        d_w = dot(d_acc[...], v[...], (1, 1)) + stats[D_MASS][:, :1]
        _, g, slope = _through(rule, s, see, x, d_w, stats[M][:, :1], stats[INVERSE][:, :1])
        sums[...] += jnp.sum(g, axis=1, keepdims=True)
        with_g[...] += dot(g * slope, k[...], (1, 0))
        plain[...] += dot(slope, k[...], (1, 0))
        if rule.plan.bias is Alibi:
            distance = basis(*here, rule.plan)
            slope_g[...] += jnp.sum(g * slope * distance, axis=1, keepdims=True)
            slope_plain[...] += jnp.sum(slope * distance, axis=1, keepdims=True)

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        t = -sums[:, :1] * stats[PER_KEY][:, :1] if rule.p is not None else jnp.zeros_like(sums[:, :1])
        dq[...] = with_g[...] + t * plain[...]
        d_total[...] = row(t)
        slope_row[...] = row(slope_g[:, :1] + t * slope_plain[:, :1])


def _dk_dv(rule: Rule, inputs: Any, q: Array, k: Array, v: Array, d_acc: Array, numbers: Array):
    plan = rule.plan
    batch, kv_heads, keys, dim = k.shape
    bq, bk, v_dim = plan.block_q, plan.block_k, v.shape[3]
    steps, rounds = keys // bk, q.shape[2] // bq  # the last grid axis goes `group` times over the query blocks

    def query(b: Any, h: Any, j: Any, t: Any, table: Any) -> tuple[Any, Any]:
        """Head and block of the query at step t."""
        return h * plan.group + div(t, rounds), Spans(table, b * steps + j).fetch(rem(t, rounds))

    def of_query(*shape: int, tokens_last: bool = False) -> pl.BlockSpec:
        def index(b, h, j, t, table, *_):
            head, i = query(b, h, j, t, table)
            return (b, head, 0, i) if tokens_last else (b, head, i, 0)

        return pl.BlockSpec((None, None, *shape), index)

    of_key = lambda d: pl.BlockSpec((None, None, bk, d), lambda b, h, j, t, table, *_: (b, h, j, 0))
    group_tiles = estimate(
        plan, q, k, v, products=(2, 2), moved=fetched(k, v, k, v), again=()
    )  # a tile fetches queries here, not keys
    tiles = batch * q.shape[1] * plan.tiles(q.shape[2], keys)
    cost = pl.CostEstimate(
        flops=group_tiles.flops,
        transcendentals=group_tiles.transcendentals,
        bytes_accessed=group_tiles.bytes_accessed + tiles * 4 * bq * (dim + v_dim + numbers.shape[2]),
    )
    return pl.pallas_call(
        partial(_dk_dv_kernel, rule, rounds),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, steps, plan.group * rounds),
            in_specs=[
                of_query(bq, dim),
                of_key(dim),
                of_key(v_dim),
                of_query(bq, v_dim),
                of_query(numbers.shape[2], bq, tokens_last=True),
                pl.BlockSpec((None, 2, bq), lambda b, h, j, t, table, *_: (b, 0, query(b, h, j, t, table)[1])),
                pl.BlockSpec((None, 2, bk), lambda b, h, j, t, table, *_: (b, 0, j)),
            ],
            out_specs=[of_key(dim), of_key(v_dim)],
            scratch_shapes=[
                pltpu.VMEM((bk, dim), jnp.float32),
                pltpu.VMEM((bk, v_dim), jnp.float32),
                pltpu.VMEM((2, bk, LANES), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=ORDER,
        cost_estimate=cost,
        interpret=plan.interpret,
        name="softplus_dk_dv",
    )(*inputs.scalars, q, k, v, d_acc, numbers, *inputs.places)


def _dk_dv_kernel(
    rule: Rule, rounds: int, table, prefix, slopes, q, k, v, d_acc, numbers, q_at, k_at, dk, dv, acc_k, acc_v, at
):
    b, h, j, t = (pl.program_id(n) for n in range(4))

    @pl.when(t == 0)
    def start():
        acc_k[...], acc_v[...] = jnp.zeros_like(acc_k), jnp.zeros_like(acc_v)
        for n in (POSITION, SEGMENT):
            at[n] = column(k_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (q_at[POSITION][None], q_at[SEGMENT][None]), (at[POSITION][:, :1], at[SEGMENT][:, :1])
        slope_of = slopes[h * rule.plan.group + div(t, rounds)]
        x, s, see = phi(dot(k[...], q[...], (1, 1)), masked, prefix[b], slope_of, *here, rule.plan)  # [keys, queries]
        d_w = dot(v[...], d_acc[...], (1, 1)) + numbers[D_MASS][None]
        w, g, slope = _through(rule, s, see, x, d_w, numbers[M][None], numbers[INVERSE][None])
        acc_v[...] += dot(w, d_acc[...], (1, 0))
        acc_k[...] += dot((g + numbers[D_TOTAL][None]) * slope, q[...], (1, 0))

    Spans(table, b * pl.num_programs(2) + j).each(rem(t, rounds), tile)

    @pl.when(t == pl.num_programs(3) - 1)
    def finish():
        dk[...], dv[...] = acc_k[...], acc_v[...]
