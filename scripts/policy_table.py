"""The README's table of inference policies, generated from the registry.

python -m scripts.policy_table            print it
python -m scripts.policy_table --write    put it into README.md
"""

from __future__ import annotations

from jaxattn.command import run_cli
from jaxattn.policies.table import markdown
from scripts.readme import table_command

MARK = "policies"


def main() -> None:
    table_command(__doc__, MARK, markdown)


if __name__ == "__main__":
    run_cli(main)
