"""What is hidden in a text and asked for, and the two commands that measure by it, with a model that copies."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from evals import needle, needles
from jaxattn.analysis.retrieval import span_of
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError
from jaxattn.policies.command import Asked
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import RunConfig
from jaxattn.runs.rundir import write_json_atomic
from jaxattn.text import load
from tests.analysis.planted import INDUCTION, params, wired
from tests.generate.helpers import byte_run
from train.data import DataConfig

heads_command = importlib.import_module("evals.heads")
TEXT = "Some of it is true. Most of it was made up on a rainy day! Who can tell? " * 12
MODEL = wired(257, 192)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over bytes that copies what followed the last byte when it came before; its text lies beside it."""
    folder = tmp_path_factory.mktemp("copies")
    text, out = folder / "text.txt", folder / "run"
    text.write_text(TEXT)
    data = DataConfig(source=str(text), tokenizer="bytes", context=192, val_fraction=0.0)
    cfg = RunConfig(attn="softmax", model=MODEL, data=data)
    out.mkdir()
    write_json_atomic(out / "config.json", cfg.to_dict())
    with Checkpoints(out / "checkpoints", config=cfg.to_dict()) as checkpoints:
        checkpoints.save(1, {"params": params(MODEL)})
    return out


@pytest.fixture(autouse=True)
def marks(monkeypatch):
    """Questions whose answers a model can copy that looks at one byte alone."""
    monkeypatch.setattr(heads_command, "NUMBER", needles.Question("And?", "#{}"))
    monkeypatch.setattr(heads_command, "PHRASE", needles.Question("And?", "of{}"))
    monkeypatch.setattr(needle, "NUMBER", needles.Question("And?", "#{}"))


