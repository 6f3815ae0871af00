"""What the tests of the neural memory share: its inputs, and documents in a row."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.neural_memory import MemoryState
from tests.conformance.cases import normal

RATES = ("eta", "theta", "alpha")


def setting(length=45, *, batch=2, heads=2, dim=4, value_dim=3, depth=2, width=6, dtype=jnp.float32, seed=0):
    """(q, k, v) with unit q and k, and the rates and M_0 as keyword arguments."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k = (unit(normal(batch, length, heads, dim)) for _ in range(2))
    rates = {r: m / (1 + np.exp(-normal(batch, length, heads))) for r, m in zip(RATES, (1, 0.1, 0.2), strict=True)}
    widths = [dim, *[width] * (depth - 1), value_dim]
    start = tuple(normal(heads, i, o) / i**0.5 for i, o in pairwise(widths))
    values = (q, k, normal(batch, length, heads, value_dim)), {**rates, "start": start}
    return jax.tree.map(lambda x: x.astype(dtype), values)


def placed(*args, **kwargs):
    """`setting` as arrays of JAX, for calls outside `jax.jit`."""
    return jax.tree.map(jnp.asarray, setting(*args, **kwargs))


# A document that goes on from the state, of 17 tokens, one of 1, one of 19; padding in front, between and behind.
# Segment 2 is empty, and a new document begins with the row in row 1.
SEGMENTS = np.zeros((2, 43), np.int32)
SEGMENTS[0, 2:19], SEGMENTS[0, 19], SEGMENTS[0, 22:41] = 1, 3, 4
SEGMENTS[1, :26], SEGMENTS[1, 28:30], SEGMENTS[1, 30:] = 5, 6, 7


def inside(start, batch, segment=1) -> MemoryState:
    """A state in the middle of a chunk: weights, momentum and frozen weights of its own."""
    noise = lambda seed, w: jnp.asarray(0.3 * normal(seed + w.size, (batch, *w.shape)))
    M, S, frozen = (tuple(f * w + noise(s, w) for w in start) for s, f in ((1, 1.0), (2, 0.0), (3, 1.0)))
    count = jnp.arange(3, 3 + batch, dtype=jnp.int32)
    return MemoryState(M, S, frozen, count, jnp.full((batch,), segment, jnp.int32))
