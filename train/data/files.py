"""Text files, JSON lines and parquet as a corpus."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from jaxattn.errors import DataError, shown
from jaxattn.json_text import loads
from train.data.cache_files import digest, file_digest
from train.data.corpus import Corpus, Tally

_READ = "txt, md, py, jsonl or parquet"
_MARKS = (  # the longer ones first: a mark of UTF-16 begins one of UTF-32
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SHOWN_NAMES = 10
_ROWS = 64
MOST_BYTES = 1 << 28  # of one document; reading it takes up to ten times as much memory, as characters of four bytes


def expand(source: str) -> list[Path]:
    """The files that a path, glob or comma-separated list names, in a fixed order, each once.

    Raises:
      DataError: a file is missing, a glob matches nothing, or a folder was given.
    """
    # A file whose own name holds a comma or a bracket wins over the list or glob reading.
    names = [source] if os.path.exists(os.path.expanduser(source)) else source.split(",")
    found: dict[Path, None] = {}
    for name in (n.strip() for n in names if n.strip()):
        path = os.path.expanduser(name)  # functions of os.path: to them an impossible name is no file
        if os.path.isdir(path):
            raise DataError(
                f"data.source={shown(name)} is a folder: name files, for example '{name.rstrip('/')}/**/*.txt'."
            )
        if os.path.exists(path):
            found[Path(path)] = None
            continue
        try:
            matches = [Path(m) for m in sorted(glob.glob(path, recursive=True)) if os.path.isfile(m)]
        except ValueError:  # a NUL in it
            matches = []
        if not matches:
            kind = "glob matches no file" if glob.has_magic(name) else "file does not exist"
            raise DataError(f"data.source={shown(name)}: the {kind}; check the path (seen from {os.getcwd()!r}).")
        found.update(dict.fromkeys(matches))
    if not found:
        raise DataError(f"data.source={shown(source)} names no file: give a path, a glob or a list.")
    return list(found)


def encoding_of(path: Path) -> str:
    """The encoding that a byte order mark at a file's start names, as "utf-16"; UTF-8 without one."""
    with open(path, "rb") as file:
        head = file.read(4)
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def _whole_text(path: Path, encoding: str, tally: Tally) -> str | None:
    """The text of a file that is one document, or is not cut at bytes; None where it is a corrupt record."""
    where = f"file {str(path)!r}"
    if (size := path.stat().st_size) > MOST_BYTES:
        tally.bad(where, _too_long("it is one document and", size))
        return None
    raw = path.read_bytes()
    name = {"utf-8-sig": "UTF-8"}.get(encoding, encoding.upper())
    if name == "UTF-8" and b"\0" in raw:
        tally.bad(
            where,
            f"it holds a NUL byte at {raw.index(0)}, so it is binary and not UTF-8 text (nor UTF-16 with a byte "
            "order mark)",
        )
        return None
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        tally.bad(where, f"byte {error.start} is not {name}")
        return None


def _too_long(what: str, size: int) -> str:
    return f"{what} has {size:,} bytes, at most {MOST_BYTES:,} are read: cut it"


def _read_text(path: Path, encoding: str, tally: Tally) -> Iterator[str]:
    text = _whole_text(path, encoding, tally)
    if text is not None:
        yield text


def _field(record: object, field: str) -> tuple[str | None, str]:
    """The text of a JSON record, or why there is none."""
    if not isinstance(record, dict):
        return None, f"it is a JSON {type(record).__name__} and not an object"
    if field not in record:
        names = ", ".join(map(shown, islice(record, _SHOWN_NAMES))) + (", ..." if len(record) > _SHOWN_NAMES else "")
        return None, f"it has no field {field!r} (it has {names or 'none'})"
    if not isinstance(record[field], str):
        return None, f"field {field!r} is a {type(record[field]).__name__} and not a string"
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        return None, f"character {error.start} of field {field!r} is half a surrogate pair"
    return record[field], ""


