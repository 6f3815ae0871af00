"""`flash` compiled for real TPUs, ahead of time and without one: the kernels fit, and memory grows with T only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import Score, compiling_for, flash

SOFTMAX = Score()
HEADS, KV_HEADS = 4, 2


def temporaries(device, length, dim, *, gradients, score=SOFTMAX, dtype=jnp.bfloat16) -> int:
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, dim), dtype, sharding=place)
    call = lambda q, k, v: flash(q, k, v, self_visibility(1, length), score, scale=0.1)
    loss = lambda *x: jnp.sum(call(*x).astype(jnp.float32))
    program = jax.grad(loss, argnums=(0, 1, 2)) if gradients else call
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(shape(HEADS), shape(KV_HEADS), shape(KV_HEADS))
    assert lowered.as_text().count("tpu_custom_call") == (3 if gradients else 1), "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


def heads_first(length: int, dim: int) -> int:
    """Bytes of q, or of k and v together, heads before tokens; rows of 64 fill whole lanes of 128."""
    return HEADS * length * max(dim, 128) * 2


@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_at_32k_need_memory_for_rows_only(chip, dim):
    """Copies of q, k, v, o and their gradients, and a few numbers per row; one head's scores would be 2 GB."""
    assert temporaries(chip, 32768, dim, gradients=True) <= 6 * heads_first(32768, dim) + 8 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_the_forward_pass_at_32k_copies_its_arguments_and_output_at_most(chip):
    assert temporaries(chip, 32768, 128, gradients=False) <= 3 * heads_first(32768, 128) + 8 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(
    ("score", "dtype"),
    [
        (Score("sigmoid", "p_norm", p=1.5), jnp.float32),
        (Score("exp", "p_norm", p=0.5), jnp.bfloat16),
    ],
    ids=lambda x: getattr(x, "activation", None),
)
def test_other_members_and_float32_fit(chip, score, dtype):
    temporaries(chip, 2048, 128, gradients=True, score=score, dtype=dtype)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_odd_lengths_and_head_dims_compile(chip):
    temporaries(chip, 257, 5, gradients=True)
