"""The README's table of mechanisms, generated from the registry.

python -m scripts.mechanism_table            print it
python -m scripts.mechanism_table --write    put it into README.md
"""

from __future__ import annotations

import dataclasses

from jaxattn.command import run_cli
from jaxattn.mechanisms import get, names
from scripts.readme import table_command

MARK = "mechanisms"


def table() -> str:
    """Markdown: name, what it is, weights, options, paper."""
    lines = ["| `--attn=` | what | weights | options | paper |", "|---|---|---|---|---|"]
    for name in names():
        m = get(name)
        options = ", ".join(f"`{f.name}={f.default}`" for f in dataclasses.fields(m.spec)) or "–"
        equation = m.equation.replace("|", "\\|")
        link = f"[{m.arxiv}](https://arxiv.org/abs/{m.arxiv})"
        lines.append(f"| `{name}` | {m.title} | {equation} | {options} | {link} |")
    return "\n".join(lines)


def main() -> None:
    table_command(__doc__, MARK, table)


if __name__ == "__main__":
    run_cli(main)
