"""The sessions of a run: every start and resume, from which step, on which machine and versions, with which log.

`sessions.json` keeps them. A resume compares itself with the session before, whose numbers it continues, and looks
whether metrics.jsonl has the rows that all of them must have left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxattn.config_fields import INT32
from jaxattn.errors import UserError, shown
from jaxattn.json_text import read_object
from jaxattn.runs.rundir import RunDir, rows_of, tidy_jsonl, write_json_atomic

log = logging.getLogger("jaxattn")

Session = dict[str, Any]
SHOWN_RANGES = 8
# What may change the last digits of a run's numbers, by its place in environment.json.
DECISIVE = ("python", "versions", "devices", "processes", "cpus", "processor", "flags", "git.commit")


def begin(place: RunDir, start: int, log_every: int, environment: dict[str, Any]) -> None:
    """Note the session that begins at step `start`, and say what it cannot continue as it was.

    Writes sessions.json and environment.json (the session's own), and leaves metrics.jsonl with the rows up to
    `start`, each once. Raises `OSError`.
    """
    sessions = _read(place, start)
    if sessions:
        before = next((s["environment"] for s in reversed(sessions) if s.get("environment")), {})
        if changes := differences(before, environment):
            log.warning(
                "this run goes on with another %s: the last digits of its numbers may differ from those of an "
                "unbroken run; both environments are in %s",
                ", ".join(changes), place.path / "sessions.json",
            )  # fmt: skip
    tidy_jsonl(place.metrics, start)
    if start:
        lost = missing(place.metrics, start, sessions)
        if lost:
            log.warning(
                "%s lacks the rows of steps %s (%d of the %d steps before this resume): they were lost or deleted, "
                "and curves will have gaps there; restore the file from a copy if there is one",
                place.metrics, ranges(lost), len(lost), start,
            )  # fmt: skip
    sessions.append({"step": start, "log_every": log_every, "environment": environment})
    write_json_atomic(place.path / "sessions.json", {"sessions": sessions})
    write_json_atomic(place.environment, environment)


def _read(place: RunDir, start: int) -> list[Session]:
    """The sessions that began before step `start`, one at least if there were steps.

    Those of a folder without the file, or with a damaged one, are taken from what else it says.
    """
    if not start:
        return []
    path = place.path / "sessions.json"
    try:
        found = read_object(path, "the run goes on without it")["sessions"] if path.exists() else None
        if found is None or not all(_sound(session) for session in found):
            raise KeyError("sessions")
        if before := [session for session in found if session["step"] < start]:
            return before
        raise KeyError("sessions")
    except (UserError, KeyError, TypeError) as error:
        if path.exists():
            log.warning("%s", error if isinstance(error, UserError) else f"{path} is damaged; the run goes on without")
    environment, every = {}, 1
    try:
        if place.environment.exists():
            environment = read_object(place.environment, "the run goes on without it")
        if place.config.exists():
            every = read_object(place.config, "the run goes on without it")["log"]["every"]
    except UserError as error:
        log.warning("%s", error)
    except (KeyError, TypeError):
        pass  # a configuration that says nothing about its log
    return [{"step": 0, "log_every": every if _whole(every, 1) else 1, "environment": environment}]


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= INT32


def _sound(session: Any) -> bool:
    return (
        _whole(session["step"], 0)
        and _whole(session["log_every"], 1)
        and isinstance(session.get("environment", {}), dict)
    )


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the digits and changed, as "jax (0.10.2 before, 0.12.0 now)"; nothing where `before` is silent."""
    lines = []
    for name in DECISIVE:
        old, new = _at(before, name), _at(now, name)
        pairs = [(name, old, new)]
        if isinstance(old, dict) and isinstance(new, dict):
            prefix = "" if name == "versions" else f"{name}."
            pairs = [(prefix + key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())]
        elif old is None:
            continue
        lines += [f"{label} ({_plain(a)} before, {_plain(b)} now)" for label, a, b in pairs if a != b]
    return lines


def _at(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _plain(value: Any) -> str:
    return "unset" if value is None else value[:60] if isinstance(value, str) else shown(value)


def missing(path: Path, start: int, sessions: list[Session]) -> list[int]:
    """Steps up to `start` whose row should be in metrics.jsonl and is not."""
    there = {row["step"] for row in rows_of(path)}
    ends = [session["step"] for session in sessions[1:]] + [start]
    lost: list[int] = []
    for session, end in zip(sessions, ends, strict=True):
        every = session["log_every"]
        first = session["step"] // every * every + every
        lost += [step for step in range(first, min(end, start) + 1, every) if step not in there]
    return lost


def ranges(steps: Iterable[int]) -> str:
    """ "1-40, 57, 60-80"; the first `SHOWN_RANGES` of them."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    parts = [f"{a}-{b}" if b > a else str(a) for a, b in runs[:SHOWN_RANGES]]
    return ", ".join(parts) + (", ..." if len(runs) > SHOWN_RANGES else "")
