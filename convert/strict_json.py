"""JSON from a stranger: bounded in size, no duplicate keys, no NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxattn.errors import Corrupt, Incomplete

MOST_BYTES = 16 << 20


def loads(raw: bytes, origin: str) -> Any:
    """The value in `raw`; `origin` names it in messages.

    Raises:
      Corrupt: not UTF-8, not JSON, nested too deep, a key twice, or a number JSON does not have.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise Corrupt(f"{origin} names {key[:80]!r} twice; a checkpoint with duplicate keys is refused.")
            found[key] = value
        return found

    def refuse(name: str) -> Any:
        raise Corrupt(f"{origin} contains {name}, which JSON does not have; write a finite number.")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise Corrupt(
            f"{origin} is not UTF-8 text ({error.reason} at byte {error.start}); download it again."
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also integers of more than 4,300 digits
        raise Corrupt(f"{origin} is not valid JSON ({str(error)[:120]}); download it again.") from error


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      Incomplete: there is no such file.
      Corrupt: too large, unreadable, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Corrupt(f"{path} has {size:,} bytes; a JSON file of a checkpoint has at most {MOST_BYTES:,}.")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise Incomplete(f"{path} is missing; download the whole checkpoint.") from error
    except OSError as error:
        raise Incomplete(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    value = loads(raw, str(path))
    if not isinstance(value, dict):
        raise Corrupt(f"{path} holds a {type(value).__name__} where an object is expected; download it again.")
    return value
