"""The TPU kernel: chunks in order, the state of a head stays in VMEM over them (arXiv 2405.17381).

Grid (batch, query head, chunk), the last one in order. A chunk is the masked product inside it and one product
with the state before it (the equations are in `xla`). With Taylor features, those of a chunk are formed in VMEM,
and nowhere else; inside a chunk not even there, because their product has a closed form.

The backward pass keeps the inputs only. It runs up once for the state before every chunk, [B, H, T/C, D, V] in f32,
and down once for all gradients (`tpu_backward`): one kernel with both states of a chunk at hand, so that the
gradient of a decay is a sum over its own chunk and not a difference of sums over the sequence. A reverse scan
without saved states would do more products, and would need that difference.

Products are in the dtype of q and k, sums and states in f32; f32 is multiplied exactly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.tiles import LANES, div, dot
from pallas_kernels.linear_scan.features import selections
from pallas_kernels.linear_scan.tpu_backward import backward, bytes_of
from pallas_kernels.linear_scan.tpu_chunk import Features, Plan, Weights, cost, pairs
from pallas_kernels.linear_scan.xla import FORGET, documents

CHUNK = 256
DTYPES = (jnp.float32, jnp.bfloat16)
WIDEST = 512  # numbers a token; above, half the chunk, so that the rows of features fit in VMEM beside a state
STATES = 7 * 2**18  # numbers of the states that the backward pass holds in VMEM: one a grouped head, and 6


def unfit(q: Array, k: Array, v: Array, *, key_dim: int, chunk: int | None) -> str | None:
    """Why this backend cannot serve a call, or None; `key_dim` is the width of the features."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    if chunk is not None and chunk % LANES:
        return f"backend 'tpu' needs a chunk of whole {LANES} tokens but chunk is {chunk}: leave it None or use 'xla'."
    group = q.shape[2] // k.shape[2]
    if (held := (group + 6) * _up(key_dim) * _up(v.shape[3])) > STATES:
        return (
            f"backend 'tpu' holds {group} + 6 states of {key_dim} x {v.shape[3]} numbers in VMEM but they take {held} "
            f"and there is room for {STATES}: use 'xla'."
        )
    return None


