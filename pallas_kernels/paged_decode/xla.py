"""Plain XLA: listed pages are gathered as whole rows of memory, then attended to; no operation spans the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.rope import Rope
from pallas_kernels.flash.merge import merge
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.paged_decode.gradient import without_gradient
from pallas_kernels.paged_decode.reference import rotated


def paged_decode_xla(
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
    splits: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.paged_decode.paged_decode`. Temporaries are one copy of what is listed."""
    q, k_pages, v_pages = without_gradient("xla", q, k_pages, v_pages)
    count, page = tables.shape[2], k_pages.shape[3]
    size = -(-count // (splits or 1))
    parts = []
    for start in range(0, count, size):
        slots = slice(start * page, (start + size) * page)
        cut = lambda x, slots=slots: None if x is None else x[:, :, slots]
        left = None if lengths is None else lengths - start * page
        part = (tables[:, :, start : start + size], left, cut(key_bias), cut(key_positions))
        parts.append(_attend(q, k_pages, v_pages, *part, scale=scale, rope=rope))
    o, lse = parts[0] if len(parts) == 1 else merge(parts)
    return o.astype(v_pages.dtype), lse


def _attend(q, k_pages, v_pages, tables, lengths, key_bias, key_positions, *, scale, rope):
    """o and L in f32 over one list."""
    batch, length, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1], k_pages.shape[3]
    group, slots = heads // kv_heads, tables.shape[2] * page
    k, v = gathered(k_pages, tables), gathered(v_pages, tables)
    if rope is not None:
        k = rotated(k, rope, jnp.broadcast_to(key_positions, (batch, kv_heads, slots)))
    live = jnp.repeat(tables >= 0, page, axis=2)[:, :, None, :]  # [B, 1 or K, 1 or T, slots]
    if lengths is not None:
        live = live & (jnp.arange(slots) < lengths[..., None])
    v = jnp.where(jnp.any(live, axis=2)[..., None], v, jnp.zeros((), v.dtype))  # else NaN in them times 0 is NaN
    rows = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, dim), 1, 3)  # [B, K, G, T, D]
    dtype = jnp.promote_types(q.dtype, k.dtype)
    rows, k = rows.reshape(batch, kv_heads, group * length, dim).astype(dtype), k.astype(dtype)
    s = scale * jnp.einsum("bkrd,bksd->bkrs", rows, k, preferred_element_type=jnp.float32)
    if key_bias is not None:
        s = s + key_bias.astype(jnp.float32)[:, :, None]
    s = s.reshape(batch, kv_heads, group, length, slots)
    s = jnp.where(live[:, :, None], s, NEVER).reshape(batch, kv_heads, group * length, slots)
    top = jnp.maximum(jnp.max(s, axis=-1), FLOOR)
    w = jax.lax.optimization_barrier(jnp.exp(s - top[..., None]))  # hidden slots: exp(NEVER - FLOOR) is exactly 0
    mass = jnp.sum(w, axis=-1)
    some = mass > 0
    o = jnp.einsum("bkrs,bksv->bkrv", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
    o = o / jnp.where(some, mass, 1.0)[..., None]
    lse = jnp.where(some, top + jnp.log(jnp.where(some, mass, 1.0)), NEVER)
    back = lambda x: jnp.moveaxis(x.reshape(batch, kv_heads, group, length, -1), 3, 1).reshape(batch, length, heads, -1)
    return back(o), back(lse)[..., 0]


def gathered(pages: Float[Array, "N K P page D"], tables: Int[Array, "B k n"]) -> Float[Array, "B K slots D"]:
    """The pages of a list; each is one row of a matrix, which XLA copies as a block, unlike windows of five axes."""
    pools, kv_heads, count, page, dim = pages.shape
    batch, _, entries = tables.shape
    head = jnp.arange(kv_heads)[:, None]
    pool = jnp.arange(batch)[:, None, None] if pools > 1 else jnp.zeros((batch, 1, 1), jnp.int32)
    row = (pool * kv_heads + head) * count + jnp.clip(tables, 0, count - 1)
    out = pages.reshape(-1, page * dim).at[row.reshape(-1)].get(mode="promise_in_bounds")
    return out.reshape(batch, kv_heads, entries * page, dim)
