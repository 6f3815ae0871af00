"""The Hopper kernels of softplus rows in JAX's simulator of GPUs, against the reference: outputs and all gradients.

What is simulated hands weights to the second product through shared memory; the form with registers is compiled in
`tests/aot/test_softplus_gpu.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility
from jaxattn.mechanisms import Call, get
from jaxattn.rope import Alibi
from pallas_kernels import compiling_for, interpreted
from pallas_kernels.shapes import ODD
from pallas_kernels.softplus import softplus_attention
from pallas_kernels.softplus.gpu import softplus_gpu
from pallas_kernels.softplus.gpu_tiles import softplus
from pallas_kernels.softplus.reference import softplus_reference
from tests.conformance.cases import normal, packed
from tests.kernels.late import delay
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()


def numbers(length, *, batch=1, heads=2, kv_heads=1, dim=60, value_dim=64, keys=None):
    """q and k of norm 1, as the mechanism makes them, and v; bfloat16."""
    keys = keys or length
    shapes = (length, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, value_dim)
    q, k, v = (normal(n, (batch, *shape)) for n, shape in enumerate(shapes))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in (unit(q), unit(k), v))


def both(fn, arrays, vis, **options):
    """Output and all gradients of a loss that weighs every entry differently."""
    options = {"scale": 1.7, "p": 15.0, "exempt": 3} | options

    def loss(q, k, v):
        o = fn(q, k, v, vis, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return dict(zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True))


def check(arrays, vis, mode="plain", rtol=2e-2, norm=1.2e-2, **options):
    """Forward and gradients equal the reference's on the same rounded inputs; returns the kernel's output.

    `norm`: of the differences, relative; a share of the gradient that every key has is small for each.
    """
    with interpreted(mode):
        ours = both(softplus_gpu, arrays, vis, **options)
    theirs = both(softplus_reference, arrays, vis, **options)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        actual, expected = np.asarray(ours[name], np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(
            actual, expected, atol=rtol * max(np.abs(expected).max(), 1e-3), rtol=0, err_msg=name
        )
    return np.asarray(ours["o"], np.float32)


def test_grouped_heads_over_several_tiles():
    check(numbers(140, heads=4, kv_heads=2), self_visibility(1, 140), p=2.0)


@pytest.mark.parametrize(
    ("dims", "length"),
    [
        ((192, 192), 70),
        ((136, 250), 70),  # tiles of 32, and values without a warpgroup that only fetches
        pytest.param((72, 96), 70, marks=pytest.mark.slow),
        *(pytest.param(x, 140, marks=pytest.mark.slow) for x in ((192, 64), (64, 192), (64, 256), (256, 64))),
        pytest.param((256, 256), 140, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_wide_heads_whose_gradients_are_taken_one_by_one(dims, length):
    check(numbers(length, heads=1, dim=dims[0], value_dim=dims[1]), self_visibility(1, length), p=3.0)


def documents():
    """One of length 1 and one that is empty, padding in front, between and behind; two rows that differ."""
    positions, segments = packed([5, 60, 9, 1, 0, 30], 140)
    segments = jnp.where((segments == 1) | (segments == 3), 0, segments)
    segments = segments.at[1, :100].set(1)
    positions = positions.at[1, :100].set(jnp.arange(100))
    return segments, self_visibility(2, 140, positions=positions, segment_ids=segments)


def test_packed_documents_with_padding_in_front_between_and_behind():
    segments, vis = documents()
    o = check(numbers(140, batch=2), vis)
    assert not o[np.asarray(segments) == 0].any(), "padding rows give zeros"
    assert o[np.asarray(segments) > 0].any(axis=-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("exempt", [0, 3])
@pytest.mark.parametrize("p", [15.0, 2.5, 1.0, 0.5, None])
def test_every_exponent_on_packed_documents(p, exempt):
    """p below 1 has a steep slope just above the mean: bfloat16 of ours and f32 of theirs meet at its other end."""
    check(numbers(140, batch=2), documents()[1], p=p, exempt=exempt, rtol=2e-2 if p != 0.5 else 4e-2, norm=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("p", [15.0, None])
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
def test_odd_shapes(shape, p):
    arrays = numbers(shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, value_dim=shape.value_dim)
    check(arrays, self_visibility(1, shape.length), p=p)


RULES = {
    "both sides": (dict(causal=False), 0),
    "window and keys that everyone sees": (dict(window=40), 3),
    "window on both sides": (dict(causal=False, window=9), 0),
    "prefix, window and keys that everyone sees": (dict(prefix_len=jnp.array([30, 0]), window=50), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "sinks"), RULES.values(), ids=list(RULES))
def test_every_rule_of_visibility(rules, sinks):
    check(numbers(140, batch=2, keys=140 + sinks), self_visibility(2, 140, **rules).prepend_global(sinks))


@pytest.mark.slow
def test_queries_that_continue_a_cache():
    written = jnp.arange(170) < jnp.array([[40], [166]])
    vis = Visibility(
        q_positions=jnp.array([[35], [161]]) + jnp.arange(5),
        k_positions=jnp.tile(jnp.arange(170), (2, 1)),
        q_segments=jnp.ones((2, 5), jnp.int32),
        k_segments=written.astype(jnp.int32),
        window=60,
    )
    check(numbers(5, batch=2, keys=170), vis)


def test_uniform_rows_keep_their_weights():
    """All scores equal: the paper's rule is 0/0, ours keeps the plain mean."""
    q, k, v = numbers(40, kv_heads=2)
    with interpreted():
        o = jax.jit(lambda *x: softplus_gpu(*x, self_visibility(1, 40), scale=1.7, p=15.0, exempt=3))(q * 0, k, v)
    mean = jnp.cumsum(v.astype(jnp.float32), axis=1) / jnp.arange(1, 41)[:, None, None]
    np.testing.assert_allclose(np.asarray(o, np.float32), mean, atol=1e-2)


