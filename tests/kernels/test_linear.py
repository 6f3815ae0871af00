"""The linear map: the plain product, and on each platform the same weight gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.linear import linear
from tests.conformance.cases import close


@pytest.mark.parametrize("shape", [(1, 3, 5), (63, 16, 40), (100, 40, 16), (7, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_equal_the_plain_product(shape, dtype):
    rows, d_in, d_out = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, d_in), dtype)
    w = jax.random.normal(keys[1], (d_in, d_out), dtype)
    g = jax.random.normal(keys[2], (rows, d_out), dtype)
    y, pull = jax.vjp(linear, x, w)
    expected, plain = jax.vjp(jnp.matmul, x, w)
    close(y, expected)
    for ours, theirs, like in zip(pull(g), plain(g), (x, w), strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, like.dtype)
        close(ours, theirs, rtol=1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.optimised
def test_only_the_cpu_turns_its_operand():
    """Other platforms choose their own layouts: an explicit transpose would cost them a copy."""
    x, g = jnp.ones((8, 4)), jnp.ones((8, 6))
    gradient = jax.jit(lambda x, w, g: jax.vjp(linear, x, w)[1](g))
    for platform, barriers in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = gradient.trace(x, jnp.ones((4, 6)), g).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == barriers, platform
