"""How every figure of a report looks: one style sheet, one scale, one colour and marker per group of runs.

Figures are made with `Figure` objects (no pyplot state, no display) in DejaVu Sans, which matplotlib ships,
so that the same run gives the same PNG and SVG bytes anywhere. All figures of a page share `dpi_of`, so that text
has one size on it.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK, GREY, TRIGGER_INK = "#333333", "#767676", "#c2410c"
FAINT = ("#aaaacc",)  # good for a line, not for text
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
    fixed = {"backend": mpl.rcParams["backend"], "figure.dpi": dpi_of(runs), "svg.hashsalt": "jaxattn"}
    return mpl.rc_context({**mpl.rcParamsDefault, **STYLE, **fixed})


def png(figure: Figure) -> bytes:
    """The PNG bytes of a figure, without a date or a version in them."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The SVG bytes of a figure as it was last laid out, without a date or a version in them; text is outlines."""
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    pads = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), layout=pads)


@cache
def _glyphs() -> set[int]:
    return set(FT2Font(findfont("DejaVu Sans")).get_charmap())


def text(value: object) -> str:
    """Any text as matplotlib may draw it: no maths, no glyph the font lacks."""
    shown = {"\n": "⏎", "\r": "⏎", "\t": "⇥", "$": r"\$"}
    return "".join(shown.get(c, c if ord(c) in _glyphs() and c.isprintable() else "□") for c in str(value))


def token(value: str) -> str:
    """A token as an axis label: blanks made visible, at most 7 characters."""
    shown = str(value).replace(" ", "␣")
    return text(shown if len(shown) <= 7 else shown[:6] + "…")


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


def layer_ticks(ax: Axes) -> None:
    """Ticks on layer numbers only."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def heat(ax: Axes, image: np.ndarray, **kw: Any) -> Any:
    """An image without a frame."""
    drawn = ax.imshow(image, aspect="auto", interpolation="nearest", **kw)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return drawn
