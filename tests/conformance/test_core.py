"""Every mechanism by itself: the efficient forward is the reference, obeys the mask, and is what its weights say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, default_positions, self_visibility
from jaxattn.rope import Alibi, RawRelativeBias, alibi_slopes
from tests.conformance import questions
from tests.conformance.cases import (
    CASES,
    DEFAULTS,
    FULL,
    SHORT,
    able,
    arrays,
    close,
    crossed,
    grouped,
    packed,
    standard,
)

every = pytest.mark.parametrize("case", grouped(CASES))
full = pytest.mark.parametrize("case", grouped(FULL))


@every
def test_values_and_gradients_equal_reference(case):
    questions.values_and_gradients(case, *standard())


SHAPES = {
    "one-token": {"length": 1, "heads": 2, "kv_heads": 2, "dim": 8, "value_dim": 8},
    "several-blocks": {"length": 257, "heads": 2, "kv_heads": 2, "dim": 64, "value_dim": 24},
}


# One of every implementation: what differs within a family has no shapes, and `long_forward` asks all of them.
APART = list({case.mechanism.forward.__module__: case for case in reversed(FULL)}.values())


@pytest.mark.parametrize(("case", "shape"), crossed([(case, shape) for case in APART for shape in SHAPES]))
def test_values_and_gradients_equal_reference_at_other_shapes(case, shape):
    questions.values_and_gradients(case, *arrays(**SHAPES[shape]))


@full
def test_long_forward_equals_reference_across_key_chunks(case):
    questions.equals_oracle(case, *arrays(1100, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8), rtol=1e-4)


@every
def test_the_future_does_not_reach_the_past(case):
    questions.the_future_does_not_reach_the_past(case)


@every
def test_packed_documents_do_not_see_each_other(case):
    questions.packed_documents_do_not_see_each_other(case)


@every
def test_padding_changes_nothing_and_gives_zeros(case):
    questions.padding_changes_nothing_and_gives_zeros(case)


@every
def test_heads_and_batch_rows_do_not_mix(case):
    questions.heads_and_rows_do_not_mix(case)


@every
def test_calls_repeat_bitwise_and_compile_once(case):
    questions.calls_repeat_bitwise_and_compile_once(case)


@every
def test_weights_rebuild_the_forward_pass(case):
    questions.weights_rebuild_the_forward_pass(case)


@every
def test_fully_masked_rows_are_zero_with_finite_gradients(case):
    questions.fully_masked_rows_are_zero_with_finite_gradients(case)


SIZES = {"equal": 0.0, "huge": 1e4, "opposite": -1e4}


@pytest.mark.parametrize(("case", "size"), crossed([(case, size) for case in CASES for size in SIZES]))
def test_extreme_logits_stay_finite_and_equal_reference(case, size):
    questions.extreme_logits_stay_finite_and_equal_reference(case, SIZES[size])


@pytest.mark.parametrize("case", grouped([c for c in CASES if c.mechanism.name not in SHORT or c in DEFAULTS]))
def test_bf16_is_as_close_as_bf16_can_be(case):
    questions.bf16_is_as_close_as_bf16_can_be(case)


# --- other rules: each is a program of its own


RULES = {  # (causal, window, bias): every pair of two of them
    "alibi": (True, None, "alibi"),
    "window": (True, 5, "none"),
    "window-raw_relative": (True, 5, "raw_relative"),
    "noncausal": (False, None, "none"),
    "noncausal-raw_relative": (False, None, "raw_relative"),
    "noncausal-window-alibi": (False, 5, "alibi"),
}
BIASES = {"none": None, "alibi": Alibi(alibi_slopes(6)), "raw_relative": RawRelativeBias()}
FEW = ("window-raw_relative", "noncausal-window-alibi")
RULED = [
    (case, rule)
    for case in able("noncausal_self", "window", "position_bias")
    for rule in (RULES if case in APART or case.mechanism.name == "softmax" else FEW)
]


@pytest.mark.parametrize(("case", "rule"), crossed(RULED))
def test_masks_and_biases_equal_reference(case, rule):
    causal, window, bias = RULES[rule]
    q, k, v = standard()
    positions, segments = packed([40, 1, 80], 150, batch=3)
    vis = self_visibility(3, 150, causal=causal, window=window, positions=positions, segment_ids=segments)
    questions.equals_oracle(case, q, k, v, vis, bias=BIASES[bias])


@pytest.mark.parametrize("case", grouped(able("prefix", among=FULL)))
def test_prefix_lm_columns_are_visible_to_all(case):
    q, k, v = arrays(20)
    vis = self_visibility(2, 20, prefix_len=jnp.array([6, 0]))
    o = np.asarray(questions.equals_oracle(case, q, k, v, vis))
    later = np.asarray(case.forward(q, k, questions.replaced(v, np.s_[:, 5], v[:, 5] + 1.0), vis))
    assert not np.allclose(o[0, 0], later[0, 0]), "query 0 must see prefix column 5"
    close(o[1, :5], later[1, :5], rtol=1e-7)


@pytest.mark.parametrize("case", grouped(able("causal_cross", "noncausal_cross", among=FULL)))
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention_equals_reference(case, causal):
    q, k, v = arrays(33, keys=57)
    vis = Visibility(
        q_positions=default_positions(2, 33) + 24,
        k_positions=default_positions(2, 57),
        q_segments=jnp.ones((2, 33), jnp.int32),
        k_segments=jnp.ones((2, 57), jnp.int32),
        causal=causal,
    )
    questions.equals_oracle(case, q, k, v, vis)


@full
def test_vmap_changes_nothing(case):
    q, k, v = standard()
    one = lambda q, k, v: case.forward(q[None], k[None], v[None])[0]
    close(jax.vmap(one)(q, k, v), case.forward(q, k, v, questions.seen()), rtol=1e-5)


@pytest.mark.parametrize("case", grouped(APART))  # op by op, each op is a program of its own
def test_jit_changes_nothing(case):
    q, k, v = map(jnp.asarray, standard())
    close(case.forward(q, k, v, questions.seen()), case.op_by_op(q, k, v), rtol=1e-5)


def test_whoever_is_not_asked_everything_is_a_member_of_a_family():
    """A name that is misspelt or gone would silently drop nothing; one too many would drop questions."""
    assert {case.mechanism.name for case in DEFAULTS} >= set(SHORT)
    for case in DEFAULTS:
        if case.mechanism.name in SHORT:
            assert case.mechanism.forward.__module__.split(".")[-1] in ("_score_family", "_linear_family")
