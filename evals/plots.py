"""The curves of a report, and what belongs to layers: loss, accuracy, sinks, norms, speed.

`draw` makes every figure that the runs have data for, as deterministic PNG, SVG and the rows of a CSV.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from evals.groups import Group
from evals.plot_parts import Plot, curve, largest, legend, smallest, subtitle, title, titles
from evals.plot_style import DASH, GREY, axes, in_style, layer_ticks, percent, png, svg
from evals.plots_heads import emergence, heads, positions
from evals.plots_maps import all_maps, maps
from evals.read_run import TRIGGER, Run

WIDE = 8.6  # inches of a figure that fills the page


class Drawn(NamedTuple):
    """A finished figure; `rows` are the numbers in it, for its CSV."""

    png: bytes
    svg: bytes
    rows: list[dict[str, Any]]


def draw(groups: Sequence[Group]) -> dict[str, Drawn]:
    """Every figure these runs have data for, by name, in reading order."""
    out: dict[str, Drawn] = {}

    def keep(name: str, plot: Plot | None) -> None:
        if plot is not None:
            out[name] = Drawn(png(plot.figure), svg(plot.figure), plot.rows)

    with in_style(sum(len(group.runs) for group in groups)):
        for make in (loss, accuracy, sink_rate, dynamics, throughput, emergence, heads, positions, maps, extreme):
            keep(make.__name__, make(groups))
        for i, group in enumerate(groups):
            keep(f"all_maps_{i}" if len(groups) > 1 else "all_maps", all_maps(group, len(groups)))
    return out


def references(run: Run) -> Iterator[tuple[str, float]]:
    """What to compare a loss with: (name, nats per token) of the data's entropies that are known."""
    for name, keys in (
        ("unigram entropy", ("unigram_nats",)),
        ("bigram entropy", ("bigram_heldout_nats", "bigram_nats")),
        ("oracle", ("oracle_nats",)),
        ("oracle on non-trigger queries", ("oracle_bigram_nats",)),
    ):
        value = next((run.entropies[k] for k in keys if k in run.entropies), None)
        if value is not None and not (name.startswith("oracle on") and "oracle_nats" in run.entropies):
            yield name, value


# -------------------------------------------------------------------------------------------------- curves


def loss(groups: Sequence[Group]) -> Plot:
    plot = Plot(4.3, 2.7)
    ax = axes(plot.axes[0, 0], "loss (nats per token)")
    runs = [run for group in groups for run in group.runs]
    shown, first, ends = [], [], []
    for group in groups:
        curve(plot, ax, group, "loss", "training loss", spread=False, alpha=0.4, lw=0.9, marker="")
        curve(plot, ax, group, "val_loss", "validation loss", marker=group.marker)
    for run in runs:
        values = np.concatenate([run.series("loss")[1], run.series("val_loss")[1]])
        values = values[np.isfinite(values)]
        shown += [values.min()] if values.size else []
        first += [values[0]] if values.size else []
        ends += [values[-1]] if values.size else []
    lines: dict[tuple[str, float], list[Group]] = {}
    for group in groups:
        for name, value in dict.fromkeys(pair for run in group.runs for pair in references(run)):
            lines.setdefault((name, round(value, 6)), []).append(group)
            plot.note(group, group.first, name, value=value)
    shown += [value for _, value in lines]
    if first:  # the first loss is the top: a diverging run must not flatten the others
        low, high = min(shown), max([*first, *shown])
        pad = 0.06 * max(high - low, 1e-3)
        ax.set_ylim(low - pad, high + pad)
    subtitle(ax, "thin: training, marked: validation")
    legend(plot, groups)
    for (_, value), owners in lines.items():
        color = GREY if len(owners) == len(groups) else owners[0].color
        ax.axhline(value, color=color, lw=0.8, ls=DASH)
    _name_lines(plot, ax, lines, len(groups), max(ends, default=-np.inf))
    return plot


