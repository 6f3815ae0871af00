"""Talking to the processes of contenders, which may end at any word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxattn.errors import UserError


@contextlib.contextmanager
def alive(name: str) -> Iterator[None]:
    """A word to a process, or from it, in which it may turn out to have ended.

    Raises:
      UserError: it has.
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise UserError(f"the process of {name} ended; what it said stands above.") from error
