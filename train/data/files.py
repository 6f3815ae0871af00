"""Text files, JSON lines and parquet as a corpus."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

from jaxattn.errors import DataError
from train.data.cache import digest, file_digest
from train.data.corpus import Corpus, Tally

_READ = "txt, md, py, jsonl or parquet"


def expand(source: str) -> list[Path]:
    """The files that a path, glob or comma-separated list names, in a fixed order, each once.

    Raises:
      DataError: a file is missing, a glob matches nothing, or a folder was given.
    """
    # A file whose own name holds a comma or a bracket wins over the list or glob reading.
    names = [source] if os.path.exists(os.path.expanduser(source)) else source.split(",")
    found: dict[Path, None] = {}
    for name in (n.strip() for n in names if n.strip()):
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            raise DataError(f"data.source={name!r} is a folder: name files, for example '{name.rstrip('/')}/**/*.txt'.")
        if path.exists():
            found[path] = None
            continue
        matches = [Path(m) for m in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(m)]
        if not matches:
            kind = "glob matches no file" if glob.has_magic(name) else "file does not exist"
            raise DataError(f"data.source={name!r}: the {kind}; check the path (seen from {os.getcwd()!r}).")
        found.update(dict.fromkeys(matches))
    if not found:
        raise DataError(f"data.source={source!r} names no file: give a path, a glob or a list.")
    return list(found)


def _read_text(path: Path, tally: Tally) -> Iterator[str]:
    raw = path.read_bytes()
    if b"\0" in raw:
        tally.bad(
            f"file {str(path)!r}",
            f"it holds a NUL byte at {raw.index(0)}, so it is binary and not UTF-8 text",
        )
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        tally.bad(f"file {str(path)!r}", f"byte {error.start} is not UTF-8")
        return
    yield text


def _field(record: object, field: str) -> tuple[str | None, str]:
    """The text of a JSON record, or why there is none."""
    if not isinstance(record, dict):
        return None, f"it is a JSON {type(record).__name__} and not an object"
    if field not in record:
        return None, f"it has no field {field!r} (it has {', '.join(map(repr, record)) or 'none'})"
    if not isinstance(record[field], str):
        return None, f"field {field!r} is a {type(record[field]).__name__} and not a string"
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        return None, f"character {error.start} of field {field!r} is half a surrogate pair"
    return record[field], ""


def _read_jsonl(path: Path, field: str, tally: Tally) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"line {number} of file {str(path)!r}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                tally.bad(where, f"byte {error.start} is not UTF-8")
                continue
            except json.JSONDecodeError as error:
                tally.bad(where, f"it is not JSON ({error.msg} at column {error.colno})")
                continue
            text, why = _field(record, field)
            if text is None:
                tally.bad(where, why)
                continue
            yield text


def _read_parquet(path: Path, field: str, tally: Tally) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        tally.bad(f"file {str(path)!r}", f"it is not a whole parquet file ({_first_line(error)})")
        return
    with table:
        if field not in table.schema_arrow.names:
            raise DataError(
                f"file {str(path)!r} has no column {field!r}: set --data.text-field to one of "
                f"{', '.join(table.schema_arrow.names)}."
            )
        for group in range(table.num_row_groups):
            where = f"row group {group} of file {str(path)!r}"
            try:
                column = table.read_row_group(group, columns=[field]).column(field).to_pylist()
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                tally.bad(where, f"it cannot be read ({_first_line(error)})")
                continue
            for row, text in enumerate(column):
                if isinstance(text, str):
                    yield text
                else:
                    kind = "empty (null)" if text is None else f"a {type(text).__name__}"
                    tally.bad(f"row {row} of {where}", f"column {field!r} is {kind} and not a string")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def file_corpus(source: str, text_field: str = "text") -> Corpus:
    """The documents of files: a txt, md or py file is one, a line of jsonl and a row of parquet is one.

    Raises:
      DataError: see `expand`; also a file that is unreadable or of another kind. Corrupt records go to the
      tally.
    """
    files = expand(source)
    known = {".txt", ".md", ".py", ".jsonl", ".parquet"}
    for path in files:
        if path.suffix.lower() not in known:
            raise DataError(f"file {str(path)!r} ends in {path.suffix!r}: only {_READ} files can be read.")
    try:
        hashes = [file_digest(path) for path in files]
    except OSError as error:
        raise DataError(f"file {error.filename!r} cannot be read ({error.strerror}): check it.") from error

    def read(tally: Tally) -> Iterator[str]:
        for path in files:
            kind = path.suffix.lower()
            if kind == ".jsonl":
                yield from _read_jsonl(path, text_field, tally)
            elif kind == ".parquet":
                yield from _read_parquet(path, text_field, tally)
            else:
                yield from _read_text(path, tally)

    kinds = [path.suffix.lower() for path in files]
    return Corpus(
        # Under an ASCII locale a path may hold surrogates, which no JSON or terminal takes.
        name=os.fsencode(source).decode("utf-8", "replace"),
        fingerprint=digest("files", text_field, *kinds, *hashes),
        size=sum(path.stat().st_size for path in files),
        files=len(files),
        read=read,
    )
