"""The flags of a tree of dataclasses, as tyro writes them: to name near ones where a flag is mistyped."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable

import tyro

from jaxattn.errors import ConfigError, near, shown


def flags_of(kind: type, prefix: str = "") -> list[str]:
    """``--name``, ``--group.name`` and for truth values also ``--group.no-name``, in the order of the fields."""
    hints, found = typing.get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        name, of = field.name.replace("_", "-"), hints[field.name]
        if tyro.conf.Suppress in getattr(of, "__metadata__", ()):
            continue
        if dataclasses.is_dataclass(of):
            found += flags_of(typing.cast(type, of), f"{prefix}{name}.")
            continue
        found.append(f"--{prefix}{name}")
        if of is bool:
            found.append(f"--{prefix}no-{name}")
    return found


def refuse_unknown(args: Iterable[str], known: list[str]) -> None:
    """Refuse the first argument that looks like a flag and is none.

    Raises:
      ConfigError: the sentence has near names.
    """
    for arg in args:
        flag = arg.partition("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag.replace("_", "-") not in known:
            raise ConfigError(f"{shown(flag)} is no flag: {near(flag, known)}--help lists all.")
