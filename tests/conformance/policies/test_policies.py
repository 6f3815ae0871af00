"""Every policy: dense where the budget holds all, its own rows alone, one size, one program; and what it refuses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.policies import cost, get, names, resolve, text_of
from jaxattn.reader import check_piece, whole_prompts
from tests.conformance.model import params_of
from tests.conformance.policies.cases import (
    CASES,
    LEFT,
    LENGTH,
    PROMPT,
    TRACES,
    VARIANTS,
    answers,
    decode,
    dense,
    grouped,
    refused,
    step,
    texts,
)

EXACT = 1e-5
SOFTMAX = [case for case in CASES if case.mechanism == "softmax"]  # for questions about places, not about weights


def close(found, expected, tolerance=EXACT):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())), rtol=0)


@pytest.mark.parametrize("case", grouped(CASES + VARIANTS))
def test_an_unlimited_budget_is_dense_attention(case):
    """Wraps have no budget: `unlimited` gives the options that change nothing."""
    own = texts()[2] > 0
    close(answers(case.unlimited())[own], dense(case.mechanism, case.layers)[own])


@pytest.mark.parametrize("case", grouped([c for c in CASES if c.policy.name not in ("dense", "watch")]))
def test_a_small_budget_is_not(case):
    """What lies outside of it is lost, so that the question above means something."""
    found, whole = answers(case.config())[0, PROMPT:], dense(case.mechanism, case.layers)[0, PROMPT:]
    assert np.isfinite(found).all()
    assert np.abs(found - whole).max() > 1e-3


@pytest.mark.parametrize("case", grouped(SOFTMAX + VARIANTS))
def test_padding_on_the_left_changes_nothing(case):
    """The padded row is a prompt of fewer tokens, so its answer begins earlier in the text: asked of one as short."""
    padded = answers(case.config())[1, LEFT:]
    tokens, positions, segments = texts()
    shorter = tuple(x[[0, 0, 0], : LENGTH - LEFT] for x in (tokens, positions, segments))  # as many rows: one program
    alone, _ = decode(case.config(), shorter, (PROMPT - LEFT,))
    close(padded, alone[0])


@pytest.mark.parametrize("case", grouped(CASES))
def test_rows_of_a_batch_do_not_mix(case):
    order = [2, 0, 1]
    found, _ = decode(case.config(), tuple(x[order] for x in texts()))
    own = texts()[2][order] > 0
    close(found[own], answers(case.config())[order][own])


@pytest.mark.parametrize("case", grouped(CASES))
def test_an_answer_does_not_see_its_own_future(case):
    """Nor a prompt, unless it may be looked at whole."""
    tokens, positions, segments = texts()
    whole = whole_prompts(case.config())
    at = PROMPT + 5 if whole else PROMPT - 6
    changed = np.where(np.arange(LENGTH) == at, (tokens + 3) % 19, tokens)
    found, _ = decode(case.config(), (changed, positions, segments))
    own = (segments > 0)[:, :at]
    close(found[:, :at][own], answers(case.config())[:, :at][own], 1e-6)
    assert np.abs(found[0, at:] - answers(case.config())[0, at:]).max() > 1e-3


@pytest.mark.parametrize("case", grouped(SOFTMAX))
def test_pieces_of_a_prompt_equal_one_call_or_are_refused(case):
    cfg = case.config()
    if whole_prompts(cfg):
        with pytest.raises(ConfigError, match="in one piece"):
            check_piece(cfg, 7)
        return
    found, _ = decode(cfg, pieces=(PROMPT - LEFT, 1, LEFT - 1))  # the first as long as the prompt without padding
    own = texts()[2] > 0
    close(found[own], answers(cfg)[own])


@pytest.mark.parametrize("case", grouped(SOFTMAX))
def test_a_window_of_the_layer_is_honoured_or_refused(case):
    windowed = "softmax(window=9)"
    if sentence := refused(case, mixers=(windowed,)):
        assert "window of 9" in sentence
        return
    spec = case.policy.unlimited(case.spec, LENGTH)
    own = texts()[2] > 0
    close(answers(case.config(spec, mixers=(windowed,)))[own], dense(windowed, case.layers)[own])


@pytest.mark.parametrize("position", ["alibi", "nope"])
@pytest.mark.parametrize("case", grouped(SOFTMAX))
def test_other_position_encodings_are_honoured_or_refused(case, position):
    if sentence := refused(case, position=position):
        assert case.policy.name in sentence
        return
    spec = case.policy.unlimited(case.spec, LENGTH)
    own = texts()[2] > 0
    close(answers(case.config(spec, position=position))[own], dense("softmax", case.layers, position=position)[own])


@pytest.mark.parametrize("mixer", ["softplus", "sink_token", "landmark(block=3)", "lightning"])
@pytest.mark.parametrize("case", grouped(SOFTMAX))
def test_mechanisms_it_cannot_serve_are_refused_by_name(case, mixer):
    sentence = refused(case, mixers=(mixer,))
    if not sentence:
        if mixer.startswith(("landmark", "lightning")):  # which keep no plain keys
            assert case.policy.name == "dense"
            return
        spec = case.policy.unlimited(case.spec, LENGTH + 1)  # a learned token takes a place, too
        own, tolerance = texts()[2] > 0, 1e-4 if mixer == "softplus" else EXACT  # whose weights are fifteenth powers
        close(answers(case.config(spec, mixers=(mixer,)))[own], dense(mixer, case.layers)[own], tolerance)
    else:
        assert case.policy.name in sentence
        assert mixer.split("(")[0] in sentence


@pytest.mark.parametrize("case", grouped(CASES))
def test_the_cost_is_the_states_and_one_program_serves_any_length(case):
    cfg = case.config()
    _, states = decode(cfg)
    plan, sites = cfg.keeping, [cfg.site(layer) for layer in range(cfg.num_layers)]
    costs = [cost(plan, site, length=LENGTH - 1, capacity=LENGTH) for site in sites]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(states)) == 3 * sum(c.held for c in costs)
    assert all(0 < c.share <= 1 for c in costs)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(states)), "a row of a state is not a row of the batch"
    far = [cost(plan, site, length=10**5, capacity=10**6).held for site in sites]
    assert (far == [c.held for c in costs]) == case.policy.bounded
    before = TRACES[cfg, "answer"]
    tokens, positions, segments = texts()
    longer = [np.concatenate([x, np.ones_like(x[:, :6])], axis=1) for x in (tokens, segments)]
    places = np.concatenate([positions, positions[:, -1:] + 1 + np.arange(6)], axis=1)
    found, _ = decode(cfg, (longer[0], places, longer[1]))
    assert TRACES[cfg, "answer"] == before, "a longer text compiles another program"
    if case.policy.bounded:
        assert np.isfinite(found[longer[1] > 0]).all(), "a text longer than the room"
    else:
        assert np.isnan(found[:, LENGTH:]).all(), "an overflowing step must never look like an answer"


@pytest.mark.parametrize("case", grouped(SOFTMAX))
def test_a_state_that_is_saved_goes_on_as_it_was(case):
    cfg = case.config()
    cut = PROMPT + 3
    whole = answers(cfg)
    _, states = decode(cfg, tuple(x[:, :cut] for x in texts()))
    leaves, tree = jax.tree.flatten(states)
    saved = jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves])  # copies on the host
    logits, _ = step(cfg, "answer", params_of(cfg), saved, *(x[:, cut : cut + 1] for x in texts()))
    close(np.asarray(logits)[:, 0], whole[:, cut], 1e-6)


# --- names and texts


@pytest.mark.parametrize("name", names())
def test_a_text_of_a_policy_is_read_back(name):
    policy = get(name)
    for spec in (policy.spec(), *policy.variants):
        plan = resolve(text_of(policy, spec))
        assert (policy, spec) in ((plan.policy, plan.spec), *plan.wraps)
    assert policy.title
    assert policy.keeps
    assert policy.reads
    assert "." in policy.arxiv


def test_refusals_are_one_sentence_with_a_remedy():
    for text, words in (
        ("dens", "did you mean dense|dense"),
        ("dense(size=3)", "size"),
        ("dense, dense", "one policy that keeps"),
        ("dense(", "NAME"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(text)
