"""`grouped_softmax` compiled for real TPUs, ahead of time and without one: kernels fit, memory grows with T only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import compiling_for
from pallas_kernels.grouped_softmax import grouped_softmax

HEADS, KV_HEADS = 4, 2


def temporaries(device, length, dim, *, gradients, block=51, dtype=jnp.bfloat16, value_dim=None) -> int:
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit.

    Segments are an argument, as where documents are packed.
    """
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda *dims, dtype=dtype: jax.ShapeDtypeStruct((1, length, *dims), dtype, sharding=place)

    def call(q, k, v, segments):
        return grouped_softmax(q, k, v, self_visibility(1, length, segment_ids=segments), block=block, scale=0.1)

    def loss(*x):
        o, log_z = call(*x)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(log_z)

    program = jax.grad(loss, argnums=(0, 1, 2)) if gradients else call
    arrays = shape(HEADS, dim), shape(KV_HEADS, dim), shape(KV_HEADS, value_dim or dim), shape(dtype=jnp.int32)
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(*arrays)
    assert lowered.as_text().count("tpu_custom_call") == (3 if gradients else 1), "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


def heads_first(length: int, dim: int) -> int:
    """Bytes of q, or of k and v together, heads before tokens; rows of 64 fill whole lanes of 128."""
    return HEADS * length * max(dim, 128) * 2


def test_gradients_at_32k_need_memory_for_rows_only(chip):
    """Copies of q, k, v and do, o and dq also in f32, k and v also in slots; one head's scores would be 2 GB."""
    assert temporaries(chip, 32768, 128, gradients=True) <= 10 * heads_first(32768, 128)


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_the_forward_pass_copies_its_arguments_and_output(chip):
    assert temporaries(chip, 8192, 128, gradients=False) <= 6.5 * heads_first(8192, 128)


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_other_chips_compile(chip):
    temporaries(chip, 1024, 128, gradients=True)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(
    ("length", "dim", "value_dim", "block", "dtype"),
    [
        (129, 5, 70, 51, jnp.bfloat16),
        (300, 192, 60, 3, jnp.float32),
        (300, 256, 256, 2048, jnp.float32),
    ],
    ids=["odd", "short blocks", "the longest block"],
)
def test_odd_sizes_and_blocks_compile(chip, length, dim, value_dim, block, dtype):
    temporaries(chip, length, dim, gradients=True, block=block, value_dim=value_dim, dtype=dtype)
