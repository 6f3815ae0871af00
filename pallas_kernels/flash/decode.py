"""`flash` for one query a head on a CPU: softmax over the keys a decode state holds.

A key costs one read, only keys that are visible and that no key bias hides are read at all, and heads are shared among
threads; XLA's way through the same sums writes the whole cache anew in every step. Same equation, mask, statistic and
rounding to f32 as the other backends; the gradient is that of the XLA backend.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from pallas_kernels import _cpu
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.xla import flash_xla

TARGET = "jaxattn_decode"
EVERYTHING = 2**31 - 1  # a window that hides nothing


def fits(q: Array, k: Array, v: Array, vis: Visibility, score: Score, bias: Any) -> bool:
    """Whether this call is one the kernel is made for; a key bias and statistics it has for every such call."""
    plain = score == Score() and bias is None and vis.causal and vis.prefix_len is None
    types = {str(k.dtype), str(v.dtype)}
    return q.shape[1] == 1 and plain and types in ({"float32"}, {"bfloat16"}) and not _cpu.missing()


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def flash_decode(
    q: Float[Array, "B 1 H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    key_bias: Float[Array, "B n S"] | None,
    scale: float,
) -> tuple[Float[Array, "B 1 H V"], Float[Array, "B 1 H"]]:
    """Output and log Z of the rows, -1e30 where a row sees nothing; see `pallas_kernels.flash.flash`, for T = 1.

    k and v best as views of arrays with heads before tokens; key_bias as `options.dense` makes it.
    """
    _register()
    spread = lambda x, length: jnp.broadcast_to(x, (k.shape[0], length)).astype(jnp.int32)
    query = [spread(x, 1) for x in (vis.q_positions, vis.q_segments)]
    keys = [spread(x, k.shape[1]) for x in (vis.k_positions, vis.k_segments)]
    # without a bias one column, which is not read; where there is but one key, its 0 is right
    columns = jnp.zeros((k.shape[0], 1, 1), jnp.float32) if key_bias is None else key_bias

    def other(q, k, v, columns, *rest):
        o, stat = _xla(q, k, v, vis, None if key_bias is None else columns, scale)
        return o.astype(jnp.float32), stat

    o, stat = jax.lax.platform_dependent(
        q, k, v, columns, *query, *keys, cpu=partial(_call, scale, vis.window or EVERYTHING), default=other
    )
    return o.astype(v.dtype), stat


def _xla(q: Array, k: Array, v: Array, vis: Visibility, key_bias: Array | None, scale: float) -> tuple[Array, Array]:
    o, stat = flash_xla(q, k, v, vis, Score(), scale=scale, key_bias=key_bias, stats=True)
    return o, stat


def _forward(q, k, v, vis, key_bias, scale):
    return flash_decode(q, k, v, vis, key_bias, scale), (q, k, v, vis, key_bias)


def _backward(scale, saved, d_out):
    q, k, v, vis, key_bias = saved
    _, pull = jax.vjp(lambda q, k, v, key_bias: _xla(q, k, v, vis, key_bias, scale), q, k, v, key_bias)
    dq, dk, dv, d_key_bias = pull(d_out)
    return dq, dk, dv, None, d_key_bias


flash_decode.defvjp(_forward, _backward)


def _call(
    scale: float, window: int, q: Array, k: Array, v: Array, columns: Array, *places: Array
) -> tuple[Array, Array]:
    batch, _, heads, dim = q.shape
    q = (q[:, 0].astype(jnp.float32) * scale).reshape(batch, k.shape[2], heads // k.shape[2], dim)
    shapes = [(*q.shape[:3], v.shape[3]), q.shape[:3]]
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = jax.ffi.ffi_call(TARGET, outs, vmap_method="broadcast_all")
    plain = lambda x: x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.uint16)
    turn = lambda x: plain(jnp.swapaxes(x, 1, 2))
    o, stat = run(q, turn(k), turn(v), columns, *places, jnp.full((1,), window, jnp.int32))
    return o.reshape(batch, 1, heads, v.shape[3]), stat.reshape(batch, 1, heads)


@functools.cache
def _register() -> None:
    from pallas_kernels.flash.decode_numba import decode_handler

    _cpu.register(TARGET, decode_handler)
