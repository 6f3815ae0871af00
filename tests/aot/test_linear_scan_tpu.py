"""`linear_scan` compiled for real TPUs, ahead of time and without one: the kernels fit, memory grows with T only."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms.based import MECHANISM as BASED
from pallas_kernels import compiling_for
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.linear_scan.features import feature_width
from pallas_kernels.linear_scan.tpu import CHUNK

HEADS, KV_HEADS = 4, 2


def compiled(device, program, *shapes, kernels):
    """The program for the device; compiling fails where a kernel does not fit."""
    place = jax.sharding.SingleDeviceSharding(device)
    args = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes)
    with compiling_for("tpu"):
        lowered = jax.jit(program).lower(*args)
    assert lowered.as_text().count("tpu_custom_call") == kernels, "auto is the kernel"
    return lowered.compile()


def temporaries(device, length, dim, value_dim, *, decay, gradients=True, taylor=None, dtype=jnp.bfloat16, heads=HEADS):
    """Bytes beside arguments, results and what fits on chip."""
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)
    width = dim if taylor is None else feature_width(dim, taylor)
    rates = {"none": [], "head": [shape(heads)], "token": [shape(1, length, heads)]}[decay]
    rows = lambda heads, dim: shape(1, length, heads, dim, dtype=dtype)
    args = [rows(heads, dim), rows(KV_HEADS, dim), rows(KV_HEADS, value_dim), shape(1, heads, width, value_dim), *rates]

    def loss(q, k, v, state, log_decay=None):
        o, last = linear_scan(q, k, v, log_decay=log_decay, initial_state=state, taylor=taylor)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(last)

    program = jax.grad(loss, tuple(range(len(args)))) if gradients else loss
    program = compiled(device, program, *args, kernels=3 if gradients else 1)
    return program.memory_analysis().temp_size_in_bytes


def heads_first(length: int, dim: int) -> int:
    """Bytes of q, or of k and v together, heads before tokens; rows of 64 fill whole lanes of 128."""
    return HEADS * length * max(dim, 128) * 2


def states(length: int, dim: int, value_dim: int) -> int:
    """Bytes of one f32 state a chunk."""
    return HEADS * length // CHUNK * dim * max(value_dim, 128) * 4


def rows_and_states(chip, dim, decay):
    bound = 5 * heads_first(32768, dim) + states(32768, dim, dim) + 8 * HEADS * 32768 * 4
    assert temporaries(chip, 32768, dim, dim, decay=decay) <= bound


def test_gradients_at_32k_need_memory_for_rows_and_a_state_a_chunk(chip):
    """Copies of q, k, v, o and their gradients, a state a chunk, and a few numbers per row; T×T would be 17 GB."""
    rows_and_states(chip, 128, "token")


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize("decay", ["none", "head"])
def test_gradients_at_32k_with_half_filled_lanes(chip, decay):
    rows_and_states(chip, 64, decay)


@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_the_forward_pass_at_32k_copies_its_arguments_and_output_at_most(chip):
    bytes_used = temporaries(chip, 32768, 128, 128, decay="none", gradients=False)
    assert bytes_used <= 3 * heads_first(32768, 128) + 8 * HEADS * 32768 * 4


@pytest.mark.parametrize("chip", ["v4", "tpu7x"], indirect=True)
def test_older_and_newer_chips(chip):
    temporaries(chip, 1024, 128, 128, decay="token")


@pytest.mark.parametrize("chip", ["v5e"], indirect=True)
@pytest.mark.parametrize(
    ("dim", "value_dim", "heads", "taylor"),
    [(5, 257, 2, None), (512, 512, 2, None), (128, 128, 64, None), (24, 65, 4, "full")],
    ids=["odd", "widest", "32 heads of a group", "full features"],
)
def test_odd_and_extreme_sizes_fit_in_float32(chip, dim, value_dim, heads, taylor):
    temporaries(chip, 257, dim, value_dim, heads=heads, decay="token", taylor=taylor, dtype=jnp.float32)


@pytest.mark.parametrize("chip", ["v5e", "v6e"], indirect=True)
def test_based_at_32k_without_features_in_memory(chip):
    """The paper's heads of 16 and 64: no array is larger than q, k or v with lanes filled; features would be double."""
    length, vis = 32768, self_visibility(1, 32768)
    shape = lambda dim: jax.ShapeDtypeStruct((1, length, HEADS, dim), jnp.bfloat16)
    loss = lambda *x: jnp.sum(BASED.forward(*x, vis, Call(BASED.spec())).astype(jnp.float32))
    program = compiled(chip, jax.grad(loss, (0, 1, 2)), shape(16), shape(16), shape(64), kernels=3)
    arrays = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", program.as_text())
    rows = [dims for dims in (tuple(map(int, x.split(","))) for x in arrays) if length in dims]
    assert max(map(math.prod, rows)) == HEADS * length * 128
    bound = 10 * heads_first(length, 128) + states(length, 256, 128)  # sums and values of the row sum in f32
    assert program.memory_analysis().temp_size_in_bytes <= bound
