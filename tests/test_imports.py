"""Who may import whom: no circles between files, and every package knows only what lies below it.

An import counts wherever it stands: inside a function, for the type checker alone, or by a literal name through
`importlib`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxattn", "pallas_kernels", "convert", "train", "evals", "scripts", "tests")

# What everything else stands on. A file joins it by importing nothing but these.
GROUND = {
    f"jaxattn/{name}.py"
    for name in (
        "checks", "command", "config_fields", "errors", "json_text", "masks", "norms", "places", "registry", "rope",
        "signals", "types",
    )
}  # fmt: skip

MAY = {
    "jaxattn": {"jaxattn", "pallas_kernels"},
    "pallas_kernels": {"pallas_kernels"},  # and the ground
    "convert": {"convert", "jaxattn"},
    "train": {"train", "jaxattn"},
    "evals": {"evals", "train", "jaxattn"},
    "scripts": {"scripts", "evals", "train", "convert", "jaxattn", "pallas_kernels"},
}
# The command that starts a run hands the loop what the run is measured by: the one place where the two meet.
MEETING = {("train/pretrain.py", "evals/watch.py")}


def sources() -> dict[str, str]:
    """Path -> text of every Python file of the project."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in found}


def named(text: str) -> Iterator[str]:
    """Dotted names that a source imports; for `from a import b` both "a.b" and, behind it, "a"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Path -> the project's files that it imports."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    return {
        path: {file for name in named(text) if (file := modules.get(name) or modules.get(name.rpartition(".")[0]))}
        for path, text in files.items()
    }


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The strongly connected sets of more than one file, and files that import themselves (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(file: str) -> None:
        order[file] = low[file] = len(order)
        stack.append(file)
        for other in sorted(edges[file]):
            if other not in order:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], order[other])
        if low[file] == order[file]:
            group = stack[stack.index(file) :]
            del stack[stack.index(file) :]
            if len(group) > 1 or file in edges[file]:
                found.append(sorted(group))

    for file in edges:
        if file not in order:
            visit(file)
    return found


def faults(files: Mapping[str, str]) -> list[str]:
    """One line for every import that the rules do not allow, and for every circle."""
    edges = graph(files)
    found = [f"circle: {', '.join(group)}" for group in circles(edges)]
    for file, imported in edges.items():
        package = file.partition("/")[0]
        for other in sorted(imported):
            if package == "tests" or (file, other) in MEETING:
                continue
            if file in GROUND:
                allowed = other in GROUND
            else:
                allowed = other.partition("/")[0] in MAY[package] or (package == "pallas_kernels" and other in GROUND)
            if not allowed:
                found.append(f"{file} imports {other}")
    return found


def test_nobody_imports_what_lies_above_and_there_are_no_circles() -> None:
    assert faults(sources()) == []


SOUND = {
    "jaxattn/__init__.py": "def f():\n    import jaxattn.text",
    "jaxattn/errors.py": "import os",
    "jaxattn/masks.py": "from jaxattn.errors import UserError",
    "jaxattn/text.py": "from jaxattn import masks\nfrom pallas_kernels import flash",
    "pallas_kernels/__init__.py": "",
    "pallas_kernels/flash/__init__.py": "from jaxattn.masks import visible",
    "convert/__init__.py": "import jaxattn.text",
    "train/loop.py": "from jaxattn import text",
    "train/pretrain.py": "def run():\n    from evals.watch import watching\n    import train.loop",
    "evals/watch.py": "from train import loop",
    "scripts/__init__.py": "import evals.watch, convert",
    "tests/test_a.py": "from scripts import x",
}


def test_what_is_allowed_is_allowed() -> None:
    assert faults(SOUND) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("jaxattn/masks.py", "import jaxattn.text", "jaxattn/masks.py imports jaxattn/text.py"),
        ("jaxattn/masks.py", "import pallas_kernels", "jaxattn/masks.py imports pallas_kernels/__init__.py"),
        ("jaxattn/masks.py", "import jaxattn", "jaxattn/masks.py imports jaxattn/__init__.py"),
        ("jaxattn/errors.py", "from jaxattn import masks", "circle: jaxattn/errors.py, jaxattn/masks.py"),
        ("pallas_kernels/__init__.py", "import jaxattn.text", "pallas_kernels/__init__.py imports jaxattn/text.py"),
        ("pallas_kernels/__init__.py", "import jaxattn", "pallas_kernels/__init__.py imports jaxattn/__init__.py"),
        ("jaxattn/text.py", "import train.loop", "jaxattn/text.py imports train/loop.py"),
        ("jaxattn/text.py", "def f():\n    from train import loop", "jaxattn/text.py imports train/loop.py"),
        ("jaxattn/text.py", "importlib.import_module('evals.watch')", "jaxattn/text.py imports evals/watch.py"),
        ("jaxattn/text.py", "if TYPE_CHECKING:\n    import convert", "jaxattn/text.py imports convert/__init__.py"),
        ("jaxattn/text.py", "import scripts", "jaxattn/text.py imports scripts/__init__.py"),
        ("train/loop.py", "import evals.watch", "train/loop.py imports evals/watch.py"),
        ("train/loop.py", "import scripts", "train/loop.py imports scripts/__init__.py"),
        ("train/loop.py", "import convert", "train/loop.py imports convert/__init__.py"),
        ("convert/__init__.py", "from train.loop import run", "convert/__init__.py imports train/loop.py"),
        ("convert/__init__.py", "import evals.watch", "convert/__init__.py imports evals/watch.py"),
        ("evals/watch.py", "import scripts", "evals/watch.py imports scripts/__init__.py"),
        ("scripts/__init__.py", "from tests import test_a", "scripts/__init__.py imports tests/test_a.py"),
        ("train/loop.py", "import train.pretrain", "circle: evals/watch.py, train/loop.py, train/pretrain.py"),
        ("train/loop.py", "from train.loop import run", "circle: train/loop.py"),
    ],
)
def test_a_planted_import_is_seen(file: str, text: str, fault: str) -> None:
    assert any(fault in found for found in faults({**SOUND, file: text}))
