"""What a comparison hangs on besides its attentions: defaults that decide, unequal texts, steps or seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from evals.groups import Group
from evals.read_run import Run, flatten

FIELDS = (  # of the data; runs that differ in one of them have losses of different texts
    *("data.seed", "data.val_fraction", "data.context", "data.batch_size", "data.packing", "data.perturb"),
    *("data.prefix_len", "data.source", "data.tokenizer", "data.vocab_size", "eval.batches"),
)


def _of(run: Run, key: str) -> str | None:
    flat = flatten(run.config)
    if key == "data.seed" and key not in flat:  # of a version with one seed for everything
        return flat.get("seed")
    return flat.get(key)


def _differ(groups: Sequence[Group], value: Callable[[Run], Any]) -> str:
    """Which runs have which value, such as "0 (softmax), 1 (sigmoid)"; "" where all have the same."""
    found = {group.label: [value(run) for run in group.runs] for group in groups}
    if len({v for values in found.values() for v in values}) < 2:
        return ""
    mixed = [label for label, values in found.items() if len(set(values)) > 1]
    if mixed:  # seeds of a group differ among themselves
        return f"different for the seeds of {' and '.join(mixed)}"
    by_value: dict[Any, list[str]] = {}
    for label, values in found.items():
        by_value.setdefault(values[0], []).append(label)
    said = lambda value: "not recorded" if value is None else value
    return "; ".join(f"{said(value)} ({' and '.join(labels)})" for value, labels in by_value.items())


def cautions(groups: Sequence[Group]) -> list[str]:
    """Sentences, most important first; none for one run."""
    runs = [run for group in groups for run in group.runs]
    if len(runs) < 2:
        return []
    out = []
    if len(groups) > 1:
        for group in groups:
            out += [f"{group.label}: {note}" for note in (group.first.sinks or {}).get("notes") or []]
    unequal = {key: told for key in FIELDS if (told := _differ(groups, lambda run, key=key: _of(run, key)))}
    if unequal:
        told = "; ".join(f"{key} is {values}" for key, values in unequal.items())
        out.append(f"Validation losses are of different held-out text: {told}.")
    elif _differ(groups, lambda run: (run.data.get("meta") or {}).get("data_hash")):
        out.append("Validation losses are of different held-out text: the data themselves differ (data.json).")
    for key in ("eval.epsilon", "eval.length", "eval.sequences"):
        if told := _differ(groups, lambda run, key=key: _of(run, key)):
            out.append(f"Sink rates are measured differently: {key} is {told}.")
    if told := _differ(groups, lambda run: run.last_step):
        out.append(f"Runs have come to different steps: {told}.")
    single = [group.label for group in groups if not group.many]
    if single and len(groups) > 1:
        whose = "all" if len(single) == len(groups) else " and ".join(single)
        out.append(f"One seed says nothing about the spread ({whose}): train more with --seed=1, --seed=2, …")
    return out
