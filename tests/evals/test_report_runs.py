"""Run folders for the report's tests, how they are read, and how damaged ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.plot_style import in_style
from evals.plots import extreme
from evals.report import write_report
from evals.run_files import read_run, read_runs
from jaxattn.errors import DataError

WORDS = [*"the quick brown fox t e s", "\n", "$x$", "<b>", "注意", "_"]
LAYERS, LENGTH = 3, 40


def make_run(folder: Path, *, attn: str = "softmax", heads: int = 1, bb: bool = True, sink: float = 0.93,
             done: bool = True, steps: int = 1000) -> Path:  # fmt: skip
    """A run folder as training leaves it; `sink` is the final start-token weight of layer 1 head 0."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "attn": attn, "preset": "bb" if bb else "tiny", "seed": 0, "steps": 1000,
        "data": {"source": "bb" if bb else "stdlib", "context": 48, "batch_size": 32},
        "model": {"num_layers": LAYERS, "d_model": 64, "num_heads": heads, "mixers": [attn]},
        "optim": {"lr": 1e-3, "note": "<i>raw</i>"},
    }  # fmt: skip
    entropies = {"unigram_nats": 3.2, "bigram_nats": 2.4, "bigram_heldout_nats": 2.41}
    if bb:
        entropies |= {"oracle_nats": 1.648, "oracle_trigger_nats": 0.0, "oracle_non_trigger_nats": 2.218}
    write(folder / "config.json", config)
    write(folder / "environment.json", {
        "git": {"commit": "abc1234def5678", "dirty": False}, "versions": {"jax": "0.10.2"},
        "devices": {"kind": "cpu", "count": 1}, "host": "box", "argv": ["pretrain", f"--attn={attn}"],
    })  # fmt: skip
    write(folder / "data.json", {"name": "bb" if bb else "stdlib", "vocab_size": 67,
                                 "meta": {"trigger_ids": [7, 8]}, "entropies": entropies})  # fmt: skip

    def table(step: int, scale: float = 1.0) -> list[list[float]]:
        out = 0.02 + 0.03 * rng.random((LAYERS, heads))
        out[1, 0] = max(out[1, 0], scale * sink * (1 / (1 + np.exp(-(step - 380) / 60))))
        return out.round(4).tolist()

    lines = []
    for step in range(10, steps + 1, 10):
        row: dict[str, Any] = {"step": step, "loss": 1.7 + 2.5 * np.exp(-step / 150) + 0.03 * rng.normal(),
                               "tokens_per_s": 52_000 + 800 * rng.normal(), "lr": 1e-3, "grad_norm": 0.5,
                               "time_s": step / 30, "skipped": 0}  # fmt: skip
        if step % 50 == 0:
            row |= {"val_loss": 1.7 + 2.5 * np.exp(-step / 150), "first_token_weight": table(step, 0.8)}
            row["sink_rate"] = 100 / LAYERS / heads * (sink > 0.3 and step > 400)
            row["value_drain"] = (1 - 0.9 * np.array(table(step))).tolist()
            row["residual_peak"] = [0.5, sink * step / 100, sink * step / 80]
        if bb and step % 50 == 0:
            row["first_token_weight_nontrigger"] = table(step)
            row["first_token_weight_trigger"] = table(step, 0)
            row |= {"risk_backcopy": 3 * np.exp(-step / 120), "risk_bigram_excess": np.exp(-step / 200)}
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not done:
        return folder
    weights: dict[str, Any] = {"first_token_weight": table(1000, 0.8)}
    if bb:
        weights["first_token_weight_nontrigger"] = table(1000)
        weights["first_token_weight_trigger"] = table(1000, 0)
        weights |= {"risk_backcopy": 0.0021, "risk_bigram": 2.243, "risk_bigram_excess": 0.0253}
    rest = 8 + rng.random((LAYERS, heads))
    drain = np.array(table(1000)) * -0.88 + 1
    write(folder / "sinks.json", {
        "step": 1000, "attn": attn, "source": "bb" if bb else "stdlib", "epsilon": 0.3, "length": 48,
        "sequences": 100, "sink_rate": 100 / LAYERS / heads if sink > 0.3 else 0.0, "sink_rate_slot": None,
        "proxy": attn != "softmax", "attention_layers": list(range(LAYERS)),
        "sink_rate_by_position": [33.3 if sink > 0.3 else 0.0, 1.2] + [0.0] * 14,
        "sink_logit": (12 * sink * np.array(weights["first_token_weight"])).tolist(),
        "value_norm_first": (rest * drain).tolist(), "value_norm_rest": rest.tolist(),
        "value_drain": drain.tolist(),
        "residual_norm_first": [9.0, 12 + 20 * sink, 14 + 25 * sink], "residual_norm_rest": [8.0, 12.0, 15.0],
        "residual_peak": [1.0, 20 * sink, 25 * sink - 1], **weights,
    })  # fmt: skip
    scores = rng.normal(size=(2, LAYERS, heads, LENGTH, LENGTH))
    scores[:, 1, 0, :, 0] += 6.5 * sink
    a = np.exp(scores) * np.tril(np.ones((LENGTH, LENGTH)))
    tokens = rng.integers(0, len(WORDS), (2, LENGTH))
    labels = np.array(WORDS)[tokens]
    labels[:, 0] = "<s>"
    a = a / (a.sum(-1, keepdims=True) if attn == "softmax" else 2.0)
    np.savez(folder / "maps.npz", weights=a.astype(np.float16), tokens=tokens, labels=labels, slots=0)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


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


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    long = "softmax(window=8), sigmoid(normalise=True, train_len={})"
    names = [
        ("a", "relu"),
        ("b", long.format(64)),
        ("c", long.format(128)),
        ("x/c", "elu"),
        ("x/b", "elu"),
        ("y/b", "elu"),
    ]
    runs = read_runs([make_run(tmp_path / folder, attn=attn, done=False, steps=10) for folder, attn in names])
    assert [run.label for run in runs] == ["relu", "b #2", "c #3", "c #4", "b #5", "b #6"]
    assert len({run.color for run in runs}) == len(runs)


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
        figure = extreme(read_runs(runs))
    assert figure is not None
    for ax in figure.axes:
        low, high = ax.get_ylim()
        for line in ax.get_lines():
            values = np.asarray(line.get_ydata(), float)
            assert low <= values.min()
            assert values.max() <= high
