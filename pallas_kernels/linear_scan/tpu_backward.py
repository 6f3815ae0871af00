"""The backward kernel for TPUs: chunks from the last to the first, the cotangent of the state stays in VMEM.

Grid (batch, key head, chunk, query head of the group): dk and dv of a chunk add up over the group in place.
With A = scale · within ∘ pairs(q kᵀ), S and dS the state before the chunk and the cotangent of the one behind it:

    dq = dA k + scale · old ∘ do Sᵀ        dv = Aᵀ do + kept ∘ k dS
    dk = dAᵀ q + kept ∘ v dSᵀ              dS <- fade · dS + scale · (old ∘ q)ᵀ do

and a log decay gets, of each weight, the weight times its gradient for both ends of the distance it spans.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.flash.tiles import dot, row
from pallas_kernels.linear_scan.tpu_chunk import Features, Plan, Weights, cost, pairs


def bytes_of(*arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def backward(
    plan: Plan, states: Array, args: Any, do: Array, d_last: Array
) -> tuple[Array, Array, Array, Array | None, Array]:
    """dq, dk, dv, the gradient of every query head's `steps` [B, H, 1, t] (None without decay) and of the state."""
    q, k, v, steps, rate, document, ends, _, select, weight = args
    batch, heads, length, dim = q.shape
    size, group, (width, v_dim) = plan.chunk, plan.group, states.shape[3:]
    end = length // size - 1
    do = do.astype(q.dtype)

    of_query = lambda d: pl.BlockSpec((None, None, size, d), lambda b, h, n, g, *_: (b, h * group + g, end - n, 0))
    of_key = lambda d: pl.BlockSpec((None, None, size, d), lambda b, h, n, g, *_: (b, h, end - n, 0))
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, h, n, g, *_: (0,) * x.ndim)
    # Read in the first round over the heads and written in the last one; else the block stays where it is.
    in_first = lambda b, h, n, g, *_: (b, h * group + jnp.where(n == 0, g, group - 1), 0, 0)
    in_last = lambda b, h, n, g, *_: (b, h * group + jnp.where(n == end, g, 0), 0, 0)
    of_head = lambda index: pl.BlockSpec((None, None, width, v_dim), index)

    def numbers(heads: str) -> pl.BlockSpec:
        head = lambda h, g: h * group + g if heads == "each" else 0
        return pl.BlockSpec((None, None, 1, size), lambda b, h, n, g, *_: (b, head(h, g), 0, end - n))

    out_specs = [of_query(dim), of_key(dim), of_key(v_dim), of_head(in_last)]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, d_last)]
    if plan.decays:
        out_specs.append(numbers("each"))
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32))
    out = pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads // group, end + 1, group),
            in_specs=[
                of_query(dim),
                of_key(dim),
                of_key(v_dim),
                of_query(v_dim),
                pl.BlockSpec(
                    (None, None, None, width, v_dim), lambda b, h, n, g, *_: (b, h * group + g, end - n, 0, 0)
                ),
                numbers("each" if plan.decay == "token" else "one"),
                pl.BlockSpec((None, 1, size), lambda b, h, n, g, *_: (b, 0, end - n)),
                of_head(in_first),
                whole(select),
                whole(weight),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((group, width, v_dim), jnp.float32),
                pltpu.VMEM((size, dim), jnp.float32),
                pltpu.VMEM((size, v_dim), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=cost(
            plan,
            q,
            select,
            v_dim,
            products=(3, 2, 4),
            maps=4,
            moved=bytes_of(q, k, v, do, states, d_last, select, weight, *out_shape)
            + heads // group * bytes_of(document)
            + (1 if plan.decay == "token" else heads // group) * bytes_of(steps),
        ),
        interpret=plan.interpret,
        name="linear_scan_backward",
    )(rate, ends, q, k, v, do, states, steps, document, d_last, select, weight)
    dq, dk, dv, d_state = out[:4]
    return dq, dk, dv, out[4] if plan.decays else None, d_state


def _kernel(plan: Plan, rate, ends, q, k, v, do, before, steps, document, d_last, select, weight, *out):
    dq, dk, dv, d_first = out[:4]
    d_states, acc_k, acc_v = out[-3:]
    b, h, n, g = (pl.program_id(i) for i in range(4))
    count = pl.num_programs(2)

    @pl.when(g == 0)
    def start():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    @pl.when(n == 0)
    def take():
        d_states[g] = d_last[...]

    at = b * (count + 1) + count - 1 - n
    weights = Weights(plan, rate[h * plan.group + g], steps[...], document[...], ends[at], ends[at + 1])
    within, (old, kept, fade) = plan.scale * weights.within(), weights.across()
    exact = lambda x: x.astype(jnp.float32)
    query, key = Features(plan, q[...], select, weight), Features(plan, k[...], select, weight)
    d_state = d_states[g]
    low = d_state.astype(q.dtype)

    product = dot(q[...], k[...], (1, 1))
    gained = within * dot(do[...], v[...], (1, 1))  # the gradient of pairs(product)
    a = within * pairs(plan, product)
    da = (gained * product if plan.taylor else gained).astype(q.dtype)
    read = plan.scale * old * dot(do[...], before[...].astype(q.dtype), (1, 1))  # of the query's features
    keep = kept * dot(v[...], low, (1, 1))  # of the key's
    dq[...] = (dot(da, k[...], (1, 0)) + query.pull(read)).astype(dq.dtype)
    acc_k[...] += dot(da, q[...], (0, 0)) + key.pull(keep)
    acc_v[...] += dot(a.astype(q.dtype), do[...], (0, 0)) + kept * dot(key.values, low, (1, 0))
    faded = fade * d_state
    seen = (plan.scale * old * exact(do[...])).astype(do.dtype)
    d_states[g] = faded + dot(query.values, seen, (0, 0))

    if plan.decays:
        over = lambda x, axis: jnp.sum(x, axis=axis, keepdims=True)
        later = over(read * exact(query.values), 1)
        written = over(keep * exact(key.values), 1)
        behind = over(written, 0) + over(over(faded * before[...], 1), 0)
        out[4][...] = _of_steps(gained * pairs(plan, product), later - written, behind)

    @pl.when(g == plan.group - 1)
    def finish():
        dk[...] = acc_k[...].astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)

    @pl.when(n == count - 1)
    def give():
        d_first[...] = d_states[g]


def _of_steps(spans: Array, ends: Array, behind: Array) -> Array:
    """[1, C], what the sum of log decays up to each token gets.

    Args:
      spans [C, C]: weights within the chunk times their gradients.
      ends [C, 1]: of what a token reads of the state before, less that of what it writes behind.
      behind [1, 1]: of all that is behind the chunk, which its last sum has faded.
    """
    line = lambda axis, shape: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    size = spans.shape[0]
    spans = jnp.where(line(0, spans.shape) > line(1, spans.shape), spans, 0.0)  # a token's own weight spans nothing
    at_end = jnp.where(line(1, (1, size)) == size - 1, behind, 0.0)
    return row(ends + jnp.sum(spans, axis=1, keepdims=True)) - jnp.sum(spans, axis=0, keepdims=True) + at_end
