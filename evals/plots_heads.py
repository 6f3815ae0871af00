"""Which heads are sinks, and from when on: tables of layers and heads, key positions. Heads of two seeds are unrelated,
so every run has a panel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from evals.groups import Group, band
from evals.plot_parts import Plot, header, legend, title, titles
from evals.plot_style import GREY, UNIT, axes, heat, percent
from evals.read_run import ALPHA, NONTRIGGER, TRIGGER, Run

WIDE = 8.6
MAX_ROWS = 32
CONDITIONS = ((ALPHA, "all queries (α₁)"), (NONTRIGGER, "non-trigger queries"), (TRIGGER, "trigger queries"))
LEAST_CELL = 0.3  # inches of a cell that has its number in it
BARS = 3  # groups whose bars beside each other can be read; more become lines


def emergence(groups: Sequence[Group]) -> Plot | None:
    """Start-token weight of each head over training, a panel per run."""
    found = [(group, run, *run.tables(run.start_key)) for group in groups for run in group.runs]
    found = [entry for entry in found if len(entry[2]) > 1]
    if not found:
        return None
    columns = min(3, len(found))
    deep = -(-len(found) // columns)
    rows = min(max(8, MAX_ROWS // deep), max(w[0].size for *_, w in found))
    many = len(found) > 1
    titled = (0.3 if any(group.many for group in groups) else 0.16) if many else 0
    high = max(0.17 * rows, 0.7) + titled
    plot = Plot(WIDE, 0.55 + (high + 0.2) * deep, deep, columns, sharex=False)
    shown = titles(groups, 0.85 * WIDE / columns)
    for ax in plot.axes.ravel()[len(found) :]:
        ax.set_axis_off()
    drawn: Any = None  # of the last one: all share a scale
    for n, (ax, (group, run, steps, w)) in enumerate(zip(plot.axes.ravel(), found, strict=False)):
        flat = w.reshape(len(steps), -1)
        pick = np.sort(np.argsort(-np.nan_to_num(flat[-1], nan=-1), kind="stable")[:rows])
        middle = (steps[1:] + steps[:-1]) / 2
        edges = np.concatenate([steps[:1], middle, steps[-1:]])
        # Thousands of cells would make an SVG of megabytes: an image in it.
        drawn = ax.pcolormesh(edges, np.arange(len(pick) + 1), flat[:, pick].T, norm=UNIT, rasterized=True)
        ax.set(yticks=np.arange(len(pick)) + 0.5, ylim=(len(pick), 0))
        ax.set_xlabel("training step" if n >= len(found) - columns else "")
        layers = run.layer_names(w.shape[1])
        ax.set_yticklabels([f"L{layers[i // w.shape[2]]} H{i % w.shape[2]}" for i in pick], fontsize=6.5)
        ax.spines[:].set_visible(False)
        ax.tick_params(axis="y", length=0)
        title(ax, group, shown[str(run.path)] if many else "", many=len(groups) > 1)
        for step, table in zip(steps.tolist(), w, strict=True):
            plot.table(group, run, run.start_key, table, ("layer", "head"), step=step)
    bar = plot.figure.colorbar(drawn, ax=plot.axes, fraction=0.03, pad=0.015, aspect=max(8, 9 * high * deep))
    bar.set_label("start-token weight" if high * deep > 1.2 else "weight")
    return plot


# ------------------------------------------------------------------------------------------- heads


def heads(groups: Sequence[Group]) -> Plot | None:
    """Layer x head tables: a column per kind of query and a row per run; with one kind, runs fill a grid."""
    runs = [(group, run) for group in groups for run in group.runs]
    kinds = [kind for kind in CONDITIONS if any(run.matrix(kind[0]) is not None for _, run in runs)]
    if not kinds:
        return None
    many, seeds = len(runs) > 1, any(group.many for group in groups)
    columns = len(kinds) if len(kinds) > 1 else min(len(runs), 4)
    rows = len(runs) if len(kinds) > 1 else -(-len(runs) // columns)
    tables = [t for _, run in runs for key, _ in kinds if (t := run.matrix(key)) is not None]
    layers = max(t.shape[0] for t in tables)
    titled = (0.3 if seeds else 0.16) * many + (0.16 if len(kinds) > 1 or not many else 0)
    high = max(min((0.3 if rows <= 4 else 0.2) * layers, 4.2), 0.55 if rows > 1 else 1.0)
    plot = Plot(min(WIDE, 1.1 + 2.6 * columns), (high + titled + 0.05) * rows + 0.55, rows, columns)
    shown = titles(groups, (plot.figure.get_figwidth() - 1.1) / columns)
    for ax in plot.axes.ravel():
        ax.set_axis_off()
    drawn = None
    for r, (group, run) in enumerate(runs):
        for k, (key, name) in enumerate(kinds):
            row, column = (r, k) if len(kinds) > 1 else divmod(r, columns)
            ax, table = plot.axes[row, column], run.matrix(key)
            named = shown[str(run.path)] if many and (k == 0 or len(kinds) == 1) else ""
            title(ax, group, named, many=len(groups) > 1)
            if row == 0 and (len(kinds) > 1 or not many):
                header(ax, name, (1 + seeds) * many)
            if table is None:
                ax.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=ax.transAxes)
                continue
            drawn = _table(ax, run, table, (plot.figure.get_figwidth() - 1.1) / columns / table.shape[1] > LEAST_CELL)
            last = r >= len(runs) - (1 if len(kinds) > 1 else columns)
            ax.set_xlabel("head" if last else "")
            ax.tick_params(labelbottom=last or len({t.shape[1] for t in tables}) > 1)
            ax.set_ylabel("layer" if column == 0 else "")
            plot.table(group, run, key, table, ("layer", "head"))
    bar = plot.figure.colorbar(drawn, ax=plot.axes, fraction=0.04, pad=0.02, aspect=max(8, 9 * high * rows))  # type: ignore[arg-type]
    bar.set_label("start-token weight" if high * rows > 1.2 else "weight")
    return plot


def _table(ax: Axes, run: Run, table: np.ndarray, numbers: bool) -> Any:
    """One layer x head heat map, with its numbers where there is room for them."""
    ax.set_axis_on()
    drawn = heat(ax, table, norm=UNIT)
    layers, count = table.shape
    every = max(1, layers // 8) if layers > 16 else 1
    ax.set_xticks(range(0, count, max(1, count // 8)))
    ax.set_yticks(range(0, layers, every), run.layer_names(layers)[::every])
    if layers <= 16 and numbers:
        for (l, h), value in np.ndenumerate(table):
            ink = "white" if value > 0.55 else "#222222"
            said = f"{value:.2f}" if value == value else "–"
            ax.text(h, l, said, ha="center", va="center", fontsize=7, color=ink)
    return drawn


# ------------------------------------------------------------------------------------------- positions


def positions(groups: Sequence[Group]) -> Plot | None:
    """Sinkₖ by key position, mean over seeds; the range where there are several."""
    key = "sink_rate_by_position"
    found = [(g, [(run, v) for run in g.runs if (v := run.vector(key)) is not None]) for g in groups]
    found = [(group, runs) for group, runs in found if runs]
    if not found:
        return None
    plot = Plot(4.3, 2.1)
    ax = axes(plot.axes[0, 0], "Sinkₖ (% of heads)", "key position k")
    width = 0.8 / len(found)
    slotted = False
    for i, (group, runs) in enumerate(found):
        shift = (i - (len(found) - 1) / 2) * width
        for run, values in runs:
            plot.table(group, run, "Sinkₖ (%)", values, ("position",))
        over = band([(np.arange(len(values)) + 1, values) for _, values in runs])
        slots = [s for run, _ in runs if (s := (run.sinks or {}).get("sink_rate_slot")) is not None]
        slotted = slotted or bool(slots)
        spread = np.maximum([over.mean - over.low, over.high - over.mean], 0)  # equal ones may round apart
        if len(found) <= BARS:
            ax.bar(over.steps + shift, over.mean, width, color=group.color)
            if len(runs) > 1:
                ax.errorbar(over.steps + shift, over.mean, spread, fmt="none", ecolor="#222222", elinewidth=0.8)
            if slots:
                ax.bar(shift, np.mean(slots), width, color=group.color, alpha=0.55)
        else:
            ax.plot(over.steps, over.mean, color=group.color, marker=group.marker, lw=1)
            if len(runs) > 1:
                ax.fill_between(over.steps, over.low, over.high, color=group.color, alpha=0.18, lw=0)
            if slots:
                ax.plot([shift], [np.mean(slots)], color=group.color, marker=group.marker, ls="")
        for run, _ in runs:
            if (run.sinks or {}).get("sink_rate_slot") is not None:
                plot.note(group, run, "Sink on the slot (%)", value=(run.sinks or {})["sink_rate_slot"])
    count = max(len(values) for _, runs in found for _, values in runs)
    ticks = [*([0] if slotted else []), *range(1, count + 1)]
    ax.set_xticks(ticks, ["slot" if t == 0 else str(t) for t in ticks], fontsize=6.5)
    percent(ax)
    ax.set_ylim(bottom=0)
    ax.grid(False, axis="x")
    legend(plot, [group for group, _ in found], markers=len(found) > BARS)
    return plot
