"""`prefix_softmax` compiled for real TPUs, ahead of time and without one: it fits, and memory grows with T only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compiling_for
from pallas_kernels.prefix_softmax import Partial, prefix_softmax
from pallas_kernels.prefix_softmax.tpu import WIDEST

HEADS = 4


def temporaries(device, length, value_dim, *, gradients=True, dtype=jnp.bfloat16):
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype, sharding=place)
    args = [shape(1, length, HEADS), shape(1, length, HEADS, value_dim, dtype=dtype)]
    args.append(Partial(shape(1, HEADS), shape(1, HEADS), shape(1, HEADS, value_dim)))

    def loss(s, v, initial):
        o, last = prefix_softmax(s, v, initial=initial)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(last.u) + jnp.sum(last.w)

    with compiling_for("tpu"):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2)) if gradients else loss).lower(*args)
    assert lowered.as_text().count("tpu_custom_call") == (2 if gradients else 1), "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


def rows(length: int, dim: int) -> int:
    """Bytes of v in bfloat16, with lanes filled."""
    return HEADS * length * max(dim, 128) * 2


@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_at_32k_need_memory_for_rows(chip, dim):
    """Copies of v, o and their cotangents with heads first, and a few numbers a row; T×T would be 17 GB."""
    assert temporaries(chip, 32768, dim) <= 5 * rows(32768, dim) + 12 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_older_and_newer_chips(chip):
    temporaries(chip, 1024, 128)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(("length", "dim"), [(257, 5), (16, 60), (300, WIDEST)], ids=str)
def test_odd_and_extreme_sizes_fit_in_float32(chip, length, dim):
    temporaries(chip, length, dim, dtype=jnp.float32)


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_the_forward_pass_at_32k_copies_values_and_outputs_at_most(chip):
    assert temporaries(chip, 32768, 128, gradients=False) <= 2 * rows(32768, 128) + 8 * HEADS * 32768 * 4
