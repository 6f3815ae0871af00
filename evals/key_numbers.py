"""The table of a report: one row per number, one column per group, with its range over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.definitions import NAMES
from evals.findings import in_words, stretches
from evals.groups import Group
from evals.plots import references
from evals.read_run import ALPHA, NONTRIGGER, RAW, TRIGGER, Run, number


class Cell(NamedTuple):
    """One number of one run: `value` None where it is missing; `text` stands for what is no number."""

    value: float | None = None
    unit: str = ""
    place: str = ""
    text: str | None = None


def show(value: Any, unit: str = "") -> str:
    """Four significant digits; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        digits = ",.0f" if abs(value) >= 1e4 else ".4g"
        return f"{value:{digits}}{unit}" if np.isfinite(value) else "not finite"
    return str(value)


def _extreme(run: Run, key: str, pick: Callable = np.nanargmax, per_head: bool = True) -> Cell:
    """The extreme of a table, with its place."""
    table = run.matrix(key)
    if table is None or not np.isfinite(table).any():
        return Cell()
    index = tuple(int(i) for i in np.unravel_index(pick(table), table.shape))
    place = run.head_name(index, len(table)) if per_head else f"layer {index[0]}"
    share = key.startswith(ALPHA) and not key.endswith(RAW)
    return Cell(float(table[index]), run.star if share else "", place)


def _mean(run: Run, key: str) -> Cell:
    table = run.matrix(key)
    return Cell() if table is None or not np.isfinite(table).any() else Cell(float(np.nanmean(table)), " %")


def _last(run: Run, key: str) -> float | None:
    values = run.series(key)[1]
    return float(values[-1]) if values.size else None


def numbers(run: Run) -> dict[str, Cell]:
    """Every number of one run, by the name of its row."""
    latest, model, data = run.latest(), run.config.get("model") or {}, run.config.get("data") or {}
    sizes = [model.get(k) for k in ("num_layers", "num_heads", "d_model")]
    batch = [data.get(k) for k in ("batch_size", "context")]
    steps = run.config.get("steps")
    words = lambda text: Cell(text=text)
    plain = lambda key, unit="": Cell(None if latest.get(key) is None else number(latest[key]), unit)
    raw = {
        f"Largest {NAMES[key + RAW][0].lower()}{NAMES[key + RAW][1:]}": _extreme(run, key + RAW) if run.star else Cell()
        for key in (ALPHA, NONTRIGGER, TRIGGER)
    }
    setting = [show((run.sinks or {}).get(k)) for k in ("epsilon", "length", "sequences")]
    speed, skipped = run.series("tokens_per_s")[1], run.series("skipped")[1]
    percent = {k: None if (v := _last(run, k)) is None else 100 * v for k in ("val_accuracy", "val_exact")}
    above = in_words(stretches(run))
    return {
        "Attention": words(run.attn),
        "Data": words(str(run.data.get("name") or data.get("source") or "–")),
        "Model": words("{} layers × {} heads, width {}".format(*sizes) if all(sizes) else None),
        "Batch": words("{} × {} tokens".format(*batch) if all(batch) else None),
        "Steps": words(f"{run.last_step} of {steps}" if steps else str(run.last_step)),
        f"{NAMES['loss']} (nats)": Cell(_last(run, "loss")),
        f"{NAMES['val_loss']} (nats)": Cell(_last(run, "val_loss")),
        **{f"{name[0].upper()}{name[1:]} (nats)": Cell(value) for name, value in references(run)},
        **{NAMES[key]: Cell(value, " %") for key, value in percent.items()},
        NAMES["sink_rate"]: plain("sink_rate", f" %{run.star}"),
        NAMES["sink_rate_slot"]: plain("sink_rate_slot", f" %{run.star}"),
        "Threshold ε, length T, sequences": words(", ".join(setting) if run.sinks else None),
        f"Some head above {run.epsilon:g}": words((above or "never") if run.weights() is not None else None),
        "Largest start-token weight α₁": _extreme(run, ALPHA),
        "Largest start-token weight, non-trigger queries": _extreme(run, NONTRIGGER),
        "Largest start-token weight, trigger queries": _extreme(run, TRIGGER),
        **raw,
        NAMES["rows_no_distribution"]: _mean(run, "rows_no_distribution"),
        NAMES["rows_nearly_empty"]: _mean(run, "rows_nearly_empty"),
        "Largest sink logit": _extreme(run, "sink_logit"),
        "Smallest value drain": _extreme(run, "value_drain", np.nanargmin),
        "Largest residual peak": _extreme(run, "residual_peak", per_head=False),
        **{f"{NAMES[key]} (nats)": plain(key) for key in ("risk_backcopy", "risk_bigram", "risk_bigram_excess")},
        "Tokens per second (median)": Cell(float(np.nanmedian(speed)) if np.isfinite(speed).any() else None),
        "Skipped steps": Cell(float(np.nanmax(skipped)) if np.isfinite(skipped).any() else None),
    }


def _over_seeds(group: Group, cells: Sequence[Cell]) -> str | None:
    """One text for a row and a group: the number with its place, or mean and range over seeds; None if none has it."""
    texts = [cell.text for cell in cells if cell.text is not None]
    if texts:
        same = len(set(texts)) == 1 and len(texts) == len(cells)
        named = zip(group.runs, cells, strict=True)
        return texts[0] if same else "; ".join(f"seed {run.seed}: {cell.text or '–'}" for run, cell in named)
    having = [cell for cell in cells if cell.value is not None]
    if not having:
        return None
    values, units = [float(cell.value) for cell in having if cell.value is not None], {cell.unit for cell in having}
    unit, places = max(units, key=len), {cell.place for cell in having} - {""}
    where = f" ({places.pop()})" if len(places) == 1 and len(having) == len(cells) == 1 else ""
    if len(cells) == 1:
        return show(values[0], unit) + where
    if not np.isfinite(values).all():
        return ", ".join(show(v, unit) for v in values)
    few = "" if len(having) == len(cells) else f", {len(having)} of {len(cells)} seeds"
    if show(min(values)) == show(max(values)):
        return show(values[0], unit) + few
    return f"{show(float(np.mean(values)), unit)} ({show(min(values))} to {show(max(values))}{few})"


def key_numbers(groups: Sequence[Group]) -> tuple[list[tuple[str, list[str]]], list[dict[str, Any]]]:
    """Rows (name, one text per group), without those that no run has; and each run's own numbers, for the CSV."""
    found = [[numbers(run) for run in group.runs] for group in groups]
    names = list(dict.fromkeys(name for runs in found for run in runs for name in run))
    rows = [("Seeds" if any(group.many for group in groups) else "Seed", [_seeds(group) for group in groups])]
    flat: list[dict[str, Any]] = []
    for name in names:
        cells = [[run.get(name, Cell()) for run in runs] for runs in found]
        texts = [_over_seeds(group, row) for group, row in zip(groups, cells, strict=True)]
        if any(texts):
            rows.append((name, [text or "–" for text in texts]))
        for group, row in zip(groups, cells, strict=True):
            for run, cell in zip(group.runs, row, strict=True):
                value = cell.value if cell.text is None else cell.text
                if value is not None:
                    at = {"group": group.label, "seed": run.seed, "run": str(run.path), "quantity": name}
                    flat.append({**at, "value": value, "unit": cell.unit.strip(), "place": cell.place})
    return rows, flat


def _seeds(group: Group) -> str:
    seeds = [run.seed for run in group.runs]
    return seeds[0] if len(seeds) == 1 else f"{len(seeds)} ({', '.join(seeds)})"
