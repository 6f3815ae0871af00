"""On Hopper: the recurrence of the sums is a `linear_scan`, whose kernel does the products.

Relative to the running maximum m_t = max_{i<=t} s_i of a segment, the sums of arXiv 2405.13956 (section 3.2) decay:

    u_t = e^{m_{t-1} - m_t} u_{t-1} + e^{s_t - m_t}
    w_t = e^{m_{t-1} - m_t} w_{t-1} + e^{s_t - m_t} v_t

w is linear attention with one feature, e^{s_t - m_t} <= 1, and a log decay per token that is never positive. u, one
number a token, is left to XLA. Features go to the tensor cores in bfloat16, as the weights of `flash` do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.linear_scan.gpu import linear_scan_gpu
from pallas_kernels.prefix_softmax.reference import Partial


def unfit(v: Array) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing():
        return reason
    return mg.inexact(v=v)


def prefix_softmax_gpu(
    s: Float[Array, "B T H"],
    v: Float[Array, "B T H V"],
    live: Bool[Array, "B T"],
    runs: Int[Array, "B T"],
    initial: Partial,
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Partial]:
    """See `pallas_kernels.prefix_softmax.prefix_softmax` and `prefix_softmax_xla`; `chunk` is the kernel's own.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    level, initial = jax.lax.stop_gradient(initial.m), _relative(initial)
    same = (runs == jnp.pad(runs[:, :-1], ((0, 0), (1, 0))))[..., None]  # as the token, or the state, before
    s = jnp.where(live[..., None], s, NEVER)
    m = jax.lax.stop_gradient(_running_maximum(s, runs, level))
    before = jnp.concatenate([level[:, None], m[:, :-1]], axis=1)
    feature = jnp.exp(s - jnp.where(live[..., None], m, 0.0))
    u = _running_sum(jnp.where(same, jnp.exp(before - m), 0.0), feature, initial.u)
    w, last = linear_scan_gpu(
        jnp.ones((*s.shape, 1), v.dtype),
        feature[..., None].astype(v.dtype),
        v,
        log_decay=jnp.where(same, before - m, 0.0),
        segments=jnp.where(live, runs + 1, 0),
        initial_state=initial.w[:, :, None],
        initial_segment=jnp.ones((s.shape[0],), runs.dtype),
        scale=1.0,
    )
    held = jnp.where(live[..., None], u, 1.0)
    o = (w.astype(jnp.float32) / held[..., None]).astype(v.dtype)
    return o, Partial(m=m[:, -1], u=u[:, -1], w=last[:, :, 0])


def _relative(initial: Partial) -> Partial:
    """The state relative to a constant m: what m does to the sums is a factor of both."""
    rise = jnp.exp(initial.m - jax.lax.stop_gradient(initial.m))
    return Partial(m=initial.m, u=initial.u * rise, w=initial.w * rise[..., None])


def _running_maximum(s: Array, runs: Array, level: Array) -> Array:
    """The largest s [B, T, H] of a token's run so far; run 0 starts from `level` [B, H]."""
    s = s.at[:, 0].max(jnp.where(runs[:, :1] == 0, level, NEVER))

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return b[0], jnp.where(a[0] == b[0], jnp.maximum(a[1], b[1]), b[1])

    runs = jnp.broadcast_to(runs[..., None], s.shape)
    return jax.lax.associative_scan(join, (runs, s), axis=1)[1]


def _running_sum(fade: Array, added: Array, start: Array) -> Array:
    """u_t = fade_t u_{t-1} + added_t [B, T, H], from `start` [B, H]."""
    added = added.at[:, 0].add(fade[:, 0] * start)

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] * b[0], b[0] * a[1] + b[1]

    return jax.lax.associative_scan(join, (fade, added), axis=1)[1]
