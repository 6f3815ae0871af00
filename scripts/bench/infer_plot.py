"""The picture of `infer_cpu`: tokens/s of every contender, prefill and decode, one colour a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(path: Path, results: dict[str, Any]) -> None:
    """Bars beside each other, with the roof of each part as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, part in zip(axes, ("prefill", "decode"), strict=True):
        for i, (dtype, found) in enumerate(results.items()):
            names = list(found["tokens_per_s"])
            speeds = [found["tokens_per_s"][n][part] for n in names]
            bars = axis.bar([x + 0.4 * i for x in range(len(names))], speeds, 0.38, label=dtype, color=f"C{i}")
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
            axis.axhline(found["roofs"][part]["tokens_per_s"], color=f"C{i}", linestyle=":", linewidth=1)
            axis.set_xticks([x + 0.2 * (len(results) - 1) for x in range(len(names))], names, fontsize=8)
        bound = {"prefill": "the best product", "decode": "memory bandwidth"}[part]
        axis.set_title(f"{part}, tokens/s (dotted: {bound})", fontsize=10)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
