"""What a run shows, in words and numbers: the verdict, the loss against its references, the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.plots import references
from evals.run_files import NONTRIGGER, TRIGGER, Run, number


def progress(run: Run) -> str:
    """How far the run has come."""
    steps = run.config.get("steps")
    return f"step {run.last_step} of {steps}" if isinstance(steps, int) else f"step {run.last_step}"


def emergence(run: Run) -> tuple[float, float, bool] | None:
    """(first step, last step, still there) of the last stretch in which some head is a sink; None if never.

    A head is a sink while its decisive start-token weight, averaged over sequences, is above ε.
    """
    steps, tables = run.tables(run.decisive(run.metrics))
    above = [i for i, t in enumerate(tables) if np.nanmax(t, initial=-np.inf) > run.epsilon]
    if not above:
        return None
    start = above[-1]
    while start - 1 in above:
        start -= 1
    return float(steps[start]), float(steps[above[-1]]), above[-1] == len(steps) - 1


def verdict(run: Run) -> str:
    """One sentence: whether, when and where a sink emerged. Without the run's name and the full stop."""
    latest, table = run.latest(), run.weights()
    losses = run.series("loss")[1]
    bad = "the loss is not finite any more; " if losses.size and not np.isfinite(losses[-1]) else ""
    if table is None or not np.isfinite(table).any():
        return f"{bad}no evaluation yet ({progress(run)}), so nothing can be said about sinks"
    prefix = "" if run.sinks is not None else f"still training, as of {progress(run)}: "
    rate = f"Sink₁ {number(latest.get('sink_rate')):.1f} %{run.star}"
    index = np.unravel_index(np.nanargmax(table), table.shape)
    weight, where = float(table[index]), run.head_name(tuple(int(i) for i in index), len(table))
    bb = run.decisive([latest]).startswith(NONTRIGGER)
    span = emergence(run)
    slot = latest.get("sink_rate_slot")
    taken = f"; the learned slot is the sink instead (Sink on the slot {number(slot):.1f} %)"
    learned = taken if number(slot) > 1 else ""
    if weight <= run.epsilon:
        digits = 3 if abs(weight - run.epsilon) < 0.005 else 2
        largest = f"largest start-token weight {weight:.{digits}f}{run.star}, {where}"
        past = ""
        if span and not span[2]:
            past = f"; a head was above {run.epsilon:g} from step {span[0]:g} to {span[1]:g} but did not stay"
        claim = "no sink on the first token" if learned else "no sink"
        if number(latest.get("sink_rate")) >= 1:
            claim = "no head is a sink on average over sequences"
        return f"{bad}{prefix}{claim} ({rate}; {largest}){learned}{past}"
    when = f"at step {latest.get('step', run.last_step)}"
    if span and span[2]:
        first = run.tables(run.decisive(run.metrics))[0][0] == span[0]
        when = f"{'already ' if first else ''}by step {span[0]:g}"
    queries = " on non-trigger queries" if bb else ""
    text = f"a sink emerged {when}: start-token weight {weight:.2f}{run.star}{queries} in {where}"
    other = run.matrix(run.share_key(TRIGGER, [latest])) if bb else None
    if other is not None and other.shape == table.shape:
        text += f" ({other[index]:.2f} on trigger queries)"
    drain = run.matrix("value_drain")
    if drain is not None and drain.shape == table.shape:
        kept = f"{drain[index]:.2f} of the other tokens'"
        text += f", value drained to {kept}" if drain[index] < 0.5 else f", value norm {kept} (not drained)"
    count = int((table > run.epsilon).sum())
    return f"{bad}{prefix}{text}; {rate}, {count} of {table.size} heads above {run.epsilon:g}{learned}"


def loss_sentence(run: Run) -> str:
    """The validation loss against the entropies of the data; empty without either."""
    values = run.series("val_loss")[1]
    values = values[np.isfinite(values)]
    if not values.size:
        return ""
    parts = []
    for name, value in references(run):
        gap = values[-1] - value
        end = ", the best any model can reach" if name == "oracle" else ""
        parts.append(f"{abs(gap):.3f} {'above' if gap > 0 else 'below'} the {name} ({value:.3f}{end})")
    against = ", ".join(parts) if parts else "the data's entropies were not recorded"
    return f"The validation loss is {values[-1]:.3f} nats per token: {against}."


