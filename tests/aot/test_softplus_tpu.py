"""Softplus rows compiled for real TPUs, ahead of time and without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import compiling_for
from pallas_kernels.softplus import softplus_attention

HEADS, KV_HEADS = 4, 2


def temporaries(device, length, dim, *, gradients, dtype=jnp.bfloat16, **options) -> int:
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, dim), dtype, sharding=place)
    call = lambda q, k, v: softplus_attention(q, k, v, self_visibility(1, length), scale=1.7, **{"p": 15.0, **options})
    loss = lambda *x: jnp.sum(call(*x).astype(jnp.float32))
    program = jax.grad(loss, argnums=(0, 1, 2)) if gradients else call
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(shape(HEADS), shape(KV_HEADS), shape(KV_HEADS))
    kernels = (2 if options.get("p", 15.0) else 1) + (2 if gradients else 0)
    assert lowered.as_text().count("tpu_custom_call") == kernels, "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v4", "tpu7x"], indirect=True)
def test_gradients_at_32k_need_memory_for_rows_only(chip):
    """f32 copies of q, k, v, o and their gradients, and a few numbers per row; one head's scores would be 4 GB."""
    heads_first = HEADS * 32768 * 128 * 4
    assert temporaries(chip, 32768, 128, gradients=True) <= 8 * heads_first + 16 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_odd_lengths_and_head_dims_compile(chip):
    temporaries(chip, 257, 192, gradients=True)
    temporaries(chip, 100, 60, gradients=True, dtype=jnp.float32, p=None)
