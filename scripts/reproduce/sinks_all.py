"""Sinks of every registered mechanism on Bigram-Backcopy: one table, one picture, one report.

    python -m scripts.reproduce.sinks_all [--runs-dir runs/sinks_all] [--seeds 1] [--only softmax,relu]

Trains the `bb` preset with each mechanism's default options and writes a table (JSON and Markdown) and a plot
under scripts/reproduce/results/, and a side-by-side report beside the runs. Finished runs are reused. Weights are
row shares, which have a common scale, unless called raw (`evals.definitions`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from evals.read_run import read_run
from evals.report import write_report
from jaxattn.command import run_cli
from jaxattn.mechanisms import get, names
from jaxattn.runs.rundir import result_environment, write_json_atomic
from scripts.reproduce._study import train
from train.presets import get_preset

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "sink_rate": "Sink₁ %",
    "nontrigger": "start-token weight, non-trigger",
    "nontrigger_raw": "the same, raw",
    "trigger_raw": "same head, trigger, raw",
    "drain": "value drain there",
    "risk_backcopy": "backcopy risk (nats)",
    "risk_bigram_excess": "bigram excess (nats)",
}


def one_run(attn: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train (or reuse) one run and read its table row."""
    folder = runs / f"{attn}-seed{seed}"
    train(dataclasses.replace(get_preset("bb"), attn=attn, seed=seed, run_dir=str(folder)))
    sinks = read_run(folder).sinks
    assert sinks is not None  # written last
    plain, raw, trigger, drain = (
        np.asarray(sinks[name])
        for name in (
            "first_token_weight_nontrigger",
            "first_token_weight_nontrigger_raw",
            "first_token_weight_trigger_raw",
            "value_drain",
        )
    )
    top = np.unravel_index(plain.argmax(), plain.shape)
    return {
        "attn": attn,
        "seed": seed,
        "steps": sinks["step"],
        "sink_rate": sinks["sink_rate"],
        "nontrigger": float(plain[top]),
        "nontrigger_raw": float(raw[top]),
        "trigger_raw": float(trigger[top]),
        "drain": float(drain[top]),
        "risk_backcopy": sinks["risk_backcopy"],
        "risk_bigram_excess": sinks["risk_bigram_excess"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a mechanism, mean (± spread over seeds)."""
    lines = ["| attention | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for attn in dict.fromkeys(row["attn"] for row in rows):
        mine = [row for row in rows if row["attn"] == attn]
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in mine]
            cells.append(f"{np.mean(values):.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {attn} | " + " | ".join(cells) + " |")
    context = get_preset("bb").data.context
    said = {attn: get(attn).advice(get(attn).make_spec(), context) for attn in dict.fromkeys(r["attn"] for r in rows)}
    notes = [f"- {attn}: {advice}" for attn, advice in said.items() if advice]
    return "\n".join([*lines, *(["", "What the defaults decide:", "", *notes] if notes else [])]) + "\n"


def plot(attentions: list[str], seeds: int, runs: Path) -> None:
    """Row share of the start token in its largest head over training, one panel a mechanism."""
    matplotlib.use("Agg")
    columns = 6
    rows = math.ceil(len(attentions) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.1 * columns, 1.6 * rows), sharex=True, sharey=True, layout="constrained"
    )
    for axis, attn in zip(axes.flat, attentions, strict=False):
        for seed in range(seeds):
            lines = (runs / f"{attn}-seed{seed}" / "metrics.jsonl").read_text("utf-8").splitlines()
            seen = [row for row in map(json.loads, lines) if "first_token_weight_nontrigger" in row]
            shares = [np.max(row["first_token_weight_nontrigger"]) for row in seen]
            axis.plot([row["step"] for row in seen], shares, color="#0072b2", linewidth=1.4)
        axis.set_title(attn, fontsize=9)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(attentions) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("share of weight on <s>, non-trigger queries, largest head", fontsize=9)
    figure.savefig(RESULTS / "sinks_all.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.reproduce.sinks_all", description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sinks_all"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="train just these (comma-separated) and write no table")
    args = parser.parse_args()
    chosen = [get(name).name for name in args.only.split(",") if name]
    rows = [one_run(attn, seed, args.runs_dir) for attn in chosen or names() for seed in range(args.seeds)]
    print(markdown(rows))
    if chosen:
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        RESULTS / "sinks_all.json",
        {"rows": rows, "device": jax.devices()[0].device_kind, "environment": result_environment()},
    )
    (RESULTS / "sinks_all.md").write_text(markdown(rows), encoding="utf-8")
    plot(names(), args.seeds, args.runs_dir)
    report = write_report([args.runs_dir / f"{name}-seed0" for name in names()], args.runs_dir / "report.html")
    print(f"side-by-side report: {report}")
    return 0


if __name__ == "__main__":
    run_cli(main)
