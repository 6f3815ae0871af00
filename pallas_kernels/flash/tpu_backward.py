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

from jaxattn.rope import Alibi
from pallas_kernels.flash import rows
from pallas_kernels.flash.tiles import (
    LANES,
    POSITION,
    SEGMENT,
    Plan,
    Spans,
    basis,
    column,
    cost,
    div,
    dot,
    places,
    rem,
    row,
    scores,
    tables,
)

STAT, DELTA = 0, 1  # rows of `kept`
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def backward(plan: Plan, saved: Any, do: Array) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv and the gradient of the heads' factors of the position bias, from what the forward pass saved."""
    q, k, v, vis, factors, o, stat = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None]
    kept = jnp.concatenate([stat, delta], axis=2)  # [B, H, 2, T]
    by_query, by_key = tables(vis, plan)
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    args = (q, k, v, do.astype(v.dtype), kept, *at)
    dq, by_row = _dq(plan, by_query, prefix, factors, *args)
    dk, dv = _dk_dv(plan, by_key, prefix, factors, *args)
    return dq, dk, dv, jnp.sum(by_row, axis=(0, 2, 3))


def _dq(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at) -> tuple[Array, Array]:
    batch, heads, length, dim = q.shape
    bq, bk, v_dim = plan.block_q, plan.block_k, v.shape[3]
    steps = length // bq
    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_query = lambda d: pl.BlockSpec((None, None, bq, d), lambda b, h, i, j, table, *_: (b, h, i, 0))
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table, *_: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    return pl.pallas_call(
        partial(_dq_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, steps, k.shape[2] // bk),
            in_specs=[
                of_query(dim),
                of_key(dim),
                of_key(v_dim),
                of_query(v_dim),
                pl.BlockSpec((None, None, 2, bq), lambda b, h, i, j, table, *_: (b, h, 0, i)),
                pl.BlockSpec((None, 2, bq), lambda b, h, i, j, table, *_: (b, 0, i)),
                pl.BlockSpec((None, 2, bk), lambda b, h, i, j, table, *_: (b, 0, fetch(b, i, j, table))),
            ],
            out_specs=[
                of_query(dim),
                pl.BlockSpec((None, None, 1, bq), lambda b, h, i, j, table, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, dim), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((2, bq, LANES), jnp.float32),
                pltpu.VMEM((2, bq, LANES), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=ORDER,
        cost_estimate=cost(plan, q, k, v, products=(2, 1), moved=_bytes(q, q, do, kept)),
        interpret=plan.interpret,
        name="flash_dq",
    )(table, prefix, factors, q, k, v, do, kept, q_at, k_at)


def _dq_kernel(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at, dq, by_row, acc, total, stats, at):
    b, h, i, j = (pl.program_id(n) for n in range(4))

    @pl.when(j == 0)
    def start():
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        for n in (0, 1):
            stats[n], at[n] = column(kept[n : n + 1]), column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        s, see = scores(dot(q[...], k[...], (1, 1)), masked, prefix[b], factors[h], *here, plan)
        dp = dot(do[...], v[...], (1, 1))
        _, ds = rows.gradients(s, see, stats[STAT][:, :1], stats[DELTA][:, :1], dp, plan.score)
        acc[...] += dot(ds.astype(k.dtype), k[...], (1, 0))
        if plan.bias is Alibi:
            total[...] += jnp.sum(ds * basis(*here, plan), axis=1, keepdims=True)

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        dq[...] = (acc[...] * plan.scale).astype(dq.dtype)
        by_row[...] = row(total[:, :1])


def _dk_dv(plan: Plan, table, prefix, factors, q, k, v, do, kept, q_at, k_at) -> tuple[Array, Array]:
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
                of_query(2, bq, tokens_last=True),
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
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=ORDER,
        cost_estimate=cost(plan, q, k, v, products=(2, 2), moved=_bytes(k, v, k, v)),
        interpret=plan.interpret,
        name="flash_dk_dv",
    )(table, prefix, factors, q, k, v, do, kept, q_at, k_at)


def _dk_dv_kernel(
    plan: Plan, rounds: int, table, prefix, factors, q, k, v, do, kept, q_at, k_at, dk, dv, acc_k, acc_v, at
):
    b, h, j, t = (pl.program_id(n) for n in range(4))

    @pl.when(t == 0)
    def start():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)
        for n in (POSITION, SEGMENT):
            at[n] = column(k_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (q_at[POSITION][None], q_at[SEGMENT][None]), (at[POSITION][:, :1], at[SEGMENT][:, :1])
        factor = factors[h * plan.group + div(t, rounds)]
        s, see = scores(dot(k[...], q[...], (1, 1)), masked, prefix[b], factor, *here, plan)  # [keys, queries]
        dp = dot(v[...], do[...], (1, 1))
        p, ds = rows.gradients(s, see, kept[STAT][None], kept[DELTA][None], dp, plan.score)
        acc_v[...] += dot(p.astype(do.dtype), do[...], (1, 0))
        acc_k[...] += dot(ds.astype(q.dtype), q[...], (1, 0))

    Spans(table, b * pl.num_programs(2) + j).each(rem(t, rounds), tile)

    @pl.when(t == pl.num_programs(3) - 1)
    def finish():
        dk[...] = (acc_k[...] * plan.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)


def _bytes(*arrays: Array) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
