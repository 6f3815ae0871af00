"""The figures of a report, as deterministic PNG bytes.

`draw` turns runs into {name: PNG}; a figure whose data the runs do not have is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evals.plot_style import (
    DASH,
    GREY,
    UNIT,
    axes,
    curve,
    figure,
    in_style,
    legend,
    percent,
    png,
    title,
    whole,
)
from evals.plots_heads import all_maps, heads, maps, positions
from evals.run_files import ALPHA, NONTRIGGER, TRIGGER, Run, read_run
from jaxattn.errors import DataError

MAX_ROWS = 32


def draw(runs: Sequence[Run]) -> dict[str, bytes]:
    """Every figure these runs have data for, {name: PNG bytes}, in reading order."""
    out: dict[str, bytes] = {}
    with in_style(len(runs)):
        for make in (loss, accuracy, sink_rate, dynamics, throughput, emergence, heads, positions, maps, extreme):
            made = make(runs)
            if made is not None:
                out[make.__name__] = png(made)
        for i, run in enumerate(runs):
            made = all_maps(run, len(runs))
            if made is not None:
                out[f"all_maps_{i}" if len(runs) > 1 else "all_maps"] = png(made)
    return out


def write_plots(run_dir: str | Path) -> list[Path]:
    """Draw the figures of one run into RUN_DIR/plots/*.png and return their paths."""
    run = read_run(run_dir)
    return save_plots(run.path, draw([run]))


def save_plots(run_dir: Path, figures: dict[str, bytes]) -> list[Path]:
    """Write drawn figures to RUN_DIR/plots. Raises `DataError` if it cannot be written."""
    folder = run_dir / "plots"
    try:
        folder.mkdir(exist_ok=True)
        for name, data in figures.items():
            (folder / f"{name}.png").write_bytes(data)
    except OSError as error:
        raise DataError(f"the plots cannot be written to {folder}: {error.strerror or error}.") from error
    return [folder / f"{name}.png" for name in figures]


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


def loss(runs: Sequence[Run]) -> Figure:
    made = figure(4.3, 3.1)
    ax = axes(made.subplots(), "loss (nats per token)")
    shown, first, ends = [], [], []
    for run in runs:
        curve(ax, run, "loss", alpha=0.4, lw=0.9, marker="")
        curve(ax, run, "val_loss", marker="o")
        values = np.concatenate([run.series("loss")[1], run.series("val_loss")[1]])
        values = values[np.isfinite(values)]
        shown += [values.min()] if values.size else []
        first += [values[0]] if values.size else []
        ends += [values[-1]] if values.size else []
    lines: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        for name, value in references(run):
            lines.setdefault((name, round(value, 6)), []).append(run)
    for (name, value), owners in lines.items():
        color = GREY if len(owners) == len(runs) else owners[0].color
        ax.axhline(value, color=color, lw=0.8, ls=DASH)
        right = value > max(ends, default=-np.inf)  # where the curves are not: they fall from top left
        ax.annotate(
            name,
            (1 if right else 0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2 if right else 3, 2),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=6.5,
            color=color,
        )
        shown.append(value)
    if first:  # the first loss is the top: a diverging run must not flatten the others
        low, high = min(shown), max([*first, *shown])
        pad = 0.06 * max(high - low, 1e-3)
        ax.set_ylim(low - pad, high + pad)
    legend(ax, runs, {"training": {"lw": 0.9, "alpha": 0.6}, "validation": {"marker": "o"}})
    return made


def accuracy(runs: Sequence[Run]) -> Figure | None:
    """Right answers on a task's scored positions."""
    made = figure(4.3, 3.1)
    ax = axes(made.subplots(), "accuracy on validation data")
    if not any([curve(ax, run, "val_accuracy", marker="o") for run in runs]):
        return None
    whole = any([curve(ax, run, "val_exact", ls=DASH, marker="") for run in runs])
    ax.set_ylim(-0.03, 1.03)
    legend(ax, runs, {"tokens": {"marker": "o"}, "whole answers": {"ls": DASH}} if whole else {})
    return made


def sink_rate(runs: Sequence[Run]) -> Figure | None:
    made = figure(4.3, 3.1)
    ax = axes(made.subplots(), "Sink₁ (% of heads)")
    if not any([curve(ax, run, "sink_rate", marker="o") for run in runs]):
        return None
    slot = any([curve(ax, run, "sink_rate_slot", ls=DASH, marker="") for run in runs])
    percent(ax)
    legend(ax, runs, {"first token": {"marker": "o"}, "learned slot": {"ls": DASH}} if slot else {})
    return made


def throughput(runs: Sequence[Run]) -> Figure | None:
    made = figure(4.3, 1.9)
    ax = axes(made.subplots(), "tokens per second")
    if not any([curve(ax, run, "tokens_per_s", lw=0.9, marker="") for run in runs]):
        return None
    speeds = [v[np.isfinite(v)] for v in (run.series("tokens_per_s")[1] for run in runs)]
    ax.set_ylim(0, 2 * max((np.median(v) for v in speeds if v.size), default=0.5))
    legend(ax, runs, {})
    return made


def dynamics(runs: Sequence[Run]) -> Figure | None:
    """Start-token weight, and what goes with it, over training: as many panels as there is data for."""
    bb = any(run.is_bb for run in runs)
    trigger: dict[str, Any] = {"ls": DASH, "marker": ""}
    first, second = (NONTRIGGER, TRIGGER) if bb else (ALPHA, "")
    risks = [
        ("risk_bigram_excess", None, {"floor": 1e-4}),
        ("risk_backcopy", None, {"floor": 1e-4, **trigger}),
    ]
    panels = (
        (
            "start-token weight, largest head",
            [(first, np.nanmax, {}), (second, np.nanmax, trigger)],
            {"non-trigger queries": {}, "trigger queries": {"ls": DASH}} if bb else {},
        ),
        ("excess risk (nats)", risks, {"bigram": {}, "backcopy": {"ls": DASH}}),
        ("value norm, start / others", [("value_drain", np.nanmin, {})], {}),
        ("residual norm, start − others", [("residual_peak", np.nanmax, {})], {}),
    )
    has = [p for p in panels if any(key in row for key, *_ in p[1] for run in runs for row in run.metrics)]
    if not has:
        return None
    columns = min(len(has), 2 if len(has) == 4 else 3)
    made = figure(8.6 if len(has) > 1 else 4.3, (2.4 if columns == 3 else 2.8) * (len(has) // columns))
    grid = made.subplots(len(has) // columns, columns, squeeze=False).ravel()
    for ax, (label, curves, kinds) in zip(grid, has, strict=True):
        axes(ax, label)
        for run in runs:
            for key, pick, style in curves:
                curve(ax, run, run.share_key(key, run.metrics), pick, **style)
        if "risk" in label:
            ax.set_yscale("log")
        elif "weight" in label and ax.dataLim.y0 >= 0 and ax.dataLim.y1 <= 1:
            ax.set_ylim(-0.03, 1.03)
        elif "/" in label:
            ax.axhline(1, color=GREY, lw=0.8, ls=DASH)
            ax.set_ylim(bottom=0)
        legend(ax, runs, kinds)
    return made


def emergence(runs: Sequence[Run]) -> Figure | None:
    """Start-token weight of each head over training."""
    found = [(run, *run.tables(run.decisive(run.metrics))) for run in runs]
    found = [(run, steps, w) for run, steps, w in found if len(steps) > 1]
    if not found:
        return None
    rows = min(MAX_ROWS, max(w[0].size for _, _, w in found))
    columns = min(3, len(found))
    made = figure(8.6, (0.75 + max(0.17 * rows, 0.9)) * -(-len(found) // columns))
    grid = made.subplots(-(-len(found) // columns), columns, squeeze=False)
    for ax in grid.ravel()[len(found) :]:
        ax.set_axis_off()
    drawn: Any = None  # of the last one: all share a scale
    for ax, (run, steps, w) in zip(grid.ravel(), found, strict=False):
        flat = w.reshape(len(steps), -1)
        pick = np.sort(np.argsort(-np.nan_to_num(flat[-1], nan=-1), kind="stable")[:rows])
        middle = (steps[1:] + steps[:-1]) / 2
        edges = np.concatenate([steps[:1], middle, steps[-1:]])
        drawn = ax.pcolormesh(edges, np.arange(len(pick) + 1), flat[:, pick].T, norm=UNIT)
        ax.set(yticks=np.arange(len(pick)) + 0.5, ylim=(len(pick), 0), xlabel="training step")
        layers = run.layer_names(w.shape[1])
        ax.set_yticklabels([f"L{layers[i // w.shape[2]]} H{i % w.shape[2]}" for i in pick], fontsize=6.5)
        ax.spines[:].set_visible(False)
        ax.tick_params(axis="y", length=0)
        title(ax, run, "", len(runs) > 1)
    made.colorbar(drawn, ax=grid, label="start-token weight", fraction=0.03, pad=0.015)
    return made


# ------------------------------------------------------------------------------------------ extreme tokens


def extreme(runs: Sequence[Run]) -> Figure | None:
    """Sink logit, value norms and residual norms by layer: one row of three panels per run."""
    keys = ("sink_logit", "value_norm_first", "residual_norm_first")
    found = [run for run in runs if any(run.matrix(k) is not None for k in keys)]
    if not found:
        return None
    made = figure(8.6, 2.35 * len(found) + 0.3)
    grid = made.subplots(len(found), 3, squeeze=False, sharey="col")
    names = ("sink logit", "value norm ‖W_O v‖", "residual norm ‖h‖")
    for row, run in zip(grid, found, strict=True):
        for ax, name in zip(row, names, strict=True):
            axes(ax, name, "layer")
        title(row[0], run, "", len(runs) > 1)
        logit = run.matrix("sink_logit")
        pairs = (run.matrix("value_norm_first"), run.matrix("value_norm_rest"))
        for ax, table, style in (
            (row[0], logit, {"mfc": run.color}),
            (row[1], pairs[1], {"mfc": "white"}),
            (row[1], pairs[0], {"mfc": run.color}),
        ):
            if table is not None:
                offset = np.linspace(-0.22, 0.22, table.shape[1]) if table.shape[1] > 1 else np.zeros(1)
                x = np.arange(len(table))[:, None] + offset[None]
                ax.plot(x.ravel(), table.ravel(), "o", ms=4, mec=run.color, mew=0.9, **style)
                every = -(-len(table) // 12)
                ax.set_xticks(range(0, len(table), every), run.layer_names(len(table))[::every])
        row[0].axhline(0, color=GREY, lw=0.8)
        row[0].margins(y=0.12)
        for key, style in (("residual_norm_rest", {"mfc": "white", "ls": DASH}), ("residual_norm_first", {})):
            values = run.vector(key)
            if values is not None:
                row[2].plot(values, **{"marker": "o", "ms": 4, "color": run.color, **style})
        whole(row[2])
    for ax in grid[0, 1:]:  # after every row is drawn: the rows share the scale
        ax.set_ylim(bottom=0)
    dot = {"marker": "o", "ls": "", "ms": 4}
    legend(grid[0, 1], found[:1], {"first token": dot, "other tokens": {**dot, "mfc": "white"}})
    return made
