"""A folder that exists once it is whole, or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxattn.errors import UserError


@contextlib.contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder to fill beside `dst`, which it becomes when the block ends well; else nothing is left.

    Raises:
      UserError: `dst` exists already, or it cannot be written.
    """
    if dst.exists():
        raise UserError(f"{dst} exists already; choose another folder, or remove it first.")
    partial = dst.with_name(f".{dst.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(dst)
    except OSError as error:
        raise UserError(f"{dst} cannot be written ({error.strerror}); nothing was left behind.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
