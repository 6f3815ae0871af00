"""The file that a measurement leaves where the user asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxattn.errors import cannot_write
from jaxattn.runs.rundir import write_json_atomic


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write JSON where the user asked for it.

    Raises:
      UserError: it cannot be written.
    """
    try:
        write_json_atomic(path, result)
    except OSError as error:
        raise cannot_write(path, error, "choose another --json") from error
