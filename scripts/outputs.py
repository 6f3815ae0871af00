"""Where a command's results go, settled before hours of measuring."""

from __future__ import annotations

import tempfile
from pathlib import Path

from jaxattn.errors import UserError, writing

REMEDY = "choose another --out"


def file_to_write(path: Path, remedy: str = REMEDY) -> Path:
    """`path` again, once a file has been written beside it; its folder is made.

    Raises:
      UserError: it is a folder, or nothing can be written there.
    """
    if not path.name or path.is_dir():
        raise UserError(f"--out is {path}, a folder: name a file.")
    _try(path.parent, remedy)
    return path


def folder_to_write(path: Path, remedy: str = REMEDY) -> Path:
    """`path` again, made, once a file has been written in it.

    Raises:
      UserError: it is a file, or nothing can be written there.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--out is {path}, a file: name a folder.")
    _try(path, remedy)
    return path


def _try(folder: Path, remedy: str) -> None:
    with writing(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
