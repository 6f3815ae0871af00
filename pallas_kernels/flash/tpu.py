"""The TPU kernel: one tile of scores at a time in VMEM, tiles nobody sees are skipped.

Grid (batch, query head, query block, key block), the last one in order: the running maximum, the mass and the
weighted values stay in VMEM over it (arXiv 2205.14135). The backward pass is in `tpu_backward`.
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

from jaxattn.masks import Visibility
from jaxattn.rope import PositionBias, RelativeBias
from pallas_kernels._blocks import blocks
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash import rows
from pallas_kernels.flash.biases import factors, scores, without_kernel
from pallas_kernels.flash.score import ACTIVATIONS, Score
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
    row,
    tables,
)
from pallas_kernels.flash.tpu_backward import backward

BLOCK = 512
WIDEST = 1024  # bytes of a head; above, half the block, so that f32 members with a p-norm still fit in VMEM
DTYPES = (jnp.float32, jnp.bfloat16)


def unfit(q: Array, k: Array, v: Array, bias: PositionBias | None) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := without_kernel(bias):
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    return None


def flash_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float,
    bias: PositionBias | None = None,
    key_bias: Float[Array, "B n S"] | None = None,
    stats: bool = False,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.flash.flash`. What is kept for the backward pass: q, k, v, o and a number per row.

    Args:
      block_q, block_k: rows and columns of a tile; multiples of 128 on the device; None: what fits.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, bias):
        raise NotImplementedError(f"flash: {reason}")
    interpret = interpret_for("flash", "tpu")
    batch, length, heads, _ = q.shape
    keys, v_dim = k.shape[1], v.shape[3]
    default = BLOCK if max(q.shape[3], v_dim) * max(q.dtype.itemsize, v.dtype.itemsize) <= WIDEST else BLOCK // 2
    tuned = blocks("flash", "tpu", max(q.shape[3], v_dim), block_q=default, block_k=default)
    block_q, block_k = _fitted(block_q or tuned["block_q"], length), _fitted(block_k or tuned["block_k"], keys)
    numbers = factors(bias, heads)
    plan = Plan(
        score=score,
        scale=float(scale),
        block_q=block_q,
        block_k=block_k,
        group=heads // k.shape[2],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        bias=None if bias is None else type(bias),
        buckets=bias.table.shape[0] if isinstance(bias, RelativeBias) else getattr(bias, "buckets", 0),
        factors=numbers.shape[1],
        sharing=0 if key_bias is None else heads // key_bias.shape[1],
        stats=stats,
        interpret=interpret,
    )
    dtype = jnp.promote_types(q.dtype, k.dtype)
    q, k = _blocked(q.astype(dtype), block_q), _blocked(k.astype(dtype), block_k)
    v = _blocked(v, block_k)
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions, length),
        q_segments=wide(vis.q_segments, length),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    )
    vis = vis.pad_rows(-length % block_q).pad_columns(-keys % block_k)
    if key_bias is not None:
        key_bias = jnp.pad(key_bias.astype(jnp.float32), ((0, 0), (0, 0), (0, -keys % block_k)))[:, :, None]
    o, stat = _attend(plan, q, k, v, vis, numbers, key_bias)
    o = jnp.swapaxes(o, 1, 2)[:, :length, :, :v_dim]
    return (o, rows.reported(jnp.swapaxes(stat[:, :, 0, :length], 1, 2), score)) if stats else o


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _fitted(block: int, length: int) -> int:
    """The block size that cuts `length` into as many blocks with the least padding."""
    count = -(-length // block)
    return min(block, _up(-(-length // count), LANES))


def _blocked(x: Float[Array, "B T H D"], block: int) -> Float[Array, "B H t d"]:
    """Heads first; whole blocks of tokens; head dims that registers hold without remainder."""
    dim = x.shape[3]
    pad = (64 if dim <= 64 else _up(dim, LANES)) - dim
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, pad)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, factors: Array, key_bias: Any) -> Any:
    """[B,H,T,D], [B,K,S,D], [B,K,S,V] and key biases [B,·,1,S] in whole blocks to [B,H,T,V] and [B,H,1,T]."""
    return _forward(plan, q, k, v, vis, factors, key_bias)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, factors: Array, key_bias: Any) -> Any:
    batch, heads, length, dim = q.shape
    keys, v_dim, bq, bk = k.shape[2], v.shape[3], plan.block_q, plan.block_k
    steps = length // bq
    table = tables(vis, plan)[0]
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros((batch,), jnp.int32)
    q_at, k_at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)

    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_query = lambda d: pl.BlockSpec((None, None, bq, d), lambda b, h, i, j, table, *_: (b, h, i, 0))
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table, *_: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    of_key_bias = pl.BlockSpec(
        (None, None, 1, bk), lambda b, h, i, j, table, *_: (b, div(h, plan.sharing), 0, fetch(b, i, j, table))
    )
    extra = [] if key_bias is None else [key_bias]
    kept = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    out = jax.ShapeDtypeStruct((batch, heads, length, v_dim), v.dtype)
    o, stat = pl.pallas_call(
        partial(_forward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, steps, keys // bk),
            in_specs=[
                of_query(dim),
                of_key(dim),
                of_key(v_dim),
                pl.BlockSpec((None, 2, bq), lambda b, h, i, j, table, *_: (b, 0, i)),
                pl.BlockSpec((None, 2, bk), lambda b, h, i, j, table, *_: (b, 0, fetch(b, i, j, table))),
                *[of_key_bias for _ in extra],
            ],
            out_specs=[
                of_query(v_dim),
                pl.BlockSpec((None, None, 1, bq), lambda b, h, i, j, table, *_: (b, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((bq, v_dim), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((bq, LANES), jnp.float32),
                pltpu.VMEM((2, bq, LANES), jnp.int32),
            ],
        ),
        out_shape=[out, kept],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=cost(
            plan, q, k, v, products=(1, 1), moved=sum(x.size * x.dtype.itemsize for x in (q, out, kept, *extra))
        ),
        interpret=plan.interpret,
        name="flash_forward",
    )(table, prefix, factors.reshape(-1), q, k, v, q_at, k_at, *extra)
    return (o, stat), (q, k, v, vis, factors, key_bias, o, stat)


def _forward_kernel(plan: Plan, table, prefix, factors, q, k, v, q_at, k_at, *refs):
    key_bias, (o, stat, acc, top, mass, at) = (refs[0] if plan.sharing else None), refs[-6:]
    b, h, i, j = (pl.program_id(n) for n in range(4))
    score = plan.score

    @pl.when(j == 0)
    def start():
        acc[...] = jnp.zeros_like(acc)
        mass[...] = jnp.zeros_like(mass)
        top[...] = jnp.full_like(top, rows.floor(score))
        for n in (POSITION, SEGMENT):
            at[n] = column(q_at[n : n + 1])

    def tile(masked: bool) -> None:
        here = (at[POSITION][:, :1], at[SEGMENT][:, :1]), (k_at[POSITION][None], k_at[SEGMENT][None])
        factor = lambda n: factors[h * plan.factors + n]
        bias = None if key_bias is None else key_bias[...]
        s, see = scores(dot(q[...], k[...], (1, 1)), masked, prefix[b], factor, bias, *here, plan)
        if score.activation == "exp":
            before = top[:, :1]
            now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
            w = jnp.exp(s - now)  # masked: exp(NEVER - FLOOR) is exactly 0
            added, fade = rows.exp_terms(w, s, now, score), jnp.exp(before - now)
            fade_mass = fade if score.power == 1.0 else jnp.exp(score.power * (before - now))
            mass[...] = mass[...] * fade_mass + jnp.sum(added, axis=1, keepdims=True)
            acc[...] = acc[...] * fade + dot(w.astype(v.dtype), v[...], (1, 0))
            top[...] = jnp.broadcast_to(now, top.shape)
        else:
            w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
            mass[...] += jnp.sum(rows.terms(w, see, score), axis=1, keepdims=True)
            acc[...] += dot(w.astype(v.dtype), v[...], (1, 0))

    Spans(table, b * pl.num_programs(2) + i).each(j, tile)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        m, t = mass[:, :1], top[:, :1]
        o[...] = (acc[...] / rows.divisor(rows.normaliser(m, t, score))).astype(o.dtype)
        stat[...] = row(rows.saved(m, t, score))


def _backward(plan: Plan, saved: Any, d_out: tuple[Array, Array]) -> tuple[Array, Array, Array, None, Array, Any]:
    dq, dk, dv, d_factors, d_key_bias = backward(plan, saved, *d_out)
    return dq, dk, dv, None, d_factors, d_key_bias


_attend.defvjp(_forward, _backward)
