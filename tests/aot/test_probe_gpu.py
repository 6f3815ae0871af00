"""The Hopper kernels of `probe` compiled for an H100, without one: registers, shared memory, tensor cores, copies."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels.probe import NAMES, probe
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS = 8, 2
KERNELS = {"columns": "probe_columns", "diagonals": "probe_diagonals", "blocks": "probe_blocks"}


def compiled(dim, want, length=32768, count=64, block=64, biases=0, **rules) -> int:
    """Bytes beside arguments and results. Nothing is spilled, products are done by tensor cores on fetched tiles."""

    def call(q, k, key_bias=None):
        vis = self_visibility(1, length, **rules).rows(length - count, count)
        return probe(q, k, vis, scale=0.1, want=want, block=block, key_bias=key_bias)

    struct = lambda n, heads: h100.struct((1, n, heads, dim), jnp.bfloat16)
    bias = [h100.struct((1, biases, length), jnp.float32)] if biases else []
    program, kernels = h100.compiled(call, struct(count, HEADS), struct(length, KV_HEADS), *bias)
    expected = {"probe_rows", *(KERNELS[name] for name in want if name in KERNELS)}
    assert {kernel.name for kernel in kernels} == expected, "auto is the kernel"
    for kernel in kernels:
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("dim", "biases"),
    [
        (64, HEADS),
        (128, 0),
        (192, KV_HEADS),
        pytest.param(128, HEADS, marks=pytest.mark.slow),
        pytest.param(256, 1, marks=pytest.mark.slow),
    ],
)
def test_32k_keys_need_memory_for_columns_and_blocks_only(dim, biases):
    """A byte per query and key of all heads would be 16 MB."""
    columns, blocks = HEADS * 32768 * 4, HEADS * 64 * (32768 // 64) * 4
    assert compiled(dim, NAMES, biases=biases) <= 2 * columns + 6 * blocks


@pytest.mark.slow
def test_diagonals_of_32k_queries_need_memory_for_rows_and_columns_only():
    """One head's places alone would be 4 GB."""
    assert compiled(64, ("columns", "diagonals"), count=32768) <= 32 * HEADS * 32768 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "count", "dim", "block"),
    [(1, 1, 60, 8), (1000, 63, 96, 16), (700, 100, 128, 256), (257, 70, 192, 128), (1000, 3, 256, 8)],
)
@pytest.mark.parametrize("rules", [dict(window=50), dict(causal=False)], ids=str)
def test_odd_sizes_compile(length, count, dim, block, rules):
    compiled(dim, NAMES, length, count, block, **rules)
