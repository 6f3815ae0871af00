"""A few rows times a matrix on a CPU: what decoding does, bound by how fast the weights are read.

A matrix lies as [out, in] and every output is one dot product over contiguous weights, f32 or bf16, shared among
threads. Sums are f32 in an order of their own, so results equal XLA's to rounding only. Rows of zeros are not computed:
sequences that decode together are often fewer than the rows they have.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from pallas_kernels import _cpu

TARGET = "jaxattn_gemv"
MOST_ROWS = 8  # above, the product is no longer bound by reading weights and XLA's is as good
DTYPES = ("float32", "bfloat16")


def usable(weight: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether weights of this kind can be multiplied here."""
    return str(weight.dtype) in DTYPES and not _cpu.missing()


def gemv(x: Float[Array, "n i"], w: Float[Array, "o i"]) -> Float[Array, "n o"]:
    """x @ wᵀ in f32, for f32 or bf16 weights; more than `MOST_ROWS` rows go to XLA. No gradient.

    Under vmap over x alone the batch joins the rows, so that weights are read once for all of them.
    """
    return _rows(x, w)


@custom_vmap
def _rows(x: Array, w: Array) -> Array:
    if x.shape[0] > MOST_ROWS:
        return _product(x, w)
    _register()
    return jax.lax.platform_dependent(x, w, cpu=_call, default=_product)


@_rows.def_vmap
def _batched(size: int, batched: list[bool], x: Array, w: Array) -> tuple[Array, bool]:
    if batched[1]:
        x = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
        return jax.vmap(_product)(x, w), True
    rows = _rows(x.reshape(-1, x.shape[-1]), w)
    return rows.reshape(size, -1, rows.shape[-1]), True


def _product(x: Array, w: Array) -> Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _call(x: Array, w: Array) -> Array:
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TARGET, out)(w, x.astype(jnp.float32))


@functools.cache
def _register() -> None:
    from pallas_kernels.linear.gemv_numba import gemv_handler

    _cpu.register(TARGET, gemv_handler)
