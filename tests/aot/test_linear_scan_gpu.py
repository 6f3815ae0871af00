"""The Hopper kernel of `linear_scan` compiled ahead of time for an H100: it fits, and spills nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _mosaic_gpu
from pallas_kernels.linear_scan.gpu import linear_scan_gpu
from scripts.bench import h100

pytestmark = pytest.mark.skipif(h100.missing() is not None, reason=str(h100.missing()))

HEADS, KV_HEADS = 4, 2
FORWARD = {"linear_scan_forward"}
ALL = FORWARD | {"linear_scan_dq", "linear_scan_dk", "linear_scan_dv"}


@functools.cache
def kernels(length, dim, width, *, decay="token", gradients=True, packed=False, remat=False):
    """Bytes of temporaries, and the kernels by name."""
    bf16, f32 = jnp.bfloat16, jnp.float32
    shape = {"none": None, "head": (HEADS,), "token": (1, length, HEADS)}[decay]
    arrays = (
        h100.struct((1, length, HEADS, dim), bf16),
        h100.struct((1, length, KV_HEADS, dim), bf16),
        h100.struct((1, length, KV_HEADS, width), bf16),
        h100.struct((1, HEADS, dim, width), f32),
        None if shape is None else h100.struct(shape, f32),
        h100.struct((1, length), jnp.int32) if packed else None,
    )

    def call(q, k, v, start, log_decay, segments):
        segments = jnp.ones((1, length), jnp.int32) if segments is None else segments
        o, last = linear_scan_gpu(
            q,
            k,
            v,
            log_decay=log_decay,
            segments=segments,
            initial_state=start,
            initial_segment=segments[:, 0],
            scale=0.1,
        )
        return jnp.sum(o.astype(f32)) + jnp.sum(last) if gradients else (o, last)

    call = jax.checkpoint(call) if remat else call
    program = jax.grad(call, argnums=tuple(range(4 if shape is None else 5))) if gradients else call
    compiled, found = h100.compiled(program, *arrays)
    return compiled.memory_analysis().temp_size_in_bytes, {x.name: x for x in found}


def fits(found):
    """What every kernel must be: on the tensor cores, fed by the copy engine, in registers, in shared memory.

    Three warpgroups have 168 registers a thread, which must do: JAX links its kernels, and a linked kernel may not
    move registers from the warpgroup that fetches to those that compute.
    """
    for x in found.values():
        assert x.spill_bytes == 0, x
        assert x.stack_bytes == 0, x
        assert x.shared_bytes <= h100.SHARED_BYTES, x
        assert x.wgmma > 0, x
        assert x.tma > 0, x
        assert x.registers <= 168, x
        assert x.barriers >= 2 * 3 + 2, f"fewer than three chunks under way: {x}"


@pytest.mark.parametrize(
    ("dim", "width", "decay"),
    [(64, 64, "token"), (128, 128, "token"), (128, 128, "none")]
    + [
        pytest.param(*x, marks=pytest.mark.slow)
        for x in [(64, 64, "none"), (64, 128, "token"), (64, 128, "none"), (128, 64, "token"), (128, 64, "none")]
    ],
)
def test_gradients_at_32k_fit_and_spill_nothing(dim, width, decay):
    """Without decay the gradients need no forward pass."""
    memory, found = kernels(32768, dim, width, decay=decay)
    assert found.keys() == (ALL if decay == "token" else ALL - FORWARD)
    fits(found)
    # A few copies of q, k, v and their gradients in f32; with decays, numbers per token and saved states.
    rows = HEADS * 32768 * (dim + width) * 4
    states = 0 if decay == "none" else 2 * HEADS * 64 * dim * width * 4
    assert memory <= 2 * rows + 2 * states + 32 * HEADS * 32768 * 4


def test_the_forward_pass_at_32k_copies_nothing_large():
    length = 32768 - 64  # of its own: a kernel compiled before in this process is not compiled, nor seen, again
    memory, found = kernels(length, 128, 128, gradients=False)
    assert found.keys() == FORWARD
    fits(found)
    assert memory <= 16 * HEADS * length * 4, "numbers per token only"


@pytest.mark.parametrize(("length", "dim", "width", "decay"), [(257, 60, 192, "head"), (1, 153, 5, "none")])
def test_odd_lengths_and_dims_compile(length, dim, width, decay):
    """Wide ones as several calls of the same kernels."""
    _, found = kernels(length, dim, width, decay=decay, packed=True)
    assert found.keys() >= ALL - FORWARD
    fits(found)


def test_rematerialised_calls_compile():
    """The simulator has effects that JAX does not rematerialise, so this is seen in the compiled program only."""
    _, found = kernels(320, 64, 64, remat=True)
    assert found.keys() == ALL
    fits(found)


def test_the_form_that_is_simulated_is_a_program_for_the_device_too(monkeypatch):
    """It differs in one thing: sums are added outside of the tensor cores."""
    monkeypatch.setattr(_mosaic_gpu, "simulated", lambda: True)
    kernels.cache_clear()
    _, found = kernels(384, 64, 64)
    kernels.cache_clear()
    assert found.keys() == ALL
    fits(found)
