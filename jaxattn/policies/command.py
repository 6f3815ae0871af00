"""The flags of a policy, for every command that runs a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """What the flags say: the policy's text (None: the model's own) and a file of head tables."""

    policy: str | None = None
    heads: Path | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a command --policy, --heads and --list-policies."""
    group = parser.add_argument_group("how keys are kept and read")
    group.add_argument("--policy", metavar="NAME(option=value)", help="such as streaming(sinks=4), see --list-policies")
    group.add_argument("--heads", type=Path, metavar="FILE", help="head tables, {name: [layers][heads]} in JSON")
    group.add_argument("--list-policies", action=_List, nargs=0, help="name them and end")


def asked(args: argparse.Namespace) -> Asked:
    """What the flags of `add_flags` say."""
    return Asked(args.policy, args.heads)


class _List(argparse.Action):
    """Print the policies and end, whatever else is missing on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from jaxattn.policies.table import text

        print(text())
        parser.exit()
