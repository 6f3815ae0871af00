"""`python -m train.finetune CKPT`: go on training a checkpoint, whole or by LoRA, perhaps with another attention.

CKPT is a converted checkpoint (`convert.from_hf`) or a run. Every flag of `train.pretrain` is there; the model is the
checkpoint's, but for its attention:

  --attn=NAME      swap the attention; projections stay, a mechanism's own parameters start anew
  --lora.rank=8    train low-rank updates of the kernels (and what is new) instead of every parameter
  --start-step=N   start from that checkpoint of a run (default: its newest)
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path

from jaxattn.command import run_cli
from jaxattn.compile_cache import prepare_jax
from jaxattn.errors import ConfigError, Incomplete, UserError
from jaxattn.runs.config import CheckpointConfig, EvalConfig, OptimConfig, RunConfig, StartConfig
from jaxattn.signals import loading
from train.command_line import parse_args
from train.pretrain import run, value_of

KEPT = ("mixers", "dtype", "remat", "backend")  # what of the model a fine-tuning may choose
FULL_LR, LORA_LR = 2e-5, 2e-4


def defaults(source: Path, step: int | None = None, lora: bool = False) -> RunConfig:
    """What fine-tuning `source` does unless it is told otherwise.

    Raises:
      UserError: there is no checkpoint.
    """
    from jaxattn.runs.checkpoint import Checkpoints
    from jaxattn.runs.load import manifest_digest, read_config

    cfg = read_config(source)
    steps = Checkpoints(source / "checkpoints", config={}, read_only=True).steps()
    if not steps or (step is not None and step not in steps):
        known = ", ".join(map(str, steps)) or "none"
        raise Incomplete(f"{source} has no checkpoint{'' if step is None else f' of step {step}'}; it has {known}.")
    step = steps[-1] if step is None else step
    return RunConfig(
        attn=cfg.attn,
        preset="finetune",
        steps=200,
        data=dataclasses.replace(cfg.data, batch_size=8, context=min(cfg.data.context, 256)),
        model=cfg.model,
        optim=OptimConfig(
            lr=LORA_LR if lora else FULL_LR,
            schedule="cosine",
            min_lr_ratio=0.1,
            warmup_steps=10,
            b2=0.95,
            clip_norm=1.0,
        ),
        eval=EvalConfig(every=50, batches=4, sequences=32, length=cfg.eval.length),
        checkpoint=CheckpointConfig(every=100),
        start=StartConfig(str(source.resolve()), step, cfg.attn, manifest_digest(source, step)),
    )


def check(cfg: RunConfig, default: RunConfig) -> None:
    """Refuse a model that is not the checkpoint's.

    Raises:
      ConfigError: naming the fields.
    """
    from jaxattn.runs.manifest import diff_config

    ours, theirs = dataclasses.asdict(cfg.model), dataclasses.asdict(default.model)
    if differences := diff_config(theirs, ours, ignore=KEPT):
        raise ConfigError(f"the model is that of {cfg.start.source}: leave out model.{', model.'.join(differences)}.")


def default_run_dir(cfg: RunConfig) -> str:
    """runs/finetune-CKPT-ATTN[-lora]-seedSEED."""
    from train.loop import default_run_dir

    name = f"finetune-{Path(cfg.start.source).name}"
    return default_run_dir(dataclasses.replace(cfg, preset=f"{name}-lora" if cfg.lora.rank else name))


def main(args: list[str] | None = None) -> int:
    """Parse CKPT and flags, then train."""
    args = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("jaxattn").setLevel(logging.INFO)
    prepare_jax()
    parse = lambda rest, default: parse_args(
        rest, default, "python -m train.finetune CKPT", __doc__ or "", ("--start-step",)
    )
    if {"-h", "--help"} & set(args):
        parse(["--help"], RunConfig(preset="finetune"))
    if not args or args[0].startswith("-"):
        raise UserError("the first argument must be the checkpoint to start from, such as checkpoints/smollm2.")

    with loading():
        from jaxattn.runs.load import read_config

    own = argparse.ArgumentParser(prog="python -m train.finetune", add_help=False, allow_abbrev=False)
    own.add_argument("checkpoint", type=Path)
    own.add_argument("--start-step", type=int)
    named, rest = own.parse_known_args(args)
    source = named.checkpoint
    lora = (value_of(rest, "--lora.rank") or "0") != "0"
    default = defaults(source, named.start_step, lora)
    cfg = parse(rest, default)
    folder = Path(cfg.run_dir or default_run_dir(cfg))
    if cfg.resume and os.path.isfile(folder / "config.json"):
        saved = dataclasses.replace(read_config(folder), resume=True, run_dir=str(folder))
        if saved.start != default.start:
            raise ConfigError(f"{folder} did not start from {source} (step {default.start.step}); name its own start.")
        cfg = parse(rest, saved)
    check(cfg, default)
    return run(dataclasses.replace(cfg, run_dir=str(folder)))


if __name__ == "__main__":
    run_cli(main)
