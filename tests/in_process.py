"""A command as `python -m` runs it, in the test's own process: another one imports JAX for seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
from typing import Any
from unittest import mock

from jaxattn.command import run_cli


def called(module: str, *words: Any) -> subprocess.CompletedProcess[str]:
    """How the command of `module` ends on these words, and what it writes."""
    argv, out, err = [module, *map(str, words)], io.StringIO(), io.StringIO()
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(importlib.import_module(module).main)
        except SystemExit as end:
            return subprocess.CompletedProcess(argv, end.code, out.getvalue(), err.getvalue())
    raise AssertionError(f"{module} came back without an exit code")
