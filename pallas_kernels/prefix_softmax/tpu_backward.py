"""The backward kernel for TPUs: chunks from the last to the first, what later tokens ask of earlier ones in VMEM.

With P_ti = exp(s_i - L_t) for i <= t of the same segment, the weights of `tpu`, and δ_t = do_t · o_t:

    dv_i = Σ_t P_ti do_t        ds_i = Σ_t P_ti (do_t · v_i - δ_t)

Of the tokens behind a chunk only G = Σ_t e^{R - L_t} do_t and h = Σ_t e^{R - L_t} δ_t are needed, relative to their
smallest L, R: L grows along a segment, so that e^{s_i - R} <= 1 for every earlier i. The state behind the last chunk
is one more such token with L = m, do = dw and δ = -du, and the state before the first one is one more i.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.tiles import column, dot, row
from pallas_kernels.prefix_softmax.reference import Partial

BIG = -NEVER  # above any L


def sees(runs: Array, keys: Array) -> tuple[Array, Array]:
    """[C, C], which tokens of a chunk see which, and the run of each [C, 1]; runs, keys [1, C], keys -1 = padding."""
    size = runs.shape[1]
    here, there = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    run = column(runs)[:, :1]
    return (there <= here) & (run == keys), run


def backward(
    plan: Any, s, v, runs, keys, ends, first: Partial, o, m_last, mass, do: Array, d_last: Partial
) -> tuple[Array, Array, Partial]:
    """Gradients of s [B,H,1,t], v [B,H,t,V] and the state before them; that of the last m is none."""
    batch, heads, length, v_dim = v.shape
    size, count = plan.chunk, length // plan.chunk
    end = count - 1
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=3)[:, :, None]
    of_chunk = pl.BlockSpec((None, None, size, v_dim), lambda b, h, n, *_: (b, h, end - n, 0))
    numbers = pl.BlockSpec((None, None, 1, size), lambda b, h, n, *_: (b, h, 0, end - n))
    place = pl.BlockSpec((None, 1, size), lambda b, h, n, *_: (b, 0, end - n))
    one = pl.BlockSpec((None, None, 1, 1), lambda b, h, n, *_: (b, h, 0, 0))
    wide = pl.BlockSpec((None, None, 1, v_dim), lambda b, h, n, *_: (b, h, 0, 0))
    inputs = (s, v, do.astype(v.dtype), mass, delta)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (s, v, first.u, first.w)]
    ds, dv, du, dw = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, count),
            in_specs=[numbers, of_chunk, of_chunk, numbers, numbers, place, place, one, one, one, wide],
            out_specs=[numbers, of_chunk, one, wide],
            scratch_shapes=[pltpu.VMEM((1, d), jnp.float32) for d in (1, 1, v_dim)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * length * (2 * size + 3) * v_dim,
            transcendentals=batch * heads * length * (size + 2),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, d_last.w, *out_shape))
            + heads * sum(x.size * x.dtype.itemsize for x in (runs, keys)),
        ),
        interpret=plan.interpret,
        name="prefix_softmax_backward",
    )(ends, *inputs, runs, keys, first.m, m_last, d_last.u, d_last.w)
    # The state before is a key with score m, mass u and values w: its m scales both.
    dm = jnp.sum(dw * first.w, axis=3, keepdims=True) + du * first.u
    return ds, dv, Partial(m=dm, u=du, w=dw)


def _kernel(ends, s, v, do, mass, delta, runs, keys, m_first, m_last, du_last, dw_last, ds, dv, du, dw, *scratch):
    b, n, count = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    low, asked, wanted = scratch  # R [1, 1], h [1, 1], G [1, V]

    @pl.when(n == 0)
    def start():
        low[...], asked[...], wanted[...] = m_last[...], -du_last[...], dw_last[...]

    at = b * (count + 1) + count - 1 - n
    before, after = ends[at], ends[at + 1]
    see, run = sees(runs[...], keys[...])
    column_of = lambda x: column(x)[:, :1]
    logs, deltas, exact = column_of(mass[...]), column_of(delta[...]), v[...].astype(jnp.float32)

    p = jnp.exp(jnp.where(see, s[...] - logs, NEVER))
    later = jnp.exp(jnp.where(keys[...] == after, s[...] - low[...], NEVER))  # [1, C]
    within = p * (dot(do[...], v[...], (1, 1)) - deltas)
    behind = row(jnp.sum(exact * wanted[...], axis=1, keepdims=True)) - asked[...]
    ds[...] = (jnp.sum(within, axis=0, keepdims=True) + later * behind).astype(ds.dtype)
    dv[...] = (dot(p.astype(do.dtype), do[...], (0, 0)) + column_of(later) * wanted[...]).astype(dv.dtype)

    same, mine = before == after, run == before
    lowest = jnp.min(jnp.where(mine, logs, BIG), axis=0, keepdims=True)
    lowest = jnp.minimum(lowest, jnp.where(same, low[...], BIG))
    old = jnp.where(same, jnp.exp(lowest - low[...]), 0.0)
    new = jnp.exp(jnp.where(mine, lowest - logs, NEVER))
    asked[...] = old * asked[...] + jnp.sum(new * deltas, axis=0, keepdims=True)
    wanted[...] = old * wanted[...] + jnp.sum(new * do[...].astype(jnp.float32), axis=0, keepdims=True)
    low[...] = lowest

    @pl.when(n == count - 1)
    def finish():
        fade = jnp.exp(m_first[...] - low[...])
        du[...], dw[...] = -fade * asked[...], fade * wanted[...]
