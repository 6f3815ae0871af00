"""Gradients of the Hopper scan: three more calls of the same kernel, and sums in XLA.

With w_ts = scale · exp(G_t - G_s) for s <= t of one document, o_t = Σ_s w_ts (q_t·k_s) v_s gives

    dq_t = Σ_s w_ts (do_t·v_s) k_s,   dk_s = Σ_t w_ts (v_s·do_t) q_t,   dv_s = Σ_t w_ts (k_s·q_t) do_t:

the first is the scan of (do, v, k), the others are scans of (v, do, q) and (k, q, do) backwards in time, whose state
is the gradient of the state. What is kept for them is the inputs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_scan.gpu_chunk import CHUNK
from pallas_kernels.linear_scan.gpu_kernel import MARK, Plan, scan

LOG2E = math.log2(math.e)


def directions(
    plan: Plan, g: Float[Array, "B H T"] | None, document: Int[Array, "B T"]
) -> tuple[Float[Array, "B _ 6 T"], Float[Array, "B _ 6 T"], Float[Array, "B _ N"]]:
    """`scan(tokens=)` forwards and backwards in time, and `fade`; one head without decay."""
    steps = jnp.zeros((document.shape[0], 1, document.shape[1]), jnp.float32) if g is None else g * LOG2E
    cut = lambda x: x.reshape(*x.shape[:-1], -1, CHUNK)
    total = jnp.cumsum(cut(steps), axis=-1)
    owner = cut(document)[:, None]  # [B, 1, N, 64]
    before = jnp.pad(owner[..., :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))  # 0 owns the first state
    old = jnp.where(owner == before, jnp.exp2(total), 0.0)
    kept = jnp.where(owner == owner[..., -1:], jnp.exp2(total[..., -1:] - total), 0.0)
    owner = jnp.broadcast_to(owner.astype(jnp.float32), total.shape)
    stack = lambda *x: jnp.stack([y.reshape(*y.shape[:2], -1) for y in x], axis=2)
    ahead = stack(total, -total, owner, owner, plan.scale * old, kept)
    back = stack(-total, total, owner, owner, kept, plan.scale * old)
    return ahead, back, old[..., -1]


def backward(
    plan: Plan, saved: tuple[Any, ...], do: Float[Array, "B T H V"], d_last: Float[Array, "B H D V"]
) -> tuple[Array, Array, Array, Array | None, Array]:
    """Gradients of q, k, v, g [B,H,T] (None without decay) and the first state."""
    q, k, v, g, document, start, last = saved
    ahead, back, fade = directions(plan, g, document)
    shared = q.shape[2] > k.shape[2]
    exact = lambda needed: jnp.float32 if needed else q.dtype  # what is summed afterwards is not rounded before
    turned = lambda x: jnp.swapaxes(x, 2, 3)
    dq, _, states = scan(
        plan,
        *(do, v, k, turned(start), ahead, fade),
        name="linear_scan_dq",
        dtype=exact(plan.decay),
        mark=plan.decay,
    )
    dk, _, slopes = scan(
        plan,
        *(v, do, q, turned(d_last), back, fade),
        name="linear_scan_dk",
        reverse=True,
        dtype=exact(plan.decay or shared),
        mark=plan.decay,
    )
    dv, d_start, _ = scan(
        plan, *(k, q, do, d_last, back, fade), name="linear_scan_dv", reverse=True, dtype=exact(shared)
    )
    dg = None
    if states is not None and slopes is not None:
        dg = _decay(q, k, dq, dk, jnp.sum(states * slopes, axis=(3, 4)), jnp.sum(last * d_last, axis=(2, 3)))
    return dq.astype(q.dtype), _grouped(dk, k), _grouped(dv, v), dg, d_start


def _grouped(x: Float[Array, "B T H D"], like: Float[Array, "B T K D"]) -> Float[Array, "B T K D"]:
    """Sums the heads that share a key head."""
    return jnp.sum(x.reshape(*like.shape[:3], -1, x.shape[3]), axis=3).astype(like.dtype)


def _decay(
    q: Array, k: Array, dq: Array, dk: Array, at_marks: Float[Array, "B H M"], at_end: Float[Array, "B H"]
) -> Float[Array, "B H T"]:
    """dg_u = <dS, S> at the end of u's stretch of `MARK` chunks + Σ_{t >= u in it} (q_t·dq_t - k_t·dk_t).

    q_t·dq_t is the share in the loss of all that t reads, k_t·dk_t of all that reads t; what lies between tokens on
    one side of u cancels. From the last token on, the sum would cancel too much to be right in bfloat16.
    """
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    share = lambda x, dx: jnp.sum(x.astype(jnp.float32) * dx, axis=3)
    gained = jnp.swapaxes(share(q, dq) - share(k, dk), 1, 2)
    length, stretch = gained.shape[2], MARK * CHUNK
    gained = jnp.pad(gained, ((0, 0), (0, 0), (0, -length % stretch)))
    gained = gained.reshape(*gained.shape[:2], -1, stretch)
    behind = jnp.concatenate([at_marks[..., 1:], at_end[..., None]], axis=2)
    dg = jax.lax.cumsum(gained, axis=3, reverse=True) + behind[..., None]
    return dg.reshape(*dg.shape[:2], -1)[:, :, :length]