def _lines(path: Path, encoding: str, tally: Tally) -> Iterator[tuple[int, bytes | str]]:
    """(number, line) of a text file; what is not UTF-8 is decoded whole, since its lines do not end in a byte."""
    if encoding not in ("utf-8", "utf-8-sig"):
        yield from enumerate((_whole_text(path, encoding, tally) or "").split("\n"), 1)
        return
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(1 << 16)):
                    size += len(line)
                tally.bad(f"line {number} of file {str(path)!r}", _too_long("it", size))
                continue
            yield number, line.removeprefix(codecs.BOM_UTF8)  # also where files with one were joined


def _read_jsonl(path: Path, encoding: str, field: str, tally: Tally) -> Iterator[str]:
    for number, line in _lines(path, encoding, tally):
        if not line.strip():
            continue
        where = f"line {number} of file {str(path)!r}"
        try:
            record = loads(line.decode("utf-8") if isinstance(line, bytes) else line)
        except UnicodeDecodeError as error:
            tally.bad(where, f"byte {error.start} is not UTF-8")
            continue
        except ValueError as reason:
            tally.bad(where, f"it is not JSON ({reason})")
            continue
        del line
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
            names = table.schema_arrow.names
            raise DataError(
                f"file {str(path)!r} has no column {field!r}: set --data.text-field to one of "
                f"{', '.join(map(str, names[:50]))}{', ...' if len(names) > 50 else ''}."
            )
        for group in range(table.num_row_groups):
            where, row = f"row group {group} of file {str(path)!r}", 0
            try:
                # A few rows at a time: a group may be as large as the file.
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=[field]):
                    for text in batch.column(field).to_pylist():
                        if isinstance(text, str) and len(text) <= MOST_BYTES:
                            yield text
                        else:
                            tally.bad(f"row {row} of {where}", f"column {field!r} is {_kind(text)}")
                        row += 1
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                tally.bad(where, f"it cannot be read ({_first_line(error)})")


def _kind(value: object) -> str:
    if isinstance(value, str):
        return _too_long("a text that", len(value))
    return f"{'empty (null)' if value is None else f'a {type(value).__name__}'} and not a string"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200].rstrip(".") if str(error).strip() else type(error).__name__


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
        if not path.is_file():
            raise DataError(f"file {str(path)!r} is no regular file: only those can be read again in every epoch.")
    try:
        hashes = [file_digest(path) for path in files]
        encodings = ["" if path.suffix.lower() == ".parquet" else encoding_of(path) for path in files]
    except OSError as error:
        raise DataError(f"file {error.filename!r} cannot be read ({error.strerror}): check it.") from error

    def read(tally: Tally) -> Iterator[str]:
        for path, encoding in zip(files, encodings, strict=True):
            kind = path.suffix.lower()
            try:
                if kind == ".jsonl":
                    yield from _read_jsonl(path, encoding, text_field, tally)
                elif kind == ".parquet":
                    yield from _read_parquet(path, text_field, tally)
                else:
                    yield from _read_text(path, encoding, tally)
            except OSError as error:  # it was there a moment ago
                tally.bad(f"file {str(path)!r}", f"it cannot be read ({error.strerror})")

    kinds = [path.suffix.lower() + _note(path, encoding) for path, encoding in zip(files, encodings, strict=True)]
    return Corpus(
        # Under an ASCII locale a path may hold surrogates, which no JSON or terminal takes.
        name=os.fsencode(source).decode("utf-8", "replace"),
        fingerprint=digest("files", text_field, *kinds, *hashes),
        size=sum(path.stat().st_size for path in files),
        files=len(files),
        read=read,
    )


def _note(path: Path, encoding: str) -> str:
    """What earlier versions read otherwise has another fingerprint, so that nothing cached stands in for it."""
    as_before = encoding in ("", "utf-8") or (encoding == "utf-8-sig" and path.suffix.lower() != ".jsonl")
    return "" if as_before else f"+{encoding}"
