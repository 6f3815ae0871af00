"""Whether kernels compiled by numba can run here, and how XLA gets to know them.

XLA's CPU backend decodes on one thread and turns bf16 weights into f32 ones first. Where the packages numba and tbb
(extra `cpu`) are installed, backend "auto" gives the few loops that matter to numba, through XLA's foreign function
interface (`jax.ffi`), so that they run inside jit and inside loops on the device.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import Any

import jax

from pallas_kernels import _interpret


def missing() -> str:
    """Why numba's kernels are not available; empty where they are."""
    platform = _interpret.platform()
    return f"they are for CPUs and this is {platform}" if platform != "cpu" else _unable()


@functools.cache
def _unable() -> str:
    for name in ("numba", "tbb"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return f"the package {name} is not installed (extra cpu)"
    try:
        for file in importlib.metadata.files("tbb") or ():
            if file.name.startswith("libtbb.so"):  # numba's module looks for it by this name alone
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
        from pallas_kernels import _numba
    except (ImportError, OSError, ValueError) as error:
        return f"numba cannot run on TBB here ({str(error).splitlines()[0]})"
    del _numba
    return ""


def register(target: str, handler: Any) -> None:
    """Tell XLA the name of a handler made by `_numba.handler`."""
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(target, capsule(handler.address, None, None), platform="cpu")
