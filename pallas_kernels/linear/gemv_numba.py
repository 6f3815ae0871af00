"""The compiled side of `gemv`: dot products over rows."""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from pallas_kernels._numba import answered_version, argument, compiled, data, dim, handler, is_f32, result, widen


@compiled(parallel=True, fastmath=True)
def products(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y [n, o] = x [n, i] @ w [o, i]ᵀ, w in f32 or the bits of bf16."""
    for o in prange(w.shape[0]):
        for n in range(x.shape[0]):
            total = np.float32(0)
            for i in range(w.shape[1]):
                total += widen(w[o, i]) * x[n, i]
            y[n, o] = total


def _gemv(frame: int) -> int:
    """Arguments w [o, i] and x [n, i], result y [n, o]; returns no error."""
    if answered_version(frame):
        return 0
    weights, rows = argument(frame, 0), argument(frame, 1)
    shape, count = (dim(weights, 0), dim(weights, 1)), dim(rows, 0)
    x = carray(data(rows), (count, shape[1]), np.float32)
    y = carray(data(result(frame, 0)), (count, shape[0]), np.float32)
    if is_f32(weights):
        products(carray(data(weights), shape, np.float32), x, y)
    else:
        products(carray(data(weights), shape, np.uint16), x, y)
    return 0


gemv_handler = handler(_gemv)
