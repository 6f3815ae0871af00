"""The Hopper kernels of `grouped_softmax` compiled for an H100, without one: registers, shared memory, tensor cores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import _mosaic_gpu
from pallas_kernels.grouped_softmax import grouped_softmax
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS = 4, 2
FORWARD = {"grouped_softmax_forward"}
ALL = FORWARD | {"grouped_softmax_dq", "grouped_softmax_dk_dv"}


def compiled(length, dim, *, block=51, value_dim=None, gradients=True, change=lambda call: call):
    """Bytes of temporaries of the program of `auto`, and its kernels. Segments are an argument, as where packed."""

    def call(q, k, v, segments):
        vis = self_visibility(1, length, segment_ids=segments)
        o, log_z = grouped_softmax(q, k, v, vis, block=block, scale=0.1)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(log_z) if gradients else (o, log_z)

    struct = lambda *dims: h100.struct((1, length, *dims), jnp.bfloat16)
    arrays = struct(HEADS, dim), struct(KV_HEADS, dim), struct(KV_HEADS, value_dim or dim)
    segments = h100.struct((1, length), jnp.int32)
    program, kernels = h100.compiled(
        jax.grad(change(call), argnums=(0, 1, 2)) if gradients else call, *arrays, segments
    )
    return program.memory_analysis().temp_size_in_bytes, kernels


def check(kernels, names=ALL):
    """Nothing is spilled, all fits, products are done by tensor cores and tiles fetched by the copy engine."""
    assert {kernel.name for kernel in kernels} == names, "auto is the kernel"
    for kernel in kernels:
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel


@pytest.mark.parametrize("dim", [64, 128, 256, pytest.param(192, marks=pytest.mark.slow)])
def test_gradients_at_32k_fit_and_need_memory_for_rows_only(dim):
    """q, o, do and dq, and k, v and their gradients also in slots; one head's scores would be 2 GB."""
    memory, kernels = compiled(32768, dim)
    check(kernels)
    assert memory <= 5 * HEADS * 32768 * dim * 2


@pytest.mark.parametrize("dim", [128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (192, 256))])
def test_the_forward_pass_at_32k_copies_keys_and_values_into_slots(dim):
    memory, kernels = compiled(32768, dim, gradients=False)
    check(kernels, FORWARD)
    q = HEADS * 32768 * dim * 2
    slots = 2 * KV_HEADS * (5 * 32768 // (4 * 51) + 3) * 64 * dim * 2
    assert memory <= slots + 1.5 * q


@pytest.mark.parametrize("dim", [*(pytest.param(dim, marks=pytest.mark.slow) for dim in (64, 128, 256)), 192])
@pytest.mark.parametrize("block", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_shorter_blocks_fit(block, dim):
    """More slots of a tile, each with numbers of its own: what takes most registers."""
    check(compiled(300, dim, block=block)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "value_dim"), [(60, 128), (5, 40), (64, 192), (130, 60), (200, 40)])
def test_other_head_dims_fit(dim, value_dim):
    check(compiled(257, dim, value_dim=value_dim)[1])


@pytest.mark.slow
def test_the_form_that_is_simulated_is_a_program_for_the_device_too(monkeypatch):
    """It differs in one thing: operands of products and their sums go through shared memory and registers."""
    monkeypatch.setattr(_mosaic_gpu, "simulated", lambda: True)
    check(compiled(300, 64)[1])


@pytest.mark.slow
def test_mapped_and_rematerialised_calls_compile():
    """The simulator's effects may cross neither `jax.vmap` of a loop nor `jax.checkpoint`; the kernels may."""
    check(compiled(256, 64, change=jax.checkpoint)[1])
    check(compiled(256, 64, change=lambda call: lambda *x: jnp.sum(jax.vmap(call)(*(y[None] for y in x))))[1])
