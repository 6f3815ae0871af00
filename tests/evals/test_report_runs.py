"""How run folders are read, of this version and older ones, and how damaged ones are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evals.groups import read_groups
from evals.plot_style import in_style
from evals.plots import extreme
from evals.read_run import read_run
from evals.report import write_report
from jaxattn.errors import DataError
from tests.evals.run_folders import LAYERS, make_run, write


def test_torn_last_line_is_left_out_and_repeated_steps_are_replaced(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1000, "loss": 9.0, "tokens_per_s": null}\n{"step": 1010, "lo')
    found = read_run(run)
    assert found.torn
    assert found.last_step == 1000
    assert found.series("loss")[1][-1] == 9.0
    out = write_report([run], run / "report.html")
    assert "the last line of metrics.jsonl is incomplete" in out.read_text(encoding="utf-8")


def _cut_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:30]
    (run / "metrics.jsonl").write_text("\n".join(lines))


def _replace(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(data) and None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "is not a run directory: it has no metrics.jsonl"),
        (lambda run: (run / "config.json").unlink(), "is not a run directory: it has no config.json"),
        (_replace("metrics.jsonl", b"\n"), "metrics.jsonl is empty"),
        (_replace("metrics.jsonl", b'{"loss": 1}\n'), "metrics.jsonl line 1 is not an object with a step"),
        (_cut_line, "metrics.jsonl line 3 is not valid JSON"),
        (_replace("sinks.json", b"{"), "sinks.json is not valid JSON"),
        (_replace("sinks.json", b"[1]"), "sinks.json holds a JSON list"),
        (_replace("sinks.json", b'{"value_drain": "x"}'), "value_drain is not a table of numbers"),
        (_replace("maps.npz", b"PK\x03\x04 no zip"), "maps.npz cannot be read as attention maps"),
        (lambda run: np.savez(run / "maps.npz", weights=[1.0], tokens=[[1]]), "does not fit"),
        (lambda run: (run / "report.html").mkdir(), "cannot be written"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    with pytest.raises(DataError) as caught:
        write_report([run], run / "report.html")
    message = str(caught.value)
    assert sentence in message
    assert message.endswith(".")
    assert "\n" not in message
    assert not list(run.glob(".*tmp"))


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_page_is_not_written_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    run = make_run(tmp_path / "run", steps=10)
    monkeypatch.chdir(run)
    with pytest.raises(DataError, match="a folder: name a file with --out"):
        write_report([run], out)


def test_maps_are_shares_whatever_the_weights_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", attn="identity")
    weights = np.random.default_rng(0).normal(size=(1, LAYERS, 1, 8, 10)) * 30
    np.savez(run / "maps.npz", weights=weights, tokens=np.zeros((1, 8), int), slots=2)
    maps = read_run(run).maps
    assert maps is not None
    panel = maps.panel(0, 1, 0)
    assert panel.min() >= 0
    np.testing.assert_allclose(panel.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(panel[3, 4], abs(weights[0, 1, 0, 3, 4]) / abs(weights[0, 1, 0, 3]).sum(), rtol=1e-5)
    assert maps.labels[0] == ["0"] * 8


def test_no_point_falls_off_a_shared_scale(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, attn=name) for name in ("softmax", "relu")]
    sinks = json.loads((runs[1] / "sinks.json").read_text())
    sinks |= {"value_norm_first": [[90.0], [1.0], [1.0]], "residual_norm_first": [1.0, 2.0, 400.0]}
    write(runs[1] / "sinks.json", sinks)
    with in_style():
        plot = extreme(read_groups(runs))
    assert plot is not None
    for ax in plot.axes.ravel():
        low, high = ax.get_ylim()
        for line in ax.get_lines():
            values = np.asarray(line.get_ydata(), float)
            assert low <= values.min()
            assert values.max() <= high


def test_older_names_are_read_under_todays(tmp_path: Path) -> None:
    """Plain names were raw weights, `_proxy` their shares; without it rows were distributions, or may not be."""
    today = make_run(tmp_path / "today", attn="sigmoid")
    old = make_run(tmp_path / "old", attn="sigmoid")
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    sinks = json.loads((old / "sinks.json").read_text())
    for row in [*rows, sinks]:
        for kind in ("nontrigger", "trigger"):
            name = f"first_token_weight_{kind}"
            if name in row:
                row[name], row[f"{name}_proxy"] = row.pop(f"{name}_raw"), row[name]
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(old / "sinks.json", sinks)
    for kind in ("nontrigger", "trigger"):
        for name in (f"first_token_weight_{kind}", f"first_token_weight_{kind}_raw"):
            np.testing.assert_array_equal(read_run(old).matrix(name), read_run(today).matrix(name))
            for a, b in zip(read_run(old).tables(name), read_run(today).tables(name), strict=True):
                np.testing.assert_array_equal(a, b)
    for row in [*rows, sinks]:
        for kind in ("nontrigger", "trigger"):
            row.pop(f"first_token_weight_{kind}_proxy", None)
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(old / "sinks.json", sinks)
    assert not any("first_token_weight_nontrigger" in row for row in read_run(old).metrics)
    write(old / "sinks.json", sinks | {"proxy": False})
    assert read_run(old).matrix("first_token_weight_nontrigger") is not None


def test_the_star_of_a_run_in_training_is_seen_in_its_numbers(tmp_path: Path) -> None:
    for attn, star in (("softmax", ""), ("sigmoid", "*")):
        assert read_run(make_run(tmp_path / attn, attn=attn, done=False)).star == star


def test_a_run_that_went_on_is_not_shown_with_the_end_of_before(tmp_path: Path) -> None:
    """Step 1000 was the end and was measured; then it was resumed, with more steps, and stopped at 1500."""
    before = make_run(tmp_path / "before")
    on = make_run(tmp_path / "on", steps=1500)
    ended, going = read_run(before), read_run(on)
    assert ended.latest() is ended.sinks
    assert ended.maps is not None
    assert going.sinks is None
    assert going.maps is None
    assert going.latest() == going.metrics[-1]
    assert going.latest()["step"] == 1500
    page = write_report([on], on / "report.html").read_text("utf-8")
    assert "the newest evaluation in metrics.jsonl is shown" in page
    rows = (on / "metrics.jsonl").read_text().splitlines()
    (on / "metrics.jsonl").write_text("\n".join(rows[:104]))  # nothing has been evaluated since
    assert read_run(on).latest()["step"] == 1000
    assert read_run(on).maps is not None


def test_the_threshold_is_that_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=False)
    config = json.loads((run / "config.json").read_text())
    for given, eps in (({}, 0.3), (None, 0.3), ({"epsilon": 0.7}, 0.7), ({"epsilon": 0}, 0.3), ({"epsilon": "x"}, 0.3)):
        write(run / "config.json", config | {"eval": given})
        assert read_run(run).epsilon == eps
    write(run / "sinks.json", {"step": 1000, "epsilon": 0.5})
    assert read_run(run).epsilon == 0.5


def test_whichever_byte_of_the_maps_is_damaged_they_are_read_or_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    whole = io.BytesIO()
    weights = np.random.default_rng(0).random((1, 1, 1, 4, 4)).astype(np.float16)
    np.savez_compressed(whole, weights=weights, tokens=np.zeros((1, 4), int), labels=[list("abcd")], slots=0)
    refused = 0
    for place in range(len(whole.getvalue())):
        for flip in (1, 64):
            damaged = bytearray(whole.getvalue())
            damaged[place] ^= flip
            (run / "maps.npz").write_bytes(damaged)
            try:
                read_run(run)
            except DataError:
                refused += 1
    assert refused > 500


def test_a_step_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(f'{{"step": 1{"0" * 400}}}\n')
    with pytest.raises(DataError, match="line 1 is not an object with a step"):
        read_run(run)
