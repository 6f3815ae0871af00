"""`block_sparse` compiled for real TPUs, ahead of time and without one: it fits, and memory grows with T only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import Score, compiling_for
from pallas_kernels.block_sparse import block_sparse

SOFTMAX = Score()
HEADS, KV_HEADS, WIDTH = 4, 2, 16


def temporaries(device, length, dim, *, lists=KV_HEADS, biases=0, block=128, score=SOFTMAX, dtype=jnp.bfloat16) -> int:
    """Bytes beside arguments, gradients and what fits on chip; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, dim), dtype, sharding=place)
    rows = -(-length // block)
    blocks = jax.ShapeDtypeStruct((1, lists, rows, min(WIDTH, rows)), jnp.int32, sharding=place)
    bias = [jax.ShapeDtypeStruct((1, biases, length), jnp.float32, sharding=place)] if biases else []

    def loss(q, k, v, blocks, *bias):
        vis, sizes = self_visibility(1, length), dict(block_q=block, block_k=block, scale=0.1)
        sizes |= {"key_bias": bias[0]} if bias else {}
        o, stat = block_sparse(q, k, v, vis, score, blocks=blocks, stats=True, **sizes)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(stat)

    with compiling_for("tpu"):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2, *range(4, 4 + len(bias)))))
        lowered = program.lower(shape(HEADS), shape(KV_HEADS), shape(KV_HEADS), blocks, *bias)
    assert lowered.as_text().count("tpu_custom_call") == 3, "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


def bound(length: int, dim: int, lists: int) -> int:
    """Copies of q, k, v, o and their gradients, numbers per row, and per list its tables; no row of scores."""
    heads_first = HEADS * length * max(dim, 128) * 2  # of q, or of k and v together
    return 6 * heads_first + 9 * HEADS * length * 4 + lists * 16 * (length // 128) * (WIDTH + 2) * 4


def test_gradients_at_32k_need_memory_for_rows_only(chip):
    """One head's scores would be 2 GB."""
    assert temporaries(chip, 32768, 128, biases=HEADS) <= bound(32768, 128, KV_HEADS)


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_other_chips_and_narrow_heads(chip):
    assert temporaries(chip, 8192, 64, biases=KV_HEADS) <= bound(8192, 64, KV_HEADS)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(("lists", "biases"), [(1, 0), (HEADS, 1)])
def test_lists_for_all_heads_and_per_query_head(chip, lists, biases):
    assert temporaries(chip, 8192, 128, lists=lists, biases=biases) <= bound(8192, 128, lists)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_the_largest_blocks_of_an_elementwise_member_in_float32_fit(chip):
    score = Score("sigmoid", "p_norm", p=1.5)
    temporaries(chip, 1024, 256, biases=HEADS, block=512, score=score, dtype=jnp.float32)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_odd_lengths_and_head_dims_compile(chip):
    temporaries(chip, 257, 5)
