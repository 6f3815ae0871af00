"""The Hopper kernel's wrapper: chunks of 64 tokens, one state per head in registers (arXiv 2405.17381).

Operands of products are bfloat16, the state before a chunk among them; sums, decays and the state that is carried
on are f32, and so are outputs where v is. The kernel is in `gpu_kernel`, its second, third and fourth call in
`gpu_backward`.

A state is as large as the registers allow, so wide heads are cut: outputs are sums over the features of q and k, and
the columns of v never meet. Taylor features come as arrays, which XLA makes: 153 numbers are two parts.
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

WIDTHS = (64, 128)  # key and value dims the kernel has; others are padded, wider ones cut


def unfit(q: Array, k: Array, v: Array) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(q=q, k=k):
        return reason
    if v.dtype != jnp.float32:  # whose outputs are wanted in float32
        return mg.inexact(v=v)
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
    if reason := unfit(q, k, v):
        raise NotImplementedError(f"linear_scan: {reason}")
    features, columns = _cuts(q.shape[3]), _cuts(v.shape[3])
    plan = Plan(
        scale=float(scale),
        decay=log_decay is not None,
        out=v.dtype if len(features) == 1 else jnp.float32,
        staged=mg.simulated(),
        interpret=mg.mode(interpret_for("linear_scan", "gpu")),
    )
    length = q.shape[1]
    live, document = documents(segments, initial_segment)
    fill = -length % CHUNK
    g = None
    if log_decay is not None:
        steps = jnp.maximum(log_decay.astype(jnp.float32), FORGET)  # [H] or [B, T, H]
        steps = jnp.where(live[..., None], steps, 0.0)
        g = jnp.pad(jnp.swapaxes(steps, 1, 2), ((0, 0), (0, 0), (0, fill)))
    document = jnp.pad(document, ((0, 0), (0, fill)), mode="edge")

    def part(at: slice, of: slice) -> tuple[Array, Array]:
        """What the features `at` add to the columns `of` of o, and their part of the last state."""
        operands = (_blocked(x.astype(jnp.bfloat16), live) for x in (q[..., at], k[..., at], v[..., of]))
        start = initial_state[:, :, at, of]
        rows, width = start.shape[2:]
        start = jnp.pad(start, ((0, 0), (0, 0), (0, _wider(rows) - rows), (0, _wider(width) - width)))
        o, last = _scan(plan, *operands, g, document, start)
        return o[:, :length, :, :width], last[:, :, :rows, :width]

    o, last = zip(*(zip(*(part(at, of) for at in features), strict=True) for of in columns), strict=True)
    o = jnp.concatenate([sum(terms[1:], terms[0]) for terms in o], axis=3)
    return o.astype(v.dtype), jnp.concatenate([jnp.concatenate(parts, axis=2) for parts in last], axis=3)


def _cuts(width: int) -> list[slice]:
    """Parts that the kernel can hold."""
    return [slice(at, min(at + WIDTHS[-1], width)) for at in range(0, width, WIDTHS[-1])]


def _wider(width: int) -> int:
    """The kernel's width that holds one."""
    return next(n for n in WIDTHS if n >= width)


def _blocked(x: Float[Array, "B T H D"], live: Array) -> Float[Array, "B t H d"]:
    """Whole chunks of live tokens, and a width the kernel has. Zeroed padding neither reads nor writes, even nan."""
    x = jnp.where(live[..., None, None], x, 0)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, _wider(x.shape[3]) - x.shape[3])))


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
