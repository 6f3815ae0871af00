"""The study of budgets: what it reads is what it says, its numbers are the model's, and its verdicts can fail."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import look
from jaxattn.errors import ConfigError, DataError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from scripts.reproduce import _study as study
from scripts.reproduce import policies
from tests.conformance.model import params_of

LENGTH, ANSWER, WINDOWS, NEEDLES = 320, 48, 2, 3
SIZES = {"length": LENGTH, "answer": ANSWER, "windows": WINDOWS, "needles": NEEDLES}
MODEL = ModelConfig(vocab_size=128, num_layers=2, d_model=16, num_heads=2, mlps=("gelu",), d_ff=16)
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def params() -> Any:
    return jax.tree.map(jnp.asarray, params_of(MODEL))


def loaded() -> Any:
    """A model of characters that nobody trained."""
    tokenizer = SimpleNamespace(encode=lambda text, **how: [ord(c) for c in text])
    render = lambda messages, **how: f"<user>{messages[0]['content']}<model>"
    return SimpleNamespace(model=MODEL, params=params(), tokenizer=tokenizer, render=render)


def test_every_chat_hides_one_number_in_its_prompt_and_ends_in_it():
    data = policies.material(loaded(), TEXT, **SIZES)
    assert data.rows.shape == (WINDOWS + NEEDLES, LENGTH + 1)
    assert data.prefill == LENGTH - ANSWER
    assert list(data.counts[:WINDOWS]) == [LENGTH + 1] * WINDOWS
    depths = []
    for row, count in zip(data.rows[WINDOWS:], data.counts[WINDOWS:], strict=True):
        prompt, answer = ("".join(map(chr, part)) for part in (row[: data.prefill], row[data.prefill : count]))
        hidden = re.findall(r"\d{5}", prompt)
        assert len(hidden) == 1
        assert answer == policies.SAID.format(hidden[0])
        assert prompt.startswith("<user>")
        assert prompt.endswith(f"{policies.ASKED}<model>")
        depths.append(prompt.index(hidden[0]))
    assert depths == sorted(depths)
    assert depths[-1] - depths[0] > LENGTH // 4
    with pytest.raises(DataError, match="give a longer one"):
        policies.material(loaded(), TEXT[:900], **SIZES)


def test_loss_and_digits_are_those_of_the_forward_pass():
    """Dense decoding, and an answer in which the model itself chose two of the five digits of a chat."""
    data = policies.material(loaded(), TEXT, **SIZES)
    forward = jax.jit(lambda params, tokens: Decoder(MODEL).apply({"params": params}, tokens))
    run = lambda: np.asarray(forward(params(), data.rows[:, :-1]), np.float64)
    for at in (data.counts[WINDOWS] - 5, data.counts[WINDOWS] - 2):
        data.rows[WINDOWS, at] = run()[WINDOWS, at - 1].argmax()
    logits, right = run(), []
    for row, (count, own) in enumerate(zip(data.counts, logits, strict=True)):
        if row >= WINDOWS:
            right.append([own[at - 1].argmax() == data.rows[row, at] for at in range(count - 5, count)])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = data.rows[:WINDOWS, data.prefill + 1 :]
    losses = -np.take_along_axis(logp[:WINDOWS, data.prefill :], target[..., None], axis=-1)
    found = policies.measure(loaded(), "dense", data)
    assert found["loss"] == pytest.approx(losses.mean(), abs=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert found["digits"] == pytest.approx(np.mean(right))
    assert np.sum(right) >= 2
    assert found["needles"] == np.mean(np.all(right, axis=1))


def rows(**other: float) -> list[study.Row]:
    """Losses and digits of a study that holds but for those given as POLICY_BUDGET."""
    losses = {"h2o": 0.2, "h2o by lot": 0.5, "window": 0.6, "tidal": 0.1, "tidal by lot": 0.4}
    losses |= {"minference": 0.1, "minference by lot": 0.4}
    out = [{"policy": "dense", "budget": 2048, "loss": 3.0, "digits": 1.0}]
    for policy, more in losses.items():
        for budget in (128, 512):
            key = f"{policy.replace(' ', '_')}_{budget}"
            loss = 3.0 + other.get(key, more * (0.3 if budget == 512 else 1.0))
            digits = other.get(f"{key}_digits", 0.75 if policy == "tidal" else 0.25)
            read = budget / 2048 * (1.4 if policy == "minference by lot" else 1.5)  # of a prompt
            row = {"policy": policy, "budget": budget, "loss": loss, "digits": digits}
            out.append(row | {"prompt": read if policy.startswith("minference") else 1.0})
    return out


def test_expectations_hold_and_fail():
    failing = lambda **other: [e.text for e in policies.expect(rows(**other), 2048) if not e.holds]
    assert failing() == []
    assert failing(h2o_128=0.55) == ["h2o: a lower loss than h2o by lot"]
    assert failing(window_512=0.01) == ["h2o: a lower loss than window"]
    assert failing(tidal_by_lot_128=0.05) == ["tidal: a lower loss than tidal by lot"]
    assert failing(tidal_by_lot_512_digits=1.5) == ["tidal: more of the numbers' digits than by lot, over all budgets"]
    prompt = "minference: a lower loss than minference by lot that reads as much of the prompt"
    assert failing(minference_by_lot_128=0.05) == [prompt]
    lots = [row | {"loss": 2.0} if row["policy"] == "minference by lot" else row for row in rows()]
    shown = next(e for e in policies.expect(lots, 2048) if e.text == prompt)
    assert shown.found == "-1.100 at 9.4%", "what reads more than any of the control's budgets is not judged by it"
    assert failing(tidal_512=0.11) == ["tidal: within 0.1 nats of dense at a budget of 512"]
    layers = [{"layer": n, "by layer 2": 0.2, "by layer 12": 0.3 if n > 12 else 0.2} for n in range(2, 30)]
    assert policies.expect_recall(layers)[0].holds
    assert not policies.expect_recall([{**row, "by layer 12": 0.1} for row in layers])[0].holds


def test_the_mean_of_a_second_choice_is_over_the_layers_that_read_lists():
    found = np.full((5, 5), 0.2)
    found[3, 4] = 0.8
    means = policies.by_again(found, 1)
    assert means == pytest.approx({1: 0.2, 2: 0.2, 3: (0.2 + 0.8) / 2, 4: 0.2})


def test_policies_of_ones_own():
    assert policies.own_policies(["a=h2o(heavy={half}, recent={half})"]) == {"a": "h2o(heavy={half}, recent={half})"}
    for text in ("h2o", "a=h2o"):
        with pytest.raises(ConfigError, match="must be NAME=TEXT"):
            policies.own_policies([text])


def test_recall_is_of_the_largest_scores_of_every_layer():
    """Against the weights that the model's own map shows: softmax keeps their order."""
    row, tokens = np.array([ord(c) for c in TEXT[:80]], np.int32), 6
    found = policies.recall(loaded(), row, tokens=tokens)
    views = look(MODEL, params(), jnp.asarray(row[None])).attention
    tops = [
        np.argsort(-np.asarray(v.weights().values)[0, :, -policies.QUERIES :], axis=-1)[..., :tokens] for v in views
    ]
    share = np.mean(
        [len(set(a) & set(b)) / tokens for a, b in zip(*(t.reshape(-1, tokens) for t in tops), strict=True)]
    )
    np.testing.assert_allclose(found, [[1, share], [share, 1]], atol=1e-6)
