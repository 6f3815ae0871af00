"""The Hopper kernels of softplus rows compiled for an H100, without one: registers, shared memory, tensor cores."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import _mosaic_gpu
from pallas_kernels.softplus import softplus_attention
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS = 4, 2
NARROW = [(64, 64), (128, 128), (60, 128), (128, 64)]
WIDE = [(192, 192), (192, 64), (64, 192), (128, 256), (256, 128), (192, 256), (256, 192), (256, 256)]


def compiled(dim, *, value_dim=None, length=1024, p=15.0, gradients=True, **rules):
    """The program of `auto`, and the resources of its kernels by name."""

    def call(q, k, v):
        return softplus_attention(q, k, v, self_visibility(1, length, **rules), scale=1.7, p=p)

    loss = lambda *x: jnp.sum(call(*x).astype(jnp.float32))
    struct = lambda heads, d: h100.struct((1, length, heads, d), jnp.bfloat16)
    arguments = struct(HEADS, dim), struct(KV_HEADS, dim), struct(KV_HEADS, value_dim or dim)
    program, kernels = h100.compiled(jax.grad(loss, argnums=(0, 1, 2)) if gradients else call, *arguments)
    return program, {kernel.name: kernel for kernel in kernels}


def check(kernels, wide, gradients=True):
    """All fits, nothing is spilled, products are done by tensor cores and tiles fetched by the copy engine."""
    backward = ["softplus_dq", *(["softplus_dk", "softplus_dv"] if wide else ["softplus_dkv"])]
    assert set(kernels) == {"softplus_forward", *(backward if gradients else [])}, "auto is the kernel"
    for kernel in kernels.values():
        assert kernel.spill_bytes == 0, kernel
        assert kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel


@pytest.mark.parametrize("dim", [64, 128, 192, pytest.param(256, marks=pytest.mark.slow)])
def test_forward_and_backward_at_32k_fit(dim):
    """And need memory for rows only: cotangents and a few numbers per row; one head's scores would be 2 GB."""
    length = 32768
    program, kernels = compiled(dim, length=length)
    check(kernels, dim >= 128)
    assert program.memory_analysis().temp_size_in_bytes <= 5 * HEADS * length * dim * 2


@pytest.mark.slow
@pytest.mark.parametrize("rules", [dict(causal=False), dict(window=100, prefix_len=jnp.array([7]))], ids=str)
@pytest.mark.parametrize(
    ("dims", "p"), [*itertools.product(NARROW, (15.0, 2.5, None)), *((x, 2.5) for x in WIDE)], ids=str
)
def test_every_width_exponent_and_rule_fits(dims, rules, p):
    check(compiled(dims[0], value_dim=dims[1], length=257, p=p, **rules)[1], sum(dims) > 128)


def test_the_form_that_is_simulated_is_a_program_for_the_device_too(monkeypatch):
    """It differs in one thing: weights go through shared memory."""
    monkeypatch.setattr(_mosaic_gpu, "simulated", lambda: True)
    check(compiled(64)[1], wide=False)


@pytest.mark.slow
def test_the_forward_pass_copies_nothing():
    program, kernels = compiled(128, length=32768, gradients=False)
    check(kernels, wide=True, gradients=False)
    assert program.memory_analysis().temp_size_in_bytes <= 4 * HEADS * 32768 * 4 + 2**22
