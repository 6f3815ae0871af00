"""What the tests of the prefix softmax share: its inputs, documents in a row, and the recurrence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.prefix_softmax import Partial, prefix_softmax
from pallas_kernels.shapes import Shape

SMALL = Shape("small", batch=2, length=75, heads=3, kv_heads=3, dim=1, value_dim=5)


def inputs(shape=SMALL, dtype=jnp.float32, spread=3.0, seed=0):
    """Scores, values, and the m, u, w of a few tokens before them."""
    rng = np.random.default_rng(seed)
    batch, length, heads, v_dim = shape.batch, shape.length, shape.heads, shape.value_dim
    draw = lambda *dims, by=1.0: jnp.asarray(by * rng.normal(size=dims), jnp.float32)
    s, v = draw(batch, length, heads, by=spread), draw(batch, length, heads, v_dim).astype(dtype)
    u = jnp.asarray(rng.uniform(0.5, 3.0, size=(batch, heads)), jnp.float32)
    return s, v, draw(batch, heads, by=spread), u, draw(batch, heads, v_dim)


def recurrence(s, v, **options):
    return prefix_softmax(s, v, backend="reference", **options)


def both(run, arrays, segments=None, initial_segment=None):
    """Outputs and all gradients of a loss that weighs every entry differently, of the state behind it too."""
    segments = jnp.ones(arrays[0].shape[:2], jnp.int32) if segments is None else segments

    def loss(s, v, m, u, w):
        o, last = run(s, v, segments=segments, initial=Partial(m, u, w), initial_segment=initial_segment)
        weigh = lambda x, by: jnp.sum(
            jnp.sin(x.astype(jnp.float32)) * jnp.cos(by * jnp.arange(x.size)).reshape(x.shape)
        )
        return weigh(o, 1.0) + weigh(last.u, 0.7) + weigh(last.w, 0.3) + weigh(last.m, 0.9), (o, last)

    return jax.jit(lambda *x: jax.grad(loss, range(5), has_aux=True)(*x)[::-1])(*arrays)


def packs(length=75):
    """Padding in front, between and behind, a document of one token, one (3) without any, and a row of padding."""
    segments = np.zeros((3, length), np.int32)
    segments[0, 3:20], segments[0, 25:26], segments[0, 26:60], segments[0, 66:72] = 1, 1, 2, 4
    segments[1, 40:] = 5
    return jnp.asarray(segments)
