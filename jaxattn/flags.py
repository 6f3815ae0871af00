"""Near names for mistyped flags, for the parser of every command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from jaxattn.errors import near


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