def _name_lines(plot: Plot, ax: Axes, lines: dict[tuple[str, float], list[Group]], groups: int, end: float) -> None:
    """Names above the reference lines, on the side where the curves (which fall from top left) are not, and apart."""
    plot.figure.draw_without_rendering()
    per_nat = ax.get_window_extent().height / np.ptp(ax.get_ylim()) * 72 / plot.figure.dpi
    least = {True: -np.inf, False: -np.inf}
    for (name, value), owners in sorted(lines.items(), key=lambda item: item[0][1]):
        right = value > end
        at = max(value * per_nat + 2, least[right])
        least[right] = at + 8.5
        ax.annotate(
            name,
            (1 if right else 0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2 if right else 3, at - value * per_nat),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=6.5,
            color=GREY if len(owners) == groups else owners[0].color,
        )


def accuracy(groups: Sequence[Group]) -> Plot | None:
    """Right answers on a task's scored positions."""
    plot = Plot(4.3, 2.7)
    ax = axes(plot.axes[0, 0], "accuracy on validation data")
    if not any([curve(plot, ax, g, "val_accuracy", "accuracy", marker=g.marker) for g in groups]):
        return None
    answers = any([curve(plot, ax, g, "val_exact", "whole answers", ls=DASH, marker="") for g in groups])
    ax.set_ylim(-0.03, 1.03)
    subtitle(ax, "solid: tokens, dashed: whole answers" if answers else "of all scored tokens")
    legend(plot, groups)
    return plot


def sink_rate(groups: Sequence[Group]) -> Plot | None:
    plot = Plot(4.3, 2.7)
    ax = axes(plot.axes[0, 0], "Sink₁ (% of heads)")
    if not any([curve(plot, ax, g, "sink_rate", "Sink₁ (%)", marker=g.marker) for g in groups]):
        return None
    slot = any([curve(plot, ax, g, "sink_rate_slot", "Sink on the slot (%)", ls=DASH, marker="") for g in groups])
    percent(ax)
    subtitle(ax, "solid: first token, dashed: slot" if slot else "of all sequences, layers and heads")
    legend(plot, groups)
    return plot


def throughput(groups: Sequence[Group]) -> Plot | None:
    plot = Plot(4.3, 1.7)
    ax = axes(plot.axes[0, 0], "tokens per second")
    how = {"spread": False, "lw": 0.9, "marker": "", "smooth": len(groups) > 1}
    if not any([curve(plot, ax, g, "tokens_per_s", "tokens per second", **how) for g in groups]):
        return None
    runs = [run for group in groups for run in group.runs]
    speeds = [v[np.isfinite(v)] for v in (run.series("tokens_per_s")[1] for run in runs)]
    ax.set_ylim(0, 2 * max((np.median(v) for v in speeds if v.size), default=0.5))
    legend(plot, groups, markers=False, spread=False)
    return plot


def dynamics(groups: Sequence[Group]) -> Plot | None:
    """Start-token weight, and what goes with it, over training: as many panels as there is data for."""
    runs = [run for group in groups for run in group.runs]
    logged = {key for run in runs for row in run.metrics for key in row}
    bb = any(run.is_bb for run in runs)
    dashed: dict[str, Any] = {"ls": DASH, "marker": ""}
    floor: dict[str, Any] = {"floor": 1e-4}
    weight, start = "start-token weight", lambda run: run.start_key
    excess, copy = "excess risk on the bigram table (nats)", "backcopy risk (nats)"
    panels = (
        (
            "start-token weight",
            f"largest head; {'solid: non-trigger, dashed: trigger queries' if bb else 'all queries (α₁)'}",
            [(start, weight, largest, {}), *([(TRIGGER, f"{weight}, trigger", largest, dashed)] if bb else [])],
        ),
        (
            "excess risk (nats)",
            "solid: bigram, dashed: backcopy",
            [("risk_bigram_excess", excess, None, floor), ("risk_backcopy", copy, None, {**floor, **dashed})],
        ),
        ("value norm, start / others", "smallest head", [("value_drain", "value drain", smallest, {})]),
        ("residual norm, start − others", "largest layer", [("residual_peak", "residual peak", largest, {})]),
    )
    keys = lambda panel: {run.start_key if callable(key) else key for key, *_ in panel[2] for run in runs}
    has = [panel for panel in panels if keys(panel) & logged]
    if not has:
        return None
    columns = min(len(has), 2 if len(has) == 4 else 3)
    rows = len(has) // columns
    plot = Plot(WIDE if len(has) > 1 else 4.3, (2.2 if columns == 3 else 2.4) * rows, rows, columns)
    for ax, (label, what, curves) in zip(plot.axes.ravel(), has, strict=True):
        axes(ax, label)
        subtitle(ax, what)
        for group in groups:
            for key, quantity, pick, style in curves:
                curve(plot, ax, group, key, quantity, pick, **style)
        if "risk" in label:
            ax.set_yscale("log")
        elif "weight" in label and ax.dataLim.y0 >= 0 and ax.dataLim.y1 <= 1:
            ax.set_ylim(-0.03, 1.03)
        elif "/" in label:
            ax.axhline(1, color=GREY, lw=0.8, ls=DASH)
            ax.set_ylim(bottom=0)
    legend(plot, groups)
    return plot


