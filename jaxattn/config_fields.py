"""Types and ranges of the fields of a configuration, whoever filled them in: a command line, a file, a caller."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jaxattn.errors import ConfigError, shown

INT32, UINT32, INT64 = 2**31 - 1, 2**32 - 1, 2**63 - 1
FLOAT32 = 3.4028234e38
# What need not fit the int32 of a device, and what no model has so many of that it could be compiled.
MOST = {"seed": UINT32, "unique_tokens": INT64, "num_layers": 10_000}
LEAST = {"seed": 0}

_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    found = typing.get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def check_fields(group: str, config: Any) -> None:
    """Check every field of a dataclass; `group` (as "optim") is put before the names, "" for none.

    A whole number in a field of floats that no int32 holds becomes the float it stands for.

    Raises:
      ConfigError: a value of another type, NaN or infinite, or a number that no device holds.
    """
    check_values(group, type(config), vars(config))
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if type(value) is int and abs(value) > INT32 and _is_real(hint):
            object.__setattr__(config, name, float(value))


def check_values(group: str, kind: type, values: Mapping[str, Any]) -> None:
    """`check_fields` for the fields that `values` has, before the dataclass is made of them."""
    for name, hint in hints(kind).items():
        if name in values:
            _check(f"{group}.{name}" if group else name, name, hint, values[name])


def _check(label: str, name: str, hint: Any, value: Any) -> None:
    if not _fits(hint, value):
        raise ConfigError(f"{label} is {shown(value)} but must be {_noun(hint)}.")
    for part in value if isinstance(value, tuple) else (value,):
        _check_number(label, name, part, _is_real(hint))
        if isinstance(part, str) and not _is_text(part):
            raise ConfigError(f"{label} is {shown(part)} but must be text, without NUL and half surrogate pairs.")


def _is_text(value: str) -> bool:
    """Whether a command line could hold it; under an ASCII locale that includes bytes escaped as surrogates."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _is_real(hint: Any) -> bool:
    """Whether the numbers of a field are floats, of which some may be written as whole numbers."""
    args = typing.get_args(hint)
    return hint is float or (float in args and int not in args)


def _check_number(label: str, name: str, value: Any, real: bool) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{label} is {value} but must be a finite number.")
    if isinstance(value, int | float):
        most = FLOAT32 if real or isinstance(value, float) else MOST.get(name, INT32)
        least = LEAST.get(name, -most)
        if not least <= value <= most:
            raise ConfigError(f"{label} is {shown(value)} but must lie between {least:,} and {most:,}.")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a field's type; an int is a float, a bool is neither."""
    if dataclasses.is_dataclass(hint):
        return isinstance(value, typing.cast(type, hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(args[0], part) for part in value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(a, value) for a in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (bool, int, str, types.NoneType):
        return type(value) is hint
    return True


def _noun(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"a {typing.cast(type, hint).__name__}"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list, each entry {_noun(args[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else _noun(a) for a in args)
    return _NOUNS.get(hint, str(hint))
