"""Synthetic tasks: `--data='mqar(pairs=8)'` trains on one, `python -m evals.tasks RUN_DIR` scores a run on one.

names()          every task
is_task(text)    whether a data source is meant to be one of them
parse_task(text) "passkey(digits=4)" -> the task with its options

NumPy only; no module here starts JAX before a model is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxattn.errors import ConfigError
from jaxattn.registry import Registry
from train.data.tasks._base import Example, Task

__all__ = ["TASKS", "Example", "Task", "is_task", "make_task", "names", "parse_task"]

TASKS: Registry[type[Task]] = Registry(
    kind="task",
    package="train.data.tasks",
    record=Task,
    lists=True,
    typed=False,  # a task names the nearest value that it takes
    places={
        "mqar": "mqar:MQAR",
        "passkey": "passkey:Passkey",
        "copy": "copying:Copy",
        "selective_copy": "selective_copying:SelectiveCopy",
    },
)
names = TASKS.names


def is_task(text: str) -> bool:
    """Whether `text` is a task's name, or has the form of NAME(option=value, ...)."""
    return text.strip() in TASKS or re.fullmatch(r"\s*\w+\(.*\)\s*", text) is not None


def make_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task `name` with some options set.

    Raises:
      ConfigError: no such task or option, or an impossible value.
    """
    if name in TASKS and "context" in options:
        raise ConfigError(f"the task {name} has no option 'context': its length is the data's, --data.context.")
    return TASKS.make(name, options)


def parse_task(text: str) -> Task:
    """``"mqar(pairs=8, vocab=512)"`` -> the task, without evaluating anything.

    Raises:
      ConfigError: another form, an unknown task or option, an impossible value.
    """
    return make_task(*TASKS.parse(text))
