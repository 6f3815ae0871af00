"""The recurrence, one token after the other in f32: slow, obvious, and what every backend is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import PADDING


def linear_scan_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Array | None,
    segments: Int[Array, "B T"],
    initial_state: Float[Array, "B H D V"],
    initial_segment: Int[Array, "B"],
    scale: float,
    chunk: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H D V"]]:
    """See `pallas_kernels.linear_scan.linear_scan`; `chunk` plays no part."""
    batch, length, heads, _ = q.shape
    exact = initial_state.dtype
    g = jnp.zeros((batch, length, heads), exact) if log_decay is None else log_decay.astype(exact)
    g = jnp.broadcast_to(g, (batch, length, heads))
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

    def token(carry: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        state, last = carry  # [B,H,D,V], [B]
        q_t, k_t, v_t, g_t, segment = now  # [B,H,·], [B,H], [B]
        live = segment != PADDING
        fresh = (segment != last)[:, None, None, None]
        old = jnp.where(fresh, 0.0, state) * jnp.exp(g_t)[..., None, None]
        new = old + k_t[..., :, None] * v_t[..., None, :]
        here = live[:, None, None, None]
        o = jnp.where(here[..., 0], scale * jnp.einsum("bhd,bhdv->bhv", q_t, new), 0.0)
        return (jnp.where(here, new, state), jnp.where(live, segment, last)), o

    first = lambda x: jnp.moveaxis(x, 1, 0)  # scan runs over the leading axis
    tokens = (*(first(x.astype(exact)) for x in (q, k, v)), first(g), first(segments))
    (state, _), o = jax.lax.scan(token, (initial_state, initial_segment), tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
