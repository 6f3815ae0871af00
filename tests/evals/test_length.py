"""Loss by length: the windows, the numbers against a plain computation, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from evals import length
from jaxattn.errors import UserError
from jaxattn.nn import Decoder
from jaxattn.runs.opened import open_trained
from tests.train.helpers import command, tiny
from train.pretrain import run


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("length")
    text = folder / "text.jsonl"
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abcdefg "), 400)) for _ in range(30)]
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    data = {"source": str(text), "tokenizer": "bytes", "context": 16, "val_fraction": 0.2}
    assert run(tiny(folder / "run", 3, data=data, model={"position": "rope"})) == 0
    return folder / "run"


def call(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evals.length", *words])
    return length.main()


def test_windows_hold_every_target_once():
    text = np.arange(2 * 25).reshape(2, 25)
    for size in (2, 3, 8, 24):
        windows = length.cut_windows(text, size)
        assert windows.shape == (2 * 24 // size, size + 1)
        np.testing.assert_array_equal(np.sort(windows[:, 1:].ravel()), np.sort(text[:, 1:].ravel()))
        np.testing.assert_array_equal(windows[:, 1:], windows[:, :-1] + 1)


def test_losses_are_those_of_each_window_alone(trained_run):
    trained = open_trained(trained_run)
    text, log_p = np.random.default_rng(1).integers(0, 256, (3, 49)).astype(np.int32), log_p_of(trained)
    rows = length.loss_by_length(trained, text, [8, 48])
    for row in rows:
        size, losses = row["length"], []
        for sequence in text:
            for start in range(0, 48, size):
                window = sequence[start : start + size + 1]
                losses.append(-log_p(window[None, :-1])[0, np.arange(size), window[1:]])
        mean = np.mean(losses, axis=0)
        assert row["windows"] == len(losses)
        assert row["loss"] == pytest.approx(mean.mean(), abs=1e-5)
        assert row["loss_last_quarter"] == pytest.approx(mean[-size // 4 :].mean(), abs=1e-5)
    np.testing.assert_allclose(rows[0]["by_position"], mean_of(trained, text, 8), atol=1e-5)
    assert rows[0]["positions"] == list(range(8))


def log_p_of(trained):
    """Logarithms of the probabilities [B, T, N] behind tokens [B, T]."""
    run = jax.jit(lambda params, x: jax.nn.log_softmax(Decoder(trained.model).apply({"params": params}, x)))
    return lambda tokens: np.asarray(run(trained.params, tokens))


def mean_of(trained, text, size) -> np.ndarray:
    windows = length.cut_windows(text, size)
    logp = log_p_of(trained)(windows[:, :-1])
    return -np.take_along_axis(logp, windows[:, 1:, None], axis=-1)[..., 0].mean(0)


def test_the_command(trained_run, monkeypatch, capsys):
    assert call(monkeypatch, str(trained_run), "--sequences=2") == 0
    result = json.loads((trained_run / "length.json").read_text())
    assert [row["length"] for row in result["lengths"]] == [16, 32, 64, 128]
    assert (result["trained_context"], result["sequences"], result["attn"]) == (16, 2, "softmax")
    assert (trained_run / "plots" / "length.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"16 tokens: loss {result['lengths'][0]['loss']:.4f}" in out


def test_another_attention(trained_run, monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    call(monkeypatch, str(trained_run), "--sequences=2", "--lengths=32", "--attn=softmax(window=1)", f"--json={out}")
    narrow = json.loads(out.read_text())
    call(monkeypatch, str(trained_run), "--sequences=2", "--lengths=32", f"--json={out}")
    assert narrow["attn"] == "softmax(window=1)"
    assert narrow["lengths"][0]["loss"] != json.loads(out.read_text())["lengths"][0]["loss"]


BAD = {
    "no run": (["nowhere"], ["nowhere", "holds no run"]),
    "numbers": (["RUN", "--lengths=a,b"], ["'a,b'", "256,512,1024"]),
    "divisor": (["RUN", "--lengths=16,20,64"], ["20", "divide the longest, 64", "use 32"]),
    "zero": (["RUN", "--lengths=0,64"], ["has 0", "use 2"]),
    "too long": (["RUN", "--lengths=4096"], ["4097 tokens", "the longest has 400"]),
    "sequences": (["RUN", "--sequences=0"], ["--sequences is 0"]),
    "json": (["RUN", "--lengths=16", "--json=/nowhere/x.json"], ["/nowhere/x.json"]),
    "attention": (["RUN", "--attn=k_bias"], ["other parameters"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, trained_run, monkeypatch):
    words, says = BAD[name]
    with pytest.raises(UserError) as error:
        call(monkeypatch, *(str(trained_run) if word == "RUN" else word for word in words))
    assert all(part in str(error.value) for part in says), str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_run_is_sent_to_evals_tasks(tmp_path, monkeypatch):
    run(tiny(tmp_path / "run", 2, data={"source": "copy(payload=3)"}, model={"position": "nope"}))
    with pytest.raises(UserError, match=r"no text.*python -m evals.tasks .*copy\(context=64\)"):
        call(monkeypatch, str(tmp_path / "run"), "--lengths=16,64")


def test_a_run_of_another_kind_is_no_task(tmp_path, monkeypatch):
    run(tiny(tmp_path / "run", 2))
    with pytest.raises(UserError, match=r"'bb', which is no text: all its sequences have .* 16 tokens.* run of text"):
        call(monkeypatch, str(tmp_path / "run"))


def test_as_a_process(tmp_path):
    code, out, err = command(["."], tmp_path, module="evals.length")
    assert (code, out) == (2, "")
    assert err == "error: . holds no run (config.json is missing); check the path.\n"
