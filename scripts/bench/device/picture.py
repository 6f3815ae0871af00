"""The picture of a run: errors of every op, rates of attention against its rivals and the roof, what is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evals.plot_style import figure, in_style, png
from scripts.bench.device.rates import roof
from scripts.bench.device.run import Run

PARTS = ("forward", "forward and backward")
TOLERANCE = 2e-2  # of `numerics`, which would start JAX


def draw(run: Run, path: Path) -> None:
    """Empty panels stay empty: a run that was cut short has a picture too."""
    with in_style():
        fig = figure(10, 7)
        panels = fig.subplots(2, 3)
        _errors(panels[0, 0], run)
        for row, dim in enumerate((128, 64)):
            for column, part in enumerate(PARTS):
                _attention(panels[row, 1 + column], run, dim, part)
        _others(panels[1, 0], run)
        partial = path.with_suffix(".png.partial")
        partial.write_bytes(png(fig))
    os.replace(partial, path)


def _errors(axis: Any, run: Run) -> None:
    rows = [row for row in run.of("numerics") if row["status"] == "ok"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for row in rows:
        color = "C0" if row["right"] else "red"
        axis.plot(max(row["worst"], 1e-7), ops.index(row["op"]), "o", color=color, fillstyle="none")
    axis.axvline(TOLERANCE, color="#444444", linewidth=1)
    axis.set(xscale="log", yticks=range(len(ops)), yticklabels=ops, title="error, of the largest entry (line: allowed)")
    axis.invert_yaxis()


def _attention(axis: Any, run: Run, dim: int, part: str) -> None:
    rows = [r for r in run.of("attention") if r["case"].startswith(f"{part} T") and r["shape"]["dim"] == dim]
    rows = sorted((r for r in rows if r.get("seconds_a_call")), key=lambda r: r["shape"]["length"])
    for n, name in enumerate(sorted({name for row in rows for name in row["seconds_a_call"]})):
        here = [row for row in rows if name in row["seconds_a_call"]]
        at = [row["shape"]["length"] for row in here]
        rates = {
            of: [row["flops"] / row["seconds_a_call"][name][of] / 1e12 for row in here]
            for of in ("median", "least", "most")
        }
        axis.plot(at, rates["median"], "o-", color=f"C{n}", label=name)
        axis.fill_between(at, rates["most"], rates["least"], color=f"C{n}", alpha=0.2, linewidth=0)
    if rows:
        axis.axhline(roof(run, "flops")[0] / 1e12, color="#444444", linewidth=1, label="roof")
    axis.set(title=f"TFLOP/s, {part}, D {dim}", xlabel="tokens", xscale="log", ylim=(0, None))
    if rows:
        ticks = sorted({row["shape"]["length"] for row in rows})
        axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axis.minorticks_off()
        axis.legend()


def _others(axis: Any, run: Run) -> None:
    """Times of the other cases, relative to ours."""
    rows = [r for s in ("recurrence", "sparse") for r in run.of(s) if "jaxattn" in r.get("seconds_a_call", {})]
    names = sorted({name for row in rows for name in row["seconds_a_call"]})
    for n, name in enumerate(names):
        here = [
            (row["seconds_a_call"][name]["median"] / row["seconds_a_call"]["jaxattn"]["median"], y)
            for y, row in enumerate(rows)
            if name in row["seconds_a_call"]
        ]
        axis.plot(*zip(*here, strict=True), "o", color=f"C{n}", label=name)
    axis.set(xscale="log", yticks=range(len(rows)), yticklabels=[row["case"] for row in rows])
    axis.set_title("time, relative to ours")
    axis.invert_yaxis()
    if rows:
        axis.legend()
