"""JSON objects from files of strangers: bounded in size, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxattn.errors import Corrupt

MOST_BYTES = 128 << 20


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a file.

    Raises:
      Corrupt: too large, unreadable, or not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > most:
            raise Corrupt(f"{path} has {size:,} bytes; a file of its kind has at most {most:,}.")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise Corrupt(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise Corrupt(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); download it again.") from error


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file, {} without one.

    Raises:
      Corrupt: unreadable, not JSON, or no object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(read_text(path, most))
    except (ValueError, RecursionError) as error:  # ValueError: also integers of more than 4,300 digits
        raise Corrupt(f"{path} is not valid JSON ({str(error)[:120]}); download it again.") from error
    if not isinstance(found, dict):
        raise Corrupt(f"{path} holds a {type(found).__name__} where an object is expected; download it again.")
    return found


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
        raise Corrupt(f"{origin}: {name} is {short(value)} but must be {wanted}.")
    return value


def short(value: Any, most: int = 60) -> str:
    """`value` as one bounded line of a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
