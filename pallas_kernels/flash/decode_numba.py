"""The compiled side of `flash_decode`: one row of softmax attention per head."""

from __future__ import annotations

import numpy as np
from numba import carray, prange

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
    word,
)
from pallas_kernels.flash import reference, rows

GLOBAL = -1  # `jaxattn.masks`
NEVER, FLOOR = np.float32(reference.NEVER), np.float32(rows.FLOOR)


@compiled(inline="always")
def sees(q_position, q_segment, k_position, k_segment, window):
    """The rules of `jaxattn.masks` for a causal query."""
    own = q_segment == k_segment and k_position <= q_position and q_position - k_position < window
    return (own and q_segment != 0) or (k_segment == GLOBAL and q_segment > 0)


@compiled(fastmath=SUMS)
def dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * widen(b[i])
    return total


@compiled(fastmath=SUMS)
def add(total, weight, row):
    for i in range(total.shape[0]):
        total[i] += weight * widen(row[i])


@compiled(inline="always")
def log_normaliser(top, mass):
    return top + np.log(mass) if mass != 0 else NEVER


@compiled(parallel=True)
def attend(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat):
    """One row of softmax attention per head, and its log Z, NEVER where it sees nothing.

    q [N, K, G, D] (scaled), k [N, K, S, D], v [N, K, S, V]; places [N] and [N, S]; o [N, K, G, V], stat [N, K, G].
    bias [N, 1 or K or K·G, S] is added to the scores, and from FLOOR down hides a key. It may be None, which
    is compiled for itself: a test of it costs nothing.
    """
    heads, group, keys = q.shape[1], q.shape[2], k.shape[2]
    shared = heads * group // (1 if bias is None else bias.shape[1])
    for item in prange(q.shape[0] * heads * group):
        n, h, g = item // (heads * group), item // group % heads, item % group
        scores, places = np.empty(keys, np.float32), np.empty(keys, np.int32)
        count, top, row = 0, FLOOR, (h * group + g) // shared
        for s in range(keys if q_segments[n] else 0):  # padding sees nothing
            if sees(q_positions[n], q_segments[n], k_positions[n, s], k_segments[n, s], window):
                if bias is not None and bias[n, row, s] <= FLOOR:
                    continue
                score = dot(q[n, h, g], k[n, h, s])
                if bias is not None:
                    score += bias[n, row, s]
                scores[count], places[count] = score, s
                count += 1
                top = max(top, score)
        total, mass = o[n, h, g], np.float32(0)
        total[:] = 0
        for i in range(count):
            weight = np.exp(scores[i] - top)
            mass += weight
            add(total, weight, v[n, h, places[i]])
        if mass != 0:
            total /= mass
        stat[n, h, g] = log_normaliser(top, mass)


@compiled(fastmath=SUMS)
def softmax(scores):
    """In place; gives log Z."""
    top, mass = FLOOR, np.float32(0)
    for i in range(scores.shape[0]):
        top = max(top, scores[i])
    for i in range(scores.shape[0]):
        scores[i] = np.exp(scores[i] - top)
        mass += scores[i]
    for i in range(scores.shape[0] if mass != 0 else 0):
        scores[i] /= mass
    return log_normaliser(top, mass)


@compiled(parallel=True)
def attend_rows(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat):
    """`attend` for many rows: what a row sees is found once for its heads, and a key is read once for its group."""
    rows, heads, group, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    shared = heads * group // (1 if bias is None else bias.shape[1])
    seen, counts = np.empty((rows, keys), np.int32), np.empty(rows, np.intp)
    for n in prange(rows):
        count = 0
        for s in range(keys if q_segments[n] else 0):  # padding sees nothing
            if sees(q_positions[n], q_segments[n], k_positions[n, s], k_segments[n, s], window):
                seen[n, count] = s
                count += 1
        counts[n] = count
    for item in prange(rows * heads):
        n, h = item // heads, item % heads
        scores = np.empty((group, counts[n]), np.float32)
        first, step = h * group // shared, 1 if shared < group else 0  # rows of bias
        for i in range(counts[n]):
            for g in range(group):
                if bias is not None and bias[n, first + g * step, seen[n, i]] <= FLOOR:
                    scores[g, i] = NEVER
                    continue
                scores[g, i] = dot(q[n, h, g], k[n, h, seen[n, i]])
                if bias is not None:
                    scores[g, i] += bias[n, first + g * step, seen[n, i]]
        for g in range(group):
            stat[n, h, g] = softmax(scores[g])
        o[n, h] = 0
        for i in range(counts[n]):
            for g in range(group):
                if bias is not None and bias[n, first + g * step, seen[n, i]] <= FLOOR:
                    continue
                add(o[n, h, g], scores[g, i], v[n, h, seen[n, i]])


@compiled()
def answer(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat):
    if q.shape[0] == 1:  # its heads are all there is to share among threads
        attend(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat)
    else:
        attend_rows(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat)


def _decode(frame: int) -> int:
    """Arguments as in `attend`, leading axes of vmap joined with N; a bias of one column is none. Returns no error."""
    if answered_version(frame):
        return 0
    query, keys, values = argument(frame, 0), argument(frame, 1), argument(frame, 2)
    extra = rank(query) - 4
    n = 1
    for axis in range(extra + 1):
        n *= dim(query, axis)
    h, g, d = dim(query, extra + 1), dim(query, extra + 2), dim(query, extra + 3)
    s, e = dim(keys, extra + 2), dim(values, extra + 3)
    q = carray(data(query), (n, h, g, d), np.float32)
    columns = argument(frame, 3)
    bias = carray(data(columns), (n, dim(columns, extra + 1), s), np.float32)
    biased = dim(columns, extra + 2) == s
    q_positions, q_segments = places(frame, 4, n), places(frame, 5, n)
    k_positions, k_segments = places(frame, 6, n * s).reshape(n, s), places(frame, 7, n * s).reshape(n, s)
    window = places(frame, 8, 1)[0]
    o = carray(data(result(frame, 0)), (n, h, g, e), np.float32)
    stat = carray(data(result(frame, 1)), (n, h, g), np.float32)
    if is_f32(keys):
        k, v = carray(data(keys), (n, h, s, d), np.float32), carray(data(values), (n, h, s, e), np.float32)
        if biased:
            answer(q, k, v, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat)
        else:
            answer(q, k, v, None, q_positions, q_segments, k_positions, k_segments, window, o, stat)
    else:
        kb, vb = carray(data(keys), (n, h, s, d), np.uint16), carray(data(values), (n, h, s, e), np.uint16)
        if biased:
            answer(q, kb, vb, bias, q_positions, q_segments, k_positions, k_segments, window, o, stat)
        else:
            answer(q, kb, vb, None, q_positions, q_segments, k_positions, k_segments, window, o, stat)
    return 0


@compiled()
def rank(buffer):
    return np.intp(word(buffer, 4))


@compiled()
def places(frame, index, count):
    return carray(data(argument(frame, index)), (count,), np.int32)


decode_handler = handler(_decode)
