"""JSON and text that anybody may have written: whatever is wrong with it is one short reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxattn.errors import CheckpointError, Corrupt, Incomplete, UserError, one_line, shown

MOST_BYTES = 128 << 20  # of a file that is read as one value
AGAIN = "download it again"


def loads(raw: bytes | str, *, unique: bool = False, strict: bool = False) -> Any:
    """The value in `raw`; bytes are UTF-8, with or without a byte order mark.

    Args:
      unique: refuse an object that names a key twice, of which otherwise the last counts.
      strict: refuse all that JSON does not have: a key twice, NaN, the infinities, a byte order mark.

    Raises:
      ValueError: no JSON, not UTF-8, nested too deep, or a number of thousands of digits; its text is the reason.
    """
    pairs, constant = _unique if unique or strict else None, _refuse if strict else None
    try:
        text = _decoded(raw, strict) if isinstance(raw, bytes) else raw
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {where}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:  # ours, or an integer of more than 4,300 digits
        raise ValueError(one_line(str(error))[:120]) from error


def read_text(path: Path, remedy: str = AGAIN, kind: type[UserError] = Corrupt) -> str:
    """The UTF-8 text of a file, without a byte order mark.

    Raises:
      Incomplete: it is not there, and `kind` is about checkpoints.
      kind: the file cannot be read, is very large, or holds something else; the sentence ends in `remedy`.
    """
    try:
        return _decoded(_bytes(path, remedy, kind))
    except ValueError as error:
        raise kind(f"{path} is not UTF-8 text ({error}); {remedy}.") from error


def read_object(
    path: Path, remedy: str = AGAIN, kind: type[UserError] = Corrupt, *, strict: bool = False
) -> dict[str, Any]:
    """The object in a JSON file (`strict`: see `loads`).

    Raises:
      Incomplete: it is not there, and `kind` is about checkpoints.
      kind: the file cannot be read, is very large, or holds something else; the sentence ends in `remedy`.
    """
    return as_object(_bytes(path, remedy, kind), str(path), remedy, kind, strict=strict)


def as_object(
    raw: bytes, name: str, remedy: str = AGAIN, kind: type[UserError] = Corrupt, *, strict: bool = False
) -> dict[str, Any]:
    """The object in the bytes of what `name` names (`strict`: see `loads`).

    Raises:
      kind: they hold something else; the sentence ends in `remedy`.
    """
    try:
        found = loads(raw, strict=strict)
    except ValueError as error:
        raise kind(f"{name} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise kind(f"{name} holds a JSON {type(found).__name__} but must hold an object; {remedy}.")
    return found


def optional_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a checkpoint may lack, {} then.

    Raises:
      Corrupt: as `read_object`.
    """
    return read_object(path) if path.exists() else {}


def field(
    raw: dict[str, Any], name: str, kinds: type | tuple[type, ...], origin: Path | str, default: Any = None
) -> Any:
    """`raw[name]` if it is one of `kinds`; the default where it is missing or null.

    Raises:
      Corrupt: it is of another kind; true and false are no numbers.
    """
    value = raw.get(name)
    if value is None:
        return default
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise Corrupt(f"{origin}: {name} is {shown(value)} but must be {wanted}.")
    return value


def _bytes(path: Path, remedy: str, kind: type[UserError]) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise kind(f"{path} is no regular file; {remedy}.")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise kind(f"{path} has {size:,} bytes, at most {MOST_BYTES:,} are read; {remedy}.")
        return path.read_bytes()
    except FileNotFoundError as error:
        missing = Incomplete if issubclass(kind, CheckpointError) else kind
        raise missing(f"{path} is missing; {remedy}.") from error
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror}); {remedy}.") from error


def _decoded(raw: bytes, strict: bool = False) -> str:
    try:
        return raw.decode("utf-8" if strict else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"names {shown(key)} twice")
        found[key] = value
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"contains {name}")
