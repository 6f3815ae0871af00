"""What figures of a report are made of: a `Plot` that keeps its numbers (its CSV), legends, curves with bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from evals.groups import Group, band, seed_of
from evals.labels import tell_apart
from evals.plot_style import FAINT, GREY, INK, figure, text
from evals.read_run import Run


class Plot:
    """A figure with its axes [rows, columns], and `rows`, the numbers in it."""

    def __init__(self, width: float, height: float, rows: int = 1, columns: int = 1, **how: Any) -> None:
        self.figure = figure(width, height)
        self.axes: np.ndarray = self.figure.subplots(rows, columns, squeeze=False, **how)
        self.rows: list[dict[str, Any]] = []

    def note(self, group: Group, run: Run | str, quantity: str, **numbers: Any) -> None:
        """Keep one number; `run` is a run of the group, or what the number is over its seeds."""
        seed, folder = (run, "") if isinstance(run, str) else (run.seed, run.path.name)
        self.rows.append({"group": group.label, "seed": seed, "run": folder, "quantity": quantity, **numbers})

    def table(self, group: Group, run: Run, quantity: str, values: np.ndarray, axes: Sequence[str], **at: Any) -> None:
        """Keep an array of numbers, with one index column per axis."""
        for index, value in np.ndenumerate(values):
            self.note(group, run, quantity, **at, **dict(zip(axes, index, strict=True)), value=float(value))


# ------------------------------------------------------------------------------------------------- legends


def _line(**style: Any) -> Line2D:
    made = Line2D([], [])
    made.set(**style)
    return made


HANDLE = 0.36  # inches of a legend's line and the gaps beside it
LINE = 0.158  # inches of a legend's row


def legend(
    plot: Plot,
    groups: Sequence[Group],
    kinds: dict[str, dict[str, Any]] | None = None,
    markers: bool = True,
    spread: bool = True,
) -> None:
    """One legend above the figure, which grows by it: groups by colour (if several), then `kinds` = {name: style}.

    spread: groups of several seeds add what their line and band are. Names are cut to the width, never to one text.
    """
    made = plot.figure
    width = made.get_figwidth() - 0.15
    many = len(groups) > 1
    grey = GREY if many else groups[0].color
    entries: list[tuple[str, Artist]] = []
    if many:
        most = max(len(group.title) - len(group.label) for group in groups)
        names = tell_apart([group.label for group in groups], int((width - HANDLE) / 0.075) - most)
        names = [name + g.title[len(g.label) :] for name, g in zip(names, groups, strict=True)]
        style = lambda g: {"color": g.color, **({"marker": g.marker} if markers else {})}
        entries += [(text(name), _line(**style(g))) for name, g in zip(names, groups, strict=True)]
    entries += [(name, _line(**{"color": grey, **style})) for name, style in (kinds or {}).items()]
    if spread and any(group.many for group in groups):
        entries.append(("mean and range over seeds", Patch(color=grey, alpha=0.3, lw=0)))
    if len(entries) < 2:
        return
    columns = _columns([name for name, _ in entries], width)
    rows = -(-len(entries) // columns)
    made.set_figheight(made.get_figheight() + LINE * rows + 0.08)
    made.legend(
        [handle for _, handle in entries],
        [" " + name for name, _ in entries],  # a blank because matplotlib hides a leading "_"
        loc="outside upper left",
        ncols=columns,
        borderaxespad=0.1,
        labelspacing=0.25,
        handlelength=1.7,
        handletextpad=0.3,
        columnspacing=1.1,
    )


def _columns(names: Sequence[str], width: float) -> int:
    """As many columns as fit into `width` inches, filled downwards as matplotlib does."""
    measure = FigureCanvasAgg(Figure(dpi=100)).get_renderer()
    prop = FontProperties(size=mpl.rcParams["legend.fontsize"])
    wide = [measure.get_text_width_height_descent(" " + name, prop, False)[0] / 100 + HANDLE for name in names]
    for columns in range(min(len(names), 6), 1, -1):
        deep = -(-len(names) // columns)
        if -(-len(names) // deep) == columns:
            per_column = [max(wide[i : i + deep]) for i in range(0, len(wide), deep)]
            if sum(per_column) + 0.12 * (columns - 1) <= width:
                return columns
    return 1


# -------------------------------------------------------------------------------------------------- curves


def curve(
    plot: Plot,
    ax: Axes,
    group: Group,
    key: str | Callable[[Run], str],
    quantity: str,
    pick: Callable | None = None,
    floor: float = -np.inf,
    spread: bool = True,
    smooth: bool = False,
    **style: Any,
) -> bool:
    """Draw a metric over steps, mean and range over the group's seeds; False if no run has it.

    pick: reduces a table to one number. floor: smaller values are drawn there. smooth: medians of a few steps.
    """
    found = []
    for run in group.runs:
        name = key if isinstance(key, str) else key(run)
        steps, values = run.tables(name) if pick else run.series(name)
        if not len(steps):
            continue
        if pick:
            values = np.array([pick(v) if np.isfinite(v).any() else np.nan for v in values])
        found.append((steps, values))
        for step, value in zip(steps.tolist(), values.tolist(), strict=True):
            plot.note(group, run, quantity, step=step, value=value)
    if not found:
        return False
    over = band(found)
    steps, mean, low, high = over
    if len(found) > 1:
        for name, values in zip(("mean", "smallest", "largest"), over[1:], strict=True):
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                plot.note(group, name, quantity, step=step, value=value)
    if smooth and len(steps) > SMOOTH_BINS:
        steps, mean = (_binned(x, SMOOTH_BINS, np.median) for x in (steps, mean))
    elif len(steps) > MOST_POINTS:  # as many as there are pixels
        steps, mean, low, high = (_binned(x, BINS, np.mean) for x in (steps, mean, low, high))
    marker = group.marker if len(steps) <= 40 else ""
    (line,) = ax.plot(steps, np.maximum(mean, floor))
    line.set(**{"color": group.color, "marker": marker, **style})
    if spread and len(found) > 1:
        ax.fill_between(steps, np.maximum(low, floor), np.maximum(high, floor), color=group.color, alpha=0.18, lw=0)
    return True


MOST_POINTS, BINS, SMOOTH_BINS = 1500, 750, 60


def _binned(values: np.ndarray, bins: int, middle: Callable) -> np.ndarray:
    """Of consecutive points."""
    return np.array([middle(part) for part in np.array_split(values, bins)])


def largest(values: np.ndarray) -> float:
    """Of the heads or layers that have a number."""
    return float(np.nanmax(values))


def smallest(values: np.ndarray) -> float:
    return float(np.nanmin(values))


# -------------------------------------------------------------------------------------------------- panels


def subtitle(ax: Axes, text: str) -> None:
    """What is drawn how, small above a panel."""
    ax.set_title(text, loc="left", fontsize=7, color=GREY)


def header(ax: Axes, text: str, lines: int) -> None:
    """A column's name above the `lines` lines of its first panel's title."""
    at = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(text, (0, 1), xytext=(0, 6 + 11 * lines), fontsize=8.5, color=INK, va="bottom", **at)


def titles(groups: Sequence[Group], width: float) -> dict[str, str]:
    """{folder: the panel title of a run} for panels `width` inches wide: its group's name, below it its seed."""
    names = tell_apart([group.label for group in groups], max(12, int(width / 0.085)))
    found = {}
    for name, group in zip(names, groups, strict=True):
        for run in group.runs:
            found[str(run.path)] = text(name) + (f"\n{seed_of(run, group)}" if group.many else "")
    return found


def title(ax: Axes, group: Group, *lines: str, many: bool) -> None:
    """Left above a panel, in the group's colour where there are several groups."""
    color = group.color if many and group.color not in FAINT else INK
    ax.set_title("\n".join(line for line in lines if line), loc="left", color=color)
