"""`paged_decode` compiled for real TPUs, ahead of time and without one: the kernel fits, the cache stays put."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout

from jaxattn.rope import Rope
from pallas_kernels import compiling_for
from pallas_kernels.paged_decode import paged_decode, pages_of

CACHE = 32768
HEADS, KV_HEADS = 8, 4


def temporaries(device, *, page, listed, dim=128, value_dim=128, queries=1, turned=False, dtype=jnp.bfloat16) -> int:
    """Bytes beside arguments, results and what fits on chip, for lists per head of a cache in row-major layout."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda *s, dtype=dtype, put=place: jax.ShapeDtypeStruct(s, dtype, sharding=put)
    rows = Format(Layout((0, 1, 2, 3)), place)  # narrow f32 caches else lie with tokens innermost
    cache = lambda width: shape(1, KV_HEADS, CACHE, width, put=rows)
    number = lambda *s: shape(*s, dtype=jnp.int32)

    def call(q, k, v, tables, lengths, positions):
        more = {"rope": Rope(1e4), "key_positions": positions} if turned else {}
        return paged_decode(q, pages_of(k, page), pages_of(v, page), tables, lengths, scale=0.1, **more)

    with compiling_for("tpu"):
        lowered = jax.jit(call).lower(
            shape(1, queries, HEADS, dim),
            cache(dim),
            cache(value_dim),
            number(1, KV_HEADS, listed),
            number(1, 1, queries),
            number(1, 1, listed * page),
        )
    assert lowered.as_text().count("tpu_custom_call") == 1, "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("page", [1, 16, 64, 512])
def test_a_list_of_2048_in_32k_needs_memory_for_the_list_only(chip, page):
    """The cache's keys are 32 MB. A row read needs a few numbers: what it adds to scores, whether it counts."""
    rows = KV_HEADS * 2048 * (16 if page == 1 else 1)  # 16 of the tile around a token
    assert temporaries(chip, page=page, listed=2048 // page) <= 12 * rows * 4 + 2**18


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_other_chips(chip):
    assert temporaries(chip, page=64, listed=32, turned=True) <= 2**20


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_the_whole_cache_listed_fits(chip):
    assert temporaries(chip, page=64, listed=CACHE // 64) <= 4 * KV_HEADS * CACHE * 4
    assert temporaries(chip, page=1, listed=CACHE // 2) <= 8 * KV_HEADS * CACHE // 2 * 16 * 4, "in several splits"


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("dim", "value_dim"), [(60, 96), (64, 64), (192, 128)])
def test_odd_head_dims_keys_turned_and_queries_with_lengths_of_their_own(chip, dim, value_dim, dtype):
    """Angles are 4 bytes a dim and listed token, in whole lanes; no copy of the cache."""
    used = temporaries(chip, page=16, listed=32, dim=dim, value_dim=value_dim, queries=3, turned=True, dtype=dtype)
    assert used <= 4 * 512 * 256 * 4


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_tokens_turned_by_their_ranks(chip):
    """One angle a token, not one a row of its tile."""
    assert temporaries(chip, page=1, listed=2048, turned=True) <= 8 * 2048 * 128 * 4
