"""The sentences of a report on curves made for them: every stretch is named, and nothing that is not so is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from evals.findings import Stretch, group_verdict, in_words, stretches, verdict
from evals.groups import read_groups
from evals.read_run import Run, read_run
from tests.evals.run_folders import make_run, write

KEY = "first_token_weight_nontrigger"


def run_of(folder: Path, curve: list[float | None], *, every: int = 50, final: float | None = None, **sinks) -> Run:
    """A run whose largest start-token weight, in layer 1 head 0, follows `curve`; None: no number, absent below 0."""
    run = make_run(folder)
    rows = []
    for i, value in enumerate(curve, 1):
        row = {"step": i * every, "loss": 2.0}
        if value is None or value >= 0:
            row[KEY] = [[0.01], [value], [0.02 if value is not None else None]]
            row[KEY] = [[None]] * 3 if value is None else row[KEY]
        rows.append(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = curve[-1] if final is None else final
    found = json.loads((run / "sinks.json").read_text())
    found |= {"step": every * len(curve) if final is None else every * len(curve) + 10}
    write(run / "sinks.json", found | {KEY: [[0.01], [last], [0.02]]} | sinks)
    return read_run(run)


def test_the_curve_of_the_list(tmp_path: Path) -> None:
    """Above at 550, 650, 800 to 900, and not before, between or after: all of it is said."""
    curve = [0.1] * 20
    for step in (550, 650, 800, 850, 900):
        curve[step // 50 - 1] = 0.4
    run = run_of(tmp_path / "run", curve, sink_rate=12.0)
    assert in_words(stretches(run)) == "at step 550, at step 650 and from step 800 to 900"
    assert verdict(run) == (
        "no head is a sink on average over sequences (Sink₁ 12.0 %; largest start-token weight on non-trigger queries "
        "0.10, layer 1 head 0); some head was above 0.3 at step 550, at step 650 and from step 800 to 900"
    )


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ([0.1, 0.1, 0.1], ""),
        ([0.1, 0.5, 0.6], "from step 100 on"),
        ([0.4, 0.5, 0.6], "at every evaluation"),
        ([0.4, 0.5, 0.1], "from step 50 to 100"),
        ([0.4, 0.1, 0.6], "at step 50 and at step 150"),
        ([0.1, 0.1, 0.6], "at step 150"),
        ([0.4, 0.1, 0.6, 0.6], "at step 50 and from step 150 on"),
        ([0.4, None, 0.6, 0.6], "at step 50 and from step 150 on"),
        ([0.4, -1, 0.6, 0.6], "at every evaluation"),  # there was none at step 100
        ([0.3, 0.3000001], "at step 100"),
        ([0.4], "at step 50"),
    ],
)
def test_stretches_in_words(tmp_path: Path, curve: list[float | None], words: str) -> None:
    assert in_words(stretches(run_of(tmp_path / "run", curve))) == words


def test_the_words_hold_for_any_curve(tmp_path: Path) -> None:
    """Read back, the sentence marks exactly the evaluations above the threshold."""
    rng = np.random.default_rng(0)
    for trial in range(12):
        curve = (0.6 * rng.random(rng.integers(1, 12))).tolist()
        run = run_of(tmp_path / f"run{trial}", curve)
        steps = [50 * i for i in range(1, len(curve) + 1)]
        marked = set()
        for part in re.split(r", | and ", in_words(stretches(run))):
            if part == "at every evaluation":
                marked |= set(steps)
            elif found := re.fullmatch(r"from step (\d+) (?:to (\d+)|on)", part):
                marked |= {s for s in steps if int(found[1]) <= s <= int(found[2] or 1e9)}
            elif found := re.fullmatch(r"at step (\d+)", part):
                marked.add(int(found[1]))
            else:
                assert part == ""
        assert marked == {s for s, value in zip(steps, curve, strict=True) if value > 0.3}, curve


def test_the_final_evaluation_belongs_to_the_curve(tmp_path: Path) -> None:
    assert stretches(run_of(tmp_path / "a", [0.1, 0.1], final=0.5)) == [Stretch(110, 110, False, True)]
    assert in_words(stretches(run_of(tmp_path / "b", [0.1, 0.4], final=0.5))) == "from step 100 on"
    assert in_words(stretches(run_of(tmp_path / "c", [0.1, 0.4], final=0.2))) == "at step 100"


def test_text_runs_are_judged_by_alpha(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", bb=False, heads=2))
    assert run.start_key == "first_token_weight"
    assert "non-trigger" not in verdict(run)
    assert verdict(run).startswith("a sink: largest start-token weight 0.74, layer 1 head 0; some head above 0.3 from")


@pytest.mark.parametrize(
    ("kinds", "rate", "words"),
    [
        (["constant"], 6.1, "; Sink on the constant slot 6.1 %"),
        (["learned"], 99.0, "; Sink on the learned slot 99.0 %"),
        (["constant", "learned"], 0.0, "; Sink on the constant and learned slot 0.0 %"),
        ([], 3.0, "; Sink on the slot 3.0 %"),  # of an older version, which did not say
    ],
)
def test_slots_are_called_what_they_are(tmp_path: Path, kinds: list[str], rate: float, words: str) -> None:
    run = run_of(tmp_path / "run", [0.1], slots=kinds, sink_rate_slot=rate, sink_rate=0.0)
    assert verdict(run).endswith(words)
    assert "instead" not in verdict(run)
    assert verdict(run).startswith("no sink (Sink₁ 0.0 %; ")


@pytest.mark.parametrize("weight", [0.2999, 0.29999, 0.3, 0.30001, 0.3049])
def test_a_number_is_printed_on_its_side_of_the_threshold(tmp_path: Path, weight: float) -> None:
    text = verdict(run_of(tmp_path / "run", [weight], sink_rate=0.0))
    shown = float(re.search(r"queries ([\d.]+)[,*]", text)[1])  # type: ignore[index]
    assert (shown > 0.3) == (weight > 0.3) == text.startswith("a sink")


def test_rows_that_attend_to_nothing_are_mentioned(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", [0.1], sink_rate=0.0, rows_nearly_empty=[[0.0], [90.0], [60.0]])
    assert verdict(run).endswith("; 50 % of rows are nearly empty")
    assert "nearly empty" not in verdict(run_of(tmp_path / "b", [0.1], rows_nearly_empty=[[0.0], [2.0], [0.1]]))


def test_groups_count_their_seeds(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{s}", seed=s, sink=sink) for s, sink in enumerate((0.9, 0.8, 0.1))]
    (group,) = read_groups(runs)
    said = group_verdict(group)
    assert said.startswith(
        "a sink in 2 of 3 seeds; largest start-token weight on non-trigger queries 0.60 (0.10 to 0.90)"
    )
    assert "Sink₁ 22.2 (0.0 to 33.3) %" in said
    (runs[1] / "sinks.json").unlink()
    assert group_verdict(read_groups(runs)[0]).endswith("; some still training")
