"""The equation with the whole T×S matrix: slow, obvious, and what every backend is tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import PADDING, Visibility

NEVER = -1e30  # a masked exponent: finite, so that differences stay finite, and exp gives exactly 0


class Roles(NamedTuple):
    """What each key is to each query, all boolean and disjoint; a key that is none of it is not seen."""

    own: Array  # an ordinary token of the query's block, at or before the query
    inside: Array  # an ordinary token of an earlier block
    landmark: Array  # the landmark of an earlier block


def roles(q_positions: Array, q_segments: Array, k_positions: Array, k_segments: Array, block: int) -> Roles:
    """Roles of keys [.., S] for queries [.., T]: the arguments broadcast against each other."""
    see = (q_segments == k_segments) & (k_segments != PADDING) & (k_positions <= q_positions)
    landmark = k_positions % block == block - 1
    earlier = k_positions // block < q_positions // block
    return Roles(see & ~landmark & ~earlier, see & ~landmark & earlier, see & landmark & earlier)


def _roles(vis: Visibility, block: int) -> Roles:
    """As `roles`, each [B, 1, T, S]."""
    row = lambda x: x[:, None, :, None]
    column = lambda x: x[:, None, None, :]
    return roles(row(vis.q_positions), row(vis.q_segments), column(vis.k_positions), column(vis.k_segments), block)


def dense_scores(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], scale: float) -> Float[Array, "B H T S"]:
    """scale · q·k, unmasked, in f32 or wider."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2).astype(kind)
    return scale * jnp.einsum("bthd,bshd->bhts", q.astype(kind), k)


def dense_rows(
    s: Float[Array, "B H T S"], vis: Visibility, block: int
) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T"]]:
    """A from scores, and the log of the gate's denominator (-1e30 where a row sees nothing)."""
    own, inside, landmark = _roles(vis, block)
    same = (vis.k_segments[:, :, None] == vis.k_segments[:, None, :]) & (
        (vis.k_positions // block)[:, :, None] == (vis.k_positions // block)[:, None, :]
    )  # [B, S, S]: two keys of one block
    number = jnp.argmax(same, axis=-1)  # [B, S]: a block is called by its first key
    s_inside = jnp.where(inside, s, NEVER)
    highest = jax.vmap(lambda s, n: jnp.full_like(s, NEVER).at[..., n].max(s)[..., n])
    e = jnp.exp(s_inside - jax.lax.stop_gradient(highest(s_inside, number)))
    e = jnp.where(inside, e, 0.0)
    total = jnp.einsum("bhts,bsu->bhtu", e, same.astype(s.dtype))
    p = e / jnp.where(total == 0, 1.0, total)

    gated = own | landmark
    s_gate = jnp.where(gated, s, NEVER)
    top = jax.lax.stop_gradient(jnp.max(s_gate, axis=-1, keepdims=True, initial=NEVER))
    e = jnp.where(gated, jnp.exp(s_gate - top), 0.0)
    z = jnp.sum(e, axis=-1, keepdims=True)
    g = e / jnp.where(z == 0, 1.0, z)
    of_block = jnp.einsum("bhts,bsu->bhtu", jnp.where(landmark, g, 0.0), same.astype(s.dtype))
    a = jnp.where(own, g, p * of_block)
    log_z = jnp.where(z == 0, NEVER, top + jnp.log(jnp.where(z == 0, 1.0, z)))
    return a, log_z[..., 0]


def grouped_softmax_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    block: int,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.grouped_softmax.grouped_softmax`."""
    a, log_z = dense_rows(dense_scores(q, k, scale), vis, block)
    v_all = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(a.dtype)
    return jnp.einsum("bhts,bshv->bthv", a, v_all).astype(v.dtype), jnp.swapaxes(log_z, 1, 2)