@pytest.mark.slow
def test_scores_far_below_zero():
    """Where e^s is all there is of φ, and 1 + e^s rounds to 1."""
    q, k, v = numbers(70)
    check((q, jnp.abs(k) * -4, v), self_visibility(1, 70), scale=4.0)
    check((jnp.abs(q), jnp.abs(k) * -4, v), self_visibility(1, 70), scale=1.5)


def test_softplus_is_relatively_exact_in_both_tails():
    s = jnp.concatenate([jnp.linspace(-80, 80, 20001), jnp.array([0.0, -1e-6, 1e-6])])
    phi, slope = (x[0] for x in softplus(s[None]))
    exact = np.logaddexp(0.0, np.asarray(s, np.float64))
    np.testing.assert_allclose(phi, exact, rtol=6e-6)  # of which the simulated 2^x of a large argument has most
    np.testing.assert_allclose(phi[np.abs(s) < 4], exact[np.abs(s) < 4], rtol=6e-7)
    np.testing.assert_allclose(slope, jax.nn.sigmoid(s), rtol=6e-6)
    hidden, flat = softplus(jnp.array([[-1e30]]))
    assert hidden[0, 0] == flat[0, 0] == 0


def test_the_mechanism_hands_over_unit_vectors_in_f32():
    """Which are rounded: the kernel serves bfloat16 models."""
    q, k, v = numbers(70)
    mechanism = get("softplus")
    vis = self_visibility(1, 70)
    run = lambda backend: jax.jit(lambda *x: mechanism.forward(*x, vis, Call(mechanism.spec(), backend=backend)))
    with interpreted():
        ours = run("gpu")(q, k, v)
    theirs = run("reference")(q, k, v)
    assert ours.dtype == theirs.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=0.1)


def test_no_races_and_nothing_uninitialised_is_read():
    """As long as no buffer is used twice: the detector takes a load before a copy for a race, whatever is between."""
    with without_races("gpu") as simulator:
        check(numbers(60, heads=1), self_visibility(1, 60), mode=simulator)


@pytest.mark.parametrize(
    ("late", "only", "value_dim"),
    [
        ("fetch", None, 64),
        pytest.param("product", None, 64, marks=pytest.mark.slow),
        pytest.param("add_product", None, 64, marks=pytest.mark.slow),
        pytest.param("add_product", 1, 64, marks=pytest.mark.slow),
        pytest.param("add_product", 1, 250, marks=pytest.mark.slow),
    ],
    ids=["copies", "first products", "second products", "second products of one warpgroup", "of wide values"],
)
def test_nobody_relies_on_others_being_quick(late, only, value_dim, monkeypatch):
    simulator = delay(monkeypatch, late, only)
    check(numbers(260, heads=1, value_dim=value_dim), self_visibility(1, 260), mode=simulator)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v = numbers(8)
    call = lambda q=q, k=k, v=v, **more: softplus_attention(
        q, k, v, self_visibility(1, 8), scale=1.0, p=15.0, backend="gpu", **more
    )
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match="'gpu' computes bfloat16 but v is float32: cast it"):
            call(v=v.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="and float32 to round, but k is float16"):
            call(k=k.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match="head dims up to 256 but v has 257"):
            call(v=jnp.zeros((1, 8, 1, 257), jnp.bfloat16))
        with pytest.raises(NotImplementedError, match="no position bias but this is Alibi"):
            call(bias=Alibi(jnp.ones(2)))


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v = numbers(8)
    text = lambda v=v, **more: str(
        jax.make_jaxpr(lambda q: softplus_attention(q, k, v, self_visibility(1, 8), scale=1.0, p=15.0, **more))(q)
    )
    assert "softplus_forward" not in text()
    with compiling_for("gpu"):
        assert "softplus_forward" in text()
        assert "softplus_forward" in text(v=jnp.zeros((1, 8, 1, 192), jnp.bfloat16))
        assert "softplus_forward" not in text(bias=Alibi(jnp.ones(2)))
        assert "softplus_forward" not in text(v=v.astype(jnp.float32))


@needs_costs
@pytest.mark.parametrize(("p", "walks"), [(15.0, 2), (None, 1)])
def test_the_cost_estimate_counts_both_walks_up_to_the_diagonal(p, walks):
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.bfloat16) for _ in range(3))
    with compiling_for("gpu"):
        call = lambda *x: softplus_gpu(*x, self_visibility(1, 2048), scale=1.0, p=p, exempt=3)
        text = str(jax.make_jaxpr(call)(q, k, v))
    scores = 136 * 128 * 128
    assert f"flops={2 * scores * 64 * (walks + 1)}" in text
    assert f"transcendentals={scores * walks}" in text
