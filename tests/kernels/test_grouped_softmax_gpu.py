"""The Hopper kernels of `grouped_softmax` in JAX's simulator of GPUs, against the f32 reference; bfloat16 throughout.

What is simulated hands weights to the second product through shared memory; the form with registers is compiled in
`tests/aot/test_grouped_softmax_gpu.py`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, PADDING, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call, landmark
from pallas_kernels import compiling_for, interpreted, shapes
from pallas_kernels.grouped_softmax import grouped_softmax, layout
from pallas_kernels.grouped_softmax.gpu import SLOTS, grouped_softmax_gpu
from pallas_kernels.grouped_softmax.reference import NEVER, grouped_softmax_reference
from tests.conformance.cases import inputs, packed
from tests.kernels.late import delay
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

numbers = partial(inputs, dtype=jnp.bfloat16)


def both(fn, arrays, vis, **options):
    """Outputs and all gradients of a loss that weighs every entry of both outputs differently."""
    weigh = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    def loss(q, k, v):
        o, log_z = fn(q, k, v, vis, **options)
        by_z = weigh(log_z) * jnp.where(log_z > NEVER / 2, jnp.sin(log_z), 0.0)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)) * weigh(o)) + jnp.sum(by_z), (o, log_z)

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, grads


def near(actual, expected, rtol):
    """Equal up to `rtol` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, atol=rtol * np.abs(expected).max(), rtol=0)


def check(arrays, vis, rtol=1e-2, mode="plain", block=51, scale=0.3, **options):
    """Both outputs and gradients equal the f32 reference's on the same rounded numbers; returns the outputs."""
    with interpreted(mode):
        (o, log_z), ours = both(grouped_softmax_gpu, arrays, vis, block=block, scale=scale, **options)
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    (o_exact, z_exact), theirs = both(grouped_softmax_reference, exact, vis, block=block, scale=scale)
    assert (o.dtype, log_z.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(x.dtype == jnp.bfloat16 for x in ours)
    blind = np.asarray(z_exact) == NEVER
    np.testing.assert_array_equal(np.asarray(log_z) == NEVER, blind)
    assert not np.asarray(o, np.float32)[blind].any(), "rows that see nothing give zeros"
    near(o, o_exact, rtol)
    near(np.where(blind, 0, log_z), np.where(blind, 0, z_exact), 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        near(a, b, rtol)
    return o, log_z


@pytest.mark.parametrize(
    ("length", "dim", "value_dim", "block"), [(230, 60, 40, 40), (120, 130, 192, 25)], ids=["narrow", "wide"]
)
def test_grouped_heads_over_several_tiles(length, dim, value_dim, block):
    """More tiles than buffers in every kernel, and a value dim of its own."""
    arrays = numbers(length, batch=1, heads=2, kv_heads=1, dim=dim, value_dim=value_dim)
    check(arrays, self_visibility(1, length), block=block, scale=0.2 if dim <= 128 else 0.1)


def documents():
    """One of length 1, one that is empty (4), padding in front, between and behind; two rows that differ."""
    positions, segments = packed([9, 70, 1, 8, 40], 160)
    segments = jnp.where(segments == 1, 0, jnp.where(segments == 4, 0, segments))
    segments = segments.at[1, :100].set(1)
    positions = positions.at[1, :100].set(jnp.arange(100))
    return self_visibility(2, 160, positions=positions, segment_ids=segments)


@pytest.mark.parametrize(
    ("block", "page", "dim"),
    [
        (12, 8, 24),
        pytest.param(12, None, 24, marks=pytest.mark.slow),
        pytest.param(25, 1, 24, marks=pytest.mark.slow),
        pytest.param(12, 8, 192, marks=pytest.mark.slow),
        pytest.param(25, 1, 256, marks=pytest.mark.slow),
    ],
)
def test_packed_documents_with_padding_in_front_between_and_behind(block, page, dim):
    """In two pages, in one, and in tiles of few slots; many slots share a tile."""
    arrays = numbers(160, heads=1, kv_heads=1, dim=dim, value_dim=24)
    check(arrays, documents(), block=block, page=page, scale=0.3 if dim <= 128 else 0.1)


def cut_keys():
    """Queries apart from their keys: a block without its first tokens, one with a hole, one without a landmark."""
    segments = jnp.ones((2, 40), jnp.int32).at[:, :3].set(PADDING).at[:, 11].set(GLOBAL).at[1, 23].set(PADDING)
    return Visibility(
        q_positions=default_positions(2, 9) + jnp.array([[25], [31]]),
        k_positions=default_positions(2, 40),
        q_segments=jnp.ones((2, 9), jnp.int32).at[0, 0].set(0).at[1, 0].set(2),
        k_segments=segments,
    )


def test_queries_apart_from_keys_that_are_not_whole_blocks():
    check(numbers(9, heads=4, kv_heads=2, keys=40), cut_keys(), block=8)


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.ODD, ids=lambda shape: shape.name)
def test_odd_shapes(shape):
    block = dict(zip(shapes.LENGTHS, (1, 8, 3, 64, 51), strict=True))[shape.length]
    arrays = numbers(
        shape.length,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        value_dim=shape.value_dim,
    )
    check(arrays, self_visibility(shape.batch, shape.length), block=block, scale=shape.dim**-0.5, rtol=2e-2)


@pytest.mark.slow
def test_a_longer_packed_row_of_wide_heads():
    positions, segments = packed([70, 0, 1, 300, 3], 390, batch=1)
    vis = self_visibility(1, 390, positions=positions, segment_ids=segments)
    check(numbers(390, batch=1, heads=4, kv_heads=2, dim=128, value_dim=128), vis, scale=0.1, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -0.3], ids=str)
