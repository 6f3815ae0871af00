"""The TPU kernel: listed tiles only, each a product in VMEM; lists steer the grid from scalar memory.

Grid (list of a batch row, chunk of heads that share it, step), the last one in order and as long as the work;
see `steps` and `plan`. The backward pass is in `tpu_backward`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxattn.masks import Visibility
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.block_sparse import steps
from pallas_kernels.block_sparse.lists import Lists, in_blocks, usable
from pallas_kernels.block_sparse.maps import ORDER, Maps, columns, folded
from pallas_kernels.block_sparse.plan import Plan, make_plan, size_of, unfit, up
from pallas_kernels.block_sparse.tpu_backward import backward
from pallas_kernels.flash import rows
from pallas_kernels.flash.biases import scores
from pallas_kernels.flash.score import ACTIVATIONS, Score
from pallas_kernels.flash.tiles import LANES, POSITION, SEGMENT, dot, places, row


def block_sparse_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    blocks: Int[Array, "B L I N"],
    block_q: int,
    block_k: int,
    scale: float,
    stats: bool = True,
    key_bias: Float[Array, "B n S"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.block_sparse.block_sparse`. What is kept for the backward pass: q, k, v, o, a number a row.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, vis, blocks, block_q, block_k, key_bias):
        raise NotImplementedError(f"block_sparse: {reason}")
    interpret = interpret_for("block_sparse", "tpu")
    batch, length, heads, _ = q.shape
    v_dim = v.shape[3]
    plan = make_plan(q, k, v, vis, score, blocks, block_q, block_k, scale, stats, interpret, key_bias)
    vis = in_blocks(vis, batch, block_q, block_k)
    lists = usable(blocks, vis, block_q, block_k)
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k, v = _blocked(q.astype(dtype), block_q), _blocked(k.astype(dtype), block_k), _blocked(v, block_k)
    q = q.reshape(batch, -1, plan.fold, *q.shape[2:])
    if key_bias is not None:
        key_bias = jnp.pad(key_bias, ((0, 0), (0, 0), (0, -key_bias.shape[2] % block_k)))[:, :, None]
    o, stat = _attend(plan, q, k, v, vis, lists, key_bias)
    back = lambda x: jnp.swapaxes(x.reshape(batch, heads, *x.shape[3:]), 1, 2)[:, :length]
    stat = rows.reported(jnp.swapaxes(stat, 3, 4), score)
    return back(o)[..., :v_dim], back(stat)[..., 0]


def _blocked(x: Float[Array, "B T H D"], block: int) -> Float[Array, "B H t d"]:
    """Heads first; whole blocks of tokens; head dims that registers hold without remainder."""
    dim = x.shape[3]
    pad = (64 if dim <= 64 else up(dim, LANES)) - dim
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, pad)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, lists: Lists, key_bias: Any) -> Any:
    """[B,C,F,T,D] (C·F = H), [B,K,S,D], [B,K,S,V] and key biases [B,·,1,S] in whole blocks to outputs and statistics.

    These are [B,C,F,T,V] and [B,C,F,1,T].
    """
    return _forward(plan, q, k, v, vis, lists, key_bias)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, lists: Lists, key_bias: Any) -> Any:
    batch, chunks, fold, length, dim = q.shape
    v_dim, bq, bk, slots = v.shape[3], plan.tile.block_q, plan.tile.block_k, plan.slots
    at = Maps(plan)
    prefix = vis.prefix_len if plan.tile.has_prefix else jnp.zeros((batch,), jnp.int32)
    q_at, k_at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    extra = [] if key_bias is None else [key_bias]
    o = jax.ShapeDtypeStruct((batch, chunks, fold, length, v_dim), v.dtype)
    stat = jax.ShapeDtypeStruct((batch, chunks, fold, 1, length), jnp.float32)

    def call(first: Array, words: Array, count: Array, units: int) -> Any:
        part = lambda x: jax.ShapeDtypeStruct((units, plan.copies, *x.shape[2:]), x.dtype)
        each = lambda spec, *args: [spec(*args, slot=m) for m in range(slots)]
        return pl.pallas_call(
            partial(_forward_kernel, plan),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(units, plan.copies, count),
                in_specs=[
                    at.query(bq, dim),
                    at.query_places(),
                    *each(at.key, dim),
                    *each(at.key, v_dim),
                    *each(at.key_places),
                    *(spec for _ in extra for spec in each(at.key_bias)),
                ],
                out_specs=[at.result(bq, v_dim), at.result(1, bq, tokens_last=True)],
                scratch_shapes=[
                    pltpu.VMEM((fold * bq, v_dim), jnp.float32),
                    pltpu.VMEM((fold * bq, LANES), jnp.float32),
                    pltpu.VMEM((fold * bq, LANES), jnp.float32),
                    pltpu.VMEM((2, fold * bq, LANES), jnp.int32),
                ],
            ),
            out_shape=[part(o), part(stat)],
            compiler_params=ORDER,
            cost_estimate=plan.cost(
                k, v, units, products=(1, 1), once=(q, o, stat, *extra), again=bk * size_of(k[0, 0, :1], v[0, 0, :1])
            ),
            interpret=plan.tile.interpret,
            name="block_sparse_forward",
        )(first, words, prefix, q, q_at, *[k] * slots, *[v] * slots, *[k_at] * slots, *extra * slots)

    table = steps.table(steps.of_queries(lists), slots, plan.size)
    o, stat = (x.reshape(y.shape) for x, y in zip(steps.over_units(table, call), (o, stat), strict=True))
    return (o, stat), (q, k, v, vis, lists, key_bias, o, stat)


def _forward_kernel(plan: Plan, first, words, prefix, q, q_at, *refs):
    n = plan.slots
    k, v, k_at = refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n]
    key_bias = refs[3 * n : 4 * n] if plan.tile.sharing else None
    o, stat, acc, top, mass, at = refs[-6:]
    score = plan.tile.score
    batch, _, step = Maps(plan).here(first, words)

    @pl.when(step.first)
    def start():
        acc[...] = jnp.zeros_like(acc)
        mass[...] = jnp.zeros_like(mass)
        top[...] = jnp.full_like(top, rows.floor(score))
        columns(at, [q_at] * plan.fold)

    def tile(m: int, masked: bool) -> None:
        q_here = at[POSITION][:, :1], at[SEGMENT][:, :1]
        k_here = k_at[m][POSITION][None], k_at[m][SEGMENT][None]
        product, bias = dot(folded(q), k[m][...], (1, 1)), None if key_bias is None else key_bias[m][...]
        s, see = scores(product, masked, prefix[batch], None, bias, q_here, k_here, plan.tile)
        if score.activation == "exp":
            before = top[:, :1]
            now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
            w = jnp.exp(s - now)  # masked: exp(NEVER - FLOOR) is exactly 0
            added, fade = rows.exp_terms(w, s, now, score), jnp.exp(before - now)
            fade_mass = fade if score.power == 1.0 else jnp.exp(score.power * (before - now))
            mass[...] = mass[...] * fade_mass + jnp.sum(added, axis=1, keepdims=True)
            acc[...] = acc[...] * fade + dot(w.astype(v[m].dtype), v[m][...], (1, 0))
            top[...] = jnp.broadcast_to(now, top.shape)
        else:
            w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
            mass[...] += jnp.sum(rows.terms(w, see, score), axis=1, keepdims=True)
            acc[...] += dot(w.astype(v[m].dtype), v[m][...], (1, 0))

    for m in range(n):
        step.each(m, partial(tile, m))

    @pl.when(step.last)
    def finish():
        m, t = mass[:, :1], top[:, :1]
        o[...] = (acc[...] / rows.divisor(rows.normaliser(m, t, score))).astype(o.dtype).reshape(o.shape)
        saved = rows.saved(m, t, score).reshape(plan.fold, -1, 1)
        for f in range(plan.fold):
            stat[f] = row(saved[f])


def _backward(plan: Plan, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None, None, Any]:
    dq, dk, dv, d_key_bias = backward(plan, saved, *cotangents)
    return dq, dk, dv, None, None, d_key_bias


_attend.defvjp(_forward, _backward)
