"""The Hopper kernel of `paged_decode` compiled for an H100, without one: registers, shared memory, copies, memory."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxattn.rope import Rope
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.gpu import parts
from pallas_kernels.paged_decode.gpu_tiles import chunk
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS = 8, 2
TURNED = Rope(1e4)


def compiled(dim=128, *, page=16, value_dim=None, queries=1, cache=32768, listed=32768, batch=1, rope=None):
    """Bytes of temporaries, and the one kernel of the program of `auto`: lists per sequence, ends per query."""
    bf16, value_dim = jnp.bfloat16, value_dim or dim
    pages = lambda dim: h100.struct((1, KV_HEADS, cache // page, page, dim), bf16)
    number = lambda *shape: h100.struct(shape, jnp.int32)

    def call(q, k, v, tables, lengths, positions):
        more = {} if rope is None else {"rope": rope, "key_positions": positions}
        return paged_decode(q, k, v, tables, lengths, scale=0.1, **more)

    program, (kernel,) = h100.compiled(
        call,
        h100.struct((batch, queries, HEADS, dim), bf16),
        pages(dim),
        pages(value_dim),
        number(batch, 1, listed // page),
        number(batch, 1, queries),
        number(batch, 1, listed),
    )
    assert kernel.name == "paged_decode_forward", "auto is the kernel"
    return program.memory_analysis().temp_size_in_bytes, kernel


def check(kernel, blocks=1):
    """Nothing is spilled, so many blocks fit a multiprocessor, products are the tensor cores', copies the engine's."""
    assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
    assert blocks * kernel.shared_bytes <= h100.SHARED_BYTES, kernel
    assert blocks * 128 * kernel.registers <= 65536, kernel
    assert kernel.wgmma > 0, kernel
    assert kernel.tma > 0, kernel


@pytest.mark.parametrize("page", [1, 16, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_whole_cache_of_32k_listed_needs_a_few_numbers_per_row(dim, page):
    """The cache's keys are 8 or 16 MB. A row read needs two numbers, every part of the list a result of its own."""
    memory, kernel = compiled(dim, page=page)
    check(kernel, blocks=2)
    split = parts(KV_HEADS, 32768 // chunk(dim, dim), 264)
    assert memory <= 2 * 32768 * 4 + split * KV_HEADS * 8 * (dim + 8) * 4 + 2**18


def test_a_short_list_needs_memory_for_the_list_only():
    memory, kernel = compiled(listed=2048, cache=2**20, page=1)
    check(kernel, blocks=2)
    assert memory <= 2 * 2048 * 4 + 32 * KV_HEADS * 8 * 136 * 4 + 2**18


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("page", [1, 64])
def test_turned_keys_fit(dim, page):
    """Their memory: cosines and sines, which are made in two copies."""
    memory, kernel = compiled(dim, page=page, listed=4096, rope=TURNED)
    check(kernel, blocks=2)
    assert memory <= 3 * 4096 * dim * 4 + 2**21


@pytest.mark.parametrize(("queries", "dim"), [(4, 128), (24, 128), (24, 64)])
def test_several_queries_fit(queries, dim):
    check(compiled(dim, queries=queries)[1], blocks=2)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [None, TURNED, Rope(1e4, fraction=0.5)], ids=["", "turned", "turned in part"])
@pytest.mark.parametrize("queries", [1, 24])
@pytest.mark.parametrize("page", [1, 48])
@pytest.mark.parametrize("dims", [(64, 64), (64, 256), (96, 80), (192, 192), (256, 256)], ids=str)
def test_every_width_fits(dims, page, queries, rope):
    check(compiled(dims[0], value_dim=dims[1], page=page, cache=960, listed=960, queries=queries, rope=rope)[1])


@pytest.mark.slow
def test_many_sequences_of_a_pool_fit():
    check(compiled(batch=64, cache=2**20)[1], blocks=2)
