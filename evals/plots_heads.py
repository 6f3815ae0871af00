"""Which heads are sinks, and what they look at: the layer x head tables and the example attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from evals.plot_style import GREY, TRIGGER_INK, UNIT, axes, figure, heat, legend, percent, title, token
from evals.run_files import ALPHA, NONTRIGGER, TRIGGER, Maps, Run

MAX_PANELS = 24
ROOT = PowerNorm(0.5, 0, 1)  # attention is mostly small: a linear scale would show white paper
CONDITIONS = ((ALPHA, "all queries (α₁)"), (NONTRIGGER, "non-trigger queries"), (TRIGGER, "trigger queries"))

# ------------------------------------------------------------------------------------- heads and positions


def heads(runs: Sequence[Run]) -> Figure | None:
    """Layer x head tables: a row of panels per kind of query and a column per run; for one run, one row."""
    tables = {
        (i, key): run.matrix(run.share_key(key, [run.latest()])) for i, run in enumerate(runs) for key, _ in CONDITIONS
    }
    kinds = [kind for kind in CONDITIONS if any(tables[i, kind[0]] is not None for i in range(len(runs)))]
    if not kinds:
        return None
    many = len(runs) > 1
    columns = min(len(runs), 4) if many else len(kinds)
    blocks = -(-len(runs) // columns) if many else 1
    rows = blocks * len(kinds) if many else 1
    layers = max(t.shape[0] for t in tables.values() if t is not None)
    high = max(min(0.34 * layers, 4.2), 1.1) + (0.75 if many else 0.6)
    made = figure(min(8.6, 1.1 + 2.6 * columns), high * rows)
    grid = made.subplots(rows, columns, squeeze=False)
    for ax in grid.ravel():
        ax.set_axis_off()
    drawn = None
    for k, (key, name) in enumerate(kinds):
        for i, run in enumerate(runs):
            ax, table = grid[(k * blocks + i // columns, i % columns) if many else (0, k)], tables[i, key]
            what = name if len(kinds) > 1 or not many else ""
            if run.star and key != ALPHA and run.share_key(key, [run.latest()]) == key:
                what += ", raw"
            title(ax, run, what, many)
            if table is None:
                ax.text(0.5, 0.5, "not measured", ha="center", color=GREY, transform=ax.transAxes)
            else:
                drawn = _table(ax, run, table)
    assert drawn is not None  # every kind in `kinds` has a table
    made.colorbar(drawn, ax=grid, label="start-token weight", fraction=0.04, pad=0.02, aspect=9 * high * rows)
    return made


def _table(ax: Axes, run: Run, table: np.ndarray) -> Any:
    """One layer x head heat map, with its numbers where there is room for them."""
    ax.set_axis_on()
    drawn = heat(ax, table, norm=UNIT)
    layers, count = table.shape
    every = max(1, layers // 8) if layers > 16 else 1
    ax.set(xlabel="head", ylabel="layer", xticks=range(0, count, max(1, count // 8)))
    ax.set_yticks(range(0, layers, every), run.layer_names(layers)[::every])
    if layers <= 16 and count <= 8:
        for (l, h), value in np.ndenumerate(table):
            ink = "white" if value > 0.55 else "#222222"
            ax.text(
                h,
                l,
                f"{value:.2f}" if value == value else "–",
                ha="center",
                va="center",
                fontsize=7,
                color=ink,
            )
    return drawn


def positions(runs: Sequence[Run]) -> Figure | None:
    found = [(run, v) for run in runs if (v := run.vector("sink_rate_by_position")) is not None]
    if not found:
        return None
    made = figure(4.3, 2.4)
    ax = axes(made.subplots(), "Sinkₖ (% of heads)", "key position k")
    width = 0.8 / len(found)
    count = max(len(v) for _, v in found)
    for i, (run, values) in enumerate(found):
        shift = (i - (len(found) - 1) / 2) * width
        ax.bar(np.arange(len(values)) + 1 + shift, values, width, color=run.color)
        slot = (run.sinks or {}).get("sink_rate_slot")
        if slot is not None:
            ax.bar(shift, slot, width, color=run.color, alpha=0.55)
    slots = any((run.sinks or {}).get("sink_rate_slot") is not None for run, _ in found)
    ticks = [*([0] if slots else []), *range(1, count + 1)]
    ax.set_xticks(ticks, ["slot" if t == 0 else str(t) for t in ticks], fontsize=7)
    percent(ax)
    ax.set_ylim(bottom=0)
    ax.grid(False, axis="x")
    legend(ax, runs, {})
    return made


# ----------------------------------------------------------------------------------------- attention maps


def strongest(run: Run, maps: Maps) -> np.ndarray:
    """[L, H] start-token weight of the heads in the maps: the evaluation's, else the maps' own column."""
    shape = maps.weights.shape[1:3]
    table = run.weights()
    if table is not None and table.shape == shape:
        return np.nan_to_num(table, nan=-1)
    share = [[maps.panel(0, l, h)[:, maps.slots].mean() for h in range(shape[1])] for l in range(shape[0])]
    return np.array(share)


def _map(ax: Axes, maps: Maps, layer: int, head: int, size: int | None = None) -> tuple[Any, int]:
    """One map, the part above the diagonal greyed; `size` crops to the first tokens."""
    image = maps.panel(0, layer, head)
    size = min(size or len(image), len(image))
    image = image[:size, : size + maps.slots]
    future = np.arange(image.shape[1])[None] - maps.slots > np.arange(size)[:, None]
    ax.set_facecolor("#f1f1ef")
    drawn = heat(ax, np.where(future & (image == 0), np.nan, image), norm=ROOT)
    ax.set_xticks([])
    ax.set_yticks([])
    return drawn, size


def maps(runs: Sequence[Run]) -> Figure | None:
    """The strongest head of each run, large, with its tokens."""
    found = [(run, run.maps) for run in runs if run.maps is not None]
    if not found:
        return None
    many = len(runs) > 1
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    made = figure(8.6 if many else 6.6, (4.2 if many else 6.2) * rows)
    grid = made.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid[len(found) :]:
        ax.set_axis_off()
    drawn: Any = None  # of the last one: all share a scale
    for ax, (run, own) in zip(grid, found, strict=False):
        table = strongest(run, own)
        layer, head = divmod(int(np.argmax(table)), table.shape[1])
        drawn, size = _map(ax, own, layer, head, 32 if many else 64)
        names = [token(t) for t in own.labels[0][:size]]
        small = 6.5 if size <= 32 else 5
        ax.set_xticks(range(size + own.slots), ["slot"] * own.slots + names, rotation=90, fontsize=small)
        ax.set_yticks(range(size), names, fontsize=small)
        ids = np.isin(own.tokens[0][:size], (run.data.get("meta") or {}).get("trigger_ids") or [])
        for label, hit in zip(ax.get_yticklabels(), ids, strict=True):
            if hit:
                label.set(color=TRIGGER_INK, fontweight="bold")
        ax.set(xlabel="key", ylabel="query")
        title(ax, run, run.head_name((layer, head), len(table)), many)
    made.colorbar(drawn, ax=grid, label="share of the query's attention", fraction=0.03, pad=0.015, aspect=30,
                  ticks=[0, 0.01, 0.1, 0.25, 0.5, 1], format="%g")  # fmt: skip
    return made


def all_maps(run: Run, runs: int) -> Figure | None:
    """All heads (the strongest ones where there are many) as small maps."""
    if run.maps is None:
        return None
    table = strongest(run, run.maps)
    if table.size == 1:
        return None
    cap = max(4, MAX_PANELS // runs)
    keep = np.sort(np.argsort(-table.ravel(), kind="stable")[:cap])
    columns = table.shape[1] if table.size <= cap and 3 <= table.shape[1] <= 8 else min(6, len(keep))
    rows = -(-len(keep) // columns)
    wide = min(8.6, 2.1 * columns)
    made = figure(wide, (wide / columns + 0.12) * rows)
    grid = made.subplots(rows, columns, squeeze=False).ravel()
    for ax in grid[len(keep) :]:
        ax.set_axis_off()
    layers = run.layer_names(len(table))
    for ax, n in zip(grid, keep, strict=False):
        layer, head = divmod(int(n), table.shape[1])
        _map(ax, run.maps, layer, head)
        ax.set_title(f"L{layers[layer]} H{head} · {max(table[layer, head], 0):.2f}", fontsize=7.5, loc="left")
    return made
