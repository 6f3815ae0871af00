"""Softplus attention with re-weighting keeps its loss beyond the training length, softmax does not; three seeds.

    python -m scripts.reproduce.length_extrapolation [--preset cpu|gpu] [--seeds 3] [--steps N]

Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models (arXiv 2501.13428). Both
models use RoPE and train on the Python standard library at one short context; the same held-out tokens are then
scored in windows of 1 to 16 times that length. Exits 1 if an expectation fails:

  softplus, p = 15       the rise in loss from 1x to 4x, if any, is at least 5 times smaller than that of softmax
  softmax                rises by more than 0.1 nats from 1x to 16x
  softplus               within 0.3 nats of softmax at the training length
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evals.length import loss_by_length
from jaxattn.command import run_cli
from jaxattn.runs.config import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, RunConfig
from jaxattn.runs.opened import open_trained
from scripts.reproduce import _study as study
from train.data import DataConfig
from train.data.open import open_source
from train.presets import get_preset

ATTENTIONS = {
    "softmax": "softmax",
    "softplus, p = 15": "softplus",
    "softplus, no re-weighting": "softplus(reweight=False)",
}
COLUMNS = ("attention", "times", "length")
MULTIPLES = (1, 2, 4, 8, 16)
PAPER = (
    "validation loss at 1K / 2K / 4K / 8K, trained at 1K: softmax + RoPE 3.19 / 4.17 / 5.45 / 6.28, LSSA (no "
    "re-weighting) 3.19 / 4.13 / 5.30 / 5.94, LSSAR p = 15 3.19 / 3.19 / 3.23 / 3.32 (124M parameters, 10B tokens)."
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the model and the training; `sequences` of 16 x `context` tokens are scored."""

    context: int
    vocab: int
    layers: int
    width: int
    heads: int
    batch: int
    steps: int
    lr: float
    sequences: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    def config(self, attn: str, seed: int, folder: Path) -> RunConfig:
        base = get_preset("text-tiny")
        return RunConfig(
            attn=attn,
            preset="length_extrapolation",
            steps=self.steps,
            seed=seed,
            run_dir=str(folder),
            report=False,
            data=DataConfig(source="stdlib", vocab_size=self.vocab, context=self.context, batch_size=self.batch),
            model=dataclasses.replace(
                base.model, num_layers=self.layers, d_model=self.width, num_heads=self.heads, dtype=self.dtype
            ),
            optim=OptimConfig(
                lr=self.lr,
                schedule="cosine",
                min_lr_ratio=0.1,
                warmup_steps=self.steps // 10,
                b2=0.95,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
            eval=EvalConfig(every=max(1, self.steps // 4), batches=4, sequences=8, length=self.context),
            checkpoint=CheckpointConfig(every=self.steps),
            log=LogConfig(every=20, tensorboard=False),
        )


SCALES = {
    "cpu": Scale(
        context=64, vocab=1024, layers=2, width=128, heads=4, batch=32, steps=1000, lr=3e-3, sequences=16
    ),
    "gpu": Scale(
        context=1024, vocab=50_432, layers=12, width=768, heads=12, batch=512, steps=18_865, lr=6e-4, sequences=16,
        dtype="bfloat16",
    ),
}  # fmt: skip


def run_model(label: str, scale: Scale, seed: int, runs: Path) -> list[study.Row]:
    """Train (or reuse) one model and score it at every length; rows of the table."""
    folder = runs / f"{label.replace(',', '').replace(' ', '-')}-seed{seed}"
    study.train(scale.config(ATTENTIONS[label], seed, folder))
    trained = open_trained(folder)
    source, _ = open_source(trained.cfg)
    lengths = [scale.context * m for m in MULTIPLES]
    text = source.held_out(scale.sequences, lengths[-1] + 1)
    found = loss_by_length(trained, text, lengths)
    return [
        {
            "attention": label,
            "length": row["length"],
            "times": multiple,
            "seed": seed,
            "loss": row["loss"],
            "last quarter": row["loss_last_quarter"],
            "positions": row["positions"],
            "by_position": row["by_position"],
        }
        for multiple, row in zip(MULTIPLES, found, strict=True)
    ]


def expect(rows: list[study.Row]) -> list[study.Expectation]:
    """The acceptance lines that the models at hand can be judged by."""
    labels = {row["attention"] for row in rows}
    mean = lambda label, times: study.spread(study.select(rows, "loss", attention=label, times=times))[0]
    rise = lambda label, times: mean(label, times) - mean(label, 1)
    ours, out = "softplus, p = 15", []
    if "softmax" in labels:
        far = rise("softmax", 16)
        out.append(study.Expectation("softmax rises by > 0.1 nats from 1x to 16x", f"{far:+.3f}", far > 0.1))
    if {"softmax", ours} <= labels:
        theirs, mine = rise("softmax", 4), rise(ours, 4)
        gap = mean(ours, 1) - mean("softmax", 1)
        out += [
            study.Expectation(
                "softplus, p = 15: its rise from 1x to 4x is at least 5 times smaller",
                f"{mine:+.3f} against {theirs:+.3f}",
                theirs > 0 and mine < theirs / 5,
            ),
            study.Expectation("softplus, p = 15: within 0.3 nats of softmax at 1x", f"{gap:+.3f}", abs(gap) < 0.3),
        ]
    return out


def draw(rows: list[study.Row], left: Any, right: Any) -> None:
    """Loss by window length, and by position in the longest window (mean over seeds)."""
    lengths: list[int] = []
    for label, color in zip(dict.fromkeys(row["attention"] for row in rows), study.COLORS, strict=False):
        mine = [row for row in rows if row["attention"] == label]
        lengths = sorted({row["length"] for row in mine})
        means = [study.spread(study.select(mine, "loss", length=n))[0] for n in lengths]
        left.plot([row["length"] for row in mine], [row["loss"] for row in mine], ".", color=color, alpha=0.5)
        left.plot(lengths, means, "o-", color=color, label=label, ms=4)
        longest = [row for row in mine if row["length"] == lengths[-1]]
        curves = np.mean([row["by_position"] for row in longest], axis=0)
        right.plot(longest[0]["positions"], curves, color=color, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [str(n) for n in lengths])
    left.set(xlabel="window (tokens)", ylabel="loss (nats per token)")
    right.set(xlabel=f"position in a window of {lengths[-1]}", ylabel="loss (nats per token)")
    left.legend()


def main() -> int:
    parser = study.arguments("length_extrapolation", __doc__)
    args = parser.parse_args()
    study.check(args)
    scale = SCALES[args.preset]
    scale = dataclasses.replace(scale, steps=args.steps or scale.steps)
    runs = args.runs_dir / args.preset
    rows = [row for label in ATTENTIONS for seed in range(args.seeds) for row in run_model(label, scale, seed, runs)]
    study.save_figure(args.out / "length_extrapolation.png", 8.6, 3.2, 2, lambda a, b: draw(rows, a, b))
    return study.finish(
        "length_extrapolation",
        args.out,
        title="Loss beyond the training length",
        setup={
            "preset": args.preset,
            "text": "the Python standard library",
            "trained at": scale.context,
            "vocabulary": scale.vocab,
            "layers": scale.layers,
            "width": scale.width,
            "steps": scale.steps,
            "batch": scale.batch,
        },
        rows=rows,
        table=study.markdown(rows, (*COLUMNS, "loss", "last quarter"), COLUMNS),
        expectations=expect(rows),
        paper=PAPER,
    )


if __name__ == "__main__":
    run_cli(main)
