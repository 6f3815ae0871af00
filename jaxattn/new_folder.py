"""A folder that exists once it is whole, or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxattn.errors import UserError, cannot_write


@contextlib.contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder to fill beside `dst`, which it becomes when the block ends well; else nothing is left.

    Every `OSError` of the block is believed to be about writing: what reads names its own file.

    Raises:
      UserError: `dst` exists already, or it cannot be written.
    """
    made: list[Path] = []
    try:
        if dst.exists():
            raise UserError(f"{dst} exists already; choose another folder, or remove it first.")
        partial = dst.with_name(f".{dst.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for folder in reversed(partial.parents):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        made.append(partial)
        partial.mkdir()
        yield partial
        partial.rename(dst)
        made.clear()
    except OSError as error:
        raise cannot_write(dst, error) from error
    finally:
        if made and made[-1].name == f".{dst.name}.partial":
            shutil.rmtree(made.pop(), ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else put a file there
                folder.rmdir()
