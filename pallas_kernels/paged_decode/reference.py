"""The equation in f32 over a full copy of what is listed: slow, obvious, what every backend is tested against."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.rope import Rope
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR


def paged_decode_reference(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "N K P page D"],
    v_pages: Float[Array, "N K P page V"],
    tables: Int[Array, "B k n"],
    lengths: Int[Array, "B l t"] | None,
    *,
    scale: float,
    key_bias: Float[Array, "B b slots"] | None,
    rope: Rope | None,
    key_positions: Int[Array, "B r slots"] | None,
    splits: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.paged_decode.paged_decode`; `splits` is ignored. Differentiable."""
    batch, length, heads, _ = q.shape
    kv_heads, page = k_pages.shape[1], k_pages.shape[3]
    slots = tables.shape[2] * page
    each_head = lambda x, *last: jnp.broadcast_to(x, (batch, kv_heads, *last))
    tables = each_head(tables, tables.shape[2])
    live = jnp.repeat(tables >= 0, page, axis=2)[:, :, None, :]  # [B, K, 1, slots]
    if lengths is not None:
        live = live & (jnp.arange(slots) < lengths[..., None])  # [B, K, 1 or T, slots]
    k, v = listed(k_pages, tables), listed(v_pages, tables).astype(jnp.float32)
    if rope is not None:
        k = rotated(k, rope, each_head(key_positions, slots))
    k = k.astype(jnp.float32)
    v = jnp.where(jnp.any(live, axis=2)[..., None], v, 0.0)  # cells never written may hold anything
    spread = partial(jnp.repeat, repeats=heads // kv_heads, axis=1)
    s = scale * jnp.einsum("bthd,bhsd->bhts", q.astype(jnp.float32), spread(k))
    if key_bias is not None:
        s = s + spread(each_head(key_bias.astype(jnp.float32), slots))[:, :, None]
    s = jnp.where(spread(jnp.broadcast_to(live, (batch, kv_heads, length, slots))), s, NEVER)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(s, axis=-1, keepdims=True), FLOOR))
    w = jnp.exp(s - top)  # hidden slots: exp(NEVER - FLOOR) is exactly 0
    mass = jnp.sum(w, axis=-1, keepdims=True)
    some = mass > 0
    o = jnp.einsum("bhts,bhsv->bthv", w / jnp.where(some, mass, 1.0), spread(v))
    lse = jnp.where(some, top + jnp.log(jnp.where(some, mass, 1.0)), NEVER)[..., 0]
    return o.astype(v_pages.dtype), jnp.swapaxes(lse, 1, 2)


def listed(pages: Float[Array, "N K P page D"], tables: Int[Array, "B K n"]) -> Float[Array, "B K slots D"]:
    """The pages of a list, one after another; unused entries repeat page 0."""
    batch, kv_heads, count = tables.shape
    pool = jnp.arange(batch)[:, None, None] if pages.shape[0] > 1 else 0
    out = pages[pool, jnp.arange(kv_heads)[:, None], jnp.maximum(tables, 0)]
    return out.reshape(batch, kv_heads, count * pages.shape[3], pages.shape[4])


def rotated(k: Float[Array, "B K slots D"], rope: Rope, positions: Int[Array, "B K slots"]) -> Array:
    """Each key turned by its own position, rounded to its dtype as a cache of rotated keys would be."""
    flat = rope(k.reshape(-1, *k.shape[2:])[:, :, None], positions.reshape(-1, positions.shape[2]))
    return flat.reshape(k.shape)
