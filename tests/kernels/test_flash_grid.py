"""Fast backends of `flash` on the shared odd shapes: forward and every gradient against the f32 reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import Score, flash, interpreted
from pallas_kernels.shapes import ODD, Shape
from tests.conformance.cases import close, inputs, normal

SCORES = {  # with the options of the call
    "softmax": (Score(), ()),
    "plus one, all options": (Score("exp", "sum_plus_one"), ("key_bias", "scale", "stats")),
    "sigmoid p-norm, all options": (Score("sigmoid", "p_norm", p=1.5), ("key_bias", "scale", "stats")),
    "relu count": (Score("relu", "count"), ()),
}
# Every length with each score and each type once or more on one backend; the rest takes minutes.
FAST = {
    ("tpu", "softmax", "float32"): (1, 63, 257, 1000),
    ("tpu", "softmax", "bfloat16"): (100,),
    ("tpu", "plus one, all options", "bfloat16"): (1, 257),
    ("tpu", "sigmoid p-norm, all options", "float32"): (100,),
    ("xla", "softmax", "float32"): (1, 257),
    ("xla", "softmax", "bfloat16"): (63,),
    ("xla", "plus one, all options", "float32"): (1000,),
}


def documents(length: int):
    """Two documents, one of length 1 and an empty one; padding in front, between and behind where there is room."""
    if length < 20:
        return self_visibility(1, length)
    positions, segments = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32)
    for segment, start, size in ((1, 3, length // 2), (3, 5 + length // 2, 1), (4, 6 + length // 2, length // 3)):
        positions[:, start : start + size], segments[:, start : start + size] = np.arange(size), segment
    return self_visibility(1, length, positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments))


@functools.lru_cache(maxsize=2)
def computed(backend: str, shape: Shape, score: str, dtype: str):
    """Outputs and the gradients of a loss that weighs every entry of them differently."""
    member, options = SCORES[score]
    q, k, v = inputs(
        shape.length, batch=1, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, value_dim=shape.value_dim,
        dtype=jnp.dtype(dtype),
    )  # fmt: skip
    size, vis = shape.dim**-0.5, documents(shape.length)
    arrays = {"q": q, "k": k, "v": v}
    if "key_bias" in options:
        arrays["key_bias"] = jnp.asarray(normal(12, (1, shape.kv_heads, shape.length)))
    if "scale" in options:
        arrays["scale"] = jnp.asarray(size * (1 + 0.3 * normal(11, (1, shape.length, shape.heads))))
    weigh = lambda x, n: jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(n + jnp.arange(x.size)).reshape(x.shape))

    def loss(arrays):
        call = {"scale": size, **arrays}
        out = flash(*(call.pop(n) for n in "qkv"), vis, member, stats="stats" in options, backend=backend, **call)
        return sum(weigh(x, n) for n, x in enumerate(jax.tree.leaves(out))), out

    with interpreted():
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, gradients


def cases():
    for backend in ("tpu", "xla"):
        for score in SCORES:
            for dtype in ("float32", "bfloat16"):
                for shape in ODD:
                    fast = shape.length in FAST.get((backend, score, dtype), ())
                    marks = () if fast else pytest.mark.slow
                    yield pytest.param(
                        backend, score, dtype, shape, marks=marks, id=f"{backend}-{score}-{dtype}-{shape.name}"
                    )


@pytest.mark.parametrize(("backend", "score", "dtype", "shape"), list(cases()))
def test_odd_shapes(backend, score, dtype, shape):
    ours, theirs = (computed(name, shape, score, dtype) for name in (backend, "reference"))
    rtol = 5e-5 if dtype == "float32" else 2e-2
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    jax.tree.map(lambda a, b: close(a, b, rtol=rtol), ours, theirs)
