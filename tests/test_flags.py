"""A mistyped flag of any command is answered with near names."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.runs.config import RunConfig
from train.command_line import parse_args
from train.config_flags import flags_of
from train.presets import get_preset

COMMANDS = {  # module: words, the flag that is meant
    "evals.sinks": (["run", "--jsn=x"], "--json"),
    "evals.report": (["run", "--outt=x"], "--out"),
    "evals.tasks": (["run", "--tsk=x"], "--task"),
    "evals.length": (["run", "--lenghts=3"], "--lengths"),
    "evals.perplexity": (["run", "--txt=x"], "--text"),
    "evals.heads": (["run", "--profle=echo"], "--profile"),
    "evals.duo_gates": (["run", "--stps=3"], "--steps"),
    "evals.needle": (["run", "--depts=3"], "--depths"),
    "convert.from_hf": (["a", "b", "--dtpe=source"], "--dtype"),
    "jaxattn.generate": (["run", "--promt", "hello"], "--prompt"),
    "jaxattn.serve": (["run", "--prt=1"], "--port"),
    "scripts.mechanism_table": (["--writ3"], "--write"),
    "scripts.policy_table": (["--writ3"], "--write"),
}


@pytest.mark.parametrize("module", COMMANDS)
def test_commands(module, monkeypatch, capsys):
    words, meant = COMMANDS[module]
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as ended:
        run_cli(importlib.import_module(module).main)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert re.search(rf"did you mean (?:'[a-z-]+' or )*'{meant}'", err), err
    assert "Traceback" not in err


def test_a_flag_that_begins_like_one_and_values_are_no_mistakes(monkeypatch, capsys):
    import argparse

    def main() -> int:
        parser = argparse.ArgumentParser()
        parser.add_argument("--prompt")
        parser.add_argument("--number", type=int)
        parser.parse_args()
        return 0

    for words in (["--promp", "x"], ["--prompt=--nmber"], ["--", "--nmber"]):
        monkeypatch.setattr(sys, "argv", ["x", *words])
        with pytest.raises(SystemExit):
            run_cli(main)
        assert "did you mean" not in capsys.readouterr().err
    assert argparse.ArgumentParser.error.__module__ == "argparse", "put back when the command ends"


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--attnn=softmax"], "--attn"),
        (["--data.contxt", "3"], "--data.context"),
        (["--stepss=3"], "--steps"),
        (["--log.no-tensorbord"], "--log.no-tensorboard"),
        (["--backnd=xla"], "--backend"),
        (["--list-atn"], "--list-attn"),
        (["--optim.lr=1", "--optim.warmup_step=3"], "--optim.warmup-steps"),
    ],
)
def test_training(words, meant):
    with pytest.raises(ConfigError, match=rf"is no flag: did you mean (?:'[a-z.-]+' or )*'{meant}'"):
        parse_args(words, get_preset("bb"))


def test_the_flags_are_those_of_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_args(["--help"], get_preset("bb"))
    printed = set(re.findall(r"(?<![\w-])--[a-z0-9][\w-]*(?:\.[\w-]+)*", capsys.readouterr().out))
    ours = set(flags_of(RunConfig))
    assert ours <= printed
    assert printed - ours <= {"--help", "--list-attn", "--list-presets", "--data", "--backend"}
    written = get_preset("bb")
    assert parse_args(["--data.batch_size=3"], written).data.batch_size == 3  # underscores are hyphens
