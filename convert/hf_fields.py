"""Typed reading of a stranger's configuration: every value is of its kind, or one sentence names the field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxattn.errors import Corrupt, shown
from jaxattn.rope import MOST_POSITIONS

MISSING = object()


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of an object by name; `prefix` goes in front of a field's name, also in messages.

    A field that is missing takes the default (None: it is needed); one that is null is no default, unless `null` says
    what it means.
    """

    raw: Mapping[str, Any]
    origin: str
    prefix: str = ""

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(self.prefix + field) is not None

    def names(self, field: str) -> bool:
        """Whether the field is there, perhaps as null."""
        return self.prefix + field in self.raw

    def value(self, field: str, kind: type, default: Any = None, *, null: Any = MISSING) -> Any:
        """A value of `kind` (bool, str, list or dict)."""
        found = self._found(field, default, null, f"a {kind.__name__}")
        if self.has(field) and type(found) is not kind:
            raise self.wrong(field, f"a {kind.__name__}")
        return found

    def count(self, field: str, default: int | None = None, *, least: int = 1, null: Any = MISSING) -> Any:
        """An integer from `least` to 2^31 - 1."""
        found = self._found(field, default, null, f"an integer from {least} to {MOST_POSITIONS}")
        if self.has(field) and (type(found) is not int or not least <= found <= MOST_POSITIONS):
            raise self.wrong(field, f"an integer from {least} to {MOST_POSITIONS}")
        return found

    def number(self, field: str, default: float | None = None, *, null: Any = MISSING) -> Any:
        """A positive finite number."""
        found = self._found(field, default, null, "a positive number")
        if not self.has(field):
            return found
        number = as_number(found)
        if number is None or number <= 0:
            raise self.wrong(field, "a positive number")
        return number

    def wrong(self, field: str, wanted: str) -> Corrupt:
        """The error of a field that holds something else."""
        found = self.raw.get(self.prefix + field)
        return Corrupt(f"{self.origin}: {self.prefix}{field} is {shown(found)} but must be {wanted}.")

    def _found(self, field: str, default: Any, null: Any, wanted: str) -> Any:
        if self.has(field):
            return self.raw[self.prefix + field]
        if self.names(field):
            if null is MISSING:
                raise self.wrong(field, wanted)
            return null
        if default is None and null is MISSING:
            raise Corrupt(f"{self.origin}: {self.prefix}{field} is missing; it is needed and not guessed.")
        return default


def as_number(value: Any) -> float | None:
    """A finite float from a JSON number, else None."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def check_ids(fields: Fields, names: tuple[str, ...], several: tuple[str, ...] = ()) -> None:
    """Refuse token ids that are none: text, booleans, fractions, and what does not fit int32 or is negative.

    A padding id may be -1, which many configurations write for "none"; those in `several` may be lists.

    Raises:
      Corrupt: naming the field.
    """
    for name in names:
        if not fields.has(name):
            continue
        found = fields.raw[fields.prefix + name]
        least = -1 if name.startswith("pad") else 0
        listed = found if name in several and isinstance(found, list) else [found]
        if not all(type(i) is int and least <= i <= MOST_POSITIONS for i in listed):
            raise fields.wrong(name, f"a token id, an integer from {least} to {MOST_POSITIONS}")
