"""Which runs are one group, what groups are called, and what a band over seeds is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evals.cautions import cautions
from evals.groups import band, group_runs, read_groups
from evals.key_numbers import key_numbers
from evals.read_run import read_run
from tests.evals.run_folders import make_run, write


def young(folder: Path, **how) -> Path:
    return make_run(folder, done=False, steps=50, **how)


def change(run: Path, **fields: object) -> Path:
    """Set dotted fields of a run's configuration; None takes one out."""
    config = json.loads((run / "config.json").read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        place = config
        for key in path:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    write(run / "config.json", config)
    return run


def test_seeds_are_one_group_and_everything_else_is_not(tmp_path: Path) -> None:
    runs = [young(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1, 2)]
    runs.append(change(young(tmp_path / "lr"), optim__lr=0.01))
    runs.append(young(tmp_path / "relu", attn="relu", seed=4))
    runs.append(change(young(tmp_path / "local", seed=5), run_dir="elsewhere", log={"every": 10}, preset="mine"))
    groups = read_groups(runs)
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "1", "2", "5"], ["0"], ["4"]]
    assert [group.title for group in groups] == [
        "softmax, optim.lr=0.001 (4 seeds)", "softmax, optim.lr=0.01", "relu",
    ]  # fmt: skip
    assert [run.label for run in groups[0].runs][1] == "softmax, optim.lr=0.001, seed 1"
    assert len({group.color for group in groups}) == len({group.marker for group in groups}) == 3


def test_a_run_twice_is_no_second_seed(tmp_path: Path) -> None:
    one, again = young(tmp_path / "x" / "run"), young(tmp_path / "y" / "run")
    groups = read_groups([one, again, one, young(tmp_path / "z", seed=1)])
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "1"], ["0"], ["0"]]
    assert [group.label for group in groups] == ["softmax · x/run #1", "softmax · y/run", "softmax · x/run #3"]
    assert len({group.label for group in groups}) == 3


def test_many_differences_are_told_by_folders(tmp_path: Path) -> None:
    fields = [{"optim__lr": x, "model__d_model": 64 * x, "steps": 100 * x} for x in (1, 2)]
    groups = read_groups([change(young(tmp_path / f"run-{i}"), **f) for i, f in enumerate(fields)])
    assert [group.label for group in groups] == ["softmax · run-0", "softmax · run-1"]


def test_bands_by_hand() -> None:
    a = (np.array([10, 20, 30]), np.array([1.0, 2.0, 3.0]))
    b = (np.array([20, 30, 40]), np.array([4.0, np.nan, 9.0]))
    found = band([a, b])
    np.testing.assert_array_equal(found.steps, [20, 30])
    np.testing.assert_array_equal(found.mean, [3, np.nan])
    np.testing.assert_array_equal(found.low, [2, np.nan])
    np.testing.assert_array_equal(found.high, [4, np.nan])
    three = band([a, a, (a[0], np.array([4.0, 2.0, 3.3]))])  # of two, mean ± standard deviation is the range
    np.testing.assert_allclose([three.mean, three.low, three.high], [[2, 2, 3.1], [1, 2, 3], [4, 2, 3.3]])
    assert len(band([a, (np.array([5]), np.array([1.0]))]).steps) == 0


def test_tables_have_mean_range_and_number_of_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    for run, drain in zip(runs, (0.1, 0.2, 0.6), strict=True):
        sinks = json.loads((run / "sinks.json").read_text())
        write(run / "sinks.json", sinks | {"value_drain": [[1.0], [drain], [1.0]], "sink_rate": 100 * drain})
    groups = read_groups([*runs, make_run(tmp_path / "relu", attn="relu")])
    rows, flat = key_numbers(groups)
    table = dict(rows)
    assert table["Seeds"] == ["3 (0, 1, 2)", "0"]
    assert table["Smallest value drain"][0] == "0.3 (0.1 to 0.6)"
    assert table["Sink₁"][0] == "30 % (10 to 60)"
    assert table["Some head above 0.3"] == ["from step 350 on", "from step 350 on"]
    drains = [row for row in flat if row["quantity"] == "Smallest value drain" and row["group"] == "softmax"]
    assert [(row["seed"], row["value"], row["place"]) for row in drains] == [
        (str(seed), value, "layer 1 head 0") for seed, value in enumerate((0.1, 0.2, 0.6))
    ]


def test_a_seed_without_numbers_is_counted(tmp_path: Path) -> None:
    groups = read_groups([make_run(tmp_path / "a"), young(tmp_path / "b", seed=1)])
    text = dict(key_numbers(groups)[0])["Largest sink logit"][0]
    assert text.endswith(", 1 of 2 seeds")


# ------------------------------------------------------------------------------------------------- cautions


def said(*runs: Path) -> str:
    return "\n".join(cautions(read_groups(runs)))


def test_a_fair_comparison_needs_no_words(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{a}{s}", attn=a, seed=s) for a in ("softmax", "relu") for s in (0, 1)]
    assert said(*runs) == ""
    assert said(runs[0]) == ""


def test_what_a_comparison_hangs_on(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", attn="sigmoid")
    assert said(a, b) == "One seed says nothing about the spread (all): train more with --seed=1, --seed=2, …"
    sinks = json.loads((b / "sinks.json").read_text())
    write(b / "sinks.json", sinks | {"notes": ["its default decides"]})
    assert said(a, b).startswith("sigmoid: its default decides\n")
    change(b, data__seed=7)
    assert "different held-out text: data.seed is 0 (softmax); 7 (sigmoid)." in said(a, b)
    change(b, data__seed=0, data__context=96, eval={"epsilon": 0.2})
    assert "different held-out text: data.context is 48 (softmax); 96 (sigmoid)." in said(a, b)
    assert "measured differently: eval.epsilon is not recorded (softmax); 0.2 (sigmoid)." in said(a, b)
    c = young(tmp_path / "c", attn="relu")
    assert "Runs have come to different steps: 1000 (softmax); 50 (relu)." in said(a, c)
    data = json.loads((c / "data.json").read_text())
    write(c / "data.json", data | {"meta": {"data_hash": "other"}})
    assert "the data themselves differ (data.json)." in said(a, c)


def test_seeds_of_old_runs_were_measured_on_different_text(tmp_path: Path) -> None:
    runs = [change(young(tmp_path / f"r{seed}", seed=seed), data__seed=None) for seed in (0, 1)]
    assert len(read_groups(runs)) == 1
    assert "different held-out text: data.seed is different for the seeds of softmax." in said(*runs)


def test_labels_survive_odd_configurations(tmp_path: Path) -> None:
    """A run that says next to nothing of itself still has a name and a group."""
    run = young(tmp_path / "bare")
    write(run / "config.json", {})
    (group,) = group_runs([read_run(run)])
    assert (group.label, group.first.seed) == ("attention", "–")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_number_of_seeds_is_in_the_title(tmp_path: Path, seeds: int) -> None:
    (group,) = read_groups([young(tmp_path / f"{s}", seed=s) for s in range(seeds)])
    assert group.title == ("softmax" if seeds == 1 else f"softmax ({seeds} seeds)")
