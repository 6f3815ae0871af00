"""wandb and trackio get the same scalars as metrics.jsonl and are closed at the end."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.train.helpers import tiny
from train.loop import run


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row(name, tmp_path, monkeypatch):
    calls = []
    tracker = ModuleType(name)
    tracker.init = lambda **call: (
        calls.append(("init", call))
        or SimpleNamespace(
            log=lambda row, step: calls.append(("log", step, row)), finish=lambda: calls.append(("finish",))
        )
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    run(tiny(tmp_path / "run", steps=3, log={"tensorboard": False, name: "study"}))

    (_, init), *rows, last = calls
    assert init["project"] == "study"
    assert init["name"] == "run"
    assert init["config"]["steps"] == 3
    assert last == ("finish",)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step for _, step, _ in rows] == [row["step"] for row in written]
    for (_, _, sent), row in zip(rows, written, strict=True):
        assert sent["loss"] == row["loss"]
        assert all(isinstance(value, int | float) for value in sent.values())
