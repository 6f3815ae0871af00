"""Calls of `tokenizers`, whose Rust raises the base class `Exception`, or panics past it with pages on stderr."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator

from jaxattn.errors import Corrupt, UserError

_LOCK = threading.Lock()  # there is one stderr


@contextlib.contextmanager
def guarded(what: str, *, quiet: bool = True) -> Iterator[None]:
    """Turn whatever the library throws into one sentence that begins with `what`.

    Args:
      quiet: also hold back what a panic writes to stderr. Off where panics are not to be expected: for the time of the
        call, other threads' messages wait too.

    Raises:
      Corrupt: the library failed.
    """
    panicked = False
    with _stderr(lambda: panicked) if quiet else contextlib.nullcontext():
        try:
            yield
        except UserError:
            raise
        except BaseException as error:
            # pyo3's PanicException derives from BaseException, so that nobody catches it by accident
            panicked = type(error).__name__ == "PanicException"
            if not panicked and not isinstance(error, Exception):
                raise
            reason = " ".join(str(error).split())[:160]
            raise Corrupt(f"{what} ({reason}).") from None


@contextlib.contextmanager
def _stderr(forget: Callable[[], bool]) -> Iterator[None]:
    """Hold back what is written to file descriptor 2 and pass it on afterwards, unless `forget()` says not to."""
    with _LOCK, contextlib.ExitStack() as stack:
        saved = None
        with contextlib.suppress(OSError):  # a process without stderr, or without room for a file
            held = stack.enter_context(tempfile.TemporaryFile())
            saved = os.dup(2)
        if saved is None:
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            held.seek(0)
            if not forget() and (text := held.read()):
                os.write(saved, text)
            os.close(saved)
