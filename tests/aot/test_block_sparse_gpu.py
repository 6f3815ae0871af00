"""The Hopper kernels of `block_sparse` compiled for an H100, without one: registers, shared memory, tensor cores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.masks import self_visibility
from pallas_kernels import Score, _mosaic_gpu
from pallas_kernels.block_sparse import block_sparse
from scripts.bench import h100

if reason := h100.missing():
    pytest.skip(reason, allow_module_level=True)

HEADS, KV_HEADS, WIDTH = 4, 2, 16
SOFTMAX, SIGMOID = Score(), Score("sigmoid", "none", logit_bias=-8.0)
ids = lambda s: f"{s.activation}-{s.normaliser}"


def compiled(
    dim, *, score=SOFTMAX, value_dim=None, length=1024, lists=KV_HEADS, biases=0, sizes=(128, 128), stats=True, **rules
):
    """The program of `auto`, forward and backward, and the resources of its kernels by name."""

    def loss(q, k, v, blocks, key_bias=None):
        vis = self_visibility(1, length, **rules)
        options = dict(blocks=blocks, block_q=sizes[0], block_k=sizes[1], scale=0.1, key_bias=key_bias)
        o = block_sparse(q, k, v, vis, score, stats=stats, **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(o))

    rows = -(-length // sizes[0])
    struct = lambda heads, d: h100.struct((1, length, heads, d), jnp.bfloat16)
    program, kernels = h100.compiled(
        jax.grad(loss, argnums=(0, 1, 2, 4) if biases else (0, 1, 2)),
        struct(HEADS, dim),
        struct(KV_HEADS, dim),
        struct(KV_HEADS, value_dim or dim),
        h100.struct((1, lists, rows, min(WIDTH, rows)), jnp.int32),
        *([h100.struct((1, biases, length), jnp.float32)] if biases else []),
    )
    return program, {kernel.name: kernel for kernel in kernels}


def check(kernels, apart=False):
    """Nothing is spilled, all fits, products are done by tensor cores and tiles fetched by the copy engine.

    Args:
      apart: dk and dv have a kernel each.
    """
    names = ["forward", "dq", *(["dk", "dv"] if apart else ["dk_dv"])]
    assert set(kernels) == {f"block_sparse_{name}" for name in names}, "auto is the kernel"
    for kernel in kernels.values():
        assert kernel.spill_bytes == kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= h100.SHARED_BYTES, kernel
        assert kernel.wgmma > 0, kernel
        assert kernel.tma > 0, kernel


CASES = [  # head dim, member, lists, heads of the key bias
    (64, SOFTMAX, KV_HEADS, 0, ()),
    (128, SOFTMAX, HEADS, HEADS, ()),
    (128, SIGMOID, 1, 1, ()),
    (64, SOFTMAX, HEADS, 1, pytest.mark.slow),
    (64, SIGMOID, 1, HEADS, pytest.mark.slow),
    (128, SOFTMAX, 1, 0, pytest.mark.slow),
    (192, SOFTMAX, HEADS, HEADS, ()),
    (192, SIGMOID, 1, 0, pytest.mark.slow),
    (256, SOFTMAX, KV_HEADS, KV_HEADS, pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("dim", "score", "lists", "biases"),
    [pytest.param(*case, marks=marks, id=f"{case[0]}-{ids(case[1])}-{case[2]}-{case[3]}") for *case, marks in CASES],
)
def test_forward_and_backward_at_32k_fit(dim, score, lists, biases):
    """And need memory for rows and lists only: cotangents, numbers per row and tables; one head's scores are 2 GB."""
    length = 32768
    program, kernels = compiled(dim, length=length, score=score, lists=lists, biases=biases, stats=False)
    check(kernels, apart=dim > 128)
    assert program.memory_analysis().temp_size_in_bytes <= 2 * HEADS * length * dim * 2


@pytest.mark.parametrize(
    ("dims", "sizes"), [((60, 128), (128, 384)), pytest.param((128, 64), (512, 128), marks=pytest.mark.slow)], ids=str
)
def test_other_value_dims_block_sizes_and_every_rule_fit(dims, sizes):
    check(compiled(dims[0], value_dim=dims[1], length=700, sizes=sizes, window=100, prefix_len=jnp.array([7]))[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [
        Score("exp", "sum_plus_one", logit_bias=0.5),
        Score("sigmoid", "sum"),
        Score("elu1", "sum"),
        Score("relu", "sum_plus_one"),
        Score("identity", "clipped_sum"),
    ],
    ids=ids,
)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_member_fits(dim, score):
    check(compiled(dim, score=score)[1])


@pytest.mark.slow
def test_the_form_that_is_simulated_is_a_program_for_the_device_too(monkeypatch):
    """It differs in one thing: weights go through shared memory."""
    monkeypatch.setattr(_mosaic_gpu, "simulated", lambda: True)
    check(compiled(64)[1])
