"""Recall against the size of the decode state: multi-query associative recall (MQAR), three seeds.

    python -m scripts.reproduce.mqar [--preset cpu|gpu] [--seeds 3] [--steps N] [--tune]

Simple linear attention language models balance the recall-throughput tradeoff (arXiv 2402.18668, figure 2) and
Zoology (arXiv 2312.04927). The papers' model: two layers, a gated short convolution and the mixer under test, one
head, no MLP, no positions. Every mixer is trained alone on one (T, N) and scored on fresh sequences; the state is
that of the mixer, in f32. Exits 1 if an expectation fails:

  softmax                recalls > 99 %
  BASED                  rises with its feature dim, and beats linear attention at no larger state
  Titans                 beats every linear attention
  no convolution         softmax and BASED lose more than half of what they recall without the layer in front
  softmax in a window    below 50 % when the window is shorter than the pairs' own part, 2 N tokens
  Aaren                  no better than a guess among the pairs shown (its query does not depend on the token)

--tune trains one seed at each of the papers' four learning rates and prints which wins; those are written below.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.command import run_cli
from jaxattn.mechanisms import resolve_mixer
from jaxattn.models import ModelConfig
from jaxattn.nn.attention import layer_state
from jaxattn.runs.config import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, RunConfig
from scripts.reproduce import _study as study
from train.data import DataConfig

COLUMNS = ("mixer", "state_bytes", "lr")
# Keys are bound to values by the layer in front; the step is large because a sequence is short.
TITANS = "titans(depth=1, max_lr=0.5, chunk=4, conv=0)"
ALONE = ", no convolution"
LEARNING_RATES = (1e-3, 3.2e-3, 1e-2, 3.2e-2)
PAPER = (
    "attention above 99 %, BASED rising with its feature dim 8, 16, 24, a window of 16 alone below 50 % at T = 256, "
    "N = 64 (card of arXiv 2402.18668; figure 2 has no table)."
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A mixer with its key width (0: the model's) and its learning rate, the best of `LEARNING_RATES`."""

    attn: str
    lr: float
    key_dim: int = 0
    front: bool = True
    """Whether the convolution stands in front."""

    @property
    def label(self) -> str:
        return self.attn + (f", D={self.key_dim}" if self.key_dim else "") + ("" if self.front else ALONE)

    @property
    def family(self) -> str:
        name = self.attn.partition("(")[0] + (" window" if "window" in self.attn else "")
        return name if self.front else name + ALONE


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the task, the model and the training; the key dims give linear attention about BASED's states."""

    length: int
    pairs: int
    vocab: int
    width: int
    batch: int
    steps: int
    windows: tuple[int, ...]
    feature_dims: tuple[int, ...]
    key_dims: tuple[int, ...]

    def variants(self) -> list[Variant]:
        return [
            Variant("softmax", 3.2e-3),
            *(Variant(f"softmax(window={w})", 1e-2) for w in self.windows),
            *(Variant("linear", 1e-2, dim) for dim in self.key_dims),
            *(Variant(f"based(feature_dim={dim})", 1e-2) for dim in self.feature_dims),
            Variant(TITANS, 1e-2),
            Variant("aaren", 1e-2),
            Variant("softmax", 3.2e-3, front=False),
            Variant(f"based(feature_dim={self.feature_dims[-1]})", 1e-2, front=False),
        ]

    def config(self, variant: Variant, seed: int, folder: Path) -> RunConfig:
        return RunConfig(
            attn=f"conv(width=3), {variant.attn}" if variant.front else variant.attn,
            preset="mqar",
            steps=self.steps,
            seed=seed,
            run_dir=str(folder),
            report=False,
            data=DataConfig(
                source=f"mqar(pairs={self.pairs}, vocab={self.vocab})", context=self.length, batch_size=self.batch
            ),
            model=ModelConfig(
                num_layers=2 if variant.front else 1,
                d_model=self.width,
                num_heads=1,
                key_dim=variant.key_dim,
                value_dim=self.width,
                mlps=("none",),
                position="nope",
            ),
            optim=OptimConfig(
                lr=variant.lr, schedule="cosine", warmup_steps=self.steps // 10, b2=0.999, weight_decay=0.1
            ),
            eval=EvalConfig(every=max(1, self.steps // 5), batches=16, sequences=4, length=self.length),
            checkpoint=CheckpointConfig(every=self.steps),
            log=LogConfig(every=20, tensorboard=False),
        )


SCALES = {
    "cpu": Scale(
        length=64, pairs=16, vocab=256, width=64, batch=64, steps=800,
        windows=(8, 16, 32), feature_dims=(4, 6, 8), key_dims=(15, 28, 45),
    ),
    "gpu": Scale(
        length=256, pairs=64, vocab=8192, width=64, batch=256, steps=20_000,
        windows=(16, 64, 128), feature_dims=(8, 16, 24), key_dims=(45, 153, 325),
    ),
}  # fmt: skip


def state_bytes(model: ModelConfig, length: int) -> int:
    """f32 bytes of the last layer's decode state after `length` tokens; of a window only its own tokens count."""
    layer = model.num_layers - 1
    capacity = min(length, model.mixer(layer).window or length)
    state = jax.eval_shape(lambda: layer_state(model, layer, 1, capacity))
    return sum(4 * x.size for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating))


def one_run(variant: Variant, scale: Scale, seed: int, runs: Path) -> study.Row:
    """Train (or reuse) one run; its row of the table."""
    name = "".join(c if c.isalnum() else "-" for c in f"{variant.label} lr {variant.lr:g}")
    cfg = scale.config(variant, seed, runs / f"{name}-seed{seed}")
    rows = study.train(cfg)
    return {
        "mixer": variant.label,
        "family": variant.family,
        "lr": variant.lr,
        "seed": seed,
        "state_bytes": state_bytes(cfg.resolved().model, scale.length),
        "accuracy": study.last(rows, "val_accuracy"),
        "train_seconds": study.last(rows, "time_s"),
    }


def tune(variants: list[Variant], scale: Scale, runs: Path) -> None:
    """Print the accuracy of every variant at every learning rate, one seed."""
    for variant in variants:
        found = [one_run(dataclasses.replace(variant, lr=lr), scale, 0, runs)["accuracy"] for lr in LEARNING_RATES]
        cells = "  ".join(f"{lr:g}: {100 * a:5.1f} %" for lr, a in zip(LEARNING_RATES, found, strict=True))
        print(f"{variant.label:30} {cells}", flush=True)


def expect(rows: list[study.Row], scale: Scale) -> list[study.Expectation]:
    """The acceptance lines that the variants at hand can be judged by."""
    mean = lambda **wanted: study.spread(study.select(rows, "accuracy", **wanted))[0]
    points = {row["mixer"]: (row["state_bytes"], mean(mixer=row["mixer"]), row["family"]) for row in rows}
    show = lambda name: f"{100 * points[name][1]:.1f} %"
    out = [study.Expectation("softmax recalls > 99 %", show("softmax"), points["softmax"][1] > 0.99)]
    based = sorted((size, accuracy, name) for name, (size, accuracy, family) in points.items() if family == "based")
    rising = all(a[1] <= b[1] + 0.01 for a, b in pairwise(based))
    found = ", ".join(f"{name} {show(name)}" for _, _, name in based)
    if len(based) > 1:
        out.append(study.Expectation("BASED rises with its feature dim (within 1 %)", found, rising))
    for size, accuracy, name in based:
        rivals = [(s, other) for other, (s, _, family) in points.items() if family == "linear" and s >= size]
        if rivals:  # of linear attentions with at least this state, the one nearest in size
            rival = min(rivals)[1]
            text = f"{name} beats {rival} ({points[rival][0] / size:.2f} times the state)"
            out.append(study.Expectation(text, f"{show(name)} against {show(rival)}", accuracy > points[rival][1]))
    linear = [(accuracy, name) for name, (_, accuracy, family) in points.items() if family == "linear"]
    if linear and TITANS in points:
        best = max(linear)
        found = f"{show(TITANS)} against {show(best[1])}"
        out.append(study.Expectation("Titans beats every linear attention", found, points[TITANS][1] > best[0]))
    for name, (_, accuracy, _) in points.items():
        if name + ALONE in points:
            text, found = (
                f"{name} loses more than half without the convolution",
                f"{show(name)} to {show(name + ALONE)}",
            )
            out.append(study.Expectation(text, found, points[name + ALONE][1] < accuracy / 2))
    for name, (_, accuracy, family) in points.items():
        window = resolve_mixer(name).window if family == "softmax window" else None
        if window and window < 2 * scale.pairs:
            out.append(study.Expectation(f"{name} fails (< 50 %)", show(name), accuracy < 0.5))
    if "aaren" in points:
        guess = 1 / scale.pairs
        out.append(
            study.Expectation(
                f"Aaren is no better than a guess among the pairs ({100 * guess:.1f} %)",
                show("aaren"),
                points["aaren"][1] < 1.5 * guess,
            )
        )
    return out


def draw(rows: list[study.Row], ax: Any) -> None:
    """Mean accuracy against state bytes, one line per family, every seed as a dot."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    for family, color in zip(families, study.COLORS, strict=False):
        mine = sorted((row["state_bytes"], row["accuracy"]) for row in rows if row["family"] == family)
        sizes = sorted({size for size, _ in mine})
        means = [100 * study.spread([a for s, a in mine if s == size])[0] for size in sizes]
        ax.plot([s for s, _ in mine], [100 * a for _, a in mine], ".", color=color, alpha=0.5)
        ax.plot(sizes, means, "o-", color=color, label=family, ms=4)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="decode state of the mixer (bytes, f32)", ylabel="recall (% of queries)", ylim=(-3, 103))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> int:
    parser = study.arguments("mqar", __doc__)
    parser.add_argument("--only", help="comma-separated names: only these mixers, such as softmax,based")
    parser.add_argument("--tune", action="store_true", help="compare the four learning rates on one seed, then stop")
    args = parser.parse_args()
    study.check(args)
    scale = SCALES[args.preset]
    scale = dataclasses.replace(scale, steps=args.steps or scale.steps)
    runs = args.runs_dir / args.preset
    variants = study.pick(scale.variants(), args.only, lambda v: v.attn.partition("(")[0])
    if args.tune:
        tune(variants, scale, runs)
        return 0
    rows = [one_run(variant, scale, seed, runs) for variant in variants for seed in range(args.seeds)]
    study.save_figure(args.out / "mqar.png", 6.4, 3.4, 1, lambda ax: draw(rows, ax))
    return study.finish(
        "mqar",
        args.out,
        title="Recall against decode state (MQAR)",
        setup={
            "preset": args.preset,
            "T": scale.length,
            "pairs": scale.pairs,
            "vocabulary": scale.vocab,
            "width": scale.width,
            "steps": scale.steps,
            "batch": scale.batch,
            "a guess among the pairs": f"{100 / scale.pairs:.1f} %",
        },
        rows=rows,
        table=study.markdown(rows, (*COLUMNS, "accuracy", "train_seconds"), COLUMNS),
        expectations=expect(rows, scale),
        paper=PAPER,
    )


if __name__ == "__main__":
    run_cli(main)