def linear_scan_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Array | None,
    segments: Int[Array, "B T"],
    initial_state: Float[Array, "B H F V"],
    initial_segment: Int[Array, "B"],
    scale: float,
    chunk: int | None = None,
    taylor: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H F V"]]:
    """See `pallas_kernels.linear_scan.linear_scan`.

    Args:
      chunk: a multiple of 128 on the device; None: what fits.
      taylor: the features of q and k; F is their width.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    interpret = interpret_for("linear_scan", "tpu")
    length, heads, dim = q.shape[1:]
    width, v_dim = initial_state.shape[2:]
    chunk = _fitted(chunk or (CHUNK if max(width, v_dim) <= WIDEST else CHUNK // 2), length)
    live, document = documents(segments, initial_segment)
    alive = live[:, :, None, None]
    dtype = jnp.promote_types(q.dtype, k.dtype)
    plan = Plan(
        scale=float(scale),
        chunk=chunk,
        group=heads // k.shape[2],
        decay="none" if log_decay is None else "head" if log_decay.ndim == 1 else "token",
        taylor=taylor is not None,
        out=v.dtype,
        interpret=interpret,
    )

    def blocked(x: Array, ones: bool = False) -> Array:
        """[B,T,H,D] to [B,H,t,d]: whole chunks, whole registers; padding and what it holds becomes zeros."""
        x = jnp.where(alive, x, 0).astype(dtype)
        if ones:  # a one behind each live token's numbers, for the features
            x = jnp.concatenate([x, jnp.broadcast_to(alive, (*x.shape[:3], 1)).astype(dtype)], axis=3)
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, -length % chunk), (0, _lanes(x.shape[3]) - x.shape[3])))

    q, k, v = blocked(q, plan.taylor), blocked(k, plan.taylor), blocked(v)
    steps, rate = _steps(plan, log_decay, live, heads)
    document = jnp.pad(document, ((0, 0), (0, -length % chunk)), mode="edge")[:, None]
    ends = jnp.pad(document[:, 0, chunk - 1 :: chunk], ((0, 0), (1, 0))).reshape(-1)  # before and behind chunks
    wide = _lanes(width) - width
    state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, wide), (0, v.shape[3] - v_dim)))
    select, weight = _select(plan, dim, taylor, q.shape[3], dtype)
    o, state = _scan(plan, q, k, v, steps, rate, document, ends, state, select, weight)
    o = jnp.swapaxes(o, 1, 2)[:, :length, :, :v_dim]
    return jnp.where(alive, o, 0), state[:, :, :width, :v_dim]


def _up(n: int) -> int:
    return -(-n // LANES) * LANES


def _lanes(n: int) -> int:
    """A head dim that registers hold without remainder."""
    return 64 if n <= 64 else _up(n)


def _fitted(chunk: int, length: int) -> int:
    """The chunk that cuts `length` into as many with the least padding."""
    count = -(-length // chunk)
    return min(chunk, _up(-(-length // count)))


def _steps(plan: Plan, log_decay: Array | None, live: Array, heads: int) -> tuple[Array, Array]:
    """[B, 1 or H, 1, t] and [H], whose product is the sum of a chunk's log decays up to a token.

    One rate for all tokens multiplies whole numbers of steps, so that their differences are exact.
    """
    decays = live[..., None].astype(jnp.float32)  # padding decays nothing
    rate = jnp.ones((heads,), jnp.float32)
    if log_decay is not None:
        floored = jnp.maximum(log_decay.astype(jnp.float32), FORGET)
        if plan.decay == "head":
            rate = floored
        else:
            decays = jnp.where(live[..., None], floored, 0.0)
    decays = jnp.pad(jnp.swapaxes(decays, 1, 2), ((0, 0), (0, 0), (0, -live.shape[1] % plan.chunk)))
    sums = jnp.cumsum(decays.reshape(*decays.shape[:2], -1, plan.chunk), axis=-1)
    return sums.reshape(*decays.shape[:2], 1, -1), rate


def _select(plan: Plan, dim: int, taylor: str | None, rows: int, dtype: Any) -> tuple[Array, Array]:
    """`selections` as [2, d, F] and [1, F] in whole registers; unused ones without features."""
    if taylor is None:
        return jnp.zeros((2, 8, LANES), dtype), jnp.zeros((1, LANES), jnp.float32)
    picks, weight = selections(dim, taylor, rows)
    fill = _lanes(weight.size) - weight.size
    picks = jnp.pad(jnp.swapaxes(jnp.asarray(picks, dtype), 0, 1), ((0, 0), (0, 0), (0, fill)))
    return picks, jnp.pad(jnp.asarray(weight), (0, fill))[None]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, q, k, v, steps, rate, document, ends, state, select, weight) -> tuple[Array, Array]:
    """[B,H,t,d], [B,K,t,d], [B,K,t,V] in whole chunks and the state before them to [B,H,t,V] and that behind them."""
    args = (q, k, v, steps, rate, document, ends, state, select, weight)
    return _ascend(plan, _forward_kernel, "linear_scan_forward", *args)


def _states(plan: Plan, *args: Array) -> Array:
    """The state before every chunk, [B, H, N, F, V]."""
    return _ascend(plan, _states_kernel, "linear_scan_states", *args)[0]


def _ascend(plan: Plan, kernel: Any, name: str, q, k, v, steps, rate, document, ends, state, select, weight):
    batch, heads, length, dim = q.shape
    size, (width, v_dim), count = plan.chunk, state.shape[2:], q.shape[2] // plan.chunk
    outputs = kernel is _forward_kernel
    rows = lambda d, by=1: pl.BlockSpec((None, None, size, d), lambda b, h, n, *_: (b, div(h, by), n, 0))
    of_head = pl.BlockSpec((None, None, width, v_dim), lambda b, h, n, *_: (b, h, 0, 0))
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, h, n, *_: (0,) * x.ndim)
    if outputs:
        out_shape = [jax.ShapeDtypeStruct((batch, heads, length, v_dim), plan.out)]
        out_shape.append(jax.ShapeDtypeStruct(state.shape, jnp.float32))
        out_specs = [rows(v_dim), of_head]
    else:
        out_shape = [jax.ShapeDtypeStruct((batch, heads, count, width, v_dim), jnp.float32)]
        out_specs = [pl.BlockSpec((None, None, None, width, v_dim), lambda b, h, n, *_: (b, h, n, 0, 0))]
    per_token = plan.decay == "token"
    again = plan.group * bytes_of(k, v) + heads * bytes_of(document) + (1 if per_token else heads) * bytes_of(steps)
    return pl.pallas_call(
        partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, count),
            in_specs=[
                *([rows(dim)] if outputs else []),
                rows(dim, plan.group),
                rows(v_dim, plan.group),
                pl.BlockSpec((None, None, 1, size), lambda b, h, n, *_: (b, h if per_token else 0, 0, n)),
                pl.BlockSpec((None, 1, size), lambda b, h, n, *_: (b, 0, n)),
                of_head,
                whole(select),
                whole(weight),
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((width, v_dim), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(
            plan,
            q,
            select,
            v_dim,
            products=(1, 1, 2) if outputs else (0, 0, 1),
            maps=2 if outputs else 1,
            moved=again + bytes_of(state, select, weight, *out_shape, *([q] if outputs else [])),
        ),
        interpret=plan.interpret,
        name=name,
    )(rate, ends, *([q] if outputs else []), k, v, steps, document, state, select, weight)


def _forward_kernel(plan: Plan, rate, ends, q, k, v, steps, document, first, select, weight, o, last, state):
    _start(first, state)
    weights = _weights(plan, rate, ends, steps, document)
    query, key = Features(plan, q[...], select, weight), Features(plan, k[...], select, weight)
    products = weights.within() * pairs(plan, dot(q[...], k[...], (1, 1)))
    inside = dot(products.astype(v.dtype), v[...], (1, 0))
    before = dot(query.values, state[...].astype(q.dtype), (1, 0))
    o[...] = (plan.scale * (inside + weights.across()[0] * before)).astype(o.dtype)
    _advance(weights, key, v, state)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def finish():
        last[...] = state[...]


def _states_kernel(plan: Plan, rate, ends, k, v, steps, document, first, select, weight, before, state):
    _start(first, state)
    before[...] = state[...]
    _advance(_weights(plan, rate, ends, steps, document), Features(plan, k[...], select, weight), v, state)


def _start(first: Any, state: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def start():
        state[...] = first[...]


def _weights(plan: Plan, rate: Any, ends: Any, steps: Any, document: Any) -> Weights:
    b, h, n = (pl.program_id(i) for i in range(3))
    at = b * (pl.num_programs(2) + 1) + n
    return Weights(plan, rate[h], steps[...], document[...], ends[at], ends[at + 1])


def _advance(weights: Weights, key: Features, v: Any, state: Any) -> None:
    """From the state before a chunk to the one behind it."""
    _, kept, fade = weights.across()
    state[...] = fade * state[...] + dot(key.values, (kept * v[...].astype(jnp.float32)).astype(v.dtype), (0, 0))


def _forward(plan: Plan, *args: Array) -> tuple[tuple[Array, Array], Any]:
    return _scan(plan, *args), args


def _backward(plan: Plan, args: Any, cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    dq, dk, dv, d_steps, d_state = backward(plan, _states(plan, *args), args, *cotangents)
    steps, rate, select, weight = args[3], args[4], args[8], args[9]
    d_rate = jnp.zeros_like(rate)
    if plan.decay == "head":
        d_rate, d_steps = jnp.sum(d_steps * steps, axis=(0, 2, 3)), None
    return dq, dk, dv, d_steps, d_rate, None, None, d_state, jnp.zeros_like(select), jnp.zeros_like(weight)


_scan.defvjp(_forward, _backward)
