"""`flash` compiled for real TPUs, ahead of time and without one: the kernels fit, and memory grows with T only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from jaxattn.rope import RelativeBias
from pallas_kernels import Score, compiling_for, flash

SOFTMAX = Score()
HEADS, KV_HEADS = 4, 2


def temporaries(device, length, dim, *, gradients, score=SOFTMAX, dtype=jnp.bfloat16, stats=False, **more) -> int:
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit.

    Args:
      more: shapes of f32 arguments: scale, key_bias, table of T5.
    """
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, dim), dtype, sharding=place)
    more = {name: jax.ShapeDtypeStruct(size, jnp.float32, sharding=place) for name, size in more.items()}

    def call(q, k, v, more):
        more = {"scale": 0.1, **more}
        bias = RelativeBias(more.pop("table")) if "table" in more else None
        return flash(q, k, v, self_visibility(1, length), score, bias=bias, stats=stats, **more)

    loss = lambda *x: sum(jnp.sum(jnp.sin(out.astype(jnp.float32))) for out in jax.tree.leaves(call(*x)))
    program = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradients else call
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(shape(HEADS), shape(KV_HEADS), shape(KV_HEADS), more)
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


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
def test_key_bias_scale_and_statistics_at_32k_cost_numbers_per_row(chip):
    """Beside the copies of the plain call: one more of q (scaled) and its gradient, and numbers per key and row."""
    more = {"scale": (1, 32768, HEADS), "key_bias": (1, HEADS, 32768)}
    used = temporaries(chip, 32768, 128, gradients=True, stats=True, **more)
    assert used <= 8 * heads_first(32768, 128) + 16 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_other_chips(chip):
    """One has less memory on chip, the other wider matrix products; with a member that keeps three numbers per row."""
    more = {"scale": (HEADS,), "key_bias": (1, KV_HEADS, 1500)}
    temporaries(chip, 1500, 96, gradients=True, score=Score("sigmoid", "none"), stats=True, **more)


@pytest.mark.parametrize(
    ("chip", "score", "dtype"),
    [
        ("v5e", SOFTMAX, jnp.bfloat16),
        *[
            pytest.param(chip, Score("sigmoid", "p_norm", p=1.5), jnp.float32, marks=pytest.mark.slow)
            for chip in ("v4", "v5e", "v6e", "tpu7x")
        ],
    ],
    indirect=["chip"],
)
def test_a_table_of_32_buckets_and_all_options_fit(chip, score, dtype):
    more = {"scale": (1, 1500, HEADS), "key_bias": (1, HEADS, 1500), "table": (32, HEADS)}
    temporaries(chip, 1500, 96, gradients=True, score=score, dtype=dtype, stats=True, **more)
