"""`probe` compiled for real TPUs, ahead of time and without one: the kernels fit, and no row of weights leaves them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import compiling_for
from pallas_kernels.probe import NAMES, probe

HEADS, KV_HEADS = 8, 2


def temporaries(
    device, length, count, *, want=NAMES, dim=128, block=64, biases=0, dtype=jnp.bfloat16, window=None
) -> int:
    """Bytes beside arguments, results and what fits on chip; keys come heads first, as caches hold them."""
    place = jax.sharding.SingleDeviceSharding(device)
    q, k = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape in ((1, count, HEADS, dim), (1, KV_HEADS, length, dim))
    )
    bias = [jax.ShapeDtypeStruct((1, biases, length), jnp.float32, sharding=place)] if biases else []

    def call(q, k, key_bias=None):
        vis = self_visibility(1, length, window=window).rows(length - count, count)
        return probe(q, jnp.swapaxes(k, 1, 2), vis, scale=0.1, want=want, block=block, key_bias=key_bias)

    with compiling_for("tpu"):
        lowered = jax.jit(call).lower(q, k, *bias)
    passes = 1 if set(want) <= {"lse", "top"} else 2
    assert lowered.as_text().count("tpu_custom_call") == passes, "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("want", [("lse", "top"), ("columns", "diagonals"), ("blocks",), NAMES], ids="-".join)
def test_32k_keys_need_memory_for_rows_and_columns_only(chip, want):
    """A byte per query and key of all heads would be 16 MB."""
    rows, columns, blocks = HEADS * 64 * 128 * 4, HEADS * 32768 * 4, HEADS * 64 * (32768 // 64) * 4
    held = temporaries(chip, 32768, 64, want=want, biases=HEADS)
    assert held <= 4 * (rows + columns + ("blocks" in want) * blocks) < 64 * columns


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_other_chips(chip):
    temporaries(chip, 4096, 128, block=128, biases=KV_HEADS)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(("length", "count", "dim", "block"), [(1, 1, 60, 8), (1000, 63, 96, 16), (257, 100, 192, 256)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_odd_sizes_compile(chip, length, count, dim, block, dtype):
    temporaries(chip, length, count, dim=dim, block=block, dtype=dtype, window=50)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_as_many_diagonals_as_are_promised_fit(chip):
    temporaries(chip, 2**20, 64, want=("diagonals",))
