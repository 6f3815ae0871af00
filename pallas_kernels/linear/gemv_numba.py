"""The compiled side of `gemv`: dot products over rows; several rows in tiles, a weight read once for four of them."""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from pallas_kernels._numba import (
    answered_version,
    argument,
    compiled,
    data,
    dim,
    handler,
    is_f32,
    prefetch,
    result,
    widen,
)

LINE = 64  # bytes that are read together
EXPONENT = np.uint32(0x7F800000)  # of an f32: 0 in zeros and in what XLA flushes to zero


@compiled(fastmath=True)
def one(w, x, y, o, n):
    """Output o of row n."""
    total = np.float32(0)
    for i in range(w.shape[1]):
        total += widen(w[o, i]) * x[n, i]
    y[n, o] = total


@compiled(fastmath=True)
def tile(w, x, y, o, rows):
    """Outputs o to o + 3 of four rows: sixteen sums in registers, eight numbers read for each of their terms."""
    r, s, t, u = rows[0], rows[1], rows[2], rows[3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for i in range(w.shape[1]):
        a, b, c, d = widen(w[o, i]), widen(w[o + 1, i]), widen(w[o + 2, i]), widen(w[o + 3, i])
        x0, x1, x2, x3 = x[r, i], x[s, i], x[t, i], x[u, i]
        a0, a1, a2, a3 = a0 + a * x0, a1 + a * x1, a2 + a * x2, a3 + a * x3
        b0, b1, b2, b3 = b0 + b * x0, b1 + b * x1, b2 + b * x2, b3 + b * x3
        c0, c1, c2, c3 = c0 + c * x0, c1 + c * x1, c2 + c * x2, c3 + c * x3
        d0, d1, d2, d3 = d0 + d * x0, d1 + d * x1, d2 + d * x2, d3 + d * x3
    y[r, o], y[s, o], y[t, o], y[u, o] = a0, a1, a2, a3
    y[r, o + 1], y[s, o + 1], y[t, o + 1], y[u, o + 1] = b0, b1, b2, b3
    y[r, o + 2], y[s, o + 2], y[t, o + 2], y[u, o + 2] = c0, c1, c2, c3
    y[r, o + 3], y[s, o + 3], y[t, o + 3], y[u, o + 3] = d0, d1, d2, d3


@compiled()
def filled(x, y):
    """The rows of x that are not all zero, or less than XLA tells from zero; the products of the others are written."""
    rows, count, words = np.empty(x.shape[0], np.intp), 0, x.view(np.uint32)
    for n in range(x.shape[0]):
        bits = np.uint32(0)
        for i in range(x.shape[1]):
            bits |= words[n, i] & EXPONENT
        if bits:
            rows[count] = n
            count += 1
        else:
            y[n] = 0
    return rows[:count]


@compiled(parallel=True)
def single(w, x, y):
    for o in prange(w.shape[0]):
        one(w, x, y, o, 0)


@compiled(parallel=True)
def several(w, x, y):
    rows, size = filled(x, y), 4 * w.shape[1] * w.itemsize
    for part in prange((w.shape[0] + 3) // 4):
        first, end = 4 * part, min(4 * part + 4, w.shape[0])
        if end < w.shape[0]:  # the products of several rows hide the time it takes to read the next weights
            for line in range(part * size + size, part * size + 2 * size, LINE):
                prefetch(np.uintp(w.ctypes.data + line))
        tiled = len(rows) // 4 * 4 if end == first + 4 else 0
        for r in range(0, tiled, 4):
            tile(w, x, y, first, rows[r : r + 4])
        for r in range(tiled, len(rows)):
            for o in range(first, end):
                one(w, x, y, o, rows[r])


@compiled()
def products(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y [n, o] = x [n, i] @ w [o, i]ᵀ, w in f32 or the bits of bf16; rows of zeros cost nothing."""
    if x.shape[0] == 1:
        single(w, x, y)
    else:
        several(w, x, y)


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
