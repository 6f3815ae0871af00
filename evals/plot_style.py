"""How every figure of a report looks: one style sheet, one scale, one colour per run.

Figures are made with `Figure` objects (no pyplot state, no display) in DejaVu Sans, which matplotlib ships,
so that the same run gives the same PNG bytes anywhere. All figures of a page share `dpi_of`, so that text
has one size on it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evals.run_files import Run

INK, GREY, TRIGGER_INK = "#333333", "#767676", "#c2410c"
DASH = (0, (4, 2.2))
UNIT = Normalize(0, 1)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 6),
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "image.cmap": "Blues",
    "lines.linewidth": 1.5,
    "lines.markersize": 3,
    "lines.solid_capstyle": "round",
}


def dpi_of(runs: int) -> int:
    """Pixels per inch: fine for a few runs, coarser where there are many, to bound the size of the page."""
    return round(max(100, 200 / max(1, runs / 4) ** 0.6))


def in_style(runs: int = 1) -> Any:
    """Context with matplotlib's defaults plus `STYLE`, whatever matplotlibrc says."""
    fixed = {"backend": mpl.rcParams["backend"], "figure.dpi": dpi_of(runs)}
    return mpl.rc_context({**mpl.rcParamsDefault, **STYLE, **fixed})


def png(figure: Figure) -> bytes:
    """The PNG bytes of a figure, without a date or a version in them."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    pads = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), layout=pads)


@cache
def _glyphs() -> set[int]:
    return set(FT2Font(findfont("DejaVu Sans")).get_charmap())


def text(value: object, limit: int = 26) -> str:
    """Any text as matplotlib may draw it: no maths, no glyph the font lacks, shortened."""
    shown = {"\n": "⏎", "\r": "⏎", "\t": "⇥", "$": r"\$"}
    chars = str(value)
    chars = chars if len(chars) <= limit else chars[: limit - 1] + "…"
    return "".join(shown.get(c, c if ord(c) in _glyphs() and c.isprintable() else "□") for c in chars)


def token(value: str) -> str:
    """A token as an axis label: blanks made visible, at most 7 characters."""
    return text(str(value).replace(" ", "␣"), 7)


def axes(ax: Axes, ylabel: str, xlabel: str = "training step") -> Axes:
    """Labels and a light grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True)
    return ax


def percent(ax: Axes) -> None:
    """A scale from 0 to 100, or less where every value is small."""
    top = ax.dataLim.y1
    top = 100 if top > 40 else max(10, 1.2 * top)
    ax.set_ylim(-0.03 * top, 1.03 * top)


def whole(ax: Axes) -> None:
    """Ticks on layer numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _line(**style: Any) -> Line2D:
    made = Line2D([], [])
    made.set(**style)
    return made


def legend(ax: Axes, runs: Sequence[Run], kinds: dict[str, dict[str, Any]]) -> None:
    """Above the axes: runs by colour (if several), then `kinds` = {name: line style}."""
    many = len(runs) > 1
    color = GREY if many else runs[0].color
    entries = [(" " + text(r.label), _line(color=r.color)) for r in runs] if many else []
    entries += [(" " + name, _line(**{"color": color, **style})) for name, style in kinds.items()]
    if len(entries) > 1:  # names start with a blank because matplotlib hides a leading "_"
        columns = min(len(entries), 4 if sum(len(n) for n, _ in entries) < 52 else 2)
        ax.legend(
            [h for _, h in entries],
            [n for n, _ in entries],
            loc="lower left",
            bbox_to_anchor=(-0.02, 1),
            ncols=columns,
            borderaxespad=0.1,
            handlelength=1.7,
            handletextpad=0.3,
            columnspacing=1.1,
        )


def curve(ax: Axes, run: Run, key: str, pick: Callable | None = None, floor: float = -np.inf, **style: Any) -> bool:
    """Plot a metric over steps (`pick` reduces a table to one number); False if the run lacks it."""
    steps, values = run.tables(key) if pick else run.series(key)
    if not len(steps):
        return False
    if pick:
        values = np.array([pick(v) if np.isfinite(v).any() else np.nan for v in values])
    if len(steps) > 1500:  # means of bins: as many as there are pixels
        bins = np.array_split(np.arange(len(steps)), 750)
        steps, values = (np.array([a[b].mean() for b in bins]) for a in (steps, values))
    marker = "o" if len(steps) <= 40 else ""
    (line,) = ax.plot(steps, np.maximum(values, floor))
    line.set(**{"color": run.color, "marker": marker, **style})
    return True


def heat(ax: Axes, image: np.ndarray, **kw: Any) -> Any:
    """An image without a frame."""
    drawn = ax.imshow(image, aspect="auto", interpolation="nearest", **kw)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return drawn


def title(ax: Axes, run: Run, what: str, many: bool) -> None:
    """The run's name in its colour where there are several, and what is shown."""
    lines = [text(run.label, 24), what] if many else [what]
    ax.set_title("\n".join(line for line in lines if line), loc="left", color=run.color if many else INK)
