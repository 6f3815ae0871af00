"""`python -m train.pretrain --attn=sigmoid`: pretrain a decoder and watch attention sinks emerge."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxattn.command import run_cli
from jaxattn.signals import loading

if TYPE_CHECKING:
    from jaxattn.runs.config import RunConfig


def main(args: list[str] | None = None) -> int:
    """Parse flags over the preset's (or, on --resume, the run's own) defaults, then train."""
    args = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("jaxattn").setLevel(logging.INFO)
    if "--list-attn" in args:
        _list_attention()
        return 0
    if "--list-presets" in args:
        _list_presets()
        return 0
    with loading():
        from jaxattn.compile_cache import prepare_jax

        prepare_jax()

        from jaxattn.runs.load import read_config
        from train.command_line import parse_args
        from train.loop import default_run_dir
        from train.presets import get_preset

    preset = value_of(args, "--preset")
    cfg = parse_args(args, get_preset(preset or "bb"))
    folder = Path(cfg.run_dir or default_run_dir(cfg))
    if cfg.resume and os.path.isfile(folder / "config.json"):
        saved = dataclasses.replace(read_config(folder), resume=True, run_dir=str(folder))
        if preset is not None:  # which says nothing about the data's seed: the run's own
            recipe = get_preset(preset)
            saved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, seed=saved.data.seed))
        cfg = parse_args(args, saved)
    return run(cfg)


def run(cfg: RunConfig) -> int:
    """Train as configured, with the sink study and the report; see `train.loop.run`."""
    with loading():
        from evals.watch import watching
        from train import loop

    return loop.run(cfg, watching)


def value_of(args: list[str], flag: str) -> str | None:
    """The value of a flag before the real parsing, whichever way it is written."""
    for i, arg in enumerate(args):
        if arg.startswith(flag + "="):
            return arg.split("=", 1)[1]
        if arg == flag and i + 1 < len(args):
            return args[i + 1]
    return None


def _list_attention() -> None:
    from jaxattn.mechanisms import get, names

    for name in names():
        mechanism = get(name)
        options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(mechanism.spec))
        print(f"{name:20} {mechanism.title} (arXiv {mechanism.arxiv})  {mechanism.equation}")
        if options:
            print(f"{'':20} options: {options}")
        if advice := mechanism.advice(mechanism.spec(), None):
            print(f"{'':20} compare with care: {advice}")


def _list_presets() -> None:
    from train.presets import PRESETS

    for name, make in PRESETS.items():
        print(f"{name:12} {(make.__doc__ or '').strip()}")


if __name__ == "__main__":
    run_cli(main)
