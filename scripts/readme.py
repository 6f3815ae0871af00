"""Texts of README.md that are generated, each between two marks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from jaxattn.errors import UserError

README = Path(__file__).parents[1] / "README.md"


def between(text: str, mark: str, body: str) -> str:
    """`text` with `body` in place of what stands between <!-- mark --> and <!-- /mark -->.

    Raises:
      UserError: not one of each, in this order.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    for found in (start, end):
        if text.count(found) != 1:
            raise UserError(f"README.md has {found} {text.count(found)} times but must have it once: restore it.")
    before, _, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not closed:
        raise UserError(f"README.md has {end} in front of {start}: swap them.")
    return f"{before}{start}\n{body}\n{end}{after}"


def table_command(description: str | None, mark: str, table: Callable[[], str]) -> None:
    """The command of a generated table: print it or, with --write, put it into README.md."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help="update README.md")
    if parser.parse_args().write:
        README.write_text(between(README.read_text("utf-8"), mark, table()), "utf-8")
    else:
        sys.stdout.write(table() + "\n")
