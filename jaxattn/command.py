"""How every command of the project runs and ends: its exit codes, its one sentence, near names for mistyped flags."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from jaxattn import signals
from jaxattn.errors import FULL, UserError, cannot_write, near, shown


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0 or its return value, or the error's exit code (2) with one sentence on a `UserError`.

    Ctrl-C and SIGTERM raise KeyboardInterrupt in `main` (`jaxattn.signals`) and end with 130 and 143.
    """
    try:
        with signals.interruptible():
            code = _code(main)
    except KeyboardInterrupt:
        signals.end_interrupted()
    sys.exit(code)


def _no_output(error: OSError) -> UserError:
    return UserError(f"the output cannot be written ({error.strerror}): free some space and run again.")


def _code(main: Callable[[], int | None]) -> int:
    try:
        try:
            with near_names():
                return main() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as other commands end
    except OSError as error:
        if error.errno in FULL:
            return _say(cannot_write(error.filename, error) if error.filename else _no_output(error))
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _say(UserError(f"{shown(error.filename)} cannot be used ({error.strerror}): choose another path."))
        raise
    except UserError as error:
        return _say(error)


def _say(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


@contextmanager
def near_names() -> Iterator[None]:
    """While a command runs, argparse's refusals name what a mistyped flag may have been meant to be.

    argparse has no such option, and every command makes a parser of its own: its method is replaced for the while.
    """
    plain = argparse.ArgumentParser.error

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        plain(self, message + "".join(_hints(self)))

    argparse.ArgumentParser.error = error
    try:
        yield
    finally:
        argparse.ArgumentParser.error = plain


def _hints(parser: argparse.ArgumentParser) -> Iterator[str]:
    known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for arg in sys.argv[1:]:
        flag = arg.partition("=")[0]
        if flag == "--":
            return
        if not flag.startswith("--") or any(name.startswith(flag) for name in known):  # the beginning of one is it
            continue
        if hint := near(flag, known):
            yield f"; for {flag[:40]} {hint.rstrip()}"
