"""A run of text has its tokenizer in its folder: what reads the run needs neither its data nor the trainer's cache."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxattn.errors import Incomplete, UserError
from jaxattn.runs.config import RunConfig
from jaxattn.text import load
from tests.train import helpers as h
from train.data.open import open_source
from train.pretrain import main, run

TEXT = "the quick brown fox jumps over the lazy dog, and naïve wolves watch it\n"


def config(folder: Path, text: Path, tokenizer: str = "bpe") -> RunConfig:
    """Two steps on a text of its own."""
    cfg = h.tiny(folder, 2)
    fields = {"source": str(text), "tokenizer": tokenizer, "vocab_size": 280, "val_fraction": 0.5}
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A run whose corpus and cache are gone, and the ids of TEXT as its data had them."""
    root = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXATTN_CACHE", str(root / "cache"))
        (root / "text").mkdir()
        for i in range(8):
            (root / "text" / f"{i}.txt").write_text(f"{i} {TEXT}" * 40)
        cfg = config(root / "run", root / "text" / "*.txt")
        assert run(cfg) == 0
        tokenizer = open_source(cfg)[0].tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(TEXT)
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "text")
    return root / "run", ids


def test_text_goes_in_and_out_without_the_data(trained: tuple[Path, list[int]]) -> None:
    folder, ids = trained
    loaded = load(folder)
    assert loaded.encode(TEXT) == ids
    assert loaded.tokenizer.decode(ids) == TEXT
    assert loaded.model.vocab_size == loaded.tokenizer.vocab_size
    np.testing.assert_array_equal(loaded.stop_tokens, [0])


def test_a_run_without_it_says_how_to_have_it_again(trained: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Incomplete, match=r"tokenizer.json is missing.* --resume --run-dir=.*/run writes it anew"):
        load(folder)
    (folder / "tokenizer.json").write_bytes(whole[:99])
    with pytest.raises(UserError, match=r"tokenizer.json"):
        load(folder)


def test_a_resumed_run_writes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXATTN_CACHE", str(tmp_path / "cache"))
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{i} {TEXT}" * 40)
    cfg = config(tmp_path / "run", tmp_path / "*.txt")
    assert run(cfg) == 0
    own = tmp_path / "run" / "tokenizer.json"
    whole = own.read_bytes()
    own.unlink()
    assert main(["--resume", f"--run-dir={tmp_path / 'run'}"]) == 0
    assert own.read_bytes() == whole


def test_a_run_of_a_task_has_none(tmp_path: Path) -> None:
    assert run(h.tiny(tmp_path / "run", 1, data={"source": "copy(payload=4, vocab=16)"})) == 0
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    with pytest.raises(UserError, match="which is no text: nothing to generate"):
        load(tmp_path / "run")
