"""Plain XLA with O(T) memory: a scan over chunks of C tokens that carries the (m, u, w) of everything before.

Inside a chunk each row has its own maximum: dividing all rows by the chunk's largest exponential would let the
early rows, whose scores may lie far below it, vanish. That costs C exponentials a token instead of one, about
what the [C, C] x [C, V] product next to it costs. The backward pass keeps the carries (T / C of them) and
recomputes the rest chunk by chunk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.flash.reference import NEVER
from pallas_kernels.prefix_softmax.reference import Partial, output

CHUNK = 64


def prefix_softmax_xla(
    s: Float[Array, "B T H"],
    v: Float[Array, "B T H V"],
    live: Bool[Array, "B T"],
    runs: Int[Array, "B T"],
    initial: Partial,
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Partial]:
    """See `pallas_kernels.prefix_softmax.prefix_softmax`. The largest temporary is [B, H, C, C].

    Args:
      live: not padding.
      runs: 0, 1, 2, ...: which segment in order of appearance; 0 continues `initial`.
      initial: m, u [B, H], w [B, H, V].
      chunk: C; None: 64.
    """
    batch, length, heads, v_dim = v.shape
    size = min(chunk or CHUNK, length)
    count = -(-length // size)
    tail = count * size - length
    # Padding behind the end stays in the last run, so that the carry passes through it unchanged.
    pad = lambda x, mode="constant": jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    s, v, live, runs = pad(s), pad(v), pad(live), pad(runs, "edge")
    before = jnp.pad(runs[:, :-1], ((0, 0), (1, 0)))[:, ::size]  # [B, N]: the run that each chunk's carry is in
    if count == 1:
        carry, o = _chunk(initial, (s, v, live, runs, before[:, 0]))
        return o, carry

    def split(x: Array) -> Array:
        """[N, B·C, ...]: an axis for a batch of one between those two would make XLA copy the array."""
        x = jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)
        return x.reshape(count, batch * size, *x.shape[3:])

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body is not merged with its own replay
    def body(carry: Partial, part: tuple[Array, ...]) -> tuple[Partial, Array]:
        *rows, run = part
        carry, o = _chunk(carry, (*(x.reshape(batch, size, *x.shape[1:]) for x in rows), run))
        return carry, o.reshape(batch * size, heads, v_dim)

    carry, o = jax.lax.scan(body, initial, (split(s), split(v), split(live), split(runs), before.T))
    o = jnp.moveaxis(o.reshape(count, batch, size, heads, v_dim), 0, 1)
    return o.reshape(batch, count * size, heads, v_dim)[:, :length], carry


def _chunk(carry: Partial, part: tuple[Array, ...]) -> tuple[Partial, Array]:
    """C tokens behind `carry`: s [B,C,H], v [B,C,H,V], live and runs [B,C], the carry's run [B]."""
    s, v, live, runs, run = part
    steps = jnp.arange(s.shape[1])
    see = (steps[:, None] >= steps) & (runs[:, :, None] == runs[:, None, :]) & live[:, None, :]
    see = see[:, None]  # [B, 1, C, C]
    goes_on = (runs == run[:, None])[:, None]  # [B, 1, C]: rows in the segment of the carry
    columns = jnp.moveaxis(s, 1, 2)[:, :, None, :]  # [B, H, 1, C]
    m_before = jnp.where(goes_on, carry.m[..., None], NEVER)
    m = jnp.maximum(jnp.max(jnp.where(see, columns, NEVER), axis=-1), m_before)
    m = jax.lax.stop_gradient(m)  # [B, H, C]
    # Masked twice: the inner one keeps exp finite (a row may see nothing), the outer one removes the term.
    p = jnp.where(see, jnp.exp(jnp.where(see, columns - m[..., None], 0.0)), 0.0)
    fade = jnp.where(goes_on, jnp.exp(m_before - m), 0.0)
    every = Partial(
        m=m,
        u=jnp.sum(p, axis=-1) + fade * carry.u[..., None],
        w=jnp.einsum("bhts,bshv->bhtv", p, v.astype(p.dtype)) + fade[..., None] * carry.w[..., None, :],
    )
    o = jnp.where(live[:, None, :, None], output(every), 0.0)
    last = Partial(m=every.m[..., -1], u=every.u[..., -1], w=every.w[..., -1, :])
    return last, jnp.moveaxis(o, 2, 1).astype(v.dtype)
