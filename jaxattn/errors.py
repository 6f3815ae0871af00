"""Errors a person can act on.

Every command of the project turns a `UserError` into one sentence on stderr and exit code 2 (`jaxattn.command`).
The sentence names the field, the value that was found and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import reprlib
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

MOST, TAIL = 2000, 600  # characters of a sentence, and of its end (the remedy) where the middle is left out
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What reading a damaged zip or gzip file raises; RuntimeError, where its bytes now say encrypted or of another version.
BAD_ARCHIVE = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = 30


def one_line(text: str) -> str:
    """`text` as one line of at most `MOST` characters that any terminal and any UTF-8 file takes."""
    text = _UNPRINTABLE.sub(" ", text[: 2 * MOST] + text[2 * MOST :][-TAIL:]).strip()
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MOST else f"{text[: MOST - TAIL]} [...] {text[-TAIL:]}"


def shown(value: Any) -> str:
    """`repr` of a value somebody gave, with its middle left out where it is long or deep."""
    return _REPR.repr(value)


class UserError(Exception):
    """Bad input or a bad environment; the text is one sentence a user can act on, `one_line` of what is given."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class ConfigError(UserError):
    """A configuration field has an impossible value."""


class ShadowedError(UserError, ImportError):
    """A file of the user's is imported in place of one of this library's packages."""


class DataError(UserError):
    """A data source is missing, empty, undecodable or corrupt."""


class TrainingStopped(UserError):
    """Training cannot go on (non-finite loss, too many skipped steps); everything before it is saved."""

    exit_code = 1


class CheckpointError(UserError):
    """A checkpoint cannot be used; the text names the file, what was expected, and what to try."""


class Incomplete(CheckpointError):
    """A file of the checkpoint is missing or was never finished."""


class Corrupt(CheckpointError):
    """The bytes of the checkpoint are not the bytes that were saved."""


class Mismatch(CheckpointError):
    """The checkpoint belongs to another configuration, shape or dtype."""


class Unsupported(CheckpointError):
    """The checkpoint is of a kind this version cannot read."""


def near(given: str, known: Iterable[str]) -> str:
    """``"did you mean 'softmax'? "`` where a known name is close to `given`, else nothing."""
    found = get_close_matches(given, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(n) for n in found)}? " if found else ""


def suggest(kind: str, given: str, known: list[str]) -> str:
    """One sentence for an unknown name: nearest names first, then all of them."""
    return f"{kind} {shown(given)} is not known: {near(given[:MOST], known)}choose one of {', '.join(known)}."


def cannot_write(
    path: str | os.PathLike[str], error: OSError, remedy: str = "choose another place", again: str = "run again"
) -> UserError:
    """The sentence for a file that could not be written; on a full disk it says how much is free and asks for space."""
    why = error.strerror or type(error).__name__
    if error.errno in FULL:
        why, remedy = f"{why}, {free_bytes(path):,} bytes free", f"free some space and {again}"
    return UserError(f"{os.fspath(path)} cannot be written ({why}): {remedy}.")


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that are free where a path is, or would be."""
    folder = os.path.abspath(os.fspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str], remedy: str = "choose another place", again: str = "run again"
) -> Iterator[None]:
    """Any `OSError` in here but a broken pipe becomes the sentence of `cannot_write`, for its own file or `path`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(error.filename or path, error, remedy, again) from error
