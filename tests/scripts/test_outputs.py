"""Benches settle where results go before they measure, print before they write, and hear of a process that ended."""

from __future__ import annotations

import importlib
import sys

import pytest

from jaxattn.errors import UserError
from scripts.bench import train_cpu
from scripts.bench.device import model
from scripts.bench.train_shape import Shape
from scripts.outputs import file_to_write, folder_to_write
from tests.scripts import odd_tasks

BENCHES = {"infer_cpu": "file", "serve_cpu": "file", "train_cpu": "file", "kernels.__main__": "folder",
           "aot_gpu": "folder", "aot_tpu": "folder"}  # fmt: skip


def test_a_place_is_made_and_left_empty(tmp_path):
    assert file_to_write(tmp_path / "a" / "b" / "x.json").parent.is_dir()
    assert folder_to_write(tmp_path / "c" / "d").is_dir()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("path", [".", "..", "/", "there"])
def test_a_folder_is_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"--out is .*, a folder: name a file\."):
        file_to_write(type(tmp_path)(path))


@pytest.mark.parametrize("bench", BENCHES)
def test_nothing_is_measured_for_a_place_that_is_none(bench, tmp_path, monkeypatch):
    module = importlib.import_module(f"scripts.bench.{bench}")
    monkeypatch.setattr(module, "measure", None)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    other = "folder" if BENCHES[bench] == "file" else "file"
    for out, says in ((tmp_path / other, f"a {other}: name a"), (tmp_path / "file" / "x" / "y", "cannot be written")):
        monkeypatch.setattr(sys, "argv", [bench, f"--out={out}"])
        with pytest.raises(UserError, match=says):
            module.main()
    assert (tmp_path / "file").read_text() == "kept"
    assert list((tmp_path / "folder").iterdir()) == []


def test_what_was_measured_is_printed_where_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    def measure(shape, rounds):
        (tmp_path / "x.json").mkdir()  # somebody is faster
        speeds = {"tokens_per_s": {"jaxattn": 12345.0, "torch eager": 1.0}, "best_rival": "torch eager"}
        return speeds | dict.fromkeys(("ratio_median", "ratio_min", "ratio_max"), 2.0)

    monkeypatch.setattr(train_cpu, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["train_cpu", f"--out={tmp_path / 'x.json'}"])
    with pytest.raises(UserError, match=r"cannot be written \(.*\): choose another --out"):
        train_cpu.main()
    assert "12,345 tokens/s" in capsys.readouterr().out


def test_a_model_that_is_refused_is_replaced_by_random_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "SMOLLM2", model.TINY)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    found = model.set_up(str(tmp_path / "x.gguf"), tiny=False, seed=0)
    assert found["weights"].startswith("random, as ")
    assert "x.gguf" in found["weights"]


def test_rounds_of_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_cpu", "--rounds=0"])
    with pytest.raises(UserError, match="--rounds is 0 but must be at least 1"):
        train_cpu.main()


def test_a_contender_that_ends_is_named(monkeypatch):
    """The last one started: no other process may keep its end of the pipe open."""
    monkeypatch.setattr(train_cpu, "make_ours", lambda shape: (None, {}))
    monkeypatch.setattr(train_cpu, "worker", odd_tasks.contend)
    with pytest.raises(UserError, match="the process of jaxattn ended"):
        train_cpu.measure(Shape(), 1)
