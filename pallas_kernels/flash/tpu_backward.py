"""The two backward kernels for TPUs: dq over key blocks, dk and dv over the query blocks of all grouped heads.

Both recompute a tile's weights from the number kept per row. The second one works on transposed tiles, keys on
sublanes, so that what belongs to a query is a row and neither product needs its big operand turned.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash import rows
from pallas_kernels.flash.biases import FactorGradient, scores
from pallas_kernels.flash.tiles import (
    LANES,
    POSITION,
    SEGMENT,
    Plan,
    Spans,
    column,
    cost,
    div,
    dot,
    places,
    rem,
    row,
    tables,
)

BIAS, SUM = 0, 1  # what the second kernel holds of a block of keys: their bias, and its gradient so far
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def backward(plan: Plan, saved: Any, do: Array, d_stat: Array) -> tuple[Array, Array, Array, Array, Any]:
    """dq, dk, dv and the gradients of the heads' factors and of the key bias, from what the forward pass saved."""
    q, k, v, vis, factors, key_bias, o, stat = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None]
    parts = [stat, delta]
    if plan.stats:  # of exp rows the log of the normaliser, through which delta's part of the gradient flows too
        parts = [stat, delta - d_stat] if plan.score.activation == "exp" else [stat, delta, d_stat]
    kept = jnp.concatenate(parts, axis=2)  # [B, H, 2 or 3, T]
    by_query, by_key = tables(vis, plan)
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    args = (q, k, v, do.astype(v.dtype), kept, *at, *([] if key_bias is None else [key_bias]))
    dq, d_factors = _dq(plan, by_query, prefix, factors.reshape(-1), *args)
    dk, dv, *d_bias = _dk_dv(plan, by_key, prefix, factors.reshape(-1), *args)
    if key_bias is None:
        return dq, dk, dv, d_factors, None
    d_key_bias = jnp.sum(d_bias[0].reshape(*key_bias.shape[:2], plan.sharing, *key_bias.shape[2:]), axis=2)
    return dq, dk, dv, d_factors, d_key_bias


def _dq(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at, *key_bias: Array) -> tuple[Array, Array]:
    """dq, and the gradient of the factors [H, N]."""
    batch, heads, length, dim = q.shape
    bq, bk, v_dim = plan.block_q, plan.block_k, v.shape[3]
    steps = length // bq
    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_query = lambda d: pl.BlockSpec((None, None, bq, d), lambda b, h, i, j, table, *_: (b, h, i, 0))
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table, *_: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    of_key_bias = pl.BlockSpec(
        (None, None, 1, bk), lambda b, h, i, j, table, *_: (b, div(h, plan.sharing), 0, fetch(b, i, j, table))
    )
    numbers = FactorGradient(plan)
    dq, by_block = pl.pallas_call(
        partial(_dq_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, steps, k.shape[2] // bk),
            in_specs=[
                of_query(dim),
                of_key(dim),
                of_key(v_dim),
                of_query(v_dim),
                pl.BlockSpec((None, None, kept.shape[2], bq), lambda b, h, i, j, table, *_: (b, h, 0, i)),
                pl.BlockSpec((None, 2, bq), lambda b, h, i, j, table, *_: (b, 0, i)),
                pl.BlockSpec((None, 2, bk), lambda b, h, i, j, table, *_: (b, 0, fetch(b, i, j, table))),
                *[of_key_bias for _ in key_bias],
            ],
            out_specs=[
                of_query(dim),
                pl.BlockSpec((None, None, *numbers.block), lambda b, h, i, j, table, *_: (b, h, *numbers.index(i))),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, dim), jnp.float32),
                pltpu.VMEM(numbers.scratch, jnp.float32),
                pltpu.VMEM((kept.shape[2], bq, LANES), jnp.float32),
                pltpu.VMEM((2, bq, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(numbers.shape(batch, heads, length), jnp.float32),
        ],
        compiler_params=ORDER,
        cost_estimate=cost(plan, q, k, v, products=(2, 1), moved=_bytes(q, q, do, kept, *key_bias)),
        interpret=plan.interpret,
        name="flash_dq",
    )(table, prefix, factors, q, k, v, do, kept, q_at, k_at, *key_bias)
    return dq, numbers.sum(by_block)


def _dq_kernel(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at, *refs):
    key_bias, (dq, by_block, acc, total, stats, at) = (refs[0] if plan.sharing else None), refs[-6:]
    numbers = FactorGradient(plan)
    b, h, i, j = (pl.program_id(n) for n in range(4))

    @pl.when(j == 0)
    def start():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        for n in range(kept.shape[0]):
            stats[n] = column(kept[n : n + 1])
        for n in (POSITION, SEGMENT):
            at[n] = column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        factor = lambda n: factors[h * plan.factors + n]
        bias = None if key_bias is None else key_bias[...]
        s, see = scores(dot(q[...], k[...], (1, 1)), masked, prefix[b], factor, bias, *here, plan)
        dp = dot(do[...], v[...], (1, 1))
        stat, delta, *d_stat = (stats[n][:, :1] for n in range(kept.shape[0]))
        _, ds = rows.gradients(s, see, stat, delta, dp, plan.score, d_stat=d_stat[0] if d_stat else None)
        acc[...] += dot(ds.astype(k.dtype), k[...], (1, 0))
        numbers.add(total, ds, *here)

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        dq[...] = (acc[...] * plan.scale).astype(dq.dtype)
        by_block[...] = numbers.finished(total[...])


def _dk_dv(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at, *key_bias: Array) -> tuple[Array, ...]:
    """dk, dv and, where there is a key bias, its gradient of every query head [B,H,1,S]."""
    batch, kv_heads, keys, dim = k.shape
    bq, bk, v_dim = plan.block_q, plan.block_k, v.shape[3]
    steps, rounds = keys // bk, q.shape[2] // bq  # the last grid axis goes `group` times over the query blocks

    def query(b: Any, h: Any, j: Any, t: Any, table: Any) -> tuple[Any, Any]:
        """Head and block of the query at step t."""
        return h * plan.group + div(t, rounds), Spans(table, b * steps + j).fetch(rem(t, rounds))

    def of_query(*shape: int | None, tokens_last: bool = False) -> pl.BlockSpec:
        def index(b, h, j, t, table, *_):
            head, i = query(b, h, j, t, table)
            return (b, head, 0, i) if tokens_last else (b, head, i, 0)

        return pl.BlockSpec((None, None, *shape), index)

    of_key = lambda d: pl.BlockSpec((None, None, bk, d), lambda b, h, j, t, table, *_: (b, h, j, 0))
    head = lambda h, t: h * plan.group + div(t, rounds)
    of_key_bias = pl.BlockSpec(
        (None, None, 1, bk), lambda b, h, j, t, table, *_: (b, div(head(h, t), plan.sharing), 0, j)
    )
    d_key_bias = pl.BlockSpec((None, None, 1, bk), lambda b, h, j, t, table, *_: (b, head(h, t), 0, j))
    by_head = [jax.ShapeDtypeStruct((batch, q.shape[1], 1, keys), jnp.float32) for _ in key_bias]
    return pl.pallas_call(
        partial(_dk_dv_kernel, plan, rounds),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, kv_heads, steps, plan.group * rounds),
            in_specs=[
                of_query(bq, dim),
                of_key(dim),
                of_key(v_dim),
                of_query(bq, v_dim),
                of_query(kept.shape[2], bq, tokens_last=True),
                pl.BlockSpec((None, 2, bq), lambda b, h, j, t, table, *_: (b, 0, query(b, h, j, t, table)[1])),
                pl.BlockSpec((None, 2, bk), lambda b, h, j, t, table, *_: (b, 0, j)),
                *[of_key_bias for _ in key_bias],
            ],
            out_specs=[of_key(dim), of_key(v_dim), *[d_key_bias for _ in key_bias]],
            scratch_shapes=[
                pltpu.VMEM((bk, dim), jnp.float32),
                pltpu.VMEM((bk, v_dim), jnp.float32),
                pltpu.VMEM((2, bk, LANES), jnp.int32),
                *[pltpu.VMEM((2, bk, LANES), jnp.float32) for _ in key_bias],
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), *by_head],
        compiler_params=ORDER,
        cost_estimate=cost(plan, q, k, v, products=(2, 2), moved=_bytes(k, v, k, v, *by_head, *by_head)),
        interpret=plan.interpret,
        name="flash_dk_dv",
    )(table, prefix, factors, q, k, v, do, kept, q_at, k_at, *key_bias)


