"""What a run shows, in sentences that hold for every curve: the verdict on sinks, the loss against its references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evals.groups import Group, over_runs
from evals.plots import references
from evals.read_run import NONTRIGGER, TRIGGER, Run, number


class Stretch(NamedTuple):
    """Evaluations in a row at which some head is above ε: steps of the first and the last, and whether these are the
    first and the last evaluation of all."""

    first: float
    last: float
    from_start: bool
    to_end: bool


def progress(run: Run) -> str:
    """How far the run has come."""
    steps = run.config.get("steps")
    return f"step {run.last_step} of {steps}" if isinstance(steps, int) else f"step {run.last_step}"


def largest_weights(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(steps, largest start-token weight of any head): the curve that is plotted, and the final evaluation."""
    steps, tables = run.tables(run.start_key)
    values = [float(np.nanmax(t)) if np.isfinite(t).any() else float("nan") for t in tables]
    final, at = run.weights(), number((run.sinks or {}).get("step"))
    if run.sinks and final is not None and np.isfinite(at) and not (len(steps) and steps[-1] >= at):
        steps = np.append(steps, at)
        values.append(float(np.nanmax(final)) if np.isfinite(final).any() else float("nan"))
    return steps, np.array(values)


def stretches(run: Run) -> list[Stretch]:
    """All stretches of that curve above the run's ε, in order; an evaluation without a number ends one."""
    steps, values = largest_weights(run)
    above = np.concatenate([[False], values > run.epsilon, [False]])
    starts, stops = (np.flatnonzero(x) for x in (above[1:] & ~above[:-1], above[:-1] & ~above[1:]))
    return [
        Stretch(float(steps[a]), float(steps[b - 1]), bool(a == 0), bool(b == len(steps)))
        for a, b in zip(starts, stops, strict=True)
    ]


def in_words(found: Sequence[Stretch]) -> str:
    """ "at step 550 and from step 800 on"; "" without any."""
    parts = []
    for s in found:
        if s.to_end and s.first < s.last:
            parts.append("at every evaluation" if s.from_start else f"from step {s.first:g} on")
        else:
            parts.append(f"at step {s.first:g}" if s.first == s.last else f"from step {s.first:g} to {s.last:g}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def verdict(run: Run) -> str:
    """Whether, when and where there is a sink. Without the run's name and the full stop."""
    latest, table = run.latest(), run.weights()
    losses = run.series("loss")[1]
    bad = "the loss is not finite any more; " if losses.size and not np.isfinite(losses[-1]) else ""
    if table is None or not np.isfinite(table).any():
        return f"{bad}no evaluation yet ({progress(run)}), so nothing can be said about sinks"
    bad += "" if run.sinks is not None else f"still training, as of {progress(run)}: "
    weight, where, index = strongest_head(run, table)
    queries = " on non-trigger queries" if run.start_key == NONTRIGGER else ""
    said = f"largest start-token weight{queries} {_digits(weight, run.epsilon)}{run.star}, {where}"
    rate = f"Sink₁ {number(latest.get('sink_rate')):.1f} %{run.star}"
    end = _slot(run) + _empty(run)
    found = stretches(run)
    if weight <= run.epsilon:
        claim = "no sink" if number(latest.get("sink_rate")) == 0 else "no head is a sink on average over sequences"
        past = f"; some head was above {run.epsilon:g} {in_words(found)}" if found else ""
        return f"{bad}{claim} ({rate}; {said}){past}{end}"
    count = int((table > run.epsilon).sum())
    when = f"; some head above {run.epsilon:g} {in_words(found)}" if found else ""
    text = f"a sink: {said}{when}"
    other = run.matrix(TRIGGER) if queries else None
    if other is not None and other.shape == table.shape and np.isfinite(other[index]):
        text += f"; {other[index]:.2f} on trigger queries there"
    drain = run.matrix("value_drain")
    if drain is not None and drain.shape == table.shape and np.isfinite(drain[index]):
        kept = f"{drain[index]:.2f} of the other tokens'"
        text += f"; value drained to {kept}" if drain[index] < 0.5 else f"; value norm {kept}, not drained"
    return f"{bad}{text}; {rate}, {count} of {table.size} heads above {run.epsilon:g}{end}"


def strongest_head(run: Run, table: np.ndarray) -> tuple[float, str, tuple[int, ...]]:
    """Weight, name and place of the head with the largest start-token weight."""
    index = tuple(int(i) for i in np.unravel_index(np.nanargmax(table), table.shape))
    return float(table[index]), run.head_name(index, len(table)), index


def _digits(weight: float, epsilon: float) -> str:
    """Two decimals, more where these would not tell the side of ε."""
    return next(text for n in range(2, 18) if (float(text := f"{weight:.{n}f}") > epsilon) == (weight > epsilon))


def _slot(run: Run) -> str:
    """What the slots in front of the tokens take, if there are any."""
    rate = number(run.latest().get("sink_rate_slot"))
    kinds = " and ".join((run.sinks or {}).get("slots") or [])
    return "" if np.isnan(rate) else f"; Sink on the {kinds}{' ' * bool(kinds)}slot {rate:.1f} %{run.star}"


def _empty(run: Run) -> str:
    """How many rows hardly attend to anything, where it is more than one in a hundred."""
    table = run.matrix("rows_nearly_empty")
    share = 0.0 if table is None else float(np.nan_to_num(np.nanmean(table)))
    return f"; {share:.0f} % of rows are nearly empty" if share >= 1 else ""


def group_verdict(group: Group) -> str:
    """What the seeds of a group have in common, in one sentence without the full stop."""
    tables = [(run, table) for run in group.runs if (table := run.weights()) is not None and np.isfinite(table).any()]
    if not tables:
        return f"no evaluation yet in any of {len(group.runs)} seeds"
    weights = [strongest_head(run, table)[0] for run, table in tables]
    sinks = sum(weight > run.epsilon for weight, (run, _) in zip(weights, tables, strict=True))
    rates = over_runs(group, lambda run: run.latest().get("sink_rate"))
    parts = [
        f"a sink in {sinks} of {len(tables)} seeds",
        f"largest start-token weight{' on non-trigger queries' * group.first.is_bb} {spread(weights)}{group.star}",
        f"Sink₁ {spread(rates, '.1f')} %{group.star}",
    ]
    losses = [float(v[-1]) for run in group.runs if (v := run.series("val_loss")[1]).size]
    if losses:
        parts.append(f"validation loss {spread(losses, '.3f')}")
    if len(tables) < len(group.runs):
        parts.append(f"{len(group.runs) - len(tables)} without an evaluation yet")
    if any(run.sinks is None for run in group.runs):
        parts.append("some still training")
    return "; ".join(parts)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """ "0.90 (0.80 to 0.95)": mean and range; the number alone where there is one."""
    shown = [f"{x:{form}}" for x in (np.mean(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


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
