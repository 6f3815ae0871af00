"""Runs of versions with one seed for everything: they open, resume to the bit, and are told from others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evals.sinks import held_out
from jaxattn.errors import Mismatch
from jaxattn.runs import manifest as mf
from jaxattn.runs.load import read_config
from tests.train import helpers as h
from train.data.open import open_source
from train.finetune import defaults
from train.pretrain import main, run


def make_old(folder: Path) -> None:
    """Take the field out of everything that a run has written of its configuration."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["data"].pop("seed") == config["seed"]
    path.write_text(json.dumps(config))
    for step in h.steps_of(folder):
        place = folder / "checkpoints" / f"step_{step:08d}"
        saved = mf.read(place)
        del saved.config["data"]["seed"]
        mf.write(place, saved)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an unbroken run of 8 steps at seed 1, an old one of the same that stopped after 4)."""
    root = tmp_path_factory.mktemp("old")
    one_seed = {"seed": 1, "data": {"seed": 1}, "eval": {"every": 4}}
    assert run(h.tiny(root / "unbroken", 8, **one_seed)) == 0
    assert run(h.tiny(root / "old", 4, **one_seed)) == 0
    (root / "old" / "sinks.json").unlink()
    make_old(root / "old")
    return root / "unbroken", root / "old"


@pytest.mark.parametrize("named", [(), ("--preset=bb",)])
def test_an_old_run_resumes_to_the_bit(runs: tuple[Path, Path], tmp_path: Path, named: tuple[str, ...]) -> None:
    """By its folder alone, and by all its flags as its owner once typed them."""
    unbroken, old = runs
    folder = tmp_path / "run"
    shutil.copytree(old, folder)
    flags = [*named, "--resume", f"--run-dir={folder}", "--steps=8"]
    if named:
        wanted = h.tiny(folder, 8, seed=1, eval={"every": 4})
        flags += [f for f in h.flags(wanted) if not f.startswith(("--preset", "--run-dir", "--steps"))]
    assert main(flags) == 0
    h.assert_same_run(folder, unbroken)
    assert json.loads((folder / "config.json").read_text())["data"]["seed"] == 1


def test_an_old_run_is_measured_on_the_text_it_was_measured_on(runs: tuple[Path, Path]) -> None:
    read = [read_config(folder) for folder in runs]
    assert read[1].data == read[0].data
    texts = [held_out(cfg, open_source(cfg)[0]) for cfg in read]
    np.testing.assert_array_equal(*texts)
    other = dataclasses.replace(read[0], data=dataclasses.replace(read[0].data, seed=0))
    assert not np.array_equal(texts[0], held_out(other, open_source(other)[0]))


def test_another_data_seed_is_another_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs[1], folder)
    with pytest.raises(Mismatch, match=r"data\.seed: saved 1, now 0"):
        main(["--resume", f"--run-dir={folder}", "--steps=8", "--data.seed=0"])


def test_what_a_finetuning_holds_out_was_not_trained_on(runs: tuple[Path, Path]) -> None:
    assert defaults(runs[1]).data.seed == 1
