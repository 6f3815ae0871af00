"""A few rows times a matrix on a CPU: what decoding does, bound by how fast the weights are read.

XLA's CPU backend multiplies a vector by a matrix on one thread, and turns bf16 weights into f32 ones first. Here a
matrix lies as [out, in], and every output is one dot product over contiguous weights; numba compiles that loop and
TBB shares the outputs among threads. XLA calls it through its foreign function interface (`jax.ffi`), so it runs
inside jit and inside device loops. Sums are f32 in an order of their own, so results equal XLA's to rounding only.

Needs the packages numba and tbb (extra `cpu`); `missing` says why it cannot be had.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

TARGET = "jaxattn_gemv"
MOST_ROWS = 8  # above, the product is no longer bound by reading weights and XLA's is as good
DTYPES = ("float32", "bfloat16")


@functools.cache
def missing() -> str:
    """Why this product is not available here; empty when it is."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs and this is {jax.default_backend()}"
    for name in ("numba", "tbb"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {name} is not installed (extra cpu)"
    try:
        _register()
    except (ImportError, OSError, ValueError) as error:
        return f"numba cannot run on TBB here ({str(error).splitlines()[0]})"
    return ""


def usable(weight: Array) -> bool:
    """Whether weights of this kind can be multiplied here."""
    return str(weight.dtype) in DTYPES and not missing()


def gemv(x: Float[Array, "n i"], w: Float[Array, "o i"]) -> Float[Array, "n o"]:
    """x @ wᵀ in f32, for f32 or bf16 weights; more than `MOST_ROWS` rows go to XLA. No gradient.

    Under vmap over x alone the batch joins the rows, so that weights are read once for all of them.
    """
    return _rows(x, w)


@custom_vmap
def _rows(x: Array, w: Array) -> Array:
    if x.shape[0] > MOST_ROWS:
        return _product(x, w)
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
    """Load TBB, compile the handler, tell XLA its name.

    Raises:
      ImportError, OSError, ValueError: the libraries do not work together.
    """
    for file in importlib.metadata.files("tbb") or ():
        if file.name.startswith("libtbb.so"):  # numba's module looks for it by this name alone
            ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
    from pallas_kernels.linear import gemv_numba

    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(TARGET, capsule(gemv_numba.handler.address, None, None), platform="cpu")
