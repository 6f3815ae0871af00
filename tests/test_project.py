"""The project's own hygiene: lint, types, generated tables, documented public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["pyrefly", "check", "--python-interpreter-path", sys.executable],
    ],
    ids=["ruff", "format", "types"],
)
def test_static_checks_pass(command):
    done = subprocess.run([TOOL / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_readme_table_is_the_registry():
    from scripts.mechanism_table import MARK, table
    from scripts.readme import README, between

    text = README.read_text("utf-8")
    assert text == between(text, MARK, table()), "run python -m scripts.mechanism_table --write"


def test_readme_policies_are_the_registry():
    from jaxattn.policies.table import markdown
    from scripts.policy_table import MARK
    from scripts.readme import README, between

    text = README.read_text("utf-8")
    assert text == between(text, MARK, markdown()), "run python -m scripts.policy_table --write"


def test_readme_results_are_those_of_the_files_that_it_links_to():
    from scripts.readme import README, between
    from scripts.results_table import MARK, table

    text = README.read_text("utf-8")
    assert text == between(text, MARK, table()), "run python -m scripts.results_table --write"


def test_a_generated_text_goes_between_its_marks():
    from jaxattn.errors import UserError
    from scripts.readme import between

    marked = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert between(marked, "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    for text, says in (
        ("a", "has <!-- x --> 0 times"),
        ("<!-- x -->", "has <!-- /x --> 0 times"),
        (marked + marked, "has <!-- x --> 2 times"),
        ("<!-- /x -->\n<!-- x -->", "in front of <!-- x -->"),
    ):
        with pytest.raises(UserError, match=says):
            between(text, "x", "new")


def test_readme_and_ci_run_the_same_test_command():
    command = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest -q -n 2"
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command in (ROOT / ".ci/run").read_text("utf-8")


def test_nothing_uses_apis_that_jax_is_removing():
    gone = ("jax.experimental.shard_map", "pallas.ops.gpu", "flax.training", "jax.pmap")
    for path in [
        *ROOT.glob("jaxattn/**/*.py"),
        *ROOT.glob("pallas_kernels/**/*.py"),
        *ROOT.glob("train/**/*.py"),
    ]:
        text = path.read_text("utf-8")
        assert not [name for name in gone if name in text], path
