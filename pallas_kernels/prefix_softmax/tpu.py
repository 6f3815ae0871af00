"""The TPU kernel: chunks in order, the (m, u, w) of everything before stays in VMEM (arXiv 2405.13956, section 3.2).

Grid (batch, head, chunk), the last one in order. The forward pass keeps one number a token and head, L_t = log of the
mass of its softmax. Both it and the backward pass (`tpu_backward`) then need the scores of one chunk at a time.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.tiles import LANES, dot, row
from pallas_kernels.prefix_softmax.reference import Partial
from pallas_kernels.prefix_softmax.tpu_backward import backward, sees

CHUNK = 256
DTYPES = (jnp.float32, jnp.bfloat16)
WIDEST = 2048  # numbers of a token's values whose chunks fit in VMEM


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled."""

    chunk: int
    interpret: Any


def unfit(s: Array, v: Array, chunk: int | None) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if v.dtype not in DTYPES:
        return f"backend 'tpu' computes float32 and bfloat16 but v is {v.dtype}: cast it or use 'xla'."
    if s.dtype not in DTYPES:
        return f"backend 'tpu' takes scores in float32 and bfloat16 but s is {s.dtype}: cast it or use 'xla'."
    if chunk is not None and chunk % LANES:
        return f"backend 'tpu' needs a chunk of whole {LANES} tokens but chunk is {chunk}: leave it None or use 'xla'."
    if v.shape[3] > WIDEST:
        return f"backend 'tpu' has room for {WIDEST} numbers of a token's values but v has {v.shape[3]}: use 'xla'."
    return None


