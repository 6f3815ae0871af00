"""Runs shown together: those that differ in seeds alone are one group, with a name, a colour and a band."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.read_run import Run, flatten, read_run

# Far apart (CIELAB) for normal, protan, deutan and tritan eyes; markers tell them apart once more.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#7700ff", "#771100"),
    *("#443344", "#aaaacc", "#112299", "#11cc77", "#9966ff"),
)
MARKERS = "os^Dv*PX<>"
SEEDS = ("seed", "data.seed")
LOCAL = ("run_dir", "resume", "overwrite", "report", "preset", "log", "checkpoint", "data.cache_dir", "data.workers")
MOST_FIELDS = 2  # of the configuration in a group's name


@dataclass
class Group:
    """Runs of one configuration but for seeds, in the order they were given."""

    runs: list[Run]
    label: str = ""
    color: str = PALETTE[0]
    marker: str = MARKERS[0]

    @property
    def many(self) -> bool:
        return len(self.runs) > 1

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def title(self) -> str:
        """The name with the number of seeds, where there are several."""
        return f"{self.label} ({len(self.runs)} seeds)" if self.many else self.label

    @property
    def star(self) -> str:
        return "*" if any(run.star for run in self.runs) else ""


class Band(NamedTuple):
    """A curve over seeds at the steps that all runs of a group have [n]; without seeds all three are equal."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """Mean, smallest and largest of (steps, values) curves where all have a step; a gap where one has no number."""
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    rows = np.array([values[np.searchsorted(at, steps)] for at, values in curves]).reshape(len(curves), len(steps))
    return Band(steps, rows.mean(0), rows.min(0), rows.max(0))


def setting(run: Run) -> dict[str, str]:
    """The flat configuration without what differs between runs of one thing, and without seeds."""
    skip = lambda key: key in SEEDS or any(key == name or key.startswith(f"{name}.") for name in LOCAL)
    return {key: value for key, value in flatten(run.config).items() if not skip(key)}


def read_groups(folders: Sequence[str | Path]) -> list[Group]:
    """Read run folders and group them. Raises `DataError` as `read_run` does."""
    return group_runs([read_run(folder) for folder in folders])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, each with a name of its own, a colour and a marker.

    Two runs of one configuration and the same seeds are repetitions, not seeds: they stay apart.
    """
    groups: list[Group] = []
    taken: list[tuple[dict[str, str], set[tuple[Any, ...]]]] = []
    for run in runs:
        mine, seeds = setting(run), tuple(flatten(run.config).get(key) for key in SEEDS)
        for group, (other, seen) in zip(groups, taken, strict=True):
            if other == mine and seeds not in seen:
                group.runs.append(run)
                seen.add(seeds)
                break
        else:
            groups.append(Group([run]))
            taken.append((mine, {seeds}))
    for i, (group, name) in enumerate(zip(groups, _names(groups), strict=True)):
        again, place = divmod(i, len(PALETTE))  # from the eleventh on with another marker
        group.label, group.color, group.marker = name, PALETTE[place], MARKERS[(place + again) % len(MARKERS)]
        for run in group.runs:
            run.label = f"{name}, {seed_of(run, group)}" if group.many else name
    return groups


def seed_of(run: Run, group: Group) -> str:
    """ "seed 1", with the data's own where the group has several."""
    data = [flatten(r.config).get("data.seed") for r in group.runs]
    own = flatten(run.config).get("data.seed")
    return f"seed {run.seed}" + (f", data seed {own}" if len(set(data)) > 1 and own is not None else "")


def _names(groups: Sequence[Group]) -> list[str]:
    """Attention names; with the configuration fields, else the folders, that tell groups of one attention apart."""
    names = [group.first.attn for group in groups]
    for attn in dict.fromkeys(name for name in names if names.count(name) > 1):
        places = [i for i, group in enumerate(groups) if group.first.attn == attn]
        settings = [setting(groups[i].first) for i in places]
        keys = [k for k in dict.fromkeys(k for s in settings for k in s) if len({s.get(k) for s in settings}) > 1]
        found = [", ".join([attn, *(f"{k}={s.get(k, '–')}" for k in keys)]) for s in settings]
        if not keys or len(keys) > MOST_FIELDS or len(set(found)) < len(found):
            found = [f"{attn} · {folder}" for folder in _folders([groups[i].first.path for i in places])]
        for i, name in zip(places, found, strict=True):
            names[i] = name
    return names


def _folders(paths: Sequence[Path]) -> list[str]:
    """As much of the ends of paths as tells them apart; a number where two are the same folder."""
    parts = [path.resolve().parts for path in paths]
    tries = ([os.sep.join(p[-depth:]) for p in parts] for depth in range(1, max(map(len, parts)) + 1))
    ends = next(ends for ends in tries if len(set(ends)) == len(set(parts)))
    return [end if ends.count(end) == 1 else f"{end} #{i}" for i, end in enumerate(ends, 1)]


def over_runs(group: Group, pick: Callable[[Run], float | None]) -> list[float]:
    """A number of every run of a group that has it."""
    return [float(x) for run in group.runs if (x := pick(run)) is not None]
