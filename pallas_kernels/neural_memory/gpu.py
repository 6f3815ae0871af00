"""The Hopper kernels' wrapper: memories of one matrix, tiles of 64 tokens, M and S in registers (arXiv 2501.00663).

The kernels are in `gpu_kernel` and `gpu_backward`, what they are told in `gpu_plan`. Kept for the backward pass: the
inputs, and in bfloat16 the M and S that each part of a tile, at most a chunk, was entered with. Operands in bfloat16
are enough at any length: a step corrects what the rounding of the one before put wrong.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import PADDING
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.neural_memory.gpu_backward import backward
from pallas_kernels.neural_memory.gpu_kernel import scan
from pallas_kernels.neural_memory.gpu_plan import COLUMNS, Plan, Visits, coefficients, cut, layout, uncut, visits
from pallas_kernels.neural_memory.reference import MemoryState, Weights

FLOATS = (jnp.float32, jnp.bfloat16)


def unfit(
    q: Array,
    k: Array,
    v: Array,
    rates: dict[str, Array],
    start: Weights,
    state: MemoryState | None,
    *,
    tangents: bool,
) -> str | None:
    """Why this backend cannot serve a call, or None. All arrays as the caller gives them."""
    if reason := mg.missing() or mg.inexact(q=q, k=k, v=v):
        return reason
    if tangents:
        return "backend 'gpu' has no forward-mode derivatives but tangents is True: use 'xla', or tangents=False."
    if len(start) > 1:
        return f"backend 'gpu' has memories of one matrix but start has {len(start)}: use 'xla'."
    if q.shape[3] > max(COLUMNS):
        return f"backend 'gpu' has key dims up to {max(COLUMNS)} but q has {q.shape[3]}: use 'xla'."
    kinds = () if state is None else tuple((f"state.{n}[0]", getattr(state, n)[0]) for n in ("M", "S", "frozen"))
    for name, x in (*rates.items(), ("start[0]", start[0]), *kinds):
        if x.dtype not in FLOATS:
            return f"backend 'gpu' takes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    return None


@partial(jax.jit, static_argnames=("chunk", "read_after_write", "tangents", "whole"))
def neural_memory_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    state: MemoryState,
    segments: Int[Array, "B T"],
    *,
    chunk: int,
    read_after_write: bool,
    tangents: bool = False,
    whole: bool = False,
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """See `pallas_kernels.neural_memory.neural_memory`.

    Args:
      whole: there is nothing but one document in every row and nothing before it: half as many states are kept.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    rates = {"eta": eta, "theta": theta, "alpha": alpha}
    if reason := unfit(q, k, v, rates, start, state, tangents=tangents):
        raise NotImplementedError(f"neural_memory: {reason}")
    interpret = mg.mode(interpret_for("neural_memory", "gpu"))
    length, dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    options = {"whole": whole, "read_after_write": read_after_write, "staged": mg.simulated(), "interpret": interpret}
    rows = next(n for n in COLUMNS if n >= dim)  # others are padded
    plan = layout(length, rows, chunk=chunk, **options)
    at, count, segment = visits(segments, state.segment, state.count, plan, chunk)
    live = segments != PADDING
    more_rows, more_columns = rows - dim, -value_dim % plan.columns

    def tokens(x: Array, more: int) -> Array:
        """Zeroed padding neither reads nor writes, even where it holds nan."""
        x = cut(jnp.where(live[..., None, None], x.astype(jnp.bfloat16), 0), plan)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))

    def rate(x: Array, still: float) -> Array:
        """[B, H, N, 64]; nothing happens at padding."""
        x = cut(jnp.where(live[..., None], x.astype(jnp.float32), still), plan, still)
        return jnp.moveaxis(x, 2, 1).reshape(x.shape[0], x.shape[2], plan.tiles, -1)

    def matrices(x: Array) -> Array:
        return jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 2) + [(0, more_rows), (0, more_columns)])

    steps = jnp.stack([rate(eta, 1.0), rate(theta, 0.0), rate(alpha, 0.0)], axis=3)
    before = tuple(matrices(kind[0]) for kind in (state.M, state.S, state.frozen))
    arrays = (tokens(q, more_rows), tokens(k, more_rows), tokens(v, more_columns), matrices(start[0]), before)
    y, after = _run(plan, at, steps, *arrays)
    y = uncut(y, plan, length)[..., :value_dim]
    return y, MemoryState(*((x[:, :, :dim, :value_dim],) for x in after), count=count, segment=segment)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
    plan: Plan,
    at: Visits,
    rates: Float[Array, "B H N 3 64"],
    q: Array,
    k: Array,
    v: Array,
    start: Float[Array, "H D V"],
    memory: tuple[Array, Array, Array],
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Reads [B, N · 64, H, V] and M, S and F [B, H, D, V] after the row; everything in whole tiles."""
    y, after, _ = scan(plan, at, coefficients(rates, at, plan), q, k, v, start, memory, keep=False)
    return y, after


def _forward(plan: Plan, at, rates, q, k, v, start, memory) -> tuple[Any, Any]:
    y, after, kept = scan(plan, at, coefficients(rates, at, plan), q, k, v, start, memory, keep=True)
    return (y, after), (at, rates, q, k, v, kept)


def _backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    at, rates, *rest = saved
    c, pull = jax.vjp(lambda rates: coefficients(rates, at, plan), rates)
    d_c, dq, dk, dv, d_start, d_memory = backward(plan, at, c, rest, *cotangents)
    return None, *pull(d_c), dq, dk, dv, d_start, d_memory


_run.defvjp(_forward, _backward)
