"""The text file that a measuring command is given."""

from __future__ import annotations

from pathlib import Path

from jaxattn.errors import DataError


def read_text_file(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
      DataError: it cannot be read as such.
    """
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text file {path} cannot be read as UTF-8 ({error}); check the file.") from error
