"""`NAME` and `NAME(option=value, ...)` as users write them on a command line, read without evaluating anything."""

from __future__ import annotations

import ast
from typing import Any

from jaxattn.errors import ConfigError


def parse_call(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """``"sigmoid(train_len=256)"`` -> ("sigmoid", {"train_len": 256}); values are Python literals.

    Raises:
      ConfigError: another form; the sentence begins with `kind` and the text.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else None
        head = call.func if call else node
        if not isinstance(head, ast.Name) or (call and call.args):
            raise ValueError("options are written option=value")
        options = {} if call is None else {str(kw.arg): ast.literal_eval(kw.value) for kw in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{kind} {text!r} is not NAME or NAME(option=value, ...): {error}.") from error
    return head.id, options
