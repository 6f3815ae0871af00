"""The compiled side of `gemv`: dot products over rows, and the handler by which XLA calls them.

The handler reads XLA's call frame (`xla/ffi/api/c_api.h`, an ABI that only grows) as machine words. Registration
first asks it for the version of that ABI, through an extension of the frame.
"""

from __future__ import annotations

import inspect
from typing import Any

import numba
import numpy as np
from numba import carray, cfunc, njit, prange, types
from numba.extending import intrinsic

# Other layers start a team per calling thread, or forbid two callers at once; XLA's callers vary.
LAYER = "tbb"
numba.config.THREADING_LAYER = LAYER
numba.get_num_threads()  # starts the threads; code from numba's cache must not be loaded before
if numba.threading_layer() != LAYER:
    raise ImportError(f"numba already runs on {numba.threading_layer()}")

API_VERSION = (0, 1)  # the oldest that has all that is read here
METADATA = 1  # the extension that asks for the version
F32 = 11  # XLA_FFI_DataType
EXTENSION, ARGS, RETS = 1, 9, 14  # words into the frame: first extension, arguments, results
DATA, DIMS = 3, 5  # words into a buffer
TYPE = 4  # ints into a buffer


def compiled(**options: Any) -> Any:
    """numba's njit; runtime type checkers may have wrapped the function, which it cannot read."""
    return lambda function: njit(cache=True, **options)(inspect.unwrap(function))


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


@compiled()
def _word(address: int, index: int) -> int:
    return carray(_pointer(np.uintp(address)), (index + 1,), np.uintp)[index]


@compiled()
def _int(address: int, index: int) -> int:
    return carray(_pointer(np.uintp(address)), (index + 1,), np.int32)[index]


@compiled(parallel=True, fastmath=True)
def rows_f32(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y [n, o] = x [n, i] @ w [o, i]ᵀ."""
    for o in prange(w.shape[0]):
        for n in range(x.shape[0]):
            total = np.float32(0)
            for i in range(w.shape[1]):
                total += w[o, i] * x[n, i]
            y[n, o] = total


@compiled(parallel=True, fastmath=True)
def rows_bf16(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """The same with w as the bits of bf16, the upper half of an f32."""
    for o in prange(w.shape[0]):
        for n in range(x.shape[0]):
            total = np.float32(0)
            for i in range(w.shape[1]):
                total += _float_of(np.uint32(w[o, i]) << np.uint32(16)) * x[n, i]
            y[n, o] = total


def _handler(frame: int) -> int:
    """Arguments w [o, i] and x [n, i], result y [n, o]; returns no error."""
    extension = _word(frame, EXTENSION)
    if extension != 0 and _int(extension, 2) == METADATA:
        metadata = carray(_pointer(_word(extension, 3)), (9,), np.int32)
        metadata[6], metadata[7], metadata[8] = API_VERSION[0], API_VERSION[1], 0
        return 0
    weights, rows = _word(_word(frame, ARGS), 0), _word(_word(frame, ARGS), 1)
    result = _word(_word(frame, RETS), 0)
    shape = (_word(_word(weights, DIMS), 0), _word(_word(weights, DIMS), 1))
    count = _word(_word(rows, DIMS), 0)
    x = carray(_pointer(_word(rows, DATA)), (count, shape[1]), np.float32)
    y = carray(_pointer(_word(result, DATA)), (count, shape[0]), np.float32)
    data = _pointer(_word(weights, DATA))
    if _int(weights, TYPE) == F32:
        rows_f32(carray(data, shape, np.float32), x, y)
    else:
        rows_bf16(carray(data, shape, np.uint16), x, y)
    return 0


handler = cfunc(types.intp(types.uintp), cache=True)(inspect.unwrap(_handler))