def test_scales_that_turn_scores_around(scale):
    check(numbers(70, batch=1, heads=1, kv_heads=1), self_visibility(1, 70), block=20, scale=scale)


@pytest.mark.slow
def test_blocks_that_score_far_apart():
    """A maximum shared between blocks would leave nothing of the lower one."""
    q, k, v = numbers(96, batch=1, heads=1, kv_heads=1, dim=8, value_dim=8)
    q = q.at[..., 0].set(8.0)
    lower = (jnp.arange(96) // 8 % 2 == 0)[:, None]
    k = k.at[..., 0].set(jnp.where((jnp.arange(96) % 8 == 7)[:, None], 0.0, jnp.where(lower, -8.0, 8.0)))
    check((q, k, v), self_visibility(1, 96), block=8, scale=1.0, rtol=2e-2)


@pytest.mark.slow
def test_sums_are_kept_in_float32():
    """300 own tokens of equal weight; a mass in bfloat16 would stop growing at 256."""
    ones = tuple(jnp.ones_like(x) for x in numbers(600, batch=1, heads=1, kv_heads=1))
    with interpreted():
        o, log_z = jax.jit(lambda *x: grouped_softmax_gpu(*x, self_visibility(1, 600), block=2, scale=1 / 16))(*ones)
    np.testing.assert_allclose(np.asarray(o, np.float32), 1.0, rtol=2**-7)
    np.testing.assert_allclose(np.exp(log_z[0, :, 0] - 1), np.arange(600) // 2 + 1, rtol=1e-5)


@pytest.mark.parametrize("dim", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_no_races_and_nothing_uninitialised_is_read(dim):
    """What the simulator sees: loads and stores, not operands of products; see the next test for those."""
    arrays = numbers(140, batch=1, heads=1, kv_heads=1, dim=dim)
    with without_races("gpu") as simulator:
        check(arrays, self_visibility(1, 140), block=20, mode=simulator, scale=0.3 if dim <= 128 else 0.1)


@pytest.mark.parametrize(
    ("late", "only", "dim"),
    [
        ("fetch", None, 64),
        ("accumulate", 1, 64),
        ("product", 1, 256),
        pytest.param("product", None, 64, marks=pytest.mark.slow),
        pytest.param("product", 1, 64, marks=pytest.mark.slow),
        pytest.param("add_product", 1, 64, marks=pytest.mark.slow),
        pytest.param("accumulate", 0, 64, marks=pytest.mark.slow),
        pytest.param("publish", 1, 64, marks=pytest.mark.slow),
        pytest.param("product", 1, 192, marks=pytest.mark.slow),
        pytest.param("fetch", None, 256, marks=pytest.mark.slow),
        pytest.param("product", 0, 256, marks=pytest.mark.slow),
        pytest.param("add_product", 1, 256, marks=pytest.mark.slow),
        pytest.param("add_product", 0, 256, marks=pytest.mark.slow),
        pytest.param("accumulate", 0, 256, marks=pytest.mark.slow),
    ],
)
def test_nobody_relies_on_others_being_quick(late, only, dim, monkeypatch):
    """The simulator misses races of products; a delay shows them as wrong values, and skipped waits as errors.

    Three tiles of keys at least in every kernel: more than there are buffers.
    """
    simulator = delay(monkeypatch, late, only, seconds=0.02)
    length = 240 if dim <= 128 else 150
    arrays = numbers(length, batch=1, heads=1, kv_heads=1, dim=dim)
    check(arrays, self_visibility(1, length), block=48, mode=simulator, scale=0.3 if dim <= 128 else 0.1)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v = numbers(8, heads=2, kv_heads=1)
    call = lambda q=q, k=k, v=v, block=3: grouped_softmax(
        q, k, v, self_visibility(2, 8), block=block, scale=1.0, backend="gpu"
    )
    with pytest.raises(NotImplementedError, match=r"grouped_softmax: .*computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match="k is float32: cast it, allow it with"):
            call(k=k.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="head dims up to 256 but v has 257: use 'xla'"):
            call(v=jnp.zeros((2, 8, 1, 257), jnp.bfloat16))
        with pytest.raises(NotImplementedError, match=r"at most 64 tokens of a block .* but block is 65: use 'xla'"):
            call(block=SLOTS[-1] + 1)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    def text(q, keys=20, block=3):
        _, k, v = numbers(keys, heads=2, kv_heads=1, dim=q.shape[3], value_dim=q.shape[3])
        vis = self_visibility(2, keys).rows(0, q.shape[1])
        return str(jax.make_jaxpr(lambda q: grouped_softmax(q, k, v, vis, block=block, scale=1.0))(q))

    q = numbers(20, heads=2, kv_heads=1)[0]
    kernel = "grouped_softmax_forward"
    assert kernel not in text(q)
    with compiling_for("gpu"):
        assert kernel in text(q)
        assert kernel in text(numbers(20, heads=2, dim=256)[0])
        assert kernel not in text(numbers(20, heads=2, dim=257)[0])
        assert kernel not in text(q, block=SLOTS[-1] + 1)
        assert kernel not in text(q.astype(jnp.float32))
        assert kernel not in text(q[:, :1]), "a decode step leaves its cache where it lies"
    with interpreted():
        assert kernel not in text(q), "a simulator is for who names the backend"


@needs_costs
@pytest.mark.parametrize(("dim", "slots"), [(64, 2), (192, 1)])
def test_the_cost_estimate_counts_tiles_up_to_the_diagonal(dim, slots):
    """Tiles of two slots of 64 rows, of wide heads of one; as many as hold the keys up to a block of queries."""
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, dim), jnp.bfloat16) for _ in range(3))
    apart = Visibility(*(default_positions(1, 2048),) * 2, *(jnp.ones((1, 2048), jnp.int32),) * 2)
    with compiling_for("gpu"):
        text = lambda vis: str(jax.make_jaxpr(lambda *x: grouped_softmax_gpu(*x, vis, block=51, scale=1.0))(q, k, v))
        half, whole = text(self_visibility(1, 2048)), text(apart)
    visited = sum(-(-128 * (i + 1) // (51 * slots)) for i in range(16))
    scores = 128 * 64 * slots
    assert f"flops={visited * 4 * scores * dim}" in half
    assert f"transcendentals={visited * scores}" in half
    assert f"flops={16 * -(-2048 // (51 * slots)) * 4 * scores * dim}" in whole


@needs_costs
def test_the_cost_estimate_counts_what_wide_heads_weigh_twice():
    """Steps of 64 queries: scores twice and three products of dk and dv; scores and those with do twice for dq."""
    q, k, v = (jax.ShapeDtypeStruct((1, 256, 1, 256), jnp.bfloat16) for _ in range(3))
    loss = lambda *x: jnp.sum(grouped_softmax_gpu(*x, self_visibility(1, 256), block=51, scale=1.0)[0])
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    scores = sum(-(-64 * (i + 1) // 51) for i in range(4)) * 64 * 64
    kernels = text.count("name=grouped_softmax_d")
    assert text.count(f"flops={scores * 2 * 5 * 256}") == text.count(f"transcendentals={scores * 2}") == kernels > 0


def test_landmark_attention_runs_on_it():
    q, k, v = numbers(45, heads=2, kv_heads=1, dim=8, value_dim=8)
    spec, vis = landmark.Spec(block=7), self_visibility(2, 45)
    with interpreted():
        ours = jax.jit(partial(landmark.forward, call=Call(spec, backend="gpu")))(q, k, v, vis)
    exact = (x.astype(jnp.float32) for x in (q, k, v))
    near(ours, jax.jit(partial(landmark.reference, call=Call(spec)))(*exact, vis), 1e-2)


def test_a_document_without_gaps_lies_in_two_pages_at_most():
    """What merging outputs and adding gradients in bfloat16 relies on."""
    for keys, block in [(270, 51), (1020, 51), (64, 64), (7, 3)]:
        assert layout.default_page(keys, block) >= -(-keys // block) + 1
