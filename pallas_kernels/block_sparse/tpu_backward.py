"""The two backward kernels for TPUs: dq over the lists, dk and dv over the lists turned round.

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

from pallas_kernels.block_sparse import steps
from pallas_kernels.block_sparse.maps import ORDER, TURNED_ORDER, Maps, TurnedMaps, columns, folded
from pallas_kernels.block_sparse.plan import Plan, size_of
from pallas_kernels.flash import rows
from pallas_kernels.flash.biases import scores
from pallas_kernels.flash.tiles import LANES, POSITION, SEGMENT, column, dot, places, row

STAT, DELTA, D_STAT = 0, 1, 2  # rows of `kept`, the last one where `_apart`


def backward(plan: Plan, saved: Any, do: Array, d_stat: Array) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv and the gradient of the key bias, from what the forward pass saved."""
    q, k, v, vis, lists, key_bias, o, stat = saved
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[..., None, :]
    if plan.tile.score.activation == "exp":
        delta = delta - d_stat  # both flow through log Z
    kept = jnp.concatenate([stat, delta, d_stat][: _kept(plan)], axis=3)  # [B, C, F, n, T]
    prefix = vis.prefix_len if plan.tile.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    args = (prefix, q, k, v, do.astype(v.dtype), kept, *at, *([] if key_bias is None else [key_bias]))
    by_query = steps.table(steps.of_queries(lists), plan.slots, plan.size)
    by_key = steps.table(steps.of_keys(lists, plan.units_turned, plan.columns), plan.slots_turned, plan.size_turned)
    dk, dv, *d_bias = _dk_dv(plan, by_key, *args)
    if key_bias is not None:  # of every bias of a key head [B, K, n, S]
        d_bias[0] = d_bias[0].reshape(*key_bias.shape[:2], -1, *key_bias.shape[2:]).sum(axis=2)
    return _dq(plan, by_query, *args), dk, dv, d_bias[0] if d_bias else None


def _apart(plan: Plan) -> bool:
    """Whether the statistic has a gradient of its own."""
    return plan.tile.stats and plan.tile.score.activation != "exp"


def _kept(plan: Plan) -> int:
    """Numbers per row that the kernels read."""
    return 3 if _apart(plan) else 2


def _dq(plan: Plan, table: steps.Table, prefix, q, k, v, do, kept, q_at, k_at, *key_bias: Array) -> Array:
    fold, dim, v_dim, slots = plan.fold, q.shape[4], v.shape[3], plan.slots
    bq, bk, at = plan.tile.block_q, plan.tile.block_k, Maps(plan)

    def call(first: Array, words: Array, count: Array, units: int) -> Array:
        each = lambda spec, *args: [spec(*args, slot=m) for m in range(slots)]
        return pl.pallas_call(
            partial(_dq_kernel, plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(units, plan.copies, count),
                in_specs=[
                    at.query(bq, dim),
                    at.query(bq, v_dim),
                    at.query(_kept(plan), bq, tokens_last=True),
                    at.query_places(),
                    *each(at.key, dim),
                    *each(at.key, v_dim),
                    *each(at.key_places),
                    *(spec for _ in key_bias for spec in each(at.key_bias)),
                ],
                out_specs=at.result(bq, dim),
                scratch_shapes=[
                    pltpu.VMEM((fold * bq, dim), jnp.float32),
                    pltpu.VMEM((_kept(plan), fold * bq, LANES), jnp.float32),
                    pltpu.VMEM((2, fold * bq, LANES), jnp.int32),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct((units, plan.copies, *q.shape[2:]), q.dtype),
            compiler_params=ORDER,
            cost_estimate=plan.cost(
                k,
                v,
                units,
                products=(2, 1),
                once=(q, q, do, kept, *key_bias),
                again=bk * size_of(k[0, 0, :1], v[0, 0, :1]),
            ),
            interpret=plan.tile.interpret,
            name="block_sparse_dq",
        )(first, words, prefix, q, do, kept, q_at, *[k] * slots, *[v] * slots, *[k_at] * slots, *key_bias * slots)

    return steps.over_units(table, call).reshape(q.shape)


def _dq_kernel(plan: Plan, first, words, prefix, q, do, kept, q_at, *refs):
    n = plan.slots
    k, v, k_at = refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n]
    key_bias = refs[3 * n : 4 * n] if plan.tile.sharing else None
    dq, acc, stats, at = refs[-4:]
    batch, _, step = Maps(plan).here(first, words)

    @pl.when(step.first)
    def start():
        acc[...] = jnp.zeros_like(acc)
        columns(stats, [kept.at[f] for f in range(plan.fold)])
        columns(at, [q_at] * plan.fold)

    def tile(m: int, masked: bool) -> None:
        q_here = at[POSITION][:, :1], at[SEGMENT][:, :1]
        k_here = k_at[m][POSITION][None], k_at[m][SEGMENT][None]
        product, bias = dot(folded(q), k[m][...], (1, 1)), None if key_bias is None else key_bias[m][...]
        s, see = scores(product, masked, prefix[batch], None, bias, q_here, k_here, plan.tile)
        dp = dot(folded(do), v[m][...], (1, 1))
        d_stat = stats[D_STAT][:, :1] if _apart(plan) else None
        _, ds = rows.gradients(s, see, stats[STAT][:, :1], stats[DELTA][:, :1], dp, plan.tile.score, d_stat=d_stat)
        acc[...] += dot(ds.astype(k[m].dtype), k[m][...], (1, 0))

    for m in range(n):
        step.each(m, partial(tile, m))

    @pl.when(step.last)
    def finish():
        dq[...] = (acc[...] * plan.tile.scale).astype(dq.dtype).reshape(dq.shape)


def _dk_dv(
    plan: Plan, table: steps.Table, prefix, q, k, v, do, kept, q_at, k_at, *key_bias: Array
) -> tuple[Array, ...]:
    """dk, dv and, where there is a key bias, its gradients [B, K, biases of a key head, S]."""
    dim, v_dim, slots = q.shape[4], v.shape[3], plan.slots_turned
    bq, bk, at = plan.tile.block_q, plan.tile.block_k, TurnedMaps(plan)
    d_bias = [jax.ShapeDtypeStruct((*k.shape[:2], plan.biases, k.shape[2]), jnp.float32) for _ in key_bias]
    results = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)), *d_bias]

    def call(first: Array, words: Array, count: Array, units: int) -> Any:
        part = lambda x: jax.ShapeDtypeStruct((units, plan.copies_turned, *x.shape[2:]), x.dtype)
        each = lambda spec, *args, **kw: [spec(*args, slot=m, **kw) for m in range(slots)]
        again = plan.fold * bq * size_of(q[0, 0, 0, :1], do[0, 0, 0, :1], kept[0, 0, 0, :, 0])
        return pl.pallas_call(
            partial(_dk_dv_kernel, plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(units, plan.copies_turned, count, plan.turns),
                in_specs=[
                    at.key(dim),
                    at.key(v_dim),
                    at.key_places(),
                    *each(at.query, bq, dim),
                    *each(at.query, bq, v_dim),
                    *each(at.query, _kept(plan), bq, tokens_last=True),
                    *each(at.query_places),
                    *(spec for _ in key_bias for spec in each(at.key_bias)),
                ],
                out_specs=[at.result(dim), at.result(v_dim), *(at.key_bias_result() for _ in key_bias)],
                scratch_shapes=[
                    pltpu.VMEM((bk, dim), jnp.float32),
                    pltpu.VMEM((bk, v_dim), jnp.float32),
                    pltpu.VMEM((2, bk, LANES), jnp.int32),
                ],
            ),
            out_shape=[part(x) for x in results],
            compiler_params=TURNED_ORDER,
            cost_estimate=plan.cost(k, v, units, products=(2, 2), once=(k, v, *key_bias, *results), again=again),
            interpret=plan.tile.interpret,
            name="block_sparse_dk_dv",
        )(
            first,
            words,
            prefix,
            *(k, v, k_at),
            *[q] * slots,
            *[do] * slots,
            *[kept] * slots,
            *[q_at] * slots,
            *key_bias * slots,
        )

    return tuple(x.reshape(y.shape) for x, y in zip(steps.over_units(table, call), results, strict=True))


