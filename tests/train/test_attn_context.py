"""The word `context` in an attention's options, and what mechanisms say a comparison hangs on."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.sinks import notes
from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call, get, names, resolve_mixer
from jaxattn.models import at_context
from jaxattn.nn import Decoder
from jaxattn.runs.opened import open_trained
from tests.train import helpers as h
from train import finetune, pretrain
from train.loop import default_run_dir
from train.pretrain import run


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sigmoid(train_len=context)", "sigmoid(train_len=16)"),
        ("sigmoid(train_len='context', normalise=True)", "sigmoid(train_len=16, normalise=True)"),
        ("softmax(window=context), none, landmark(block=4, context=context)",
         "softmax(window=16), none, landmark(block=4, context=16)"),
        # Left as they were typed: no such word, or not where a whole number stands.
        ("softmax(window=64),sigmoid", "softmax(window=64),sigmoid"),
        ("lightning(slopes=context)", "lightning(slopes=context)"),
        ("softplus(p=context)", "softplus(p=context)"),
        ("sigmoid(normalise=context)", "sigmoid(normalise=context)"),
        ("context", "context"),
        ("bogus(", "bogus("),
        ("nosuch(train_len=context)", "nosuch(train_len=context)"),
        ("(" * 200_000, "(" * 200_000),
    ],
)  # fmt: skip
def test_the_word_becomes_a_number(text: str, found: str) -> None:
    assert at_context(text, 16) == found


def test_a_run_is_that_of_the_number(tmp_path: Path) -> None:
    """Saved, named, resumed, opened and fine-tuned as the number: no later context can change what was trained."""
    word = h.tiny(tmp_path / "word", 3, attn="sigmoid(train_len=context)")
    number = h.tiny(tmp_path / "number", 3, attn="sigmoid(train_len=16)")
    assert run(word) == run(number) == 0
    h.assert_same_run(tmp_path / "word", tmp_path / "number")
    saved = json.loads((tmp_path / "word" / "config.json").read_text())
    assert (saved["attn"], saved["model"]["mixers"]) == ("sigmoid(train_len=16)", ["sigmoid(train_len=16)"])
    assert default_run_dir(word) == default_run_dir(number) == "runs/bb-sigmoid-train_len=16-seed0"
    flags = ["--resume", f"--run-dir={tmp_path / 'word'}", "--steps=4", "--attn=sigmoid(train_len=context)"]
    assert pretrain.main(flags) == 0
    assert open_trained(tmp_path / "word", "sigmoid(train_len=context)").model.mixers == ("sigmoid(train_len=16)",)
    assert finetune.defaults(tmp_path / "word").attn == "sigmoid(train_len=16)"


def test_without_a_training_context_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sigmoid.train_len is 'context' but must be a number"):
        resolve_mixer("sigmoid(train_len='context')")


def test_advice_is_one_sentence_each_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(["--list-attn"])
    listed = capsys.readouterr().out
    for name in names():
        mechanism = get(name)
        for spec in (mechanism.spec(), *mechanism.variants):
            for context in (None, 8, 128):
                said = mechanism.advice(spec, context)
                assert not said or (said.endswith(".") and "\n" not in said), (name, said)
        assert (said := mechanism.advice(mechanism.spec(), None)) == "" or said in listed
    assert "train_len=context" in listed


def test_what_the_advice_names_settles_it() -> None:
    """The setting an advice recommends is one it has nothing against."""
    for text, better in (
        ("sigmoid", "sigmoid(train_len=128)"),
        ("sigmoid(train_len=64)", "sigmoid(train_len=128)"),
        ("softplus", "softplus(p=3.0)"),
        ("landmark(block=128)", "landmark(block=32)"),
        ("landmark(block=16, retrieve=2)", "landmark(block=16, retrieve=2, context=128)"),
        ("titans(form='mag', attention_window=128)", "titans(form='mag', attention_window=64)"),
    ):
        for setting, warned in ((text, True), (better, False)):
            choice = resolve_mixer(setting)
            assert choice.mechanism is not None
            assert bool(choice.mechanism.advice(choice.spec, 128)) == warned, setting


def test_sigmoid_rows_start_as_its_advice_says() -> None:
    """At scores of zero: half the length without the bias, length / (length + 1) with it."""
    q = jnp.zeros((1, 128, 1, 8))
    mechanism, vis = get("sigmoid"), self_visibility(1, 128)
    sums = lambda **how: np.asarray(mechanism.weights(q, q, vis, Call(mechanism.make_spec(**how))).values.sum(-1))
    np.testing.assert_allclose(sums()[0, 0, -1], 64, rtol=1e-5)
    np.testing.assert_allclose(sums(train_len=128)[0, 0, -1], 128 / 129, rtol=1e-5)


def test_a_landmark_model_without_landmarks_is_softmax() -> None:
    """What the advice says of a context of one block, on the model's own logits."""
    cfg = h.tiny(Path("x"), attn="landmark(block=16)", model={"vocab_size": 60}).resolved().model
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 60)
    soft = cfg.with_attention("softmax")
    shared = jax.jit(Decoder(soft).init)(jax.random.key(0), tokens)["params"]
    params = jax.jit(Decoder(cfg).init)(jax.random.key(0), tokens)["params"] | shared
    np.testing.assert_allclose(
        jax.jit(Decoder(cfg).apply)({"params": params}, tokens),
        jax.jit(Decoder(soft).apply)({"params": shared}, tokens),
        atol=1e-5,
    )
    assert "softmax attention" in get("landmark").advice(get("landmark").make_spec(block=16), 16)


def test_notes_of_a_run_name_the_layer_where_layers_differ() -> None:
    cfg = h.tiny(Path("x"), attn="sigmoid, softmax", model={"num_layers": 2}).resolved()
    (note,) = notes(cfg)
    assert note.startswith("sigmoid: without train_len")
    (note,) = notes(h.tiny(Path("x"), attn="sigmoid").resolved())
    assert note.startswith("without train_len")
    assert notes(h.tiny(Path("x"), attn="sigmoid(train_len=context), none", model={"num_layers": 2}).resolved()) == []
