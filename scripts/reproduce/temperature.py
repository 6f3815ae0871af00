"""Selective temperature against softmax on real text, at equal steps; three seeds.

    python -m scripts.reproduce.temperature [--preset cpu|gpu] [--seeds 3] [--steps N]

Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892). Same model, data
order and schedule; only the attention differs. Seeds are paired (same initial projections and batches), so the
difference per seed is what is judged. Exits 1 if an expectation fails:

  overhead      fewer than 0.5 % more parameters (the paper's weight-sharing variant)
  loss          not worse: the mean difference in validation loss is below 0.01 nats

Whether it is better is a finding, not an expectation: the verdict line says what these seeds can and cannot tell.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxattn.command import run_cli
from jaxattn.runs.config import EvalConfig, LogConfig, RunConfig
from scripts.reproduce import _study as study
from train.data.open import open_source
from train.presets import get_preset
from train.start_from import abstract_state

BASE, OURS = "softmax", "selective_temperature"
ATTENTIONS = (BASE, OURS, "selective_temperature(value=False)")
PAPER = (
    "consistent small gains in perplexity, 1.45 times fewer steps to the same loss for Llama on Wikitext, < 0.5 % more "
    "parameters with shared weights (arXiv 2411.12892)."
)
TIMES_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a two-sided 95 % interval, by seeds


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the model and the training."""

    context: int
    vocab: int
    layers: int
    width: int
    heads: int
    batch: int
    accumulate: int
    steps: int
    lr: float
    dtype: Literal["float32", "bfloat16"] = "float32"

    def config(self, attn: str, seed: int, folder: Path) -> RunConfig:
        base = get_preset("text-tiny")
        return dataclasses.replace(
            base,
            attn=attn,
            preset="temperature",
            steps=self.steps,
            seed=seed,
            run_dir=str(folder),
            report=False,
            data=dataclasses.replace(base.data, vocab_size=self.vocab, context=self.context, batch_size=self.batch),
            model=dataclasses.replace(
                base.model, num_layers=self.layers, d_model=self.width, num_heads=self.heads, dtype=self.dtype
            ),
            optim=dataclasses.replace(
                base.optim, lr=self.lr, warmup_steps=self.steps // 15, accumulate=self.accumulate
            ),
            eval=EvalConfig(every=max(1, self.steps // 12), batches=16, sequences=8, length=min(64, self.context)),
            checkpoint=dataclasses.replace(base.checkpoint, every=self.steps),
            log=LogConfig(every=20, tensorboard=False),
        )


SCALES = {
    "cpu": Scale(context=128, vocab=1024, layers=3, width=128, heads=4, batch=16, accumulate=1, steps=900, lr=2e-3),
    "gpu": Scale(
        context=1024, vocab=50_432, layers=12, width=768, heads=12, batch=512, accumulate=8, steps=20_000, lr=6e-4,
        dtype="bfloat16",
    ),
}  # fmt: skip


def parameters(cfg: RunConfig) -> int:
    """How many numbers the model learns."""
    _, model = open_source(cfg.resolved())
    shapes = abstract_state(dataclasses.replace(cfg, model=model))["params"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def one_run(attn: str, scale: Scale, seed: int, runs: Path) -> study.Row:
    """Train (or reuse) one run; its row of the table."""
    name = "".join(c if c.isalnum() or c == "_" else "-" for c in attn)
    cfg = scale.config(attn, seed, runs / f"{name}-seed{seed}")
    rows = study.train(cfg)
    curve = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    return {
        "attention": attn,
        "seed": seed,
        "parameters": parameters(cfg),
        "loss": curve[-1][1],
        "sink rate (%)": study.last(rows, "sink_rate"),
        "train_seconds": study.last(rows, "time_s"),
        "curve": curve,
    }


def difference(rows: list[study.Row], attn: str) -> tuple[float, float, list[float]]:
    """Mean of (loss of `attn` - loss of softmax) over seeds, half its 95 % interval (inf for one seed), the values."""
    values = [a - b for a, b in zip(*(study.select(rows, "loss", attention=x) for x in (attn, BASE)), strict=True)]
    n = len(values)
    half = TIMES_95.get(n, 2.6) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return float(np.mean(values)), half, values


def steps_saved(rows: list[study.Row], attn: str) -> float | None:
    """How many times fewer steps `attn` needs for softmax's final loss, on mean curves; None if it never gets there."""
    curves = lambda name: np.array([row["curve"] for row in rows if row["attention"] == name])  # [seeds, points, 2]
    steps, ours = curves(attn)[0, :, 0], curves(attn)[..., 1].mean(0)
    goal = curves(BASE)[:, -1, 1].mean()
    below = np.flatnonzero(ours <= goal)
    if not below.size:
        return None
    i = int(below[0])
    at = steps[0] if i == 0 else np.interp(-goal, [-ours[i - 1], -ours[i]], [steps[i - 1], steps[i]])
    return float(steps[-1] / at)


def verdict(rows: list[study.Row]) -> str:
    """What the paired seeds say, in words."""
    parts = []
    for attn in dict.fromkeys(row["attention"] for row in rows if row["attention"] != BASE):
        mean, half, values = difference(rows, attn)
        if len(values) < 2:
            said = "one seed: nothing can be said"
        elif abs(mean) <= half:
            said = "no difference that these seeds can show"
        else:
            said = "better on these seeds" if mean < 0 else "worse on these seeds"
        saved = steps_saved(rows, attn)
        pace = f"{saved:.2f} times fewer steps to softmax's final loss" if saved else "softmax's final loss not reached"
        each = ", ".join(f"{v:+.4f}" for v in values)
        parts.append(f"**{attn}**: {mean:+.4f} ± {half:.4f} nats (95 %; by seed {each}): {said}; {pace}.")
    return "Verdict (difference in validation loss from softmax, paired by seed):\n\n" + "\n\n".join(parts)


def expect(rows: list[study.Row]) -> list[study.Expectation]:
    """The acceptance lines."""
    count = lambda attn: study.select(rows, "parameters", attention=attn)[0]
    over, (mean, _, _) = count(OURS) / count(BASE) - 1, difference(rows, OURS)
    return [
        study.Expectation("fewer than 0.5 % more parameters", f"{100 * over:.3f} %", 0 < over < 0.005),
        study.Expectation("not worse than softmax by 0.01 nats", f"{mean:+.4f}", mean < 0.01),
    ]


def draw(rows: list[study.Row], left: Any, right: Any) -> None:
    """Validation loss over training, and the difference from softmax by seed."""
    names = list(dict.fromkeys(row["attention"] for row in rows))
    for attn, color in zip(names, study.COLORS, strict=False):
        for row in rows:
            if row["attention"] == attn:
                label = attn if row["seed"] == 0 else None
                left.plot(*zip(*row["curve"], strict=True), color=color, label=label, lw=1)
    left.set(xlabel="step", ylabel="validation loss (nats per token)")
    left.legend()
    for place, (attn, color) in enumerate(zip(names[1:], study.COLORS[1:], strict=False)):
        mean, half, values = difference(rows, attn)
        right.plot([place] * len(values), values, "o", color=color, alpha=0.6)
        right.errorbar([place + 0.15], [mean], [half if math.isfinite(half) else 0], fmt="s", color=color, capsize=3)
    right.axhline(0, color="#767676", lw=0.8)
    right.set_xticks(range(len(names) - 1), [n.replace("(", "\n(") for n in names[1:]])
    right.set(ylabel="final loss minus softmax's", xlim=(-0.5, len(names) - 1.3))


def main() -> int:
    parser = study.arguments("temperature", __doc__)
    args = parser.parse_args()
    study.check(args)
    scale = SCALES[args.preset]
    scale = dataclasses.replace(scale, steps=args.steps or scale.steps)
    runs = args.runs_dir / args.preset
    rows = [one_run(attn, scale, seed, runs) for attn in ATTENTIONS for seed in range(args.seeds)]
    study.save_figure(args.out / "temperature.png", 8.6, 3.2, 2, lambda a, b: draw(rows, a, b))
    columns = ("attention", "parameters", "loss", "sink rate (%)", "train_seconds")
    return study.finish(
        "temperature",
        args.out,
        title="Selective temperature against softmax on text",
        setup={
            "preset": args.preset,
            "text": "the Python standard library",
            "context": scale.context,
            "vocabulary": scale.vocab,
            "layers": scale.layers,
            "width": scale.width,
            "steps": scale.steps,
            "batch": scale.batch,
        },
        rows=rows,
        table=study.markdown(rows, columns, ("attention", "parameters")) + "\n" + verdict(rows),
        expectations=expect(rows),
        paper=PAPER,
    )


if __name__ == "__main__":
    run_cli(main)
