"""The Markdown table and the plot of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.plot_style import figure, in_style, png
from scripts.bench.kernels.cases import OURS


def markdown(result: dict[str, Any], platform: str) -> str:
    """A table of medians and bars, the claims that follow, and what was not measured."""
    versions = result["environment"]["versions"]
    lines = [
        f"# Kernels on {result['device']}",
        "",
        f"{result['rounds']} interleaved rounds, medians; seed {result['seed']}; jax {versions.get('jax', '?')}. "
        "A ratio above 1 says that ours is faster.",
        "",
        "| case | " + OURS + " | rivals | bar | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        medians = row["median_ms"]
        others = ", ".join(f"{name} {ms:.2f}" for name, ms in medians.items() if name != OURS) or "–"
        speed = f" ({row['tflops'][OURS]:.2f} TFLOP/s)" if "tflops" in row else ""
        bar, found = "–", "–"
        if "bar" in row:
            bar = f"{row['bar']:g} × {row['against']}"
            verdict = "reached" if row["reached"] else "NOT reached"
            found = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f}) {verdict}"
        lines.append(f"| {row['case']} | {medians[OURS]:.2f} ms{speed} | {others} | {bar} | {found} |")
    lines.append("")
    for claim in result["derived"]:
        number = f": {claim['ratio']:.2f} (bar {claim['bar']:g})" if "ratio" in claim else ""
        if "us_per_token" in claim:
            number += ", µs a token " + ", ".join(f"{n}: {us:.2f}" for n, us in claim["us_per_token"].items())
        lines.append(f"- {claim['claim']}{number}: {'reached' if claim['reached'] else 'NOT reached'}")
    lines += [f"- {name}: not measured, {why}" for name, why in result["absent"].items()]
    if platform == "cpu":
        lines.append("- GPU and TPU speed: not measured")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time of each contender relative to ours, case by case, on a logarithmic axis."""
    names = sorted({name for row in rows for name in row["median_ms"]}, key=lambda n: (n != OURS, n))
    with in_style():
        fig = figure(9, 0.3 * len(rows) + 1.2)
        axis = fig.subplots()
        for i, name in enumerate(names):
            here = [(row["median_ms"][name] / row["median_ms"][OURS], y) for y, row in enumerate(rows)
                    if name in row["median_ms"]]  # fmt: skip
            axis.plot(*zip(*here, strict=True), "o", color=f"C{i}", label=name)
        for y, row in enumerate(rows):
            if "bar" in row:
                axis.plot([row["bar"]] * 2, [y - 0.35, y + 0.35], color="#444444", linewidth=1)
        axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(f"time relative to {OURS} (a line: the bar)")
        axis.legend()
        path.write_bytes(png(fig))
