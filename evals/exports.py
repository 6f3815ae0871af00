"""What a report leaves beside its page: every figure as PNG, SVG and CSV, every table as CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.plots import Drawn
from jaxattn.errors import DataError


def folder_for(out: Path, run_dir: Path | None) -> Path:
    """Where the files of the page `out` go: a run's own `plots` for its own report, else NAME_files beside it.

    Raises:
      DataError: `out` is a folder.
    """
    if not out.name or out.is_dir():
        raise DataError(f"the report cannot be written to {out}, a folder: name a file with --out.")
    own = run_dir is not None and out.absolute().parent == run_dir.absolute() and out.name == "report.html"
    return out.with_name("plots" if own else f"{out.stem}_files")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with one column per key of any row; numbers with all their digits, no number as an empty field."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    blank = lambda x: "" if x is None or (isinstance(x, float) and x != x) else x
    writer.writerows([{key: blank(value) for key, value in row.items()} for row in rows])
    return out.getvalue()


def save(folder: Path, figures: Mapping[str, Drawn], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write NAME.png, NAME.svg and NAME.csv of every figure, NAME.csv of every table.

    Raises:
      DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, drawn in figures.items():
            (folder / f"{name}.png").write_bytes(drawn.png)
            (folder / f"{name}.svg").write_bytes(drawn.svg)
            (folder / f"{name}.csv").write_text(csv_text(drawn.rows), "utf-8")
        for name, rows in tables.items():
            (folder / f"{name}.csv").write_text(csv_text(rows), "utf-8")
    except OSError as error:
        raise DataError(f"the plots cannot be written to {folder}: {error.strerror or error}.") from error


def write_page(out: Path, text: str) -> None:
    """Replace the page at once, whole.

    Raises:
      DataError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = error.strerror or error
        raise DataError(f"the report cannot be written to {out}: {why}; choose another --out.") from error
