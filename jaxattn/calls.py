"""`NAME` and `NAME(option=value, ...)` as users write them on a command line, read without evaluating anything."""

from __future__ import annotations

import ast
from typing import Any

from jaxattn.errors import ConfigError, shown

FORM = "NAME or NAME(option=value, ...)"


def parse_call(kind: str, text: str, *, lists: bool = False) -> tuple[str, dict[str, Any]]:
    """``"sigmoid(train_len=256)"`` -> ("sigmoid", {"train_len": 256}).

    Values are numbers, True, False or text, which may be a bare word: ``slopes=paper`` is ``slopes='paper'``.

    Args:
      lists: a value may also be a list of such values, as in ``pairs=[4, 8]``.

    Raises:
      ConfigError: another form; the sentence begins with `kind` and the text.
    """
    node = parsed(kind, text, text)
    call = node if isinstance(node, ast.Call) else None
    head = call.func if call else node
    wrong = f"{kind} {shown(text)} is not {FORM}"
    if not isinstance(head, ast.Name) or (call and call.args):
        raise ConfigError(f"{wrong}: options are written option=value.")
    options: dict[str, Any] = {}
    for keyword in call.keywords if call else ():
        if keyword.arg is None:
            raise ConfigError(f"{wrong}: options are written option=value.")
        if keyword.arg in options:
            raise ConfigError(f"{wrong}: {keyword.arg} is given twice.")
        try:
            value = keyword.value
            listed = lists and isinstance(value, ast.List | ast.Tuple)
            options[keyword.arg] = [literal(item) for item in value.elts] if listed else literal(value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            known = "a number, a word, 'text', True or False" + ", or a list of such" * lists
            raise ConfigError(f"{wrong}: the value of {keyword.arg} must be {known}.") from error
    return head.id, options


def literal(node: ast.expr) -> Any:
    """A number, a truth value or text, which may be a bare word.

    Raises:
      ValueError: anything else.
    """
    value = node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{type(value).__name__} is no value of an option")
    return value


def parsed(kind: str, text: str, code: str) -> ast.expr:
    """The expression `code`, made of what the user wrote as `text`.

    Raises:
      ConfigError: it is none.
    """
    try:
        return ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: very deep brackets
        reason = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise ConfigError(f"{kind} {shown(text)} is not {FORM}: {reason}.") from error


def quoted(node: ast.expr) -> str:
    """A call as text again, bare words in quotes, so that one meaning has one text."""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if isinstance(keyword.value, ast.Name):
                keyword.value = ast.Constant(keyword.value.id)
    return ast.unparse(node)
