"""The README's table of inference policies, generated from the registry.

python -m scripts.policy_table            print it
python -m scripts.policy_table --write    put it into README.md
"""

from __future__ import annotations

import argparse
import sys

from jaxattn.command import run_cli
from jaxattn.policies.table import markdown
from scripts.readme import README, between

MARK = "policies"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update README.md")
    if parser.parse_args().write:
        README.write_text(between(README.read_text("utf-8"), MARK, markdown()), "utf-8")
    else:
        sys.stdout.write(markdown() + "\n")


if __name__ == "__main__":
    run_cli(main)
