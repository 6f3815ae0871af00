"""Every mechanism: decoding token by token, or in pieces, gives the forward's answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions
from jaxattn.rope import Alibi, alibi_slopes
from tests import decoding
from tests.conformance import questions
from tests.conformance.cases import CASES, DEFAULTS, FULL, able, close, crossed, grouped, inputs, standard

PIECES = {"mixed": [9, 1, 1, 9], "steps": [1] * 20, "two": [9, 9, 1, 1], "one": [20]}
# Every way to cut on the full matrix; all others once, in a way that holds long pieces and single steps.
CUTS = [(case, name) for case in CASES for name in (PIECES if case in FULL else ["mixed"])]


@pytest.mark.parametrize(("case", "pieces"), crossed(CUTS))
def test_steps_equal_forward(case, pieces):
    questions.steps_equal_forward(case, PIECES[pieces])


@pytest.mark.parametrize("case", grouped(able("window", among=FULL)))
def test_windowed_steps_equal_windowed_forward(case):
    q, k, v = standard(length=20)
    decoded = questions.decode(case, q, k, v, [9] + [1] * 11, window=4)
    close(decoded, case.reference(q, k, v, questions.windowed(20, 4)))


@pytest.mark.parametrize("case", grouped(able("position_bias", among=FULL)))
def test_steps_with_a_position_bias_equal_forward(case):
    q, k, v = standard(length=20)
    bias = Alibi(alibi_slopes(6))
    close(questions.decode(case, q, k, v, [9] + [1] * 11, bias=bias), case.reference(q, k, v, bias=bias))


@pytest.mark.parametrize("case", grouped(CASES))
def test_left_padded_prompts_decode_like_unpadded_ones(case):
    questions.left_padded_prompts_decode_like_unpadded_ones(case)


@pytest.mark.parametrize("case", grouped([c for c in DEFAULTS if c.mechanism.capabilities.state == "kv"]))
def test_a_full_cache_is_refused_outside_jit_and_poisoned_inside(case):
    questions.a_full_cache_is_poisoned_inside_jit(case)
    q, k, v = inputs(6, value_dim=8)
    ones, positions = jnp.ones((2, 6), jnp.int32), default_positions(2, 6)
    state, params = questions.new_state(case, q, k, v, 5), case.params_for(q, k, v)
    with pytest.raises(ConfigError, match="capacity 5"):
        decoding.step(case.mechanism, case.spec, state, q, k, v, positions, ones, params=params)


@pytest.mark.parametrize("case", grouped([c for c in DEFAULTS if c.mechanism.capabilities.state == "recurrent"]))
def test_a_recurrent_state_has_the_same_size_for_any_context(case):
    q, k, v = inputs(6)
    shapes = lambda capacity: jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: questions.new_state(case, q, k, v, capacity))
    )
    assert shapes(8) == shapes(100_000)
