"""Things that are chosen by name: what is known under which name, and "NAME(option=value, ...)" read into it.

One `Registry` a kind of thing (attention, tasks, policies, ...). A thing of the library is one line: its name and the
module that has it, which is loaded on first use. Things kept outside call `register`; modules that do so are named in
the environment variable `JAXATTN_PLUGINS` ("my_module, other.module") for the commands and the tests, which import
them first.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import keyword
import os
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from jaxattn.errors import ConfigError, UserError, near, shown, suggest

FORM = "NAME or NAME(option=value, ...)"
MOST = 2**31 - 1  # the largest whole number an option may have: JAX counts in int32
PLUGINS = "JAXATTN_PLUGINS"
Record = TypeVar("Record")
_loaded: list[str] = []  # plugins that were imported, or are being imported


# ------------------------------------------------------------------------------------------------ the text


def parse_call(kind: str, text: str, *, lists: bool = False) -> tuple[str, dict[str, Any]]:
    """``"sigmoid(train_len=256)"`` -> ("sigmoid", {"train_len": 256}); nothing is evaluated.

    Values are numbers, True, False or text, which may be a bare word: ``slopes=paper`` is ``slopes='paper'``.

    Args:
      lists: a value may also be a list of such values, as in ``pairs=[4, 8]``.

    Raises:
      ConfigError: another form; the sentence begins with `kind` and the text.
    """
    name, options = _read_call(kind, text, lists)
    return name, {option: list(value) if isinstance(value, tuple) else value for option, value in options}


@functools.lru_cache(maxsize=1024)  # models ask for their layers' attention again and again
def _read_call(kind: str, text: str, lists: bool) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """`parse_call` in values that nobody changes."""
    node = _expression(kind, text, text)
    call = node if isinstance(node, ast.Call) else None
    head = call.func if call else node
    wrong = f"{kind} {shown(text)} is not {FORM}"
    if not isinstance(head, ast.Name) or (call and call.args):
        raise ConfigError(f"{wrong}: options are written option=value.")
    options: dict[str, Any] = {}
    for written in call.keywords if call else ():
        if written.arg is None:
            raise ConfigError(f"{wrong}: options are written option=value.")
        if written.arg in options:
            raise ConfigError(f"{wrong}: {written.arg} is given twice.")
        try:
            value = written.value
            listed = lists and isinstance(value, ast.List | ast.Tuple)
            options[written.arg] = tuple(map(_literal, value.elts)) if listed else _literal(value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            known = "a number, a word, 'text', True or False" + ", or a list of such" * lists
            raise ConfigError(f"{wrong}: the value of {written.arg} must be {known}.") from error
    return head.id, tuple(options.items())


def parse_list(kind: str, text: str) -> tuple[str, ...]:
    """Split ``"softmax(window=64), sigmoid"`` into its entries, each written in one way; nothing is evaluated.

    Raises:
      ConfigError: the text is not a comma-separated list of NAME or NAME(option=value, ...).
    """
    tree = _expression(kind, text, f"({text},)")
    if not isinstance(tree, ast.Tuple) or not tree.elts:
        raise ConfigError(f"{kind} {shown(text)} is not {FORM}.")
    return tuple(_quoted(entry) for entry in tree.elts)


def _literal(node: ast.expr) -> Any:
    """A number, a truth value or text, which may be a bare word. Raises `ValueError` for anything else."""
    value = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{type(value).__name__} is no value of an option")
    return value


def _expression(kind: str, text: str, code: str) -> ast.expr:
    """The syntax tree of `code`, made of what the user wrote as `text`. Raises `ConfigError` where it has none."""
    try:
        return ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: very deep brackets
        reason = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise ConfigError(f"{kind} {shown(text)} is not {FORM}: {reason}.") from error


def _quoted(node: ast.expr) -> str:
    """A call as text again, bare words in quotes, so that one meaning has one text."""
    for each in ast.walk(node) if isinstance(node, ast.Call) else ():
        if isinstance(each, ast.keyword) and isinstance(each.value, ast.Name):
            each.value = ast.Constant(each.value.id)
        if isinstance(each, ast.List | ast.Tuple):
            each.elts = [ast.Constant(x.id) if isinstance(x, ast.Name) else x for x in each.elts]
    return ast.unparse(node)


# ------------------------------------------------------------------------------------------------ the options


def make_spec(name: str, spec: type, options: Mapping[str, Any], *, typed: bool = True) -> Any:
    """The dataclass `spec` of the thing called `name` with some of its fields set, each value in its field's type.

    Args:
      typed: False leaves the values as they are; the dataclass judges them.

    Raises:
      ConfigError: a field that it does not have, a value of another type or one that the dataclass refuses.
    """
    known = _types_of(spec)
    for option in options:
        if option not in known:
            have = ", ".join(known) or "none"
            raise ConfigError(f"{name} has no option {shown(option)}; {near(option, known)}its options are: {have}.")
    return spec(**{k: _typed(f"{name}.{k}", v, known[k]) if typed else v for k, v in options.items()})


@functools.cache
def _types_of(spec: type) -> dict[str, Any]:
    """The type of every field; where an annotation cannot be read (a class made inside a function), its default's."""
    fields = dataclasses.fields(spec)
    try:
        hints = typing.get_type_hints(spec)
    except NameError:
        hints = {field.name: type(field.default) for field in fields}
    return {field.name: hints[field.name] for field in fields if field.init}


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


