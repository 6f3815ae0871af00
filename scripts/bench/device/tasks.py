"""One task of a run, and the kinds of answers to it."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

LONGEST = 600  # characters of a reason


class Absent(Exception):
    """What a task needs is not on this machine; nothing has failed."""


def perform(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The answer to a task `module:function`, or why there is none: `status` is ok, absent, refused or failed."""
    module, function = task.split(":")
    module = module if "." in module else f"{__package__}.{module}"
    try:
        found = getattr(importlib.import_module(module), function)(**arguments)
        return {"status": "ok", **found}
    except (Absent, ModuleNotFoundError) as error:
        return {"status": "absent", "reason": short(error)}
    except NotImplementedError as error:  # what kernels raise where they cannot serve a call
        return {"status": "refused", "reason": short(error)}
    except Exception as error:  # noqa: BLE001, as any library may fail on a new device: the run goes on without
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {short(error)}"}


def short(error: object) -> str:
    """One line of what an error says."""
    return " ".join(str(error).split())[:LONGEST]
