"""Sinks on Bigram-Backcopy: softmax against its sigmoid and ReLU twins, three seeds.

    python -m scripts.reproduce.sinks_bb [--runs-dir runs/sinks_bb] [--seeds 3]

Active-Dormant Attention Heads (arXiv 2410.13835) and When Attention Sink Emerges in Language Models
(arXiv 2410.10781). Trains the `bb` preset for each attention and seed, writes a table (JSON and Markdown)
under scripts/reproduce/results/ and a side-by-side report, and exits 1 if an expectation fails:

  softmax        largest start-token weight on non-trigger queries > 0.8, < 0.05 on trigger queries in that
                 head, value drain < 0.5 there, within 1000 steps
  sigmoid, relu  raw start-token weight < 0.02 on non-trigger queries in the copying layer, backcopy risk < 0.05

Weights are row shares unless called raw (`evals.definitions`). The copying layer is the one whose attention output,
zeroed, raises the backcopy risk most. All seeds are measured on the same held-out sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from evals.groups import read_groups
from evals.plot_parts import Plot, curve, largest, legend, subtitle
from evals.plot_style import axes, in_style, png
from evals.read_run import read_run
from evals.report import write_report
from evals.sinks import bigram_task, held_out
from jaxattn.command import run_cli
from jaxattn.nn import Decoder, Edit
from jaxattn.runs.load import load_params, read_config
from scripts.reproduce._study import RESULTS, spread, train, write_rows
from train.data.open import open_source
from train.objective import token_losses
from train.presets import get_preset

ATTENTIONS = ("softmax", "sigmoid", "relu")


def zeroed_risks(folder: Path) -> list[float]:
    """Backcopy risk (nats) with each layer's attention output zeroed."""
    cfg = read_config(folder)
    source, model = open_source(cfg)
    task = bigram_task(source)
    assert task is not None
    params, _ = load_params(folder, dataclasses.replace(cfg, model=model))
    tokens = jnp.asarray(held_out(cfg, source))
    copy = jnp.isin(tokens[:, 1:-1], jnp.asarray(task.trigger_ids))

    def risk(layer: int) -> float:
        logits = jnp.asarray(Decoder(model).apply({"params": params}, tokens, edits=(Edit(layer, "attn"),)))
        loss = token_losses(logits[:, 1:-1], tokens[:, 2:])
        return float(jnp.sum(jnp.where(copy, loss, 0.0)) / jnp.sum(copy))

    return [risk(layer) for layer in range(model.num_layers)]


def one_run(attn: str, seed: int, runs: Path) -> dict[str, Any]:
    """Train (or reuse) one run and read what the expectations need."""
    folder = runs / f"{attn}-seed{seed}"
    train(dataclasses.replace(get_preset("bb"), attn=attn, seed=seed, run_dir=str(folder)))
    sinks = read_run(folder).sinks
    assert sinks is not None  # written last
    start = "first_token_weight_{}".format
    plain, raw, trigger, drain = (
        np.asarray(sinks[k]) for k in (start("nontrigger"), start("nontrigger_raw"), start("trigger"), "value_drain")
    )
    top = np.unravel_index(plain.argmax(), plain.shape)
    zeroed = zeroed_risks(folder)
    copying = int(np.argmax(zeroed))
    row = {
        "attn": attn,
        "seed": seed,
        "steps": sinks["step"],
        "sink_rate": sinks["sink_rate"],
        "sink_layer": int(top[0]),
        "nontrigger_max": float(plain[top]),
        "nontrigger_raw_there": float(raw[top]),
        "trigger_there": float(trigger[top]),
        "drain_there": float(drain[top]),
        "copying_layer": copying,
        "nontrigger_raw_copying": float(raw[copying].max()),
        "risk_backcopy": sinks["risk_backcopy"],
        "risk_bigram_excess": sinks["risk_bigram_excess"],
        "risk_backcopy_zeroed": zeroed,
    }
    if attn == "softmax":
        row["holds"] = row["nontrigger_max"] > 0.8 and row["trigger_there"] < 0.05 and row["drain_there"] < 0.5
    else:
        row["holds"] = row["nontrigger_raw_copying"] < 0.02 and row["risk_backcopy"] < 0.05
    return row


COLUMNS = (
    *("attn", "seed", "sink_rate", "sink_layer", "nontrigger_max", "nontrigger_raw_there", "trigger_there"),
    *("drain_there", "copying_layer", "nontrigger_raw_copying", "risk_backcopy", "risk_bigram_excess", "holds"),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with mean and spread over seeds per attention."""
    show = lambda x: f"{x:.4f}" if isinstance(x, float) else str(x)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(show(row[c]) for c in COLUMNS) + " |" for row in rows]
    for attn in dict.fromkeys(row["attn"] for row in rows):
        mine = [row for row in rows if row["attn"] == attn]
        cells = []
        for c in COLUMNS:
            values = [row[c] for row in mine]
            numeric = isinstance(values[0], float)
            cells.append("{:.4f} ± {:.4f}".format(*spread(values)) if numeric else "")
        lines.append("| " + " | ".join([f"**{attn}**, mean ± sd", *cells[1:]]) + " |")
    lines.append(
        "\nWeights are row shares unless called raw. Paper-scale figures (card of arXiv 2410.13835, CPU runs): softmax "
        "0.94 non-trigger, 0.000 trigger; ReLU and sigmoid 0.000 to 0.001 raw in the copying layer."
    )
    return "\n".join(lines) + "\n"


def plot(runs: Path, seeds: int) -> None:
    """Largest start-token weight on non-trigger queries over training: mean and range over seeds."""
    groups = read_groups([runs / f"{attn}-seed{seed}" for attn in ATTENTIONS for seed in range(seeds)])
    with in_style():
        made = Plot(6.6, 2.8)
        ax = axes(made.axes[0, 0], "start-token weight")
        subtitle(ax, "Bigram-Backcopy, non-trigger queries, row shares of the largest head")
        for group in groups:
            curve(made, ax, group, "first_token_weight_nontrigger", "start-token weight", largest)
        ax.set_ylim(0, 1)
        legend(made, groups)
        (RESULTS / "sinks_bb.png").write_bytes(png(made.figure))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.reproduce.sinks_bb", description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/sinks_bb"))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = [one_run(attn, seed, args.runs_dir) for attn in ATTENTIONS for seed in range(args.seeds)]
    write_rows(RESULTS / "sinks_bb.json", rows)
    (RESULTS / "sinks_bb.md").write_text(markdown(rows), encoding="utf-8")
    plot(args.runs_dir, args.seeds)
    folders = [args.runs_dir / f"{attn}-seed{seed}" for attn in ATTENTIONS for seed in range(args.seeds)]
    report = write_report(folders, args.runs_dir / "report.html")
    print(markdown(rows))
    print(f"side-by-side report: {report}")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    run_cli(main)