class _Misfit(Exception):
    """A value is not of a type; the text says of which."""


def _typed(label: str, value: Any, hint: Any) -> Any:
    """An option's value in the type of its field; whole floats pass as whole numbers, lists as tuples.

    Raises:
      ConfigError: it has another type, is not finite or beyond int32.
    """
    try:
        return _as_type(value, hint)
    except _Misfit as misfit:
        raise ConfigError(f"{label} is {shown(value)} but must be {misfit}.") from None


def _as_type(value: Any, hint: Any) -> Any:
    """`_typed`, raising `_Misfit`."""
    value = value.item() if isinstance(value, np.generic) else value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        listed = isinstance(value, list | tuple)
        some = [a for a in args if a is not types.NoneType and (typing.get_origin(a) is tuple) == listed]
        return _as_type(value, some[0]) if len(some) == 1 else value  # else the dataclass decides
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Misfit("a list")
        try:
            return tuple(_as_type(part, args[0]) for part in value)
        except _Misfit as misfit:
            raise _Misfit(f"a list, each entry {misfit}") from None
    if origin is typing.Literal:  # which of them the dataclass asks
        hint = type(args[0])
    if hint is bool and not isinstance(value, bool):
        raise _Misfit("True or False")
    if hint is str and not isinstance(value, str):
        raise _Misfit("text")
    if hint not in (int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Misfit("a number")
    if not abs(value) <= sys.float_info.max:  # nan, infinity, and whole numbers that no float holds
        raise _Misfit("a finite number")
    if hint is int and value != int(value):
        raise _Misfit("a whole number")
    if hint is int and abs(value) > MOST:
        raise _Misfit(f"at most {MOST} in size")
    return hint(value)


# ------------------------------------------------------------------------------------------------ the names


class Registry(Generic[Record]):
    """What there is of one kind: records by name, those of the library and those that were registered.

    Args:
      kind: the word of the sentences about a text that was given, as in "attention 'x' is not known".
      package: where the library's modules are.
      places: name -> "module" or "module:ATTRIBUTE" in that package.
      record: the class that every record is an instance of, or a subclass of where the records are classes.
      attribute: what a module calls its record where a place does not say.
      noun: the word for one of them, as in "a mechanism named 'x' exists"; without it `kind`.
      reserved: names that nobody may register.
      lists: an option's value may be a list.
      typed: whether values are brought into the types of their fields; else the dataclass itself judges them.

    A record has a `name`, and as `spec` the frozen dataclass of its options; one that is a class is that dataclass.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        places: Mapping[str, str],
        record: type[Record] | type,
        *,
        attribute: str = "",
        noun: str = "",
        reserved: Collection[str] = (),
        lists: bool = False,
        typed: bool = True,
    ) -> None:
        self.kind, self.noun, self.lists, self.typed = kind, noun or kind, lists, typed
        self._package, self._places, self._record = package, places, record
        self._attribute, self._reserved = attribute, tuple(reserved)
        self._added: dict[str, Record] = {}

    def names(self) -> list[str]:
        """Every name, sorted.

        Raises:
          ConfigError: a module of `JAXATTN_PLUGINS` cannot be imported.
        """
        load_plugins()
        return sorted({*self._places, *self._added})

    def __contains__(self, name: str) -> bool:
        if name not in self._places:
            load_plugins()
        return name in self._places or name in self._added

    def get(self, name: str) -> Record:
        """What is called `name`.

        Raises:
          ConfigError: nothing is; the sentence has near names.
        """
        if name not in self._places or os.environ.get(PLUGINS):
            load_plugins()
        if name in self._added:
            return self._added[name]
        if name not in self._places:
            raise ConfigError(
                suggest(self.kind, name, self.names())
                + f" One that is kept outside the library: name its module in {PLUGINS}."
            )
        module, _, attribute = self._places[name].partition(":")
        return getattr(importlib.import_module(f"{self._package}.{module}"), attribute or self._attribute)

    def register(self, record: Record, *, replace: bool = False) -> Record:
        """Make a record of your own known by its name, and return it.

        Args:
          replace: allow a name that is taken, as when a notebook cell runs again.

        Raises:
          ConfigError: it is no such record, its name is no Python name or taken.
        """
        kind = self._record.__name__
        fits = issubclass(record, self._record) if isinstance(record, type) else isinstance(record, self._record)
        if not fits:
            raise ConfigError(f"register takes a {kind} but was given {shown(record)}.")
        name: str = record.name  # type: ignore[attr-defined]
        if not name.isidentifier() or keyword.iskeyword(name) or name in self._reserved:
            other = f" other than {' and '.join(self._reserved)}" if self._reserved else ""
            raise ConfigError(f"the {self.noun}'s name {shown(name)} must be a Python name{other}.")
        if (name in self._places or name in self._added) and not replace:
            raise ConfigError(f"a {self.noun} named {name!r} exists: choose another name, or pass replace=True.")
        self._added[name] = record
        return record

    def unregister(self, name: str) -> None:
        """Forget what `register` added under this name; one of the library that it replaced is back."""
        self._added.pop(name, None)

    def make(self, name: str, options: Mapping[str, Any]) -> Any:
        """The options of what is called `name`, some of them set.

        Raises:
          ConfigError: an unknown name or option, an impossible value.
        """
        record: Any = self.get(name)
        return make_spec(name, record if isinstance(record, type) else record.spec, options, typed=self.typed)

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        """``"NAME(option=value)"`` -> its name and options as they are written. Raises `ConfigError`."""
        return parse_call(self.kind, text, lists=self.lists)

    def resolve(self, text: str) -> tuple[Record, Any]:
        """``"NAME(option=value)"`` -> the record and its options.

        Raises:
          ConfigError: another form, an unknown name or option, an impossible value.
        """
        name, options = self.parse(text)
        return self.get(name), self.make(name, options)


def load_plugins() -> None:
    """Import what `JAXATTN_PLUGINS` names, once a process.

    Raises:
      ConfigError: one of the modules cannot be imported.
    """
    for plugin in filter(None, (entry.strip() for entry in os.environ.get(PLUGINS, "").split(","))):
        if plugin in _loaded:
            continue
        _loaded.append(plugin)
        try:
            importlib.import_module(plugin)
        except UserError:
            _loaded.remove(plugin)
            raise
        except Exception as error:  # whatever a user's module raises while it is imported
            _loaded.remove(plugin)
            raise ConfigError(
                f"the module {plugin!r} of {PLUGINS} cannot be imported ({type(error).__name__}: {error}); mend it, "
                "or correct the variable (its folder must be on PYTHONPATH or the current one)."
            ) from error


def forget_plugins() -> None:
    """Let the modules of `JAXATTN_PLUGINS` be imported, and so register, again."""
    _loaded.clear()
