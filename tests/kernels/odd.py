"""Odd shapes and both dtypes for tests of kernels: each shape in one dtype, the other one is slow."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels.shapes import ODD

DTYPES = (("f32", jnp.float32), ("bf16", jnp.bfloat16))
in_both_dtypes = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape.name}-{name}", marks=() if i % 2 == j else pytest.mark.slow)
        for i, shape in enumerate(ODD)
        for j, (name, dtype) in enumerate(DTYPES)
    ],
)
