"""What heads look at: the example attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from evals.groups import Group
from evals.plot_parts import Plot, title, titles
from evals.plot_style import TRIGGER_INK, heat, text, token
from evals.read_run import Maps, Run

WIDE = 8.6
MAX_PANELS = 24
MOST_GROUPS = 4  # whose heads are all drawn
ROOT = PowerNorm(0.5, 0, 1)  # attention is mostly small: a linear scale would show white paper


def example(group: Group) -> Run | None:
    """The run of a group whose maps stand for it: the first that has some."""
    return next((run for run in group.runs if run.maps is not None), None)


def columns_for(groups: int) -> int:
    """Panels beside each other."""
    return 2 if groups in (2, 4) else min(groups, 3)


def tokens_shown(groups: int) -> int:
    """How many tokens of a sequence have room in a panel."""
    return 64 if groups == 1 else 32 if columns_for(groups) == 2 else 20


def panels_shown(groups: int) -> int:
    """How many heads of a run are drawn."""
    return max(6, MAX_PANELS // groups)


def strongest(run: Run, maps: Maps) -> np.ndarray:
    """[L, H] start-token weight of the heads in the maps: the evaluation's, else the maps' own column."""
    shape = maps.weights.shape[1:3]
    table = run.weights()
    if table is not None and table.shape == shape:
        return np.nan_to_num(table, nan=-1)
    share = [[maps.panel(0, l, h)[:, maps.slots].mean() for h in range(shape[1])] for l in range(shape[0])]
    return np.array(share)


def _map(ax: Axes, maps: Maps, layer: int, head: int, size: int | None = None) -> tuple[Any, np.ndarray]:
    """One map, the part above the diagonal greyed; `size` crops to the first tokens."""
    image = maps.panel(0, layer, head)
    size = min(size or len(image), len(image))
    image = image[:size, : size + maps.slots]
    future = np.arange(image.shape[1])[None] - maps.slots > np.arange(size)[:, None]
    ax.set_facecolor("#f1f1ef")
    drawn = heat(ax, np.where(future & (image == 0), np.nan, image), norm=ROOT)
    ax.set_xticks([])
    ax.set_yticks([])
    return drawn, image


def maps(groups: Sequence[Group]) -> Plot | None:
    """The strongest head of each group's first run, large, with its tokens."""
    found = [(group, run, run.maps) for group in groups if (run := example(group)) and run.maps]
    if not found:
        return None
    many = len(groups) > 1
    columns = columns_for(len(found))
    rows = -(-len(found) // columns)
    size = tokens_shown(len(found))
    side = 6.0 if len(found) == 1 else 0.88 * WIDE / columns
    plot = Plot(6.6 if len(found) == 1 else WIDE, (side + 0.35 * many) * rows, rows, columns)
    shown = titles(groups, 0.8 * WIDE / columns)
    for ax in plot.axes.ravel()[len(found) :]:
        ax.set_axis_off()
    drawn: Any = None  # of the last one: all share a scale
    for n, (ax, (group, run, own)) in enumerate(zip(plot.axes.ravel(), found, strict=False)):
        table = strongest(run, own)
        layer, head = divmod(int(np.argmax(table)), table.shape[1])
        drawn, image = _map(ax, own, layer, head, size)
        labels = own.labels[0][: len(image)]
        names = [token(t) for t in labels]
        small = 6.5 if len(names) <= 32 else 5
        ax.set_xticks(range(len(names) + own.slots), ["slot"] * own.slots + names, rotation=90, fontsize=small)
        ax.set_yticks(range(len(names)), names, fontsize=small)
        ids = np.isin(own.tokens[0][: len(names)], (run.data.get("meta") or {}).get("trigger_ids") or [])
        for label, hit in zip(ax.get_yticklabels(), ids, strict=True):
            if hit:
                label.set(color=TRIGGER_INK, fontweight="bold")
        ax.set_xlabel("key" if n >= len(found) - columns else "")
        ax.set_ylabel("query" if n % columns == 0 else "")
        name = shown[str(run.path)].replace("\n", ", ") if columns < 3 else shown[str(run.path)]
        title(ax, group, name if many or group.many else "", run.head_name((layer, head), len(table)), many=many)
        place = {"layer": layer, "head": head}
        for (query, key), value in np.ndenumerate(image):
            at = {"query": query, "key": key - own.slots, "query_token": labels[query]}
            plot.note(group, run, "share of the query's attention", **place, **at, value=float(value))
    bar = plot.figure.colorbar(drawn, ax=plot.axes, fraction=0.03, pad=0.015, aspect=30, format="%g",
                               ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])  # fmt: skip
    bar.set_label("share of the query's attention")
    return plot


def all_maps(group: Group, groups: int) -> Plot | None:
    """All heads of a group's first run (the strongest ones where there are many) as small maps."""
    run = example(group)
    if run is None or run.maps is None or groups > MOST_GROUPS:
        return None
    table = strongest(run, run.maps)
    if table.size == 1:
        return None
    cap = panels_shown(groups)
    keep = np.sort(np.argsort(-table.ravel(), kind="stable")[:cap])
    columns = table.shape[1] if table.size <= cap and 3 <= table.shape[1] <= 8 else min(6, len(keep))
    rows = -(-len(keep) // columns)
    wide = min(WIDE, 2.1 * columns)
    plot = Plot(wide, (wide / columns + 0.12) * rows, rows, columns)
    for ax in plot.axes.ravel()[len(keep) :]:
        ax.set_axis_off()
    layers = run.layer_names(len(table))
    for ax, n in zip(plot.axes.ravel(), keep, strict=False):
        layer, head = divmod(int(n), table.shape[1])
        _map(ax, run.maps, layer, head)
        ax.set_title(text(f"L{layers[layer]} H{head} · {max(table[layer, head], 0):.2f}"), fontsize=7.5, loc="left")
        plot.note(group, run, run.start_key, layer=layer, head=head, value=float(table[layer, head]))
    return plot
