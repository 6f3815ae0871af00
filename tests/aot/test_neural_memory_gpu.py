"""The Hopper kernels of `neural_memory` compiled ahead of time for an H100: they fit, and spill nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.neural_memory import MemoryState, neural_memory
from pallas_kernels.neural_memory.gpu_plan import COLUMNS
from scripts.bench import h100

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=str(h100.missing()))

HEADS = 4
FORWARD = {"neural_memory_forward"}
BOTH = FORWARD | {"neural_memory_backward"}


@functools.cache
def kernels(length, dim, width, *, chunk=64, gradients=True, packed=False, remat=False, read_after_write=True):
    """Bytes of temporaries, and the kernels by name."""
    f32 = jnp.float32
    token = lambda n: h100.struct((1, length, HEADS, n), jnp.bfloat16)
    rate, state = h100.struct((1, length, HEADS), f32), h100.struct((1, HEADS, dim, width), f32)
    arrays = (token(dim), token(dim), token(width), rate, rate, rate, h100.struct((HEADS, dim, width), f32))
    if packed:
        arrays += (state, state, state, h100.struct((1, length), jnp.int32))

    def call(q, k, v, eta, theta, alpha, start, *rest):
        options = {}
        if packed:
            *before, segments = rest
            count = jnp.zeros((1,), jnp.int32)
            options["state"] = MemoryState(*((x,) for x in before), count=count, segment=segments[:, 0])
            options["segments"] = segments
        rates = {"eta": eta, "theta": theta, "alpha": alpha}
        options |= {"start": (start,), "chunk": chunk, "read_after_write": read_after_write}
        y, after = neural_memory(q, k, v, **rates, **options)
        parts = y, after.M[0], after.S[0], after.frozen[0]
        return sum(jnp.sum(x.astype(f32)) for x in parts) if gradients else parts

    call = jax.checkpoint(call) if remat else call
    program = jax.grad(call, argnums=tuple(range(10 if packed else 7))) if gradients else call
    compiled, found = h100.compiled(program, *arrays)
    return compiled.memory_analysis().temp_size_in_bytes, {x.name: x for x in found}


def fits(found):
    """What every kernel must be: on the tensor cores, fed by the copy engine, in registers, in shared memory."""
    for x in found.values():
        assert x.spill_bytes == 0, x
        assert x.stack_bytes == 0, x
        assert x.shared_bytes <= h100.SHARED_BYTES, x
        assert x.wgmma > 0, x
        assert x.tma > 0, x


def rows(length, numbers):
    """Bytes of so many f32 numbers a token and head."""
    return HEADS * length * numbers * 4


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dim", "width", "packed"),
    [
        (64, 64, False),
        (192, 192, True),
        pytest.param(64, 64, True, marks=SLOW),
        pytest.param(128, 128, True, marks=SLOW),
        pytest.param(128, 128, False, marks=SLOW),
        pytest.param(192, 192, False, marks=SLOW),
    ],
)
def test_gradients_at_32k_fit_and_spill_nothing(dim, width, packed):
    """Kept are an M and an S in bfloat16 a tile, two where documents may begin anywhere."""
    memory, found = kernels(32768, dim, width, packed=packed)
    assert found.keys() == BOTH
    fits(found)
    states = HEADS * (32768 // 64) * (2 if packed else 1) * 2 * dim * width * 2
    partial = (2 * dim + 64) * (width // COLUMNS[dim])  # dq, dk and dG of every block of columns
    assert memory <= states + rows(32768, partial + 2 * (dim + width) + 10 * 64)


def test_the_forward_pass_at_32k_keeps_no_states():
    memory, found = kernels(32768, 192, 192, gradients=False)
    assert found.keys() == FORWARD
    fits(found)
    assert memory <= rows(32768, 5 * 64), "G and what it is made of"


@pytest.mark.parametrize(
    ("length", "dim", "width", "chunk"), [(257, 60, 96, 12), pytest.param(1, 128, 5, 16, marks=SLOW)]
)
def test_odd_lengths_widths_and_chunks_compile(length, dim, width, chunk):
    _, found = kernels(length, dim, width, chunk=chunk, packed=True, read_after_write=False)
    assert found.keys() == BOTH
    fits(found)


@SLOW
@pytest.mark.parametrize(
    ("length", "dim", "width", "chunk"), [(1000, 100, 192, 1), (640, 64, 128, 512), (257, 150, 40, 30)]
)
def test_more_widths_and_chunks_compile(length, dim, width, chunk):
    _, found = kernels(length, dim, width, chunk=chunk, packed=True)
    fits(found)


def test_rematerialised_calls_compile():
    """The simulator has effects that JAX does not rematerialise, so this is seen in the compiled program only."""
    _, found = kernels(320, 64, 64, remat=True)
    assert found.keys() == BOTH
    fits(found)
