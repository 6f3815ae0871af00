"""Aaren: the card's identities, hand-worked rows, its constant state and its refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call, get
from jaxattn.mechanisms.aaren import MECHANISM as AAREN
from jaxattn.rope import Alibi, alibi_slopes
from tests.conformance.cases import arrays, close, inputs, normal, packed
from tests.mechanisms import programs

SPEC = AAREN.spec()


def query(heads=4, dim=16, dtype=np.float32):
    """A learned query that has moved away from its small start."""
    return {"query": normal(5, (heads, dim)).astype(dtype)}


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


def run(q, k, v, params, vis=None, which="forward"):
    vis = self_visibility(*q.shape[:2]) if vis is None else vis
    return np.asarray(programs.run(AAREN, which, SPEC, q, k, v, vis, params=params))


def test_hand_worked_rows():
    """D = 4, so scale = 1/2; the query 2·e1 gives the scores 1, -1, 0 to every row."""
    k = np.float32([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]])[None, :, None]
    params = {"query": np.float32([[2, 0, 0, 0]])}
    a = programs.run(AAREN, "weights", SPEC, np.full_like(k, 7), k, self_visibility(1, 3), params=params)
    a = jax.device_get(a)
    e = np.exp([1.0, -1.0, 0.0])
    expected = [[1, 0, 0], [*(e[:2] / e[:2].sum()), 0], e / e.sum()]
    np.testing.assert_allclose(a.values[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(a.scores[0, 0], [[1, -1, 0]] * 3, atol=1e-6)
    v = np.float32([3, 5, -2]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(run(k, k, v, params)[0, :, 0, 0], np.dot(expected, [3, 5, -2]), atol=1e-6)


def test_the_last_output_is_cross_attention_of_the_learned_query():
    """Card 4: softmax of this library, the query broadcast, no mask; the shape's q changes nothing."""
    q, k, v = arrays(70, value_dim=8)
    params, softmax = query(), get("softmax")
    o = run(q, k, v, params)
    of_softmax = lambda q, vis: programs.run(softmax, "forward", softmax.spec(), q, k, v, vis)
    rows = np.broadcast_to(params["query"], (2, 70, 4, 16))
    ones = np.ones((2, 70), np.int32)
    everything = Visibility(*map(jnp.asarray, (ones[:, :1], ones, ones[:, :1], ones)), causal=False)
    close(o[:, -1:], of_softmax(rows[:, :1], everything))
    np.testing.assert_array_equal(o, run(q + 3, k, v, params))
    close(o, of_softmax(rows, self_visibility(2, 70)))


def test_forward_reference_and_gradients_agree_in_f64():
    """Card 1 and 5 through keys, values and query, packed and padded, grouped heads, scores of std 30."""
    positions, segments = packed([30, 1, 40], 80)
    with jax.enable_x64(True):
        q, k, v = inputs(80, dtype=jnp.float64)
        params = query(dtype=np.float64)
        vis = self_visibility(2, 80, positions=positions, segment_ids=segments)
        weigh = normal(6, (*v.shape[:2], 4, 16)).astype(np.float64)

        def both(f):
            def loss(k, v, p):
                o = f(q, k, v, vis, Call(SPEC, p, scale=7.5))
                return jnp.sum(weigh * o), o

            (_, o), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(k, v, params)
            return o, grads

        ours, theirs = both(AAREN.forward), both(AAREN.reference)
        s = programs.run(AAREN, "weights", SPEC, q, k, vis, params=params, scale=7.5).scores
        assert 25 < np.std(s) < 35
        assert ours[0].dtype == jnp.float64
        error = lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(1.0, np.max(np.abs(b)))
        assert max(jax.tree.leaves(jax.tree.map(error, ours, theirs))) < 1e-12


def test_the_state_is_constant_in_size():
    """Card 5: H (V + 2) f32 numbers and one segment id a sequence, at capacity 10 as at 100000, and after use."""
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(state(10)) == size(state(100_000)) == 2 * (4 * (16 + 2) * 4 + 4)
    q, k, v = inputs(30)
    ids, at = np.ones((2, 30), np.int32), default_positions(2, 30)
    _, after = programs.run(AAREN, "step", SPEC, state(10), q, k, v, at, ids, params=query())
    assert size(after) == size(state(10))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state(10))
    assert state(dtype=jnp.bfloat16).partial.w.dtype == jnp.float32


def test_steps_over_packed_documents_and_left_padding_equal_forward():
    q, k, v = arrays(40, value_dim=8)
    segments, at = np.zeros((2, 40), np.int32), np.asarray(default_positions(2, 40))
    segments[0, 5:16], segments[0, 16:] = 1, 2
    segments[1, 21:39] = 3
    params, vis = query(), self_visibility(2, 40, segment_ids=jnp.asarray(segments))
    expected = run(q, k, v, params, vis)
    close(expected, run(q, k, v, params, vis, "reference"))
    for pieces in ([13, 13, 14], [13] + [1] * 27):
        now, first, outputs = state(value_dim=8), 0, []
        for n in pieces:
            cut = [x[:, first : first + n] for x in (q, k, v, at, segments)]
            o, now = programs.run(AAREN, "step", SPEC, now, *cut, params=params)
            outputs.append(np.asarray(o))
            first += n
        close(np.concatenate(outputs, axis=1), expected)
        np.testing.assert_array_equal(now.segment, [2, 3])


def test_head_h_reads_key_head_h_over_group():
    q, k, v = arrays(20)
    params = query()
    o = run(q, k, v, params)
    close(run(q, k.repeat(2, axis=2), v.repeat(2, axis=2), params), o)
    k[:, :, 1] += 1
    changed = run(q, k, v, params)
    np.testing.assert_array_equal(changed[:, :, :2], o[:, :, :2])
    assert not np.allclose(changed[:, :, 2:], o[:, :, 2:])


def test_parameters_are_one_query_token_a_layer():
    """At E = 512 the paper's analysis model has 3,152,896 parameters against 3,152,384: one token."""
    params = AAREN.init_params(jax.random.key(0), SPEC, heads=8, kv_heads=8, key_dim=64, value_dim=64)
    assert params["query"].size == 3_152_896 - 3_152_384
    assert 0.018 < np.std(params["query"]) < 0.022


def test_sink_tokens_are_seen_by_no_segment_in_forward_and_reference_alike():
    q, k, v = arrays(12)
    segments = jnp.asarray([[GLOBAL] * 2 + [1] * 5 + [2] * 5] * 2, jnp.int32)
    vis = self_visibility(2, 12, segment_ids=segments)
    o = run(q, k, v, query(), vis)
    close(o, run(q, k, v, query(), vis, "reference"))
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