def _dk_dv_kernel(plan: Plan, rounds: int, table, prefix, factors, q, k, v, do, kept, q_at, k_at, *refs):
    if plan.sharing:
        key_bias, dk, dv, d_key_bias, acc_k, acc_v, at, by_key = refs
    else:
        dk, dv, acc_k, acc_v, at = refs
    b, h, j, t = (pl.program_id(n) for n in range(4))

    @pl.when(t == 0)
    def start():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)
        for n in (POSITION, SEGMENT):
            at[n] = column(k_at[n : n + 1])

    if plan.sharing:

        @pl.when(rem(t, rounds) == 0)
        def start_head():
            by_key[BIAS] = column(key_bias[...])
            by_key[SUM] = jnp.zeros_like(by_key[SUM])

    def tile(masked: bool) -> None:
        here = (q_at[POSITION][None], q_at[SEGMENT][None]), (at[POSITION][:, :1], at[SEGMENT][:, :1])
        factor = lambda n: factors[(h * plan.group + div(t, rounds)) * plan.factors + n]
        bias = by_key[BIAS][:, :1] if plan.sharing else None
        s, see = scores(dot(k[...], q[...], (1, 1)), masked, prefix[b], factor, bias, *here, plan)  # [keys, queries]
        dp = dot(v[...], do[...], (1, 1))
        stat, delta, *d_stat = (kept[n][None] for n in range(kept.shape[0]))
        p, ds = rows.gradients(s, see, stat, delta, dp, plan.score, d_stat=d_stat[0] if d_stat else None)
        if plan.sharing:
            by_key[SUM] += jnp.sum(ds, axis=1, keepdims=True)
        acc_v[...] += dot(p.astype(do.dtype), do[...], (1, 0))
        acc_k[...] += dot(ds.astype(q.dtype), q[...], (1, 0))

    Spans(table, b * pl.num_programs(2) + j).each(rem(t, rounds), tile)

    if plan.sharing:

        @pl.when(rem(t, rounds) == rounds - 1)
        def finish_head():
            d_key_bias[...] = row(by_key[SUM][:, :1])

    @pl.when(t == pl.num_programs(3) - 1)
    def finish():
        dk[...] = (acc_k[...] * plan.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)


def _bytes(*arrays: Array | jax.ShapeDtypeStruct) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
