"""The files that a measurement leaves where the user asked for them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxattn.errors import UserError, cannot_write, writing
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


@contextlib.contextmanager
def results_in(folder: Path) -> Iterator[Path]:
    """The folder of --out, made and tried before anything is measured, and gone again if nothing came of it.

    Raises:
      UserError: it is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out is {folder}, a file: name a folder.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):  # somebody put something there
                for path in missing:
                    path.rmdir()
            raise
