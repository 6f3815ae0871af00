"""float32 on a Hopper GPU, whose products are bfloat16: refused, unless JAX was told to round their operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, interpreted, recording
from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS
from tests.kernels.simulators import skip_module_without_gpus

skip_module_without_gpus()

SHAPE = Shape("small", batch=1, length=100, heads=2, kv_heads=1, dim=32, value_dim=48)
CACHES = {"paged_decode": (1, 2)}  # arguments that are never rounded: it would copy the cache at every step


def arrays_of(name):
    """Random arguments, which rounding does not change: what sums and weights lose is seen then.

    Log decays are not positive, lists name the first block or page.
    """
    draw = np.random.default_rng(0)

    def make(n, like):
        if jnp.issubdtype(like.dtype, jnp.integer):
            return jnp.full(like.shape, -1, like.dtype).at[..., 0].set(0)
        x = 0.5 * draw.normal(size=like.shape)
        kind = jnp.bfloat16 if n in CACHES.get(name, ()) else like.dtype
        return jnp.asarray(-0.4 * np.abs(x) if x.ndim == 1 else x, jnp.bfloat16).astype(kind)

    call = CALLS[name](SHAPE, jnp.float32)
    return call, [make(n, like) for n, like in enumerate(call.arguments)]


def results(call, backend, arrays):
    """The first output, and gradients of a loss that weighs each of its entries differently."""

    def loss(*arrays):
        o = jax.tree.leaves(call.function(*arrays, backend=backend))[0]
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

    if not call.differentiable:
        return [jax.jit(loss)(*arrays)[1]]
    which = tuple(range(call.differentiable))
    (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=which, has_aux=True))(*arrays)
    return [o, *gradients]


@pytest.mark.parametrize("name", CALLS)
def test_operands_are_rounded_on_request(name):
    """Outputs and gradients are f32 and differ from the reference as bfloat16 products do."""
    call, arrays = arrays_of(name)
    expected = results(call, "reference", arrays)
    with interpreted(), jax.default_matmul_precision("BF16_BF16_F32"):
        got = results(call, "gpu", arrays)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error, largest = np.abs(a - b).max(), np.abs(b).max()
        assert 0 < error <= 3e-2 * largest, (error, largest)


@pytest.mark.parametrize("name", CALLS)
def test_otherwise_they_are_refused(name):
    call, _ = arrays_of(name)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) if n in CACHES.get(name, ()) else x
        for n, x in enumerate(call.arguments)
    ]
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match=r"is float32: cast it, allow it with jax\.default_matmul"):
            jax.eval_shape(call.run("gpu"), *arguments)
        with recording() as choices:
            jax.eval_shape(call.run("auto"), *arguments)
        assert all("xla" in got for got in choices.values()), choices
        with jax.default_matmul_precision("bfloat16"), recording() as choices:
            jax.eval_shape(call.run("auto"), *arguments)
        assert all("gpu" in got for got in choices.values()), choices
