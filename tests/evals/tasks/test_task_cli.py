"""Train on a task, score the run on tasks and on other lengths, from the command line; every refusal is a sentence."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.accuracy import accuracy, make_hits, scored_places
from evals.report import write_report
from evals.run_task import batches
from evals.tasks import main
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.runs.opened import open_trained
from tests.train.helpers import command, rows, tiny
from train.data.bb import HELD_OUT
from train.data.tasks import make_task
from train.pretrain import run

MODEL = {"position": "nope", "num_layers": 2, "d_model": 16}


def train_tiny(folder: Path, source: str, **changes) -> Path:
    model = MODEL | changes.pop("model", {})
    cfg = tiny(folder, 6, attn="conv(width=3), softmax", data={"source": source, "context": 16}, model=model, **changes)
    assert run(cfg) == 0
    return folder


@pytest.fixture(scope="module")
def mqar(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mqar"
    return train_tiny(folder, "mqar(pairs=2, vocab=32)", eval={"every": 3}, report=True)


@pytest.fixture(scope="module")
def passkey(tmp_path_factory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("runs") / "passkey", "passkey(digits=2, vocab=20)")


def score(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evals.tasks", *words])
    assert main() == 0


# ------------------------------------------------------------------------------------------- the numbers


def test_accuracy_is_the_share_of_right_argmaxes():
    """Against the definition on full logits, with rows of different numbers of scored positions."""
    model = ModelConfig(vocab_size=32, num_layers=1, d_model=16)
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    (batch,) = batches(make_task("mqar", {"pairs": [1, 3], "vocab": 32}), 16, 40, 0)
    logits = np.asarray(jax.jit(Decoder(model).apply)({"params": params}, jnp.asarray(batch["tokens"])))
    predicted, mask = logits.argmax(-1), batch["loss_mask"]
    batch["targets"][::3] = predicted[::3]  # an untrained model is never right by itself
    right = predicted == batch["targets"]
    found = accuracy(make_hits(model), params, [batch])
    assert found["accuracy"] == pytest.approx(right[mask].mean())
    assert found["exact"] == pytest.approx(np.mean([(right | ~mask)[i].all() for i in range(40)]))
    assert all(0.3 < found[name] < 0.6 for name in ("accuracy", "exact"))
    assert found["exact"] != found["accuracy"]
    assert set(mask.sum(1)) == {1, 3}


def test_scored_places():
    mask = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    np.testing.assert_array_equal(scored_places(mask), [[1, 3], [-1, -1], [2, -1]])


def test_accuracy_in_chunks_is_that_of_one_pass():
    """The decode path (prefill by chunks, ragged at the end) predicts what the whole forward pass predicts."""
    model = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=2, mixers=("softmax(window=9)", "linear"))
    params = jax.jit(Decoder(model).init)(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"]
    (batch,) = batches(make_task("copy", {}), 22, 6, 0)
    logits = np.asarray(jax.jit(Decoder(model).apply)({"params": params}, jnp.asarray(batch["tokens"])))
    batch["targets"] = np.where(np.arange(6)[:, None] % 2, logits.argmax(-1), batch["targets"])
    whole = make_hits(model)(params, batch)
    assert 0.3 < whole.mean() < 0.8
    for chunk in (0, 4, 22, 100):
        np.testing.assert_array_equal(make_hits(model, chunk)(params, batch), whole)


def test_held_out_sequences_are_scored():
    task = make_task("copy", {"payload": 3})
    found = list(batches(task, 4096, 5, seed=9))
    assert [len(batch["tokens"]) for batch in found] == [4, 1]
    want = task.sample(4096, seed=9, stream=HELD_OUT, index=4)
    np.testing.assert_array_equal(found[1]["tokens"][0], want.tokens)
    np.testing.assert_array_equal(found[1]["loss_mask"][0], want.mask)


# ------------------------------------------------------------------------------------------ the training run


def test_the_run_logs_accuracy(mqar, passkey):
    (first, second) = (row for row in rows(mqar) if "val_loss" in row)
    assert (first["step"], second["step"]) == (3, 6)
    assert 0 <= second["val_accuracy"] <= 1
    assert "val_exact" not in second  # every pair is an answer of its own
    (only,) = (row for row in rows(passkey) if "val_loss" in row)
    assert 0 <= only["val_exact"] <= only["val_accuracy"] <= 1


def test_the_report_shows_accuracy(mqar, tmp_path):
    text = write_report([mqar], tmp_path / "report.html").read_text()
    value = 100 * next(r["val_accuracy"] for r in reversed(rows(mqar)) if "val_accuracy" in r)
    assert f"<td>{value:.4g} %</td>" in text
    assert "Accuracy on the task" in text
    assert "Whole answers right" not in text
    assert "unigram entropy" in text
    assert (tmp_path / "report_files" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_run_has_no_accuracy(tmp_path):
    run(tiny(tmp_path / "run", 2))
    assert not any("val_accuracy" in row for row in rows(tmp_path / "run"))


# ----------------------------------------------------------------------------------------------- the command


def test_the_runs_own_task_is_the_default(mqar, monkeypatch, capsys, tmp_path):
    score(monkeypatch, str(mqar), "--sequences=30", f"--json={tmp_path / 'out.json'}")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["options"] == {"pairs": 2, "vocab": 32, "power": 0.01}
    assert (result["task"], result["context"], result["trained_context"], result["step"]) == ("mqar", 16, 16, 6)
    assert result["sequences"] == 30
    trained = open_trained(mqar)
    task = make_task("mqar", {"pairs": 2, "vocab": 32})
    found = accuracy(make_hits(trained.model), trained.params, batches(task, 16, 30, 0))
    assert result["accuracy"] == pytest.approx(found["accuracy"])
    assert result["exact"] == pytest.approx(found["exact"])
    assert f"accuracy {100 * found['accuracy']:.1f} ±" in capsys.readouterr().out


def test_other_lengths_keep_the_runs_options(passkey, monkeypatch, tmp_path):
    score(monkeypatch, str(passkey), "--task=passkey(context=64)", "--sequences=3", f"--json={tmp_path / 'out.json'}")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["context"], result["options"]) == (64, {"digits": 2, "vocab": 20})


def test_attention_options_without_parameters_are_swapped(passkey, monkeypatch, tmp_path):
    """A window of one token sees no key at all: the two results must differ in what the model computes."""
    trained = open_trained(passkey)
    narrow = open_trained(passkey, "conv(width=3), softmax(window=1)")
    assert narrow.model.mixer(1).window == 1
    tokens = jnp.arange(16)[None] % 20
    apply = lambda t: np.asarray(jax.jit(Decoder(t.model).apply)({"params": t.params}, tokens))
    assert np.abs(apply(trained) - apply(narrow)).max() > 1e-3
    score(monkeypatch, str(passkey), "--attn=conv(width=3), softmax(window=1)", "--sequences=3")


BAD = {
    "no run": (["nowhere"], ["nowhere", "holds no run"]),
    "unknown task": (["RUN", "--task=paskey"], ["'paskey'", "did you mean 'passkey'"]),
    "unknown option": (["RUN", "--task=passkey(digit=2)"], ["'digit'", "did you mean 'digits'"]),
    "length": (["RUN", "--task=passkey(context=4)"], ["context is 4", "use at least 5"]),
    "no length": (["RUN", "--task=passkey(context='x')"], ["context is 'x'"]),
    "vocabulary": (["RUN", "--task=mqar(vocab=64, pairs=2)"], ["64 tokens", "the model knows 20", "vocab=20"]),
    "parameters": (["RUN", "--attn=softmax"], ["'softmax'", "'conv(width=3), softmax'", "parameters"]),
    "attention": (["RUN", "--attn=conv, sofmax"], ["did you mean 'softmax'"]),
    "sequences": (["RUN", "--sequences=0"], ["--sequences is 0"]),
    "chunk": (["RUN", "--chunk=-1"], ["--chunk is -1"]),
    "step": (["RUN", "--step=77"], ["77"]),
    "json": (["RUN", "--sequences=1", "--json=/nowhere/out.json"], ["/nowhere/out.json", "another --json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, passkey, monkeypatch):
    words, says = BAD[name]
    monkeypatch.setattr(sys, "argv", ["evals.tasks", *(str(passkey) if w == "RUN" else w for w in words)])
    with pytest.raises(UserError) as error:
        main()
    message = str(error.value)
    assert error.value.exit_code == 2
    assert all(part in message for part in says), message
    assert "\n" not in message


def test_learned_positions_have_an_end(tmp_path, monkeypatch):
    folder = train_tiny(tmp_path / "run", "copy(payload=3)", model={"position": "learned"})
    monkeypatch.setattr(sys, "argv", ["evals.tasks", str(folder), "--task=copy(context=17)"])
    with pytest.raises(UserError, match=r"17 tokens .* 16 learned positions"):
        main()


def test_as_a_process(passkey, tmp_path):
    code, out, err = command([str(passkey), "--sequences=2"], tmp_path, module="evals.tasks")
    assert (code, err) == (0, "")
    assert out.startswith("conv(width=3), softmax at step 6, passkey(digits=2, vocab=20), 2 x 16 tokens")
    code, out, err = command([str(passkey), "--task=mqar(pairs=99)"], tmp_path, module="evals.tasks")
    (text,) = err.splitlines()
    assert (code, out) == (2, "")
    assert text.startswith("error: ")


def test_a_task_can_be_learnt(tmp_path):
    """The whole chain at a size where recall is reached: a blind guess gets 6 %."""
    cfg = tiny(
        tmp_path / "run",
        250,
        attn="conv(width=3), softmax",
        data={"source": "mqar(pairs=2, vocab=32)", "context": 16, "batch_size": 32},
        model=MODEL | {"d_model": 32, "mlps": ("none",)},
        optim={"lr": 1e-2},
        checkpoint={"every": 250},
    )
    run(dataclasses.replace(cfg, run_dir=str(tmp_path / "run")))
    assert next(r["val_accuracy"] for r in rows(tmp_path / "run") if "val_accuracy" in r) > 0.95