def _dk_dv_kernel(plan: Plan, first, words, prefix, k, v, k_at, *refs):
    n = plan.slots_turned
    q, do, kept, q_at = (refs[i * n : (i + 1) * n] for i in range(4))
    key_bias, rest = (refs[4 * n : 5 * n], refs[5 * n :]) if plan.tile.sharing else (None, refs[4 * n :])
    dk, dv, *d_bias, acc_k, acc_v, at = rest
    turn = pl.program_id(3)
    batch, _, step = TurnedMaps(plan).here(first, words)

    @pl.when(step.first & (turn == 0))
    def start():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)
        for x in d_bias:
            x[...] = jnp.zeros_like(x)
        columns(at, [k_at])

    def tile(m: int, masked: bool) -> None:
        across = lambda x: jnp.concatenate([x] * plan.fold, axis=1)
        q_here = across(q_at[m][POSITION][None]), across(q_at[m][SEGMENT][None])
        k_here = at[POSITION][:, :1], at[SEGMENT][:, :1]
        product = dot(k[...], folded(q[m]), (1, 1))  # [keys, queries]
        bias = None if key_bias is None else column(key_bias[m][...])[:, :1]
        s, see = scores(product, masked, prefix[batch], None, bias, q_here, k_here, plan.tile)
        dp = dot(v[...], folded(do[m]), (1, 1))
        of_row = lambda i: jnp.concatenate([kept[m][f, i][None] for f in range(plan.fold)], axis=1)
        d_stat = of_row(D_STAT) if _apart(plan) else None
        p, ds = rows.gradients(s, see, of_row(STAT), of_row(DELTA), dp, plan.tile.score, d_stat=d_stat)
        for x in d_bias:
            which = TurnedMaps(plan).chunk(0, step.other(m), turn) if plan.biases > 1 else 0
            x[pl.ds(which, 1)] += row(jnp.sum(ds, axis=1, keepdims=True))
        acc_v[...] += dot(p.astype(v.dtype), folded(do[m]), (1, 0))
        acc_k[...] += dot(ds.astype(k.dtype), folded(q[m]), (1, 0))

    for m in range(n):
        step.each(m, partial(tile, m))

    @pl.when(step.last & (turn == plan.turns - 1))
    def finish():
        dk[...] = (acc_k[...] * plan.tile.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)
