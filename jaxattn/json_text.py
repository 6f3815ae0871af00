"""JSON that anybody may have written: whatever is wrong with it is one short reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxattn.errors import UserError, one_line, shown

MOST_BYTES = 64 << 20  # of a file that is read as one value


def loads(raw: bytes | str, *, unique: bool = False) -> Any:
    """The value in `raw`; bytes are UTF-8, with or without a byte order mark.

    Args:
      unique: refuse an object that names a key twice, of which otherwise the last counts.

    Raises:
      ValueError: no JSON, not UTF-8, nested too deep, or a number of thousands of digits; its text is the reason.
    """
    try:
        return json.loads(
            raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw, object_pairs_hook=_once if unique else None
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{error.msg} at {where}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    except ValueError as error:  # an integer of more than 4,300 digits
        raise ValueError(one_line(str(error))[:100]) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def read_object(path: Path, remedy: str, kind: type[UserError] = UserError) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      kind: the file cannot be read, is very large, or holds something else; the sentence ends in `remedy`.
    """
    try:
        if path.exists() and not path.is_file():
            raise kind(f"{path} is no regular file; {remedy}.")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise kind(f"{path} has {size:,} bytes, at most {MOST_BYTES:,} are read as JSON; {remedy}.")
        found = loads(path.read_bytes())
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except ValueError as error:
        raise kind(f"{path} is not valid JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise kind(f"{path} holds a JSON {type(found).__name__} but must hold an object; {remedy}.")
    return found
