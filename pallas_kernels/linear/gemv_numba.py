"""The compiled side of `gemv`: dot products over rows; several rows in tiles, a weight read once for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, prange, types
from numba.extending import overload

from pallas_kernels._numba import (
    SUMS,
    answered_version,
    argument,
    compiled,
    data,
    dim,
    handler,
    is_f32,
    result,
    widen,
)
from pallas_kernels.linear.gemv_tile import LANES, SIDE, tile_bf16, tile_f32

EXPONENT = np.uint32(0x7F800000)  # of an f32: 0 in zeros and in what XLA flushes to zero


@compiled(fastmath=SUMS)
def one(w, x, y, o, n):
    """Output o of row n."""
    total = np.float32(0)
    for i in range(w.shape[1]):
        total += widen(w[o, i]) * x[n, i]
    y[n, o] = total


def tile(w: Any, *places: Any) -> None:
    """`gemv_tile` for what w holds; inside compiled code only."""
    raise NotImplementedError("tile has a meaning in compiled code only.")


@overload(tile)
def _tile(w, *places):
    of = tile_bf16 if w.dtype is types.uint16 else tile_f32
    return lambda w, *places: of(*places)


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
def single(w, x, y, n):
    for o in prange(w.shape[0]):
        one(w, x, y, o, n)


@compiled(fastmath=SUMS)
def rest(w, x, y, o, n, first):
    """Adds to outputs o to o + 3 of row n what the inputs from `first` on give."""
    for i in range(first, w.shape[1]):
        for part in range(o, o + SIDE):
            y[n, part] += widen(w[part, i]) * x[n, i]


@compiled(parallel=True)
def several(w, x, y, rows):
    """Tiles of four outputs and four rows, the last row again and again where four do not come out even."""
    outputs, inputs = w.shape
    whole = inputs // LANES * LANES
    ws, xs, ys = np.uintp(w.ctypes.data), np.uintp(x.ctypes.data), np.uintp(y.ctypes.data)
    stride = np.uintp(inputs * w.itemsize)
    for part in prange((outputs + SIDE - 1) // SIDE):
        o = SIDE * part
        if o + SIDE > outputs:
            for n in rows:
                for last in range(o, outputs):
                    one(w, x, y, last, n)
            continue
        for r in range(0, len(rows), SIDE):
            a, b = rows[r], rows[min(r + 1, len(rows) - 1)]
            c, d = rows[min(r + 2, len(rows) - 1)], rows[min(r + 3, len(rows) - 1)]
            tile(
                w, ws + np.uintp(o) * stride, stride, np.uintp(whole), ws + np.uintp(o + SIDE) * stride,
                xs + np.uintp(4 * a * inputs), xs + np.uintp(4 * b * inputs),
                xs + np.uintp(4 * c * inputs), xs + np.uintp(4 * d * inputs),
                ys + np.uintp(4 * (a * outputs + o)), ys + np.uintp(4 * (b * outputs + o)),
                ys + np.uintp(4 * (c * outputs + o)), ys + np.uintp(4 * (d * outputs + o)),
            )  # fmt: skip
            if whole < inputs:
                for n in rows[r : r + SIDE]:
                    rest(w, x, y, o, n, whole)


@compiled()
def products(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """y [n, o] = x [n, i] @ w [o, i]ᵀ, w in f32 or the bits of bf16; rows of zeros cost nothing."""
    rows = filled(x, y)
    if len(rows) == 1:
        single(w, x, y, rows[0])
    elif len(rows):
        several(w, x, y, rows)


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