# ------------------------------------------------------------------------------------------ extreme tokens


def extreme(groups: Sequence[Group]) -> Plot | None:
    """Sink logit, value norms and residual norms by layer: a row of three panels per group, all its seeds in it."""
    keys = ("sink_logit", "value_norm_first", "residual_norm_first")
    found = [group for group in groups if any(run.matrix(k) is not None for k in keys for run in group.runs)]
    if not found:
        return None
    plot = Plot(WIDE, 0.35 + (1.9 if len(found) == 1 else 1.55) * len(found), len(found), 3, sharey="col")
    named = ("sink logit", "value norm ‖W_O v‖", "residual norm ‖h‖")
    names = named if len(found) <= 2 else ("sink logit", "‖W_O v‖", "‖h‖")  # rows are lower then
    shown = titles(found, WIDE / 3)
    for row, group in zip(plot.axes, found, strict=True):
        last = group is found[-1]
        for ax, name in zip(row, names, strict=True):
            axes(ax, name, "layer" if last else "")
        for run in group.runs:
            _extreme_row(plot, row, group, run)
        count = f" ({len(group.runs)} seeds)" if group.many else ""
        title(row[0], group, shown[str(group.first.path)].split("\n")[0] + count, many=len(groups) > 1)
        row[0].axhline(0, color=GREY, lw=0.8)
        row[0].margins(y=0.12)
        layer_ticks(row[2])
    for ax in plot.axes[0, 1:]:  # after every row is drawn: the rows share the scale
        ax.set_ylim(bottom=0)
    dot = {"marker": "o", "ls": "", "ms": 4, "color": GREY}
    legend(plot, found[:1], {"first token": dot, "other tokens": {**dot, "mfc": "white"}}, spread=False)
    return plot


def _extreme_row(plot: Plot, row: Sequence[Axes], group: Group, run: Run) -> None:
    for ax, key, inside in (
        (row[0], "sink_logit", group.color),
        (row[1], "value_norm_rest", "white"),
        (row[1], "value_norm_first", group.color),
    ):
        table = run.matrix(key)
        if table is None:
            continue
        plot.table(group, run, key, table, ("layer", "head"))
        offset = np.linspace(-0.22, 0.22, table.shape[1]) if table.shape[1] > 1 else np.zeros(1)
        x = np.arange(len(table))[:, None] + offset[None]
        ax.plot(x.ravel(), table.ravel(), "o", ms=4, mec=group.color, mew=0.9, mfc=inside)
        every = -(-len(table) // 12)
        ax.set_xticks(range(0, len(table), every), run.layer_names(len(table))[::every])
    for key, inside, line in (("residual_norm_rest", "white", DASH), ("residual_norm_first", group.color, "-")):
        values = run.vector(key)
        if values is not None:
            plot.table(group, run, key, values, ("layer",))
            row[2].plot(values, marker="o", ms=4, color=group.color, mfc=inside, ls=line)
