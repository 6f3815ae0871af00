"""Aaren: the card's identities, hand-worked rows, its constant state and its refusals."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call, get
from jaxattn.mechanisms.aaren import MECHANISM as AAREN
from jaxattn.rope import Alibi, alibi_slopes
from tests.conformance.cases import close, inputs, packed

SPEC = AAREN.spec()


@partial(jax.jit, static_argnames=("scale", "backend"))
def forward(q, k, v, vis, params, **options):
    return AAREN.forward(q, k, v, vis, Call(SPEC, params, **options))


def query(heads=4, dim=16, dtype=jnp.float32):
    """A learned query that has moved away from its small start."""
    return {"query": jax.random.normal(jax.random.key(5), (heads, dim), dtype)}


def state(capacity=8, batch=2, heads=4, value_dim=16, dtype=jnp.float32):
    return AAREN.init_state(
        SPEC,
        batch=batch,
        capacity=capacity,
        heads=heads,
        kv_heads=2,
        key_dim=16,
        value_dim=value_dim,
        dtype=dtype,
    )


def run(q, k, v, params, vis=None, **options):
    vis = self_visibility(*q.shape[:2]) if vis is None else vis
    return forward(q, k, v, vis, params=params, **options)


def test_hand_worked_rows():
    """D = 4, so scale = 1/2; the query 2·e1 gives the scores 1, -1, 0 to every row."""
    k = jnp.array([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]])[None, :, None]
    params = {"query": jnp.array([[2.0, 0, 0, 0]])}
    a = AAREN.weights(jnp.full_like(k, 7.0), k, self_visibility(1, 3), Call(SPEC, params))
    e = np.exp([1.0, -1.0, 0.0])
    expected = [[1, 0, 0], [*(e[:2] / e[:2].sum()), 0], e / e.sum()]
    np.testing.assert_allclose(a.values[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(a.scores[0, 0], [[1, -1, 0]] * 3, atol=1e-6)
    v = jnp.array([3.0, 5.0, -2.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(run(k, k, v, params)[0, :, 0, 0], np.dot(expected, [3, 5, -2]), atol=1e-6)


def test_the_last_output_is_cross_attention_of_the_learned_query():
    """Card 4: softmax of this library, the query broadcast, no mask; the shape's q changes nothing."""
    q, k, v = inputs(70, value_dim=8)
    params = query()
    o = run(q, k, v, params)
    one = jnp.broadcast_to(params["query"], (2, 1, 4, 16))
    ones = lambda n: jnp.ones((2, n), jnp.int32)
    everything = Visibility(ones(1), default_positions(2, 70), ones(1), ones(70), causal=False)
    softmax = get("softmax")
    close(o[:, -1:], softmax.forward(one, k, v, everything, Call(softmax.spec())))
    np.testing.assert_array_equal(o, run(q + 3.0, k, v, params))
    all_rows = jnp.broadcast_to(params["query"], (2, 70, 4, 16))
    close(o, softmax.forward(all_rows, k, v, self_visibility(2, 70), Call(softmax.spec())))


def test_forward_reference_and_gradients_agree_in_f64():
    """Card 1 and 5 through keys, values and query, packed and padded, grouped heads, scores of std 30."""
    positions, segments = packed([30, 1, 40], 80)
    with jax.enable_x64(True):
        q, k, v = inputs(80, dtype=jnp.float64)
        params = query(dtype=jnp.float64)
        vis = self_visibility(2, 80, positions=positions, segment_ids=segments)
        weigh = jax.random.normal(jax.random.key(1), (*v.shape[:2], 4, 16), jnp.float64)

        def both(f):
            loss = lambda k, v, p: jnp.sum(weigh * f(q, k, v, vis, Call(SPEC, p, scale=7.5)))
            o = f(q, k, v, vis, Call(SPEC, params, scale=7.5))
            return o, jax.jit(jax.grad(loss, (0, 1, 2)))(k, v, params)

        ours, theirs = both(AAREN.forward), both(AAREN.reference)
        s = AAREN.weights(q, k, vis, Call(SPEC, params, scale=7.5)).scores
        assert 25 < jnp.std(s) < 35
        assert ours[0].dtype == jnp.float64
        error = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.maximum(1.0, jnp.max(jnp.abs(b))))
        assert max(jax.tree.leaves(jax.tree.map(error, ours, theirs))) < 1e-12