def prefix_softmax_tpu(
    s: Float[Array, "B T H"],
    v: Float[Array, "B T H V"],
    live: Bool[Array, "B T"],
    runs: Int[Array, "B T"],
    initial: Partial,
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Partial]:
    """See `pallas_kernels.prefix_softmax.prefix_softmax` and `prefix_softmax_xla`.

    Args:
      chunk: a multiple of 128 on the device; None: what fits.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    interpret = interpret_for("prefix_softmax", "tpu")
    length, v_dim = v.shape[1], v.shape[3]
    plan = Plan(chunk or _fitted(v_dim, length), interpret)
    tail, wide = -length % plan.chunk, _lanes(v_dim) - v_dim
    s = jnp.swapaxes(jnp.where(live[..., None], s, 0.0), 1, 2)[:, :, None]
    v = jnp.swapaxes(jnp.where(live[..., None, None], v, 0), 1, 2)
    s = jnp.pad(s, ((0, 0), (0, 0), (0, 0), (0, tail)))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, tail), (0, wide)))
    # Padding behind the end stays in the last run, so that the state passes through it unchanged.
    runs = jnp.pad(runs, ((0, 0), (0, tail)), mode="edge")[:, None]
    keys = jnp.where(jnp.pad(live, ((0, 0), (0, tail)))[:, None], runs, -1)  # runs of those that anyone sees
    ends = jnp.pad(runs[:, 0, plan.chunk - 1 :: plan.chunk], ((0, 0), (1, 0))).reshape(-1)  # before, behind chunks
    first = Partial(
        m=initial.m[..., None, None],
        u=initial.u[..., None, None],
        w=jnp.pad(initial.w, ((0, 0), (0, 0), (0, wide)))[:, :, None],
    )
    o, last = _prefix(plan, s, v, runs, keys, ends, first)
    o = jnp.where(live[..., None, None], jnp.swapaxes(o, 1, 2)[:, :length, :, :v_dim], 0)
    return o, Partial(m=last.m[..., 0, 0], u=last.u[..., 0, 0], w=last.w[:, :, 0, :v_dim])


def _lanes(n: int) -> int:
    """A head dim that registers hold without remainder."""
    return 64 if n <= 64 else -(-n // LANES) * LANES


def _fitted(v_dim: int, length: int) -> int:
    """The chunk that fits in VMEM and cuts `length` with the least padding."""
    chunk = CHUNK if v_dim <= 512 else LANES
    return min(chunk, -(-length // LANES) * LANES)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _prefix(plan: Plan, s, v, runs, keys, ends, first: Partial) -> tuple[Array, Partial]:
    """[B,H,1,t], [B,H,t,V] in whole chunks, places [B,1,t], the state before them; outputs and that behind them."""
    return _run(plan, s, v, runs, keys, ends, first)[:2]


def _run(plan: Plan, s, v, runs, keys, ends, first: Partial) -> tuple[Array, Partial, Array]:
    """And L [B,H,1,t]; padding has that of its keys, or NEVER without any, and no cotangent that it could weigh."""
    batch, heads, length, v_dim = v.shape
    size, count = plan.chunk, length // plan.chunk
    of_chunk = pl.BlockSpec((None, None, size, v_dim), lambda b, h, n, *_: (b, h, n, 0))
    numbers = pl.BlockSpec((None, None, 1, size), lambda b, h, n, *_: (b, h, 0, n))
    place = pl.BlockSpec((None, 1, size), lambda b, h, n, *_: (b, 0, n))
    of_head = [pl.BlockSpec((None, None, 1, d), lambda b, h, n, *_: (b, h, 0, 0)) for d in (1, 1, v_dim)]
    state_shapes = [jax.ShapeDtypeStruct((batch, heads, 1, d), jnp.float32) for d in (1, 1, v_dim)]
    out_shape = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(s.shape, jnp.float32), *state_shapes]
    o, mass, *last = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, count),
            in_specs=[numbers, of_chunk, place, place, *of_head],
            out_specs=[of_chunk, numbers, *of_head],
            scratch_shapes=[pltpu.VMEM((1, d), jnp.float32) for d in (1, 1, v_dim)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * heads * length * (size + 1) * v_dim,
            transcendentals=batch * heads * length * (size + 2),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (s, v, first.w, *out_shape))
            + heads * sum(x.size * x.dtype.itemsize for x in (runs, keys)),
        ),
        interpret=plan.interpret,
        name="prefix_softmax_forward",
    )(ends, s, v, runs, keys, first.m, first.u, first.w)
    return o, Partial(*last), mass


def _kernel(plan, ends, s, v, runs, keys, m0, u0, w0, o, mass, m_last, u_last, w_last, m_state, u_state, w_state):
    b, n, count = pl.program_id(0), pl.program_id(2), pl.num_programs(2)

    @pl.when(n == 0)
    def start():
        m_state[...], u_state[...], w_state[...] = m0[...], u0[...], w0[...]

    see, run = sees(runs[...], keys[...])
    goes_on = run == ends[b * (count + 1) + n]  # [C, 1]: tokens of the segment that the state belongs to
    before = jnp.where(goes_on, m_state[...], NEVER)
    # Each row has its own maximum: relative to the chunk's largest exponential early rows could vanish.
    m = jnp.maximum(jnp.max(jnp.where(see, s[...], NEVER), axis=1, keepdims=True), before)
    p = jnp.exp(jnp.where(see, s[...] - m, NEVER))
    fade = jnp.where(goes_on, jnp.exp(before - m), 0.0)
    u = jnp.sum(p, axis=1, keepdims=True) + fade * u_state[...]
    w = dot(p.astype(v.dtype), v[...], (1, 0)) + fade * w_state[...]
    held = jnp.where(u == 0, 1.0, u)
    o[...] = (w / held).astype(o.dtype)
    mass[...] = row(m + jnp.log(held))
    m_state[...], u_state[...], w_state[...] = m[-1:], u[-1:], w[-1:]

    @pl.when(n == count - 1)
    def finish():
        m_last[...], u_last[...], w_last[...] = m_state[...], u_state[...], w_state[...]


def _forward(plan: Plan, s, v, runs, keys, ends, first: Partial) -> tuple[tuple[Array, Partial], Any]:
    o, last, mass = _run(plan, s, v, runs, keys, ends, first)
    return (o, last), (s, v, runs, keys, ends, first, o, last.m, mass)


def _backward(plan: Plan, kept: Any, cotangents: tuple[Array, Partial]) -> tuple[Any, ...]:
    s, v, runs, keys, ends, first, o, m_last, mass = kept
    ds, dv, d_first = backward(plan, s, v, runs, keys, ends, first, o, m_last, mass, *cotangents)
    return ds, dv, None, None, None, d_first


_prefix.defvjp(_forward, _backward)
