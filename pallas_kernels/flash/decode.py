"""`flash` for one query a head on a CPU: softmax over the keys a decode state holds.

A key costs one read, only visible keys are read at all, and heads are shared among threads; XLA's way through the
same sums writes the whole cache anew in every step. Same equation, mask and rounding to f32 as the other backends;
the gradient is that of the XLA backend.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.masks import Visibility
from pallas_kernels import _cpu
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.xla import flash_xla

TARGET = "jaxattn_decode"
EVERYTHING = 2**31 - 1  # a window that hides nothing


def fits(q: Array, k: Array, v: Array, vis: Visibility, score: Score, bias: Any) -> bool:
    """Whether this call is one the kernel is made for."""
    plain = score == Score() and bias is None and vis.causal and vis.prefix_len is None
    types = {str(k.dtype), str(v.dtype)}
    return q.shape[1] == 1 and plain and types in ({"float32"}, {"bfloat16"}) and not _cpu.missing()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_decode(q: Array, k: Array, v: Array, vis: Visibility, scale: float) -> Array:
    """See `pallas_kernels.flash.flash`, for T = 1; k and v best as views of arrays with heads before tokens."""
    _register()
    spread = lambda x, length: jnp.broadcast_to(x, (k.shape[0], length)).astype(jnp.int32)
    query = [spread(x, 1) for x in (vis.q_positions, vis.q_segments)]
    keys = [spread(x, k.shape[1]) for x in (vis.k_positions, vis.k_segments)]
    other = lambda q, k, v, *rest: jnp.asarray(flash_xla(q, k, v, vis, Score(), scale=scale), jnp.float32)
    o = jax.lax.platform_dependent(
        q, k, v, *query, *keys, cpu=partial(_call, scale, vis.window or EVERYTHING), default=other
    )
    return o.astype(v.dtype)


def _forward(q, k, v, vis, scale):
    return flash_decode(q, k, v, vis, scale), (q, k, v, vis)


def _backward(scale, saved, do):
    q, k, v, vis = saved
    _, pull = jax.vjp(lambda q, k, v: flash_xla(q, k, v, vis, Score(), scale=scale), q, k, v)
    return *pull(do), None


flash_decode.defvjp(_forward, _backward)


def _call(scale: float, window: int, q: Array, k: Array, v: Array, *places: Array) -> Array:
    batch, _, heads, dim = q.shape
    q = (q[:, 0].astype(jnp.float32) * scale).reshape(batch, k.shape[2], heads // k.shape[2], dim)
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), jnp.float32)
    run = jax.ffi.ffi_call(TARGET, out, vmap_method="broadcast_all")
    plain = lambda x: x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.uint16)
    turn = lambda x: plain(jnp.swapaxes(x, 1, 2))
    o = run(q, turn(k), turn(v), *places, jnp.full((1,), window, jnp.int32))
    return o.reshape(batch, 1, heads, v.shape[3])


@functools.cache
def _register() -> None:
    from pallas_kernels.flash.decode_numba import decode_handler

    _cpu.register(TARGET, decode_handler)