def test_the_state_is_constant_in_size():
    """Card 5: H (V + 2) f32 numbers and one segment id a sequence, at capacity 10 as at 100000, and after use."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(state(10)) == size(state(100_000)) == 2 * (4 * (16 + 2) * 4 + 4)
    q, k, v = inputs(30)
    ids = jnp.ones((2, 30), jnp.int32)
    _, after = AAREN.step(state(10), q, k, v, default_positions(2, 30), ids, Call(SPEC, query()))
    assert size(after) == size(state(10))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state(10))
    assert state(dtype=jnp.bfloat16).partial.w.dtype == jnp.float32


def test_steps_over_packed_documents_and_left_padding_equal_forward():
    q, k, v = inputs(40, value_dim=8)
    segments = np.zeros((2, 40), np.int32)
    segments[0, 5:16], segments[0, 16:] = 1, 2
    segments[1, 21:39] = 3
    segments = jnp.asarray(segments)
    params = query()
    expected = run(q, k, v, params, self_visibility(2, 40, segment_ids=segments))
    close(expected, AAREN.reference(q, k, v, self_visibility(2, 40, segment_ids=segments), Call(SPEC, params)))
    step = jax.jit(lambda s, *x: AAREN.step(s, *x, Call(SPEC, params)))
    for pieces in ([12, 9, 19], [20] + [1] * 20):
        now, at, outputs = state(value_dim=8), 0, []
        for n in pieces:
            cut = [x[:, at : at + n] for x in (q, k, v, default_positions(2, 40), segments)]
            o, now = step(now, *cut)
            outputs.append(o)
            at += n
        close(jnp.concatenate(outputs, axis=1), expected)
        np.testing.assert_array_equal(now.segment, [2, 3])


def test_head_h_reads_key_head_h_over_group():
    q, k, v = inputs(20)
    params = query()
    o = run(q, k, v, params)
    repeat = lambda x: jnp.repeat(x, 2, axis=2)
    close(run(q, repeat(k), repeat(v), params), o)
    changed = run(q, k.at[:, :, 1].add(1.0), v, params)
    np.testing.assert_array_equal(changed[:, :, :2], o[:, :, :2])
    assert not np.allclose(changed[:, :, 2:], o[:, :, 2:])


def test_parameters_are_one_query_token_a_layer():
    """At E = 512 the paper's analysis model has 3,152,896 parameters against 3,152,384: one token."""
    params = AAREN.init_params(jax.random.key(0), SPEC, heads=8, kv_heads=8, key_dim=64, value_dim=64)
    assert params["query"].size == 3_152_896 - 3_152_384
    assert 0.018 < jnp.std(params["query"]) < 0.022


def test_sink_tokens_are_seen_by_no_segment_in_forward_and_reference_alike():
    q, k, v = inputs(12)
    segments = jnp.asarray([[GLOBAL] * 2 + [1] * 5 + [2] * 5] * 2, jnp.int32)
    vis = self_visibility(2, 12, segment_ids=segments)
    o = run(q, k, v, query(), vis)
    close(o, AAREN.reference(q, k, v, vis, Call(SPEC, query())))
    close(o[:, 2:7], run(q[:, 2:7], k[:, 2:7], v[:, 2:7], query()))


REFUSED = {
    "noncausal_self": {"causal": False},
    "window": {"window": 4},
    "prefix": {"prefix_len": jnp.array([3, 3])},
}


FUNCTIONS = [(f, c) for c in (*REFUSED, "position_bias") for f in ("forward", "reference", "weights")]
FUNCTIONS += [(f, c) for c in ("causal_cross", "noncausal_cross") for f in ("forward", "reference")]


@pytest.mark.parametrize(("function", "capability"), FUNCTIONS)  # any rows of the weights may be asked for
def test_what_is_off_is_refused_by_every_function(capability, function):
    q, k, v = inputs(10)
    vis = self_visibility(2, 10, **REFUSED.get(capability, {}))
    if capability.endswith("cross"):
        q, vis = q[:, :6], dataclasses.replace(vis.rows(0, 6), causal=capability == "causal_cross")
    bias = Alibi(alibi_slopes(4)) if capability == "position_bias" else None
    arrays = (q, k) if function == "weights" else (q, k, v)
    assert not getattr(AAREN.capabilities, capability)
    with pytest.raises(NotImplementedError, match=f"aaren does not support {capability}[.]"):
        getattr(AAREN, function)(*arrays, vis, Call(SPEC, query(), bias=bias))


@pytest.mark.parametrize(
    ("capability", "option"), [("window", {"window": 4}), ("position_bias", {"bias": Alibi(alibi_slopes(4))})]
)
def test_step_refuses_too(capability, option):
    q, k, v = inputs(3)
    ids = jnp.ones((2, 3), jnp.int32)
    with pytest.raises(NotImplementedError, match=f"aaren does not support {capability}[.]"):
        AAREN.step(state(), q, k, v, default_positions(2, 3), ids, Call(SPEC, query(), **option))
