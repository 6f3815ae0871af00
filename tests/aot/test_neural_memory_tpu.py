"""`neural_memory` compiled for real TPUs, ahead of time and without one: memory of any depth fits, and grows with T."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import compiling_for
from pallas_kernels.neural_memory import neural_memory
from pallas_kernels.neural_memory.tpu_plan import layout

HEADS = 4


def temporaries(device, length, widths, *, gradients=True, heads=HEADS, dtype=jnp.bfloat16, **options) -> int:
    """Bytes beside arguments, results and what fits on chip; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype, sharding=place)
    tokens = lambda width: shape(1, length, heads, width, dtype=dtype)
    rate, start = shape(1, length, heads), tuple(shape(heads, *w) for w in pairwise(widths))

    def loss(q, k, v, eta, theta, alpha, start):
        y, after = neural_memory(q, k, v, eta=eta, theta=theta, alpha=alpha, start=start, **options)
        return sum(jnp.sum(a.astype(jnp.float32)) for a in (y, *after.M, *after.S))

    program = jax.grad(loss, argnums=range(7)) if gradients else loss
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(tokens(widths[0]), tokens(widths[0]), tokens(widths[-1]), *[rate] * 3, start)
    assert lowered.as_text().count("tpu_custom_call") == (2 if gradients else 1), "auto is the kernel"
    return lowered.compile().memory_analysis().temp_size_in_bytes


def rows(length: int, count: int) -> int:
    """Bytes of `count` arrays of tokens in f32; rows of 64 fill whole lanes of 128."""
    return count * HEADS * length * 128 * 4


def kept(length: int, widths: tuple[int, ...], chunk: int) -> int:
    """Bytes of the states that the forward pass keeps."""
    plan = layout(tuple(jnp.zeros((1, *w)) for w in pairwise(widths)), length, chunk=chunk)
    blocks = -(-length // (plan.size * plan.tiles))
    return HEADS * blocks * 3 * sum(i * max(o, 128) * 4 for i, o in plan.layers)


@pytest.mark.parametrize(("widths", "chunk"), [((64, 64), 64), ((64, 128, 64), 16), ((128, 128), 512)])
def test_gradients_at_32k_need_memory_for_rows_and_a_state_a_block(chip, widths, chunk):
    """q, k, v, y, their gradients and the rates' tables, and the kept states; a state a token would be 100 times that.

    The last width has rows twice as long, in bytes, as bf16's.
    """
    bound = rows(32768, 10) + kept(32768, widths, chunk)
    assert temporaries(chip, 32768, widths, chunk=chunk) <= bound


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_the_forward_pass_keeps_no_states(chip):
    assert temporaries(chip, 32768, (64, 128, 64), gradients=False, chunk=16) <= rows(32768, 5)


@pytest.mark.parametrize("chip", ["v4", "v5e", "tpu7x"], indirect=True)
def test_two_wide_layers_fit_where_vmem_is_smallest(chip):
    """Heads of 128 and a hidden width of 256, in f32, reading before the write."""
    temporaries(chip, 2048, (128, 256, 128), chunk=16, dtype=jnp.float32, read_after_write=False)


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_what_unfit_lets_through_fits(chip):
    """The largest memory with two layers of twice the head dim; v4 alone has too little VMEM for it."""
    temporaries(chip, 1024, (192, 384, 192), chunk=16, heads=1)


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(
    ("length", "widths", "chunk"), [(257, (60, 120, 60), 12), (1000, (5, 7, 130, 96), 1), (1, (64, 64), 16)]
)
def test_odd_lengths_widths_and_chunks_compile(chip, length, widths, chunk):
    temporaries(chip, length, widths, chunk=chunk, read_after_write=False)
