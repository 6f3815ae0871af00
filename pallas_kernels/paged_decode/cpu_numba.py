"""The compiled side of `paged_decode` on a CPU: one row of softmax attention per head over listed pages."""

from __future__ import annotations

import numpy as np
from numba import carray, prange

from pallas_kernels._numba import answered_version, argument, compiled, data, dim, handler, is_f32, result
from pallas_kernels.flash.decode_numba import add, dot, places

NEVER = np.float32(-1e30)


@compiled(parallel=True)
def attend(q, k, v, tables, lengths, o, log_z):
    """q [B, K, G, D] (scaled), k and v [N, K, P, page, ·], tables [B, K, n], lengths [B, K]; o [B, K, G, V]."""
    heads, group, page, listed = q.shape[1], q.shape[2], k.shape[3], tables.shape[2]
    for item in prange(q.shape[0] * heads * group):
        b, h, g = item // (heads * group), item // group % heads, item % group
        pool = b if k.shape[0] > 1 else 0
        scores = np.empty(listed * page, np.float32)
        top = np.float32(-np.inf)
        for i in range(listed):
            if tables[b, h, i] >= 0:
                for s in range(min(page, lengths[b, h] - i * page)):
                    score = dot(q[b, h, g], k[pool, h, tables[b, h, i], s])
                    scores[i * page + s] = score
                    top = max(top, score)
        total, mass = o[b, h, g], np.float32(0)
        total[:] = 0
        for i in range(listed):
            if tables[b, h, i] >= 0:
                for s in range(min(page, lengths[b, h] - i * page)):
                    weight = np.exp(scores[i * page + s] - top)
                    mass += weight
                    add(total, weight, v[pool, h, tables[b, h, i], s])
        log_z[b, h, g] = NEVER
        if mass > 0:
            total /= mass
            log_z[b, h, g] = top + np.log(mass)


def _decode(frame: int) -> int:
    """Arguments as in `attend`; returns no error."""
    if answered_version(frame):
        return 0
    query, keys, values, listed = argument(frame, 0), argument(frame, 1), argument(frame, 2), argument(frame, 3)
    b, h, g, d = dim(query, 0), dim(query, 1), dim(query, 2), dim(query, 3)
    pools, pages, page, e, n = dim(keys, 0), dim(keys, 2), dim(keys, 3), dim(values, 4), dim(listed, 2)
    q = carray(data(query), (b, h, g, d), np.float32)
    tables, lengths = places(frame, 3, b * h * n).reshape(b, h, n), places(frame, 4, b * h).reshape(b, h)
    o = carray(data(result(frame, 0)), (b, h, g, e), np.float32)
    log_z = carray(data(result(frame, 1)), (b, h, g), np.float32)
    if is_f32(keys):
        k = carray(data(keys), (pools, h, pages, page, d), np.float32)
        v = carray(data(values), (pools, h, pages, page, e), np.float32)
        attend(q, k, v, tables, lengths, o, log_z)
    else:
        kb = carray(data(keys), (pools, h, pages, page, d), np.uint16)
        vb = carray(data(values), (pools, h, pages, page, e), np.uint16)
        attend(q, kb, vb, tables, lengths, o, log_z)
    return 0


paged_handler = handler(_decode)
