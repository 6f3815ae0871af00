"""RazorAttention against its rule in NumPy: what is kept, what stands for the rest, and which heads keep all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.head_tables import settled
from jaxattn.models import ModelConfig
from jaxattn.policies import cost, razor, resolve
from jaxattn.policies.parts import key_heads
from tests.decoding import site_of
from tests.policies.key_heads import HEADS, KV_HEADS, LEFT, VALUES, arrays, places, run, softmax_over

LENGTH, PROMPT = 44, 27
QKV = arrays(LENGTH)
SMALL = {"vocab_size": 7, "num_layers": 4, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "d_ff": 8}
LIVE = places((0, LEFT), LENGTH)[1] > 0


def expected(spec, row, left, prompt):
    """[T, H, V] of one row's own tokens, by the paper's formula."""
    q, k, v = (x[row, left:] for x in QKV)
    out, count = np.zeros((len(q), HEADS, VALUES)), prompt - left
    newest = max(spec.least, math.ceil(count / spec.part)) if prompt else spec.least
    full = key_heads.full_heads(spec.full, site_of(*QKV))
    for t in range(len(q)):
        at = np.arange(t + 1)
        for head in range(KV_HEADS):
            group = slice(2 * head, 2 * head + 2)
            kept = (at < spec.sinks) | (t - at <= newest)
            if head in full or t < count or kept.all():
                out[t, group] = softmax_over(q[t, group], k[at, head], v[at, head])
                continue
            gone, keys, values, extra = at[~kept], k[at[kept], head], v[at[kept], head], np.zeros(kept.sum())
            if spec.compensate:
                keys = np.concatenate([keys, k[gone, head].astype(np.float64).mean(0)[None]])
                values = np.concatenate([values, v[gone, head].astype(np.float64).mean(0)[None]])
                extra = np.append(extra, np.log(len(gone)))
            out[t, group] = softmax_over(q[t, group], keys, values, extra)
    return out


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(
    ("full", "sinks", "least", "part"), [("1", 3, 5, 9.0), ("2", 0, 2, 3.0), ("0", 2, 4, 6.0), ("3", 2, 3, 5.0)]
)
def test_it_is_the_papers_formula(full, sinks, least, part, compensate):
    spec = razor.Spec(full=full, sinks=sinks, least=least, part=part, compensate=compensate)
    found, _ = run(razor, spec, QKV, prompt=PROMPT)
    for row, left in enumerate((0, LEFT)):
        np.testing.assert_allclose(found[row, left:], expected(spec, row, left, PROMPT), atol=3e-5)


def test_several_tokens_of_an_answer_are_one_after_the_other():
    spec = razor.Spec(full="1", sinks=3, least=5, part=9.0)
    one, _ = run(razor, spec, QKV, prompt=LENGTH - 15)
    several, _ = run(razor, spec, QKV, prompt=LENGTH - 15, width=5)
    np.testing.assert_allclose(several[LIVE], one[LIVE], atol=2e-6)


def test_room_for_more_tokens_changes_nothing():
    """How many are kept follows from the prompt of a row, not from the room that its state has."""
    spec = razor.Spec(full="1", sinks=1, least=2, part=4.0)
    found, state = run(razor, spec, QKV, prompt=PROMPT)
    wide, larger = run(razor, spec, QKV, prompt=PROMPT, room=3 * LENGTH)
    np.testing.assert_allclose(wide[LIVE], found[LIVE], atol=2e-6)
    assert larger.ring.slots > state.ring.slots
    assert np.asarray(state.newest).tolist() == [7, 6]


def test_a_prompt_without_anything_to_drop_is_dense():
    spec = razor.Spec(full="0", sinks=2, least=LENGTH)
    found, state = run(razor, spec, QKV, prompt=PROMPT)
    dense, _ = run(razor, razor.Spec(full="all"), QKV, prompt=PROMPT)
    np.testing.assert_allclose(found[LIVE], dense[LIVE], atol=2e-6)
    assert not np.asarray(state.dropped).any()


def test_equal_keys_are_lost_without_loss_but_for_the_count():
    """All dropped keys are one: weighted by its number it is exact, whatever the values; unweighted it is not."""
    q, k, v = (x[:1].copy() for x in arrays(40, seed=3, batch=1))
    k[:, 2:34] = k[:, 2:3]
    spec = razor.Spec(full="0", sinks=2, least=4, part=20.0)
    at = 36
    found, state = run(razor, spec, (q, k, v), prompt=at, left=(0,))
    dense, _ = run(razor, razor.Spec(full="all"), (q, k, v), prompt=at, left=(0,))
    assert int(state.dropped[0]) == 40 - 2 - 5
    few = slice(at, at + 2)  # behind these other keys are dropped too
    np.testing.assert_allclose(found[:, few], dense[:, few], atol=1e-6)
    gone, kept = np.arange(2, at - 4), np.r_[0, 1, np.arange(at - 4, at + 1)]
    keys, values = (np.concatenate([x[0, kept, 0], x[0, gone, 0].mean(0)[None]]) for x in (k, v))
    assert np.abs(softmax_over(q[0, at, :2], keys, values) - dense[0, at, :2]).max() > 0.05


def test_the_compensation_never_gets_more_than_the_dropped_would():
    """exp of a mean is at most the mean of exps."""
    spec = razor.Spec(full="0", sinks=2, least=5, part=30.0)
    q, k, _ = QKV
    mass = np.zeros((2, LENGTH, KV_HEADS, VALUES), np.float32)
    mass[:, 2 : PROMPT - 5] = 1.0  # a value of 1 for what the first answer token finds dropped
    found, _ = run(razor, spec, (q, k, mass), prompt=PROMPT, left=(0, 0))
    dense, _ = run(razor, razor.Spec(full="all"), (q, k, mass), prompt=PROMPT, left=(0, 0))
    ours, theirs = found[:, PROMPT], dense[:, PROMPT]
    assert (ours <= theirs + 1e-6).all()
    assert 0.1 < ours.mean() < theirs.mean()


def test_a_second_piece_of_a_prompt_is_no_number():
    found, _ = run(razor, razor.Spec(full="0", least=3), QKV, prompt=PROMPT, pieces=(7, PROMPT - 7))
    assert np.isfinite(found[0, :7]).all()
    assert np.isnan(found[0, 7:PROMPT]).all()


def test_what_is_held_is_the_papers_formula():
    """Protected heads N, others sinks + max(least, N/5) and the token itself, and two f32 means."""
    small = {
        "vocab_size": 7,
        "num_layers": 4,
        "d_model": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "key_dim": 8,
        "d_ff": 8,
    }
    model = ModelConfig(**small, policy="razor(full='1.0.3.2', least=40)")
    for room, kept in ((100, 40), (1000, 200)):
        for layer, full in enumerate((1, 0, 2, 1)):
            spent = cost(model.keeping, model.site(layer), length=room - 1, capacity=room)
            slots, others = 4 + kept + 1, 2 - full
            counters = 12 + (4 + 8 * room if full else 0) + (8 * slots if others else 0)
            assert spent.held == (full * room + others * (slots + 1)) * (8 + 8) * 4 + counters
            assert spent.share == pytest.approx((full * room + others * (slots + 1)) / 2 / room)


def test_retrieval_heads_are_the_largest_of_the_whole_model_and_their_groups():
    induction = np.zeros((2, 4), np.float32)
    induction[0] = [0.1, 0.0, 0.2, 0.5]
    induction[1] = [0.0, 0.3, 0.0, 0.0]
    echo = np.zeros((2, 4), np.float32)
    echo[1, 2] = 0.9
    tables = {"induction": induction, "echo": echo}
    full = lambda text: resolve(settled(text, tables, kv_heads=2)).spec.full
    assert full("razor(induction=0.125, echo=0.0)") == "2.0"
    assert full("razor(induction=0.25, echo=0.0)") == "2.1"
    assert full("razor(induction=0.25, echo=0.125)") == "2.3"
    assert full("razor(induction=0.14, echo=0.01)") == "2.3", "shares of eight heads are rounded up"
    assert settled("razor", {"echo": echo}, 2) == settled("razor", {}, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("razor", "--heads FILE"),
        ("razor(full='4')", "2 key heads, but full names one beyond them"),
        ("razor(full='1', sinks=-1)", "razor.sinks is -1"),
        ("razor(full='1', least=0)", "razor.least is 0"),
        ("razor(full='1', part=0.5)", "razor.part is 0.5"),
        ("razor(full='1', echo=2)", "razor.echo is 2"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(text, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**SMALL, policy=text)
