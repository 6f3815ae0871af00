"""Errors a person can act on.

Every command line of the project turns a `UserError` into one sentence on stderr and exit code 2.
The sentence names the field, the value that was found and the remedy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input or a bad environment; the text is one sentence a user can act on."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration field has an impossible value."""


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


def suggest(kind: str, given: str, known: list[str]) -> str:
    """One sentence for an unknown name: nearest names first, then all of them."""
    near = get_close_matches(given, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{kind} {given!r} is not known: {hint}choose one of {', '.join(known)}."


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0 or its return value, or the error's exit code (2) with one sentence on a `UserError`."""
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as other commands end
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as other commands end
    sys.exit(code or 0)
