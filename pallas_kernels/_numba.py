"""What kernels compiled by numba share: threads, and reading the frame in which XLA's FFI passes buffers.

Import through `pallas_kernels._cpu.missing`, which says why when it cannot be. The frame is `XLA_FFI_CallFrame` of
`xla/ffi/api/c_api.h`, an ABI that only grows; it is read as machine words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

# Other layers start a team per calling thread, or forbid two callers at once; XLA's callers vary.
LAYER = "tbb"
config: Any = numba.config
config.THREADING_LAYER = LAYER
numba.get_num_threads()  # starts the threads; code from numba's cache must not be loaded before
if numba.threading_layer() != LAYER:
    raise ImportError(f"numba already runs on {numba.threading_layer()}")

API_VERSION = (0, 1)  # the oldest that has all that is read here
METADATA = 1  # the extension by which registration asks for the version
F32 = 11  # XLA_FFI_DataType
EXTENSION, ARGS, RETS = 1, 9, 14  # words into the frame: first extension, arguments, results
DATA, DIMS = 3, 5  # words into a buffer
TYPE = 4  # ints into a buffer
SUMS = {"reassoc", "contract", "nsz"}  # numba's fastmath: sums in any order, but what is no number stays none


def compiled(**options: Any) -> Any:
    """numba's njit; runtime type checkers may have wrapped the function, which it cannot read.

    Not for closures over compiled functions: the key of numba's cache would have to pickle those.
    """
    return lambda function: njit(cache=True, **options)(inspect.unwrap(function))


def handler(function: Callable[[int], int]) -> Any:
    """A C function of the frame's address, for `jax.ffi.register_ffi_target`."""
    return cfunc(types.intp(types.uintp), cache=True)(inspect.unwrap(function))


@intrinsic
def _pointer(typing, address):
    cast = lambda context, builder, signature, args: builder.inttoptr(
        args[0], context.get_value_type(signature.return_type)
    )
    return types.voidptr(types.uintp), cast


@intrinsic
def _float_of(typing, bits):
    cast = lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(signature.return_type)
    )
    return types.float32(types.uint32), cast


pointer: Any = _pointer  # an address as void*, inside compiled code; numba passes `typing` itself
float_of: Any = _float_of  # the f32 with these bits


def widen(x: Any) -> Any:
    """An f32 as it is, or the f32 whose upper half are the bits of a bf16; inside compiled code only."""
    raise NotImplementedError("widen has a meaning in compiled code only.")


@overload(widen)
def _widen(x):
    if x is types.uint16:
        return lambda x: float_of(np.uint32(x) << np.uint32(16))
    return lambda x: x


@compiled()
def word(address: Any, index: Any) -> Any:
    return carray(pointer(np.uintp(address)), (index + 1,), np.uintp)[index]


@compiled()
def integer(address: Any, index: Any) -> Any:
    return carray(pointer(np.uintp(address)), (index + 1,), np.int32)[index]


@compiled()
def answered_version(frame: Any) -> Any:
    """Whether this call only asked for the ABI's version, which is then filled in."""
    extension = word(frame, EXTENSION)
    if extension == 0 or integer(extension, 2) != METADATA:
        return False
    metadata = carray(pointer(word(extension, 3)), (9,), np.int32)
    metadata[6], metadata[7], metadata[8] = API_VERSION[0], API_VERSION[1], 0
    return True


@compiled()
def argument(frame: Any, index: Any) -> Any:
    """Address of an argument's buffer."""
    return word(word(frame, ARGS), index)


@compiled()
def result(frame: Any, index: Any) -> Any:
    """Address of a result's buffer."""
    return word(word(frame, RETS), index)


@compiled()
def dim(buffer: Any, index: Any) -> Any:
    return np.intp(word(word(buffer, DIMS), index))


@compiled()
def is_f32(buffer: Any) -> Any:
    return integer(buffer, TYPE) == F32


@compiled()
def data(buffer: Any) -> Any:
    return pointer(word(buffer, DATA))
