"""What a resume says about the sessions before it: other versions and machines, and rows that are gone."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from jaxattn.errors import UserError
from jaxattn.runs.rundir import RunDir, write_json_atomic
from tests.train import helpers as h
from train.pretrain import run
from train.sessions import begin, differences, ranges

ENVIRONMENT = {
    "python": "3.11.7",
    "versions": {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
    "devices": {"kind": "cpu", "count": 1},
    "processes": 1,
    "cpus": 2,
    "processor": "a CPU",
    "flags": {},
    "git": {"commit": "abc", "dirty": False},
}


def rows(*steps, torn=""):
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps) + torn


@pytest.fixture
def place(tmp_path):
    """A run of 10 steps in one session, every step logged."""
    place = RunDir(tmp_path, resumed=True)
    begin(place, 0, 1, ENVIRONMENT)
    place.metrics.write_text(rows(*range(1, 11)))
    return place


def warnings(caplog, place, step=10, every=1, environment=ENVIRONMENT):
    caplog.clear()
    begin(place, step, every, environment)
    return [record.getMessage() for record in caplog.records]


def steps_of(place):
    return [json.loads(line)["step"] for line in place.metrics.read_text().splitlines()]


def test_a_whole_run_says_nothing(place, caplog):
    assert warnings(caplog, place, 10) == []
    assert warnings(caplog, place, 7) == []
    assert steps_of(place) == [1, 2, 3, 4, 5, 6, 7]
    sessions = json.loads((place.path / "sessions.json").read_text())["sessions"]
    assert [s["step"] for s in sessions] == [0, 7]  # the session from 10 on is no part of this run any more


@pytest.mark.parametrize(
    ("content", "lost"),
    [
        (None, "1-10 (10 of the 10 steps"),
        ("", "1-10 (10 of the 10 steps"),
        (rows(*range(1, 6)), "6-10 (5 of the 10 steps"),
        (rows(*range(6, 11)), "1-5 (5 of the 10 steps"),
        (rows(1, 2, 4, 5, 8, 9, 10), "3, 6-7 (3 of the 10 steps"),
        (rows(*range(1, 10), torn='{"step": 10, "lo'), "10 (1 of the 10 steps"),
        (rows(1, 2) + "[" * 200_000 + "\n" + rows(*range(4, 11)), "3 (1 of the 10 steps"),
        (rows(1, 2) + "\0" * 40 + "\n" + rows(*range(4, 11)), "3 (1 of the 10 steps"),
        (rows(1, 2) + '{"step": "3"}\n{"step": true}\n[3]\n7\n' + rows(*range(4, 11)), "3 (1 of the 10 steps"),
        (rows(*range(2, 11, 2)), "1, 3, 5, 7, 9 (5 of the 10 steps"),
    ],
)
def test_lost_rows_are_named(place, caplog, content, lost):
    if content is None:
        place.metrics.unlink()
    else:
        place.metrics.write_text(content)
    said = warnings(caplog, place)
    assert f"metrics.jsonl lacks the rows of steps {lost} before this resume" in said[-1]
    for line in place.metrics.read_text().splitlines() if place.metrics.exists() else []:
        json.loads(line)


def test_each_step_is_there_once_and_in_order(place, caplog):
    place.metrics.write_text(rows(3, 1, 2) + '{"step": 2, "loss": 5.0}\n' + rows(*range(4, 11), torn='{"step": 1'))
    said = warnings(caplog, place)
    assert any("step 2 is there twice; the later row stays" in text for text in said)
    assert any("dropped a torn line of 10 bytes" in text for text in said)
    assert steps_of(place) == list(range(1, 11))
    assert json.loads(place.metrics.read_text().splitlines()[1])["loss"] == 5.0


def test_the_log_may_have_been_thinner(place, caplog):
    """Each session logs as it was told: 1..10 every step, 11..20 every fourth, 21..30 every step."""
    assert warnings(caplog, place, 10, every=4) == []
    place.metrics.write_text(rows(*range(1, 11), 12, 16, 20))
    assert warnings(caplog, place, 20) == []
    place.metrics.write_text(rows(*range(1, 11), 12, 20, *range(21, 30)))
    assert "lacks the rows of steps 16, 30 (2 of the 30 steps" in warnings(caplog, place, 30)[-1]


def test_many_gaps_are_cut_short():
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert ranges([]) == ""
    assert ranges(range(1, 1000, 2)).endswith("15, ...")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"versions": {"jax": "0.12.0.1"}}, "jax (0.10.2 before, 0.12.0.1 now)"),
        ({"versions": {"jaxlib": "0.11.2"}}, "jaxlib (0.10.2 before, 0.11.2 now)"),
        ({"versions": {"flax": "0.12.12"}}, "flax (0.12.8 before, 0.12.12 now)"),
        ({"versions": {"optax": "0.3"}}, "optax (0.2.8 before, 0.3 now)"),
        ({"python": "3.12.1"}, "python (3.11.7 before, 3.12.1 now)"),
        ({"devices": {"kind": "NVIDIA H100"}}, "devices.kind (cpu before, NVIDIA H100 now)"),
        ({"devices": {"count": 8}}, "devices.count (1 before, 8 now)"),
        ({"processor": "another"}, "processor (a CPU before, another now)"),
        ({"flags": {"XLA_FLAGS": "--xla_x"}}, "flags.XLA_FLAGS (unset before, --xla_x now)"),
        ({"git": {"commit": "def"}}, "git.commit (abc before, def now)"),
    ],
)
def test_another_environment_is_said_and_both_are_kept(place, caplog, change, says):
    now = {
        k: v | change[k] if isinstance(v, dict) and k in change else change.get(k, v) for k, v in ENVIRONMENT.items()
    }
    (said,) = warnings(caplog, place, environment=now)
    assert f"goes on with another {says}: the last digits of its numbers may differ" in said
    kept = [s["environment"] for s in json.loads((place.path / "sessions.json").read_text())["sessions"]]
    assert kept == [ENVIRONMENT, now]
    assert json.loads(place.environment.read_text()) == now
    assert differences(now, now) == []


def test_a_run_of_an_earlier_version_has_only_its_environment(place, caplog):
    (place.path / "sessions.json").unlink()
    write_json_atomic(place.config, {"log": {"every": 5}})
    place.metrics.write_text(rows(5, 10))
    (said,) = warnings(caplog, place, environment=ENVIRONMENT | {"python": "3.12"})
    assert "python (3.11.7 before, 3.12 now)" in said


@pytest.mark.parametrize("name", ["sessions.json", "environment.json"])
@pytest.mark.parametrize(
    "content",
    [
        "", "[" * 200_000, "[]", '{"sessions": 3}', '{"sessions": []}', '{"a": NaN',
        '{"sessions": [{"step": -1, "log_every": 0}]}', '{"sessions": [{"step": 10, "log_every": 1}]}',
    ],
)  # fmt: skip
def test_damaged_files_stop_no_run(place, caplog, name, content):
    if name == "environment.json":
        (place.path / "sessions.json").unlink()
    (place.path / name).write_text(content)
    said = warnings(caplog, place)
    assert all(len(text) < 500 for text in said)
    assert any(name in text for text in said) or content.startswith('{"sessions"')
    assert json.loads((place.path / "sessions.json").read_text())["sessions"][-1]["step"] == 10


def test_metrics_that_cannot_be_read(place):
    place.metrics.unlink()
    place.metrics.mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl is no regular file"):
        begin(place, 10, 1, ENVIRONMENT)


def test_a_run_that_lost_its_rows_and_goes_on_with_another_jax(tmp_path, caplog):
    """The whole way: a run, its files as another version and a careless hand leave them, and a resume."""
    folder = tmp_path / "run"
    assert run(h.tiny(folder, 8)) == 0
    path = folder / "sessions.json"
    saved = json.loads(path.read_text())
    assert [s["step"] for s in saved["sessions"]] == [0]
    now = saved["sessions"][0]["environment"]["versions"]["jax"]
    saved["sessions"][0]["environment"]["versions"]["jax"] = "0.1.0"
    path.write_text(json.dumps(saved))
    shutil.copy(folder / "metrics.jsonl", tmp_path / "kept.jsonl")
    (folder / "metrics.jsonl").write_text("")
    caplog.clear()
    assert run(dataclasses.replace(h.read_config(folder), resume=True, run_dir=str(folder), steps=12)) == 0
    assert f"another jax (0.1.0 before, {now} now)" in caplog.text
    assert "lacks the rows of steps 1-8 (8 of the 8 steps before this resume)" in caplog.text
    assert [row["step"] for row in h.rows(folder)] == [9, 10, 11, 12]
    jaxes = [s["environment"]["versions"]["jax"] for s in json.loads(path.read_text())["sessions"]]
    assert jaxes == ["0.1.0", now]
