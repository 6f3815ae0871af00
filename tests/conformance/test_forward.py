"""Every mechanism: the efficient forward is the reference, in value and gradient, and obeys the mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, default_positions, self_visibility
from jaxattn.rope import Alibi, RawRelativeBias, alibi_slopes
from tests.conformance.cases import CASES, DEFAULTS, able, close, inputs, normal, packed

every = pytest.mark.parametrize("case", CASES, ids=str)
default = pytest.mark.parametrize("case", DEFAULTS, ids=str)


def those(*capabilities: str):
    """The default cases with these capabilities, as test parameters."""
    return pytest.mark.parametrize("case", able(*capabilities), ids=str)


SHAPES = [  # T, heads, kv_heads, D, V
    (1, 2, 2, 8, 8),
    (100, 3, 1, 60, 60),
    (257, 2, 2, 64, 24),
]
# Every shape on the default settings; the variants on one that is odd, grouped and padded.
GRID = [(case, shape) for case in CASES for shape in (SHAPES if case in DEFAULTS else SHAPES[1:2])]


@functools.partial(jax.jit, static_argnums=0)
def gradients(run, q, k, v, vis, params):
    """Value and all gradients of a scalar that weighs every output differently."""

    def scalar(q, k, v, params):
        o = run(q, k, v, vis, params).astype(jnp.float32)
        size = jax.lax.stop_gradient(jnp.maximum(1.0, jnp.mean(jnp.abs(o))))  # the slope of sin at 100 is chance
        return jnp.sum(jnp.sin(o / size) * normal(3, o.shape))

    return jax.value_and_grad(scalar, argnums=(0, 1, 2, 3))(q, k, v, params)


@pytest.mark.parametrize(
    ("case", "shape"), GRID, ids=["{}-T{}-H{}-K{}-D{}-V{}".format(case, *shape) for case, shape in GRID]
)
def test_forward_and_gradient_equal_reference(case, shape):
    length, heads, kv_heads, dim, value_dim = shape
    q, k, v = inputs(length, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    params = case.params(heads, kv_heads, dim, value_dim)
    positions, segments = packed([length // 3 + 1, length // 2], length)
    vis = self_visibility(2, length, positions=positions, segment_ids=segments)
    o = case.forward(q, k, v, vis, params)
    assert o.shape == (2, length, heads, value_dim)
    assert o.dtype == v.dtype
    close(o, case.reference(q, k, v, vis, params))
    ours = gradients(case.forward, q, k, v, vis, params)[1]
    theirs = gradients(case.reference, q, k, v, vis, params)[1]
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4), ours, theirs)


@default
def test_long_forward_equals_reference_across_key_chunks(case):
    q, k, v = inputs(1100, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    close(case.forward(q, k, v), case.reference(q, k, v), rtol=1e-4)


@those("noncausal_self", "window", "position_bias")
@pytest.mark.parametrize(
    ("causal", "window", "bias"),  # every pair of two of them
    [
        (True, None, "alibi"),
        (True, 5, "none"),
        (True, 5, "raw_relative"),
        (False, None, "none"),
        (False, None, "raw_relative"),
        (False, 5, "alibi"),
    ],
)
def test_masks_and_biases_equal_reference(case, causal, window, bias):
    q, k, v = inputs(150)
    bias = {"none": None, "alibi": Alibi(alibi_slopes(4)), "raw_relative": RawRelativeBias()}[bias]
    positions, segments = packed([40, 1, 80], 150)
    vis = self_visibility(2, 150, causal=causal, window=window, positions=positions, segment_ids=segments)
    close(case.forward(q, k, v, vis, bias=bias), case.reference(q, k, v, vis, bias=bias))


@those("prefix")
def test_prefix_lm_columns_are_visible_to_all(case):
    q, k, v = inputs(20)
    vis = self_visibility(2, 20, prefix_len=jnp.array([6, 0]))
    o = case.forward(q, k, v, vis)
    close(o, case.reference(q, k, v, vis))
    later = case.forward(q, k, v.at[:, 5].add(1.0), vis)
    assert not np.allclose(o[0, 0], later[0, 0]), "query 0 must see prefix column 5"
    close(o[1, :5], later[1, :5], rtol=1e-7)


@those("causal_cross", "noncausal_cross")
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_equals_reference(case, causal):
    q, k, v = inputs(33, keys=57)
    vis = Visibility(
        q_positions=default_positions(2, 33) + 24,
        k_positions=default_positions(2, 57),
        q_segments=jnp.ones((2, 33), jnp.int32),
        k_segments=jnp.ones((2, 57), jnp.int32),
        causal=causal,
    )
    close(case.forward(q, k, v, vis), case.reference(q, k, v, vis))


@every
def test_the_future_does_not_reach_the_past(case):
    q, k, v = inputs(150)
    before = case.forward(q, k, v)
    at = 70
    change = lambda x: x.at[:, at:].set(normal(9, x[:, at:].shape))
    after = case.forward(change(q), change(k), change(v))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.allclose(before[:, at:], after[:, at:])


@every
def test_packed_documents_do_not_see_each_other(case):
    lengths, total = [40, 1, 63], 110
    q, k, v = inputs(total)
    positions, segments = packed(lengths, total)
    vis = self_visibility(2, total, positions=positions, segment_ids=segments)
    together = case.forward(q, k, v, vis)
    params = case.params(4, 2, 16, 16)
    start = 0
    for n in lengths:
        alone = case.forward(*(x[:, start : start + n] for x in (q, k, v)), None, params)
        close(together[:, start : start + n], alone)
        start += n
    changed = case.forward(*(x.at[:, :40].set(7.0) for x in (q, k, v)), vis)
    np.testing.assert_array_equal(together[:, 40:], changed[:, 40:])


@every
def test_padding_changes_nothing_and_gives_zeros(case):
    q, k, v = inputs(50)
    alone = case.forward(q, k, v)
    for left, right in ((0, 13), (9, 0)):
        wide = lambda x, a=left, b=right: jnp.pad(x, ((0, 0), (a, b), (0, 0), (0, 0)), constant_values=50.0)
        positions = jnp.pad(default_positions(2, 50), ((0, 0), (left, right)))
        segments = jnp.pad(jnp.ones((2, 50), jnp.int32), ((0, 0), (left, right)))
        vis = self_visibility(2, 50 + left + right, positions=positions, segment_ids=segments)
        o = case.forward(wide(q), wide(k), wide(v), vis)
        close(o[:, left : left + 50], alone)
        assert not np.any(o[:, :left])
        assert not np.any(o[:, left + 50 :])


@every
def test_fully_masked_rows_are_zero_with_finite_gradients(case):
    q, k, v = inputs(12)
    segments = jnp.zeros((2, 12), jnp.int32).at[0, 5:].set(1)
    vis = self_visibility(2, 12, segment_ids=segments)
    params = case.params(4, 2, 16, 16)
    for run in (case.forward, case.reference):
        o = run(q, k, v, vis, params)
        assert not np.any(o[1])
        assert not np.any(o[0, :5])
        assert np.all(np.isfinite(o))
        grads = gradients(run, q, k, v, vis, params)[1]
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
        assert not np.any(grads[0][1]), "queries that see nothing have no gradient"


SIZES = {"equal": 0.0, "huge": 1e4, "opposite": -1e4}
EXTREMES = [(case, name) for case in CASES for name in (SIZES if case in DEFAULTS else ["huge"])]


@pytest.mark.parametrize(("case", "size"), [(c, SIZES[n]) for c, n in EXTREMES], ids=[f"{c}-{n}" for c, n in EXTREMES])
def test_extreme_logits_stay_finite_and_equal_reference(case, size):
    q, k, v = inputs(20, dim=4, value_dim=4)
    q, k = jnp.ones_like(q), jnp.ones_like(k) * (size / 2)
    if size:
        k = k.at[:, 3].mul(2.0)
    o, expected = case.forward(q, k, v), case.reference(q, k, v)
    assert np.all(np.isfinite(expected))
    close(o, expected, rtol=1e-4)
    grad = jax.jit(jax.grad(lambda *x: jnp.sum(case.forward(*x)), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.all(np.isfinite(g)) for g in grad)


@every
def test_bf16_is_as_close_as_bf16_can_be(case):
    q, k, v = inputs(130, dtype=jnp.bfloat16)
    o = case.forward(q, k, v)
    assert o.dtype == jnp.bfloat16
    exact = case.reference(*(x.astype(jnp.float32) for x in (q, k, v)))
    if case.mechanism.name == "kernel_mlp":  # two more bf16 products before the scores
        close(o, exact, rtol=6e-2)
    else:
        close(o, exact, rtol=2e-2)


@default
def test_heads_and_batch_rows_do_not_mix(case):
    q, k, v = inputs(30, heads=4, kv_heads=4, batch=3)
    params = case.params(4, 4, 16, 16)
    o = case.forward(q, k, v, None, params)
    rows = jnp.array([2, 0, 1])
    close(case.forward(q[rows], k[rows], v[rows], None, params), o[rows], rtol=1e-6)
    other = lambda x: x.at[:, :, 2].set(normal(9, x[:, :, 2].shape))
    changed = case.forward(other(q), other(k), other(v), None, params)
    rest = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(changed[:, :, rest], o[:, :, rest])
    assert not np.allclose(changed[:, :, 2], o[:, :, 2])
