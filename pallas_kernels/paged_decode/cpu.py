"""`paged_decode` of one query a head on a CPU: a listed key costs one read and no copy, heads are shared among threads.

Same equation, mask and rounding to f32 as the other backends. XLA's way through the same sums first gathers what is
listed, on one thread.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _cpu
from pallas_kernels.paged_decode.gradient import without_gradient
from pallas_kernels.paged_decode.xla import paged_decode_xla

TARGET = "jaxattn_paged_decode"


def fits(q: Array, k_pages: Array, v_pages: Array, lengths: Array | None, *others: Any) -> bool:
    """Whether this call is one the kernel is made for; `others`: options it does not have, where given."""
    types = {str(k_pages.dtype), str(v_pages.dtype)}
    plain = q.shape[1] == 1 and all(x is None for x in others) and types in ({"float32"}, {"bfloat16"})
    return plain and str(q.dtype) in ("float32", "bfloat16") and not _cpu.missing()


def paged_decode_cpu(
    q: Float[Array, "B 1 H D"],
    k_pages: Float[Array, "N K P page D"],
    v_pages: Float[Array, "N K P page V"],
    tables: Int[Array, "B k n"],
    lengths: Int[Array, "B l t"] | None,
    scale: float,
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B 1 H"]]:
    """See `pallas_kernels.paged_decode.paged_decode`."""
    _register()
    q, k_pages, v_pages = without_gradient("auto", q, k_pages, v_pages)
    batch, kv_heads, slots = q.shape[0], k_pages.shape[1], tables.shape[2] * k_pages.shape[3]
    tables = jnp.broadcast_to(tables, (batch, kv_heads, tables.shape[2])).astype(jnp.int32)
    tables = jnp.minimum(tables, k_pages.shape[2] - 1)
    ends = jnp.full((batch, kv_heads), slots) if lengths is None else lengths[..., 0]
    ends = jnp.broadcast_to(ends, (batch, kv_heads)).astype(jnp.int32)

    def other(q: Array, k: Array, v: Array, tables: Array, ends: Array) -> tuple[Array, Array]:
        none = {"key_bias": None, "rope": None, "key_positions": None, "splits": None}
        o, log_z = paged_decode_xla(q, k, v, tables, ends[..., None], scale=scale, **none)
        return o.astype(jnp.float32), log_z

    o, log_z = jax.lax.platform_dependent(q, k_pages, v_pages, tables, ends, cpu=partial(_call, scale), default=other)
    return o.astype(v_pages.dtype), log_z


def _call(scale: float, q: Array, k: Array, v: Array, tables: Array, ends: Array) -> tuple[Array, Array]:
    batch, _, heads, dim = q.shape
    rows = (q[:, 0].astype(jnp.float32) * scale).reshape(batch, k.shape[1], -1, dim)
    out = [
        jax.ShapeDtypeStruct((*rows.shape[:3], v.shape[4]), jnp.float32),
        jax.ShapeDtypeStruct(rows.shape[:3], jnp.float32),
    ]
    run = jax.ffi.ffi_call(TARGET, out, vmap_method="sequential")
    plain = lambda x: x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.uint16)
    o, log_z = run(rows, plain(k), plain(v), tables, ends)
    return o.reshape(batch, 1, heads, -1), log_z.reshape(batch, 1, heads)


@functools.cache
def _register() -> None:
    from pallas_kernels.paged_decode.cpu_numba import paged_handler

    _cpu.register(TARGET, paged_handler)
