"""The Hopper kernels of `flash` compiled for an H100, without one: registers, shared memory, tensor cores, copies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from jaxattn.rope import Alibi, RawRelativeBias
from pallas_kernels import Score, _mosaic_gpu, flash
from pallas_kernels.flash.gpu_biases import MOST_HEADS
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS = 4, 2
SOFTMAX, SIGMOID = Score(), Score("sigmoid", "none", logit_bias=-8.0)
ids = lambda s: f"{s.activation}-{s.normaliser}"


def compiled(
    dim, *, score=SOFTMAX, value_dim=None, length=1024, gradients=True, stats=False, bias=None, biases=0, **rules
):
    """The program of `auto`, and the resources of its kernels by name.

    Args:
      bias: a function from the heads' slopes to a position bias.
      biases: heads of the key bias.
    """

    def loss(q, k, v, slopes, key_bias):
        more = {"bias": bias(slopes) if bias else None, "key_bias": key_bias if biases else None}
        o = flash(q, k, v, self_visibility(1, length, **rules), score, scale=0.1, stats=stats, **more)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(o))

    call = lambda *x: flash(*x, self_visibility(1, length, **rules), score, scale=0.1)
    struct = lambda heads, d: h100.struct((1, length, heads, d), jnp.bfloat16)
    arguments = struct(HEADS, dim), struct(KV_HEADS, dim), struct(KV_HEADS, value_dim or dim)
    numbers = h100.struct((HEADS,), jnp.float32), h100.struct((1, max(biases, 1), length), jnp.float32)
    wanted = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    program, kernels = h100.compiled(*((wanted, *arguments, *numbers) if gradients else (call, *arguments)))
    return program, {kernel.name: kernel for kernel in kernels}


def check(kernels, gradients=True, apart=False):
    """Nothing is spilled, all fits, products are done by tensor cores and tiles fetched by the copy engine.

    Args:
      apart: dk and dv have a kernel each.
    """
    backward = ["flash_dq", *(["flash_dk", "flash_dv"] if apart else ["flash_dk_dv"])]
    assert set(kernels) == {"flash_forward", *(backward if gradients else [])}, "auto is the kernel"
    for kernel in kernels.values():
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize(
    ("score", "causal"),
    [(SOFTMAX, True), (SOFTMAX, False), (SIGMOID, True), pytest.param(SIGMOID, False, marks=pytest.mark.slow)],
    ids=["softmax-causal", "softmax-full", "sigmoid-causal", "sigmoid-full"],
)
def test_forward_and_backward_at_32k_fit(dim, score, causal):
    """And need memory for rows only: cotangents and a few numbers per row; one head's scores would be 2 GB."""
    length = 32768
    program, kernels = compiled(dim, length=length, score=score, causal=causal)
    check(kernels, apart=dim > 128)
    assert program.memory_analysis().temp_size_in_bytes <= 5 * HEADS * length * dim * 2


SLOW_DIMS = [(64, 192), (64, 256), (192, 192), (192, 256), (256, 64), (256, 128), (256, 192), (256, 256)]


@pytest.mark.parametrize(
    "dims",
    [(60, 128), (128, 64), (192, 64), (192, 128), *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_DIMS)],
    ids=str,
)
def test_other_value_dims_and_every_rule_fit(dims):
    kernels = compiled(dims[0], value_dim=dims[1], length=257, window=100, prefix_len=jnp.array([7]))[1]
    check(kernels, apart=sum(dims) > 256)


ADDED = {
    "key bias": dict(biases=HEADS),
    "alibi and key bias": dict(bias=Alibi, biases=HEADS),
    "raw relative and key bias": dict(bias=lambda _: RawRelativeBias(), biases=HEADS),
}


def test_biases_at_32k_fit():
    program, kernels = compiled(128, length=32768, **ADDED["alibi and key bias"])
    check(kernels)
    assert program.memory_analysis().temp_size_in_bytes <= 5 * HEADS * 32768 * 128 * 2


@pytest.mark.slow
@pytest.mark.parametrize("score", [SOFTMAX, SIGMOID], ids=ids)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 192), (256, 256), (192, 64)], ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_biases_of_every_width_under_every_rule_fit(dims, added, score):
    rules = dict(window=100, prefix_len=jnp.array([7]))
    kernels = compiled(dims[0], value_dim=dims[1], length=257, score=score, **rules, **ADDED[added])[1]
    check(kernels, apart=sum(dims) > 256)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [128, 256])
def test_key_biases_of_the_largest_groups_fit(dim, monkeypatch):
    monkeypatch.setattr(f"{__name__}.HEADS", 2 * MOST_HEADS)
    check(compiled(dim, biases=2 * MOST_HEADS, bias=Alibi, stats=True)[1], apart=dim > 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [
        Score("exp", "sum", row_sum=3.0, logit_bias=0.5),
        Score("exp", "sum_plus_one"),
        Score("sigmoid", "sum"),
        Score("elu1", "sum"),
        Score("relu", "sum_plus_one"),
        Score("relu", "none"),
        Score("identity", "clipped_sum"),
    ],
    ids=ids,
)
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_every_member_fits(dim, score, stats):
    check(compiled(dim, score=score, stats=stats)[1], apart=dim > 128)


def test_the_form_that_is_simulated_is_a_program_for_the_device_too(monkeypatch):
    """It differs in one thing: weights go through shared memory."""
    monkeypatch.setattr(_mosaic_gpu, "simulated", lambda: True)
    check(compiled(64)[1])


@pytest.mark.slow
def test_the_forward_pass_copies_nothing():
    program, kernels = compiled(128, length=32768, gradients=False)
    check(kernels, gradients=False)
    assert program.memory_analysis().temp_size_in_bytes <= HEADS * 32768 * 4 + 2**22


@pytest.mark.slow
def test_remat_runs_the_forward_kernel_again():
    """The simulator's effects may not cross `jax.checkpoint`; the compiled kernels may."""
    call = jax.checkpoint(lambda q, k, v: flash(q, k, v, self_visibility(1, 256), SOFTMAX, scale=0.1))
    loss = lambda *x: jnp.sum(jnp.sin(call(*x).astype(jnp.float32)))
    struct = lambda heads: h100.struct((1, 256, heads, 64), jnp.bfloat16)
    _, kernels = h100.compiled(jax.grad(loss, argnums=(0, 1, 2)), struct(4), struct(2), struct(2))
    check({kernel.name: kernel for kernel in kernels})
