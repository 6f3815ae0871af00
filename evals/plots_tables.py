"""Two heat maps: a number for every head, and a number for every depth and length of a hidden sentence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize

from evals.plot_style import UNIT, figure, heat, in_style, png, text

LEAST_TOP = 0.1  # of a scale of scores


def head_map(table: np.ndarray, name: str, title: str) -> bytes:
    """PNG of layers and heads [L, H]; scores from 0 to the largest."""
    layers, heads = table.shape
    with in_style():
        made = figure(1.9 + 0.1 * max(12, heads), max(1.7, 0.11 * layers + 1.0))
        ax = made.subplots()
        drawn = heat(ax, table, norm=Normalize(0, max(LEAST_TOP, float(table.max()))))
        made.colorbar(drawn, ax=ax, label=name)
        ax.set(xlabel="head", ylabel="layer")
        ax.set_xticks(range(0, heads, max(1, heads // 8)))
        ax.set_yticks(range(0, layers, max(1, layers // 8)))
        ax.set_title(text(title))
        return png(made)


def needle_grid(shares: np.ndarray, lengths: Sequence[int], depths: Sequence[float], title: str) -> bytes:
    """PNG of the share that was given back [depths, lengths], with its numbers."""
    with in_style():
        made = figure(1.9 + 0.55 * len(lengths), 1.2 + 0.3 * len(depths))
        ax = made.subplots()
        drawn = heat(ax, shares, norm=UNIT)
        made.colorbar(drawn, ax=ax, label="digits given back")
        ax.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        ax.set(xlabel="tokens", ylabel="depth")
        for (row, column), share in np.ndenumerate(shares):
            ink = "white" if share > 0.55 else "#222222"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=ink)
        ax.set_title(text(title))
        return png(made)