def called(module, monkeypatch, *words):
    """The exit code of a command that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_cli(module.main)
    return ended.value.code


# --- texts


def characters(template="<user>{}<model>"):
    """A tokenizer of characters, with or without a template."""
    tokenizer = SimpleNamespace(
        encode=lambda text, **how: [ord(c) for c in text], decode=lambda ids: "".join(map(chr, ids)), around=([1], [])
    )
    render = lambda messages, **how: template.format(messages[0]["content"])
    return SimpleNamespace(tokenizer=tokenizer, render=render, templates={"default": template} if template else {})


IDS = np.array([ord(c) for c in TEXT], np.int32)


@pytest.mark.parametrize("template", ["<user>{}<model>", ""])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_number_is_hidden_behind_a_sentence_and_prompt_and_answer_fill_the_length(template, depth):
    loaded = characters(template)
    ends = needles.sentence_ends(loaded.tokenizer, IDS)
    assert ends == {ord(c) for c in ".!?"}
    question = needles.NUMBER
    asked = needles.ask(loaded, IDS, question, [("", "48213")], length=400, depth=depth, ends=ends, start=20)
    prompt, hidden = "".join(map(chr, asked.prompt)), " The special magic number is 48213."
    assert len(asked.prompt) + len(asked.said) + len(" 48213.") == 400
    assert prompt.count(hidden) == 1
    front, end = ("<user>", f"\n\n{question.asked}<model>") if template else ("\x01", f"\n\n{question.asked}\n")
    hay = prompt.removeprefix(front).removesuffix(end)
    assert hay.replace(hidden, "") == TEXT[20 : 20 + len(hay) - len(hidden)], "the text is not whole"
    before, whole = hay.index(hidden), len(hay) - len(hidden)
    assert before <= depth * whole
    assert before > depth * whole - 40, "farther from its depth than a sentence is long"
    assert before == 0 or hay[before - 1] in ".!?"
    assert asked.said == [ord(c) for c in "The special magic number is"]
    case = needles.case_of(loaded.tokenizer, asked)
    assert "".join(map(chr, case.prompt[case.start : case.stop])) == "48213"


def test_of_several_numbers_one_is_asked_for_by_its_word():
    hidden = [("candle", "11111"), ("apple", "22222"), ("tiger", "11111")]
    asked = needles.ask(characters(), IDS, needles.KEYED, hidden, length=700, depth=0.9, ends={ord(".")})
    prompt = "".join(map(chr, asked.prompt))
    places = [prompt.index(f" The special magic number for {key} is {answer}.") for key, answer in hidden]
    assert places[1] < places[2] < places[0], "the others lie evenly around it"
    assert prompt.endswith("number for candle that the text mentions? Answer with the number alone.<model>")
    assert "".join(map(chr, asked.said)) == "The special magic number for candle is"
    assert asked.answer == "11111"
    assert needles.case_of(characters().tokenizer, asked).start > places[0]


@pytest.mark.parametrize("count", [1, 7, 14])
def test_needles_of_a_profile_lie_at_as_many_depths_as_there_are(count):
    loaded = characters()
    found = heads_command.cases(loaded, IDS, count=count, lengths=[600])
    assert len(found) == count
    assert all(case.start < case.stop <= len(case.prompt) <= 600 for case in found)
    places = {case.start // (600 // count) for case in found}
    assert len(places) > count / 2


def test_what_does_not_fit_is_refused():
    short = {"depth": 0.5, "ends": ()}
    with pytest.raises(ConfigError, match=r"a length of 100 tokens has no room for a text: .* take \d+; ask for more"):
        needles.ask(characters(), IDS, needles.NUMBER, [("", "48213")], length=100, **short)
    with pytest.raises(DataError, match=r"the text has 50 tokens but \d+ are read for a length of 300"):
        needles.ask(characters(), IDS[:50], needles.NUMBER, [("", "48213")], length=300, **short)


def test_depths_without_a_sentence_are_met_exactly():
    assert needles.place([1, 2, 3, 4], 0.5, ()) == 2
    assert needles.place([1, 2, 3, 4], 0.5, {1}) == 1
    assert needles.place([1, 2, 3, 4], 1.0, {4}) == 4
    assert needles.place([1, 2, 3, 4], 0.0, {4}) == 0


@pytest.mark.parametrize(
    ("answer", "digits", "whole"),
    [
        (" 48213", 5, True),
        ("is 48213. And 11111", 5, True),
        ("482139", 5, False),
        ("48219", 4, False),
        ("8213", 0, False),
        ("48 213", 2, False),
        ("none", 0, False),
        ("٤48213", 5, True),
    ],
)
def test_the_first_number_of_an_answer_counts_digit_by_digit(answer, digits, whole):
    assert needles.right(answer, "48213") == (digits, whole)


def test_lengths_are_numbers_and_k_is_1024():
    assert needles.numbers_of("512,1k, 2K,512", "--lengths") == [512, 1024, 2048]
    for text in ("", "a", "0", "1k,-2", "1.5k", "k"):
        with pytest.raises(ConfigError, match=r"--lengths is .* must be positive numbers like 512,1k"):
            needles.numbers_of(text, "--lengths")


def test_a_phrase_is_found_by_its_tokens_in_the_sentence():
    """Where words behind a blank are other tokens than words that begin a text."""
    tokens = {"a": 1, " a": 2, "b": 3, " b": 4, "x": 5}
    encode = lambda text, **how: [tokens[w] for w in {"a b": ["a", " b"], " a b": [" a", " b"]}[text]]
    asked = needles.Asked([5, 2, 4, 5], [], "a b", 0)
    assert needles.case_of(SimpleNamespace(encode=encode), asked)[1:3] == (1, 3)
    assert span_of([5, 2, 4, 5], [[1, 4], [2, 4]]) == (1, 3)


# --- commands


def test_heads_writes_tables_of_its_model_that_the_policy_reads(run, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "out"
    words = [run, "--text", run.parent / "text.txt", "--lengths", "150", "--cases", 4, "--block", 20, "--sequences", 2]
    assert called(heads_command, monkeypatch, *words, "--profile", "retrieval,induction,sinks", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "retrieval: 2 of 4 answers hold their needle and count" in printed
    assert "retrieval: 1 of 8 heads (12.5%) at least 0.1\n  1-0 1.00, 0-0 0.00" in printed
    written = json.loads((out / "heads.json").read_text())
    assert set(written) == {"model", "retrieval", "retrieval_count", "induction", "sinks", "mask_heads"}
    for name in ("retrieval", "retrieval_count", "induction"):
        table = np.array(written[name])
        assert table[INDUCTION] > 0.95
        assert np.delete(table.reshape(-1), 4).max() < 0.15
    assert written["mask_heads"][1][0] == 1
    assert sorted(np.ravel(written["mask_heads"])) == list(range(1, 9))
    assert all(
        (out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("retrieval", "induction", "sinks")
    )
    loaded = load(run, asked=Asked("mask_heads(top=1)", out / "heads.json"))
    assert loaded.params["heads"]["layer_1"]["attn"]["mask_heads"][0] == 1
    with pytest.raises(ConfigError, match=r"has shape \[2, 4\] but must be"):
        load(byte_run(tmp_path), asked=Asked("mask_heads(top=1)", out / "heads.json"))


def test_needle_finds_what_the_model_copies_and_not_without_its_head(run, monkeypatch, capsys, tmp_path):
    words = [run, "--text", run.parent / "text.txt", "--lengths", "100,160", "--depths", 3, "--out", tmp_path]
    assert called(needle, monkeypatch, *words) == 0
    assert "digits given back 100.0%, whole numbers 100.0%" in capsys.readouterr().out
    result = json.loads((tmp_path / "needle.json").read_text())
    assert [(c["length"], c["depth"]) for c in result["cells"]] == [(n, d) for n in (100, 160) for d in (0.0, 0.5, 1.0)]
    assert result["policy"] == "dense"
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    for policy, most in (("mask_heads(heads='1-0')", 0.4), ("h2o(heavy=2, recent=20)", 0.5)):
        assert called(needle, monkeypatch, *words, "--policy", policy) == 0
        lossy = json.loads((tmp_path / "needle.json").read_text())
        assert lossy["digits"] < most
        assert lossy["policy"] == policy
    assert lossy["cost"]["bytes_held"] < result["cost"]["bytes_held"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "retrieval,inductoin"], "did you mean 'induction'"),
        (["--profile", "sinks"], "--profile sinks reads a text: name a UTF-8 file as --text"),
        (["--profile", "retrieval", "--text", "TEXT", "--cases", 0], "--cases is 0 but must be at least 1"),
        (["--profile", "induction", "--block", 60], "--block is 60 but must be from 2 to 47"),
        (["--profile", "retrieval", "--text", "TEXT", "--lengths", "1k"], "the text has"),
        (["--profile", "retrieval", "--text", "TEXT", "--lengths", "190"], "exceed the model's 192 positions"),
        (["--profile", "retrieval", "--text", "gone.txt"], "gone.txt cannot be read"),
    ],
)
def test_heads_refuses_in_one_sentence_and_leaves_nothing(run, monkeypatch, capsys, tmp_path, words, message):
    words = [run.parent / "text.txt" if word == "TEXT" else word for word in words]
    assert called(heads_command, monkeypatch, run, *words, "--out", tmp_path / "a" / "b") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_model_that_finds_nothing_has_no_retrieval_heads(monkeypatch, capsys, tmp_path):
    run = byte_run(tmp_path)
    words = [run, "--text", tmp_path / "text.txt", "--lengths", "100", "--cases", 2, "--out", tmp_path / "out"]
    assert called(heads_command, monkeypatch, *words) == 2
    assert "none of the 2 answers holds more than 50% of its needle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", 0], "--depths is 0 but must be from 1 to 1000"),
        (["--keys", 99], "--keys is 99 but must be from 1 to"),
        (["--lengths", "1k"], "the model knows 192 positions: ask for at most 176"),
        (["--lengths", "10"], "a length of 10 tokens has no room for a text"),
        (["--policy", "mask_heads(heads='7-0')"], "no head 7-0"),
        (["--policy", "mask_heads"], "which is not there: give the file of evals.heads as --heads"),
        (["--lengths", "a"], "--lengths is 'a'"),
    ],
)
def test_needle_refuses_in_one_sentence_and_leaves_nothing(run, monkeypatch, capsys, tmp_path, words, message):
    words = ["--text", run.parent / "text.txt", "--lengths", "100", *words]
    assert called(needle, monkeypatch, run, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(run, monkeypatch, capsys, tmp_path):
    (tmp_path / "out").write_text("mine")
    words = [run, "--text", run.parent / "text.txt", "--lengths", "100", "--out", tmp_path / "out"]
    assert called(needle, monkeypatch, *words) == 2
    assert "a file: name a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
