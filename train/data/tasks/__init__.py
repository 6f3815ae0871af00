"""Synthetic tasks: `--data='mqar(pairs=8)'` trains on one, `python -m evals.tasks RUN_DIR` scores a run on one.

names()          every task
is_task(text)    whether a data source is meant to be one of them
parse_task(text) "passkey(digits=4)" -> the task with its options

NumPy only; no module here starts JAX before a model is run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxattn.calls import parse_call
from jaxattn.errors import ConfigError, suggest
from train.data.tasks._base import Example, Task
from train.data.tasks.copying import Copy
from train.data.tasks.mqar import MQAR
from train.data.tasks.passkey import Passkey
from train.data.tasks.selective_copying import SelectiveCopy

__all__ = ["Example", "Task", "is_task", "make_task", "names", "parse_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (MQAR, Passkey, Copy, SelectiveCopy)}


def names() -> list[str]:
    """Every task, sorted."""
    return sorted(TASKS)


def is_task(text: str) -> bool:
    """Whether `text` is a task's name, or has the form of NAME(option=value, ...)."""
    return text.strip() in TASKS or re.fullmatch(r"\s*\w+\(.*\)\s*", text) is not None


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task `name` with some options set.

    Raises:
      ConfigError: no such task or option, or an impossible value.
    """
    if name not in TASKS:
        raise ConfigError(suggest("task", name, names()))
    known = [f.name for f in dataclasses.fields(TASKS[name])]
    for option in options:
        if option == "context":
            raise ConfigError(f"the task {name} has no option 'context': its length is the data's, --data.context.")
        if option not in known:
            raise ConfigError(suggest(f"option of the task {name}", option, known))
    return TASKS[name](**options)


def parse_task(text: str) -> Task:
    """``"mqar(pairs=8, vocab=512)"`` -> the task, without evaluating anything.

    Raises:
      ConfigError: another form, an unknown task or option, an impossible value.
    """
    return make_task(*parse_call("task", text, lists=True))
