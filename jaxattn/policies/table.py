"""What there is of policies, as text: for `--list-policies` and README."""

from __future__ import annotations

import dataclasses

from jaxattn.policies import get, names


def options_of(spec: type) -> str:
    """``"sinks=4, recent=1020"``, the options with their defaults."""
    return ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(spec))


def text() -> str:
    """Two lines a policy: its call with defaults, and what it does."""
    lines = []
    for name in names():
        policy = get(name)
        lines.append(f"{name}({options_of(policy.spec)})")
        lines.append(f"    {policy.title}, arXiv {policy.arxiv}; keeps: {policy.keeps}; reads: {policy.reads}")
    return "\n".join(lines)


def markdown() -> str:
    """A row each: name, what it is, what is kept and read, options, paper."""
    lines = ["| `--policy=` | what | keeps | reads | options | paper |", "|---|---|---|---|---|---|"]
    for name in names():
        policy = get(name)
        link = f"[{policy.arxiv}](https://arxiv.org/abs/{policy.arxiv})"
        options = f"`{options_of(policy.spec)}`" if dataclasses.fields(policy.spec) else "–"
        lines.append(f"| `{name}` | {policy.title} | {policy.keeps} | {policy.reads} | {options} | {link} |")
    return "\n".join(lines)