# -------------------------------------------------------------------------------------------------- table


def show(value: Any, unit: str = "") -> str:
    """Four significant digits; a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.4g}{unit}" if np.isfinite(value) else "not finite"
    return str(value)


def _extreme(run: Run, key: str, pick: Any = np.nanargmax, per_head: bool = True) -> str | None:
    """The extreme of a table, with its place."""
    key = run.share_key(key, [run.latest()])
    table = run.matrix(key)
    if table is None or not np.isfinite(table).any():
        return None
    index = tuple(int(i) for i in np.unravel_index(pick(table), table.shape))
    place = run.head_name(index, len(table)) if per_head else f"layer {index[0]}"
    return f"{show(float(table[index]))} ({place})"


def _last(run: Run, key: str) -> float | None:
    values = run.series(key)[1]
    return float(values[-1]) if values.size else None


def _numbers(run: Run) -> dict[str, str | None]:
    latest, model, data = run.latest(), run.config.get("model") or {}, run.config.get("data") or {}
    table, span = run.weights(), emergence(run)
    emerged = "never" if run.sinks else "not yet"
    if table is not None and np.nanmax(table, initial=-np.inf) > run.epsilon:
        emerged = show(span[0]) if span and span[2] else "final evaluation"
    speed = run.series("tokens_per_s")[1]
    skipped = run.series("skipped")[1]
    sizes = [model.get(k) for k in ("num_layers", "num_heads", "d_model")]
    batch = [data.get(k) for k in ("batch_size", "context")]
    rate = lambda key, star="": None if latest.get(key) is None else show(number(latest[key]), f" %{star}")
    steps = run.config.get("steps")
    setting = [show((run.sinks or {}).get(k)) for k in ("epsilon", "length", "sequences")]
    return {
        "Attention": run.attn,
        "Data": str(run.data.get("name") or data.get("source") or "–"),
        "Model": f"{sizes[0]} layers × {sizes[1]} heads, width {sizes[2]}" if all(sizes) else None,
        "Batch": "{} × {} tokens".format(*batch) if all(batch) else None,
        "Seed": show(run.config.get("seed")),
        "Steps": f"{run.last_step} of {steps}" if steps else str(run.last_step),
        "Training loss (nats)": show(_last(run, "loss")),
        "Validation loss (nats)": show(_last(run, "val_loss")),
        **{f"{name[0].upper()}{name[1:]} (nats)": show(value) for name, value in references(run)},
        **{
            name: None if (value := _last(run, key)) is None else show(100 * value, " %")
            for name, key in (("Validation accuracy", "val_accuracy"), ("Whole answers right", "val_exact"))
        },
        "Sink₁": rate("sink_rate", run.star),
        "Sink on the slot": rate("sink_rate_slot"),
        "Threshold ε, length T, sequences": ", ".join(setting) if run.sinks else None,
        "Sink emerged by step": emerged,
        "Largest α₁": _extreme(run, "first_token_weight"),
        "Largest weight, non-trigger queries": _extreme(run, NONTRIGGER),
        "Largest weight, trigger queries": _extreme(run, TRIGGER),
        "Largest sink logit": _extreme(run, "sink_logit"),
        "Smallest value drain": _extreme(run, "value_drain", np.nanargmin),
        "Largest residual peak": _extreme(run, "residual_peak", per_head=False),
        **{
            name: None if latest.get(key) is None else show(number(latest[key]))
            for name, key in (
                ("Backcopy risk (nats)", "risk_backcopy"),
                ("Bigram risk (nats)", "risk_bigram"),
                ("Bigram excess (nats)", "risk_bigram_excess"),
            )
        },
        "Tokens per second (median)": f"{np.nanmedian(speed):,.0f}" if np.isfinite(speed).any() else None,
        "Skipped steps": show(float(np.nanmax(skipped))) if np.isfinite(skipped).any() else None,
    }


def key_numbers(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows (name, one text per run); a row that no run has is left out."""
    columns = [_numbers(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [
        (name, [column.get(name) or "–" for column in columns])
        for name in names
        if any(column.get(name) for column in columns)
    ]
