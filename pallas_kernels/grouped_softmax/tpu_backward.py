"""The two backward kernels for TPUs: dq over tiles of keys, dk and dv over the query blocks of all grouped heads.

Both recompute a tile from log Z. With D = do·o - d log Z, A = p g and c a block, the own one or an earlier one:

    ds_j = A_j (do·v_j - D)  in the own block,    A_j (do·v_j - m)  in an earlier one,  m = Σ_j p_j do·v_j
    ds of its landmark       = g (m - D)
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.tiles import LANES, Spans, div, dot, rem
from pallas_kernels.grouped_softmax import layout
from pallas_kernels.grouped_softmax.layout import Plan
from pallas_kernels.grouped_softmax.tpu_tile import levels

LOG_Z, DELTA = 0, 1  # rows of `kept`
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


def backward(plan: Plan, saved: Any, do: Array, d_log_z: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv from what the forward pass saved; a key is in one page only, a query meets them all."""
    q, k, v, place, o, log_z = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - d_log_z
    seeing = jnp.where(log_z > FLOOR, log_z, 0.0)  # rows that see nothing: their weights are exp(NEVER)
    kept, do = jnp.stack([seeing, delta], axis=2), do.astype(v.dtype)  # [B, H, 2, T]

    def one(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = carry
        here = layout.page(place, plan, n)
        args = (q, layout.rows(k, here.source), layout.rows(v, here.source), do, kept, here.tokens, here.of_query)
        by_query, by_key = layout.tables(here, plan)
        dk_here, dv_here = _dk_dv(plan, k.shape[2], by_key, *args)
        back = lambda total, part: total + layout.rows(part, here.at)
        return _dq(plan, k.shape[2], by_query, *args, dq), back(dk, dk_here), back(dv, dv_here)

    start = (jnp.zeros((*q.shape[:2], q.shape[3], q.shape[2]), jnp.float32), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = jax.lax.fori_loop(0, layout.pages(place, plan), one, start)
    return jnp.swapaxes(dq * plan.scale, 2, 3).astype(q.dtype), dk, dv


def _dq(plan: Plan, keys: int, table, q, k, v, do, kept, tokens, at, dq) -> Array:
    """Σ ds k, [B,H,D,T], added to the pages before."""
    batch, heads, length, dim = q.shape
    bq, bk, v_dim = plan.block_q, plan.tile, v.shape[3]
    steps = length // bq
    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_query = lambda d: pl.BlockSpec((None, None, bq, d), lambda b, h, i, j, table: (b, h, i, 0))
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    turned = lambda d: pl.BlockSpec((None, None, d, bq), lambda b, h, i, j, table: (b, h, 0, i))
    return pl.pallas_call(
        partial(_dq_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, steps, plan.tiles),
            in_specs=[
                of_query(dim),
                of_key(dim),
                of_key(v_dim),
                of_query(v_dim),
                turned(2),
                pl.BlockSpec((None, plan.slots, 1, LANES), lambda b, h, i, j, table: (b, fetch(b, i, j, table), 0, 0)),
                pl.BlockSpec((None, 3, bq), lambda b, h, i, j, table: (b, 0, i)),
                turned(dim),
            ],
            out_specs=turned(dim),
            scratch_shapes=[pltpu.VMEM((dim, bq), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(dq.shape, dq.dtype),
        input_output_aliases={8: 0},
        compiler_params=ORDER,
        cost_estimate=layout.cost(plan, q, keys, k, v, products=(2, 1), moved=_bytes(q, do, kept, dq, dq)),
        interpret=plan.interpret,
        name="grouped_softmax_dq",
    )(table, q, k, v, do, kept, tokens, at, dq)


def _dq_kernel(plan: Plan, table, q, k, v, do, kept, tokens, at, before, dq, acc):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def start():
        acc[...] = before[...]

    @pl.when(Spans(table, b * pl.num_programs(2) + i).holds(j))
    def tile():
        _, ds = _gradients(plan, q[...], k[...], v[...], do[...], kept[...], tokens[...], at[...], j)
        acc[...] += dot(k[...], ds.astype(k.dtype), (0, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        dq[...] = acc[...]


def _gradients(plan: Plan, q, k, v, do, kept, tokens, at, j) -> tuple[Array, Array]:
    """A and the gradient of the scores of one tile, both [keys, queries]."""
    line = lambda n: kept[n : n + 1][None]
    p, r, own = levels(plan, dot(k, q, (1, 1)), tokens, at, j)
    gate = jnp.exp(r - line(LOG_Z))
    a = p * gate
    da = dot(v, do, (1, 1)).reshape(p.shape)
    mean = jnp.sum(p * da, axis=1, keepdims=True)
    ds = a * (da - jnp.where(own, line(DELTA), mean))
    d_landmark = jnp.where(own, 0.0, gate * (mean - line(DELTA)))
    ds = jnp.where(jax.lax.broadcasted_iota(jnp.int32, p.shape, 1) == plan.slot - 1, d_landmark, ds)
    flat = lambda x: x.reshape(plan.tile, plan.block_q)
    return flat(a), flat(ds)


def _dk_dv(plan: Plan, keys: int, table, q, k, v, do, kept, tokens, at) -> tuple[Array, Array]:
    """Of the page's rows, in the dtypes of k and v."""
    batch, kv_heads, _, dim = k.shape
    bq, bk, v_dim = plan.block_q, plan.tile, v.shape[3]
    rounds = q.shape[2] // bq  # the last grid axis goes `group` times over the query blocks

    def query(b: Any, h: Any, j: Any, t: Any, table: Any) -> tuple[Any, Any]:
        """Head and block of the query at step t."""
        return h * plan.group + div(t, rounds), Spans(table, b * plan.tiles + j).fetch(rem(t, rounds))

    def of_query(*shape: int | None, tokens_last: bool = False) -> pl.BlockSpec:
        def index(b, h, j, t, table):
            head, i = query(b, h, j, t, table)
            return (b, head, 0, i) if tokens_last else (b, head, i, 0)

        return pl.BlockSpec((None, None, *shape), index)

    of_key = lambda d: pl.BlockSpec((None, None, bk, d), lambda b, h, j, t, table: (b, h, j, 0))
    return pl.pallas_call(
        partial(_dk_dv_kernel, plan, rounds),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, plan.tiles, plan.group * rounds),
            in_specs=[
                of_query(bq, dim),
                of_key(dim),
                of_key(v_dim),
                of_query(bq, v_dim),
                of_query(2, bq, tokens_last=True),
                pl.BlockSpec((None, plan.slots, 1, LANES), lambda b, h, j, t, table: (b, j, 0, 0)),
                pl.BlockSpec((None, 3, bq), lambda b, h, j, t, table: (b, 0, query(b, h, j, t, table)[1])),
            ],
            out_specs=[of_key(dim), of_key(v_dim)],
            scratch_shapes=[pltpu.VMEM((bk, dim), jnp.float32), pltpu.VMEM((bk, v_dim), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=ORDER,
        cost_estimate=layout.cost(plan, q, keys, k, v, products=(2, 2), moved=_bytes(k, v, k, v)),
        interpret=plan.interpret,
        name="grouped_softmax_dk_dv",
    )(table, q, k, v, do, kept, tokens, at)


def _dk_dv_kernel(plan: Plan, rounds: int, table, q, k, v, do, kept, tokens, at, dk, dv, acc_k, acc_v):
    b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(t == 0)
    def start():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    @pl.when(Spans(table, b * plan.tiles + j).holds(rem(t, rounds)))
    def tile():
        a, ds = _gradients(plan, q[...], k[...], v[...], do[...], kept[...], tokens[...], at[...], j)
        acc_v[...] += dot(a.astype(do.dtype), do[...], (1, 0))
        acc_k[...] += dot(ds.astype(q.dtype), q[...], (1, 0))

    @pl.when(t == pl.num_programs(3) - 1)
    def finish():
        dk[...] = (acc_k[...] * plan.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)


def _bytes(*arrays: Array) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
