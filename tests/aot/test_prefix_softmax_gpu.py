"""`prefix_softmax` compiled for an H100, without one: by the kernels of `linear_scan`, with memory for rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.prefix_softmax import prefix_softmax
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, LENGTH = 4, 32768


@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_at_32k_need_memory_for_rows(dim):
    """Values, outputs, cotangents and one feature a token, filled up to 64; T×T of one head would be 4 GB."""
    args = h100.struct((1, LENGTH, HEADS), jnp.float32), h100.struct((1, LENGTH, HEADS, dim), jnp.bfloat16)
    loss = lambda s, v: jnp.sum(prefix_softmax(s, v)[0].astype(jnp.float32))
    program, kernels = h100.compiled(jax.grad(loss, argnums=(0, 1)), *args)
    assert "linear_scan_forward" in {kernel.name for kernel in kernels}
    for kernel in kernels:
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel
    assert program.memory_analysis().temp_size_in_bytes <= 24 * HEADS * LENGTH * dim * 2
