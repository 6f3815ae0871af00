"""The Hopper kernel's wrapper: chunks of 64 tokens, one state per head in registers (arXiv 2405.17381).

Operands of products are bfloat16, the state before a chunk among them; sums, decays and the state that is carried
on are f32, and so are outputs where v is. The kernel is in `gpu_kernel`, its second, third and fourth call in
`gpu_backward`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.linear_scan.gpu_backward import backward, directions
from pallas_kernels.linear_scan.gpu_chunk import CHUNK
from pallas_kernels.linear_scan.gpu_kernel import Plan, scan
from pallas_kernels.linear_scan.xla import FORGET, documents

WIDTHS = (64, 128)  # key and value dims the kernel has; others are padded


def unfit(q: Array, k: Array, v: Array, *, key_dim: int) -> str | None:
    """Why this backend cannot serve a call, or None; `key_dim` is the width of the features."""
    if reason := mg.missing():
        return reason
    if key_dim != q.shape[3]:
        return f"backend 'gpu' forms no features but taylor makes {key_dim} of {q.shape[3]} numbers: use 'xla'."
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != jnp.bfloat16 and (name, x.dtype) != ("v", jnp.float32):  # whose outputs are wanted in float32
            return f"backend 'gpu' computes bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
        if x.shape[3] > WIDTHS[-1]:
            return f"backend 'gpu' has head dims up to {WIDTHS[-1]} but {name} has {x.shape[3]}: use 'xla'."
    return None


def linear_scan_gpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Array | None,
    segments: Int[Array, "B T"],
    initial_state: Float[Array, "B H D V"],
    initial_segment: Int[Array, "B"],
    scale: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H D V"]]:
    """See `pallas_kernels.linear_scan.linear_scan`. Chunks have 64 tokens, whatever `chunk` is.

    The backward pass keeps the inputs and the last state.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, key_dim=q.shape[3]):
        raise NotImplementedError(f"linear_scan: {reason}")
    plan = Plan(
        scale=float(scale),
        decay=log_decay is not None,
        out=v.dtype,
        staged=mg.simulated(),
        interpret=mg.mode(interpret_for("linear_scan", "gpu")),
    )
    length, key_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    live, document = documents(segments, initial_segment)
    # Zeroed padding neither reads nor writes, even nan.
    q, k, v = (_blocked(x.astype(jnp.bfloat16), live) for x in (q, k, v))
    fill = -length % CHUNK
    g = None
    if log_decay is not None:
        steps = jnp.maximum(log_decay.astype(jnp.float32), FORGET)  # [H] or [B, T, H]
        steps = jnp.where(live[..., None], steps, 0.0)
        g = jnp.pad(jnp.swapaxes(steps, 1, 2), ((0, 0), (0, 0), (0, fill)))
    document = jnp.pad(document, ((0, 0), (0, fill)), mode="edge")
    wider = lambda n: next(width for width in WIDTHS if width >= n) - n
    start = jnp.pad(initial_state, ((0, 0), (0, 0), (0, wider(key_dim)), (0, wider(value_dim))))
    o, last = _scan(plan, q, k, v, g, document, start)
    return o[:, :length, :, :value_dim], last[:, :, :key_dim, :value_dim]


def _blocked(x: Float[Array, "B T H D"], live: Array) -> Float[Array, "B t H d"]:
    """Whole chunks of live tokens, and a width the kernel has."""
    x = jnp.where(live[..., None, None], x, 0)
    width = next(n for n in WIDTHS if n >= x.shape[3])
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, width - x.shape[3])))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    plan: Plan, q: Array, k: Array, v: Array, g: Array | None, document: Array, start: Array
) -> tuple[Array, Array]:
    """Whole chunks; g [B,H,T] in f32, natural logarithms, 0 at padding."""
    return _forward(plan, q, k, v, g, document, start)[0]


def _forward(
    plan: Plan, q: Array, k: Array, v: Array, g: Array | None, document: Array, start: Array
) -> tuple[tuple[Array, Array], tuple[Array | None, ...]]:
    ahead, _, fade = directions(plan, g, document)
    o, last, _ = scan(plan, q, k, v, start, ahead, fade, name="linear_scan_forward", dtype=plan.out)
    return (o, last), (q, k, v, g, document, start, last)


def _backward(plan: Plan, saved: tuple[Array | None, ...], cotangents: tuple[Array, Array]) -> tuple[Array | None, ...]:
    do, d_last = cotangents
    dq, dk, dv, dg, d_start = backward(plan, saved, do.astype(jnp.bfloat16), d_last)
    return dq, dk, dv, dg, None, d_start


_scan.defvjp(_forward, _backward)
