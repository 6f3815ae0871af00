"""`RunConfig`: everything a run depends on, as one frozen tree that is written beside its checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import tyro

from jaxattn.config_fields import check_fields
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig, at_context
from jaxattn.runs.data_config import DataConfig


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay on ALL parameters, as in the sink study; sgd: with momentum."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: stay, or fall to lr · min_lr_ratio by the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0; a shorter run ends inside it."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak (cosine and linear)."""
    b1: float = 0.9
    """AdamW's first-moment decay."""
    b2: float = 0.99
    """AdamW's second-moment decay."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    momentum: float = 0.9
    """SGD's momentum."""
    clip_norm: float = 0.0
    """Clip the global gradient norm to this; 0 = off."""
    accumulate: int = 1
    """Micro-batches per step; must divide the local batch."""
    spike_factor: float = 0.0
    """Skip a step whose loss exceeds this multiple of its running mean; 0 = never."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss does. A finite loss with an infinite gradient always skips the step."""
    max_skips: int = 100
    """Skipped steps in a row that end the run."""

    def __post_init__(self) -> None:
        check_fields("optim", self)
        for field in ("lr", "eps"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"optim.{field} is {getattr(self, field)} but must be positive.")
        for field in ("warmup_steps", "weight_decay", "clip_norm", "spike_factor", "min_lr_ratio"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optim.{field} is {getattr(self, field)} but must be 0 or positive.")
        for field in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"optim.{field} is {getattr(self, field)} but must be in [0, 1).")
        for field in ("accumulate", "max_skips"):
            if getattr(self, field) < 1:
                raise ConfigError(f"optim.{field} is {getattr(self, field)} but must be at least 1.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured while training."""

    every: int = 100
    """Steps between evaluations; 0 = only at the end."""
    batches: int = 4
    """Validation batches."""
    sequences: int = 100
    """Held-out sequences of the sink metric."""
    length: int = 64
    """Their length T."""
    epsilon: float = 0.3
    """Threshold of the sink indicator."""

    def __post_init__(self) -> None:
        check_fields("eval", self)
        for field in ("every",):
            if getattr(self, field) < 0:
                raise ConfigError(f"eval.{field} is {getattr(self, field)} but must be 0 or positive.")
        for field, least in (("batches", 1), ("sequences", 1), ("length", 2)):
            if getattr(self, field) < least:
                raise ConfigError(f"eval.{field} is {getattr(self, field)} but must be at least {least}.")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"eval.epsilon is {self.epsilon} but must lie between 0 and 1.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved. The last step is always saved."""

    every: int = 500
    """Steps between checkpoints."""
    keep: int = 3
    """How many are kept."""

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        for field in ("every", "keep"):
            if getattr(self, field) < 1:
                raise ConfigError(f"checkpoint.{field} is {getattr(self, field)} but must be at least 1.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides metrics.jsonl, which is always written."""

    every: int = 1
    """Steps between rows of metrics.jsonl."""
    print_every: int = 50
    """Steps between plain lines when the output is not a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str = ""
    """Project name for Weights & Biases (extra `track`)."""
    trackio: str = ""
    """Project name for trackio (extra `track`)."""

    def __post_init__(self) -> None:
        check_fields("log", self)
        for field in ("every", "print_every"):
            if getattr(self, field) < 1:
                raise ConfigError(f"log.{field} is {getattr(self, field)} but must be at least 1.")


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The checkpoint whose parameters a run starts from; `train.finetune` fills it in."""

    source: str = ""
    """Its folder; empty starts from random parameters."""
    step: int = 0
    """Its step."""
    attn: str = ""
    """The attention it was trained with."""
    digest: str = ""
    """sha256 of its manifest: a run goes on from the very parameters it started from."""

    def __post_init__(self) -> None:
        check_fields("start", self)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates (arXiv 2106.09685) instead of training every parameter."""

    rank: int = 0
    """Rank r; 0 trains every parameter."""
    alpha: float = 16.0
    """The update is alpha / r · A B."""
    targets: tuple[str, ...] = ("attn/[qkvo]", "mlp/*")
    """Which kernels get one: patterns of the ends of their names."""

    def __post_init__(self) -> None:
        check_fields("lora", self)
        if self.rank < 0:
            raise ConfigError(f"lora.rank is {self.rank} but must be 0 (off) or positive.")
        if self.rank and not self.alpha > 0:
            raise ConfigError(f"lora.alpha is {self.alpha} but must be positive.")
        if self.rank and not self.targets:
            raise ConfigError("lora.targets is empty but lora.rank is set; name the kernels, such as attn/[qv].")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Pretrain a decoder with swappable attention and watch sinks emerge."""

    attn: str = "softmax"
    """Attention of the layers: NAME, NAME(option=value, window=64), or a comma-separated pattern that repeats over depth, e.g. "softmax(window=64), sigmoid"; none is a layer without attention. The word context as an option's value is data.context, e.g. "sigmoid(train_len=context)". See --list-attn."""
    preset: str = "bb"
    """Named recipe that sets every default below; see --list-presets."""
    steps: int = 1000
    """Optimiser steps in all."""
    seed: int = 0
    """Seed of the initial parameters and of the training stream: the order of text, fresh sequences of tasks. What is held out follows data.seed."""
    run_dir: str = ""
    """Where the run lives; default runs/PRESET-ATTN-seedSEED."""
    resume: bool = False
    """Go on from the newest valid checkpoint in the run directory."""
    overwrite: bool = False
    """Set an earlier run in the same directory aside and start anew."""
    report: bool = True
    """Write plots and report.html at the end."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    start: tyro.conf.Suppress[StartConfig] = dataclasses.field(default_factory=StartConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_fields("", self)
        if self.lora.rank and not self.start.source:
            raise ConfigError(
                f"lora.rank is {self.lora.rank} but there is no checkpoint to adapt: use python -m train.finetune."
            )
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps} but must be at least 1.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed} but must be 0 or positive.")

    def resolved(self) -> RunConfig:
        """The same run with `attn`, its context in numbers, written into the model and other such fields filled in.

        Raises:
          ConfigError: unknown attention, a window longer than the context, a micro-batch that does not fit.
        """
        attn = at_context(self.attn, self.data.context)
        model = self.model.with_attention(attn)
        for layer in range(model.num_layers):
            mechanism, window = model.mixer(layer).mechanism, model.mixer(layer).window
            if self.data.prefix_len and mechanism and not mechanism.capabilities.prefix:
                raise ConfigError(
                    f"data.prefix_len is {self.data.prefix_len} but {model.mixer_text(layer)} cannot look ahead "
                    "into a prefix; set it to 0."
                )
            if window is not None and window > self.data.context:
                raise ConfigError(
                    f"window {window} of {model.mixer_text(layer)} is longer than data.context "
                    f"{self.data.context}; use at most the context or drop it."
                )
        if all(model.mixer(layer).mechanism is None for layer in range(model.num_layers)):
            raise ConfigError(f"attn {self.attn!r} leaves every layer without attention; name one for some layer.")
        if self.data.batch_size % self.optim.accumulate:
            raise ConfigError(
                f"optim.accumulate {self.optim.accumulate} does not divide data.batch_size {self.data.batch_size}."
            )
        if model.position == "learned" and not model.max_positions:
            model = dataclasses.replace(model, max_positions=max(self.data.context, self.eval.length))
        elif model.position == "learned" and model.max_positions < max(self.data.context, self.eval.length):
            raise ConfigError(
                f"model.max_positions is {model.max_positions} but sequences have up to "
                f"{max(self.data.context, self.eval.length)} positions; raise it."
            )
        return dataclasses.replace(self, attn=attn, model=model)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, JSON-ready; a run that starts from no checkpoint does not speak of one."""
        drop = () if self.start.source else ("start", "lora")
        plain = {k: v for k, v in dataclasses.asdict(self).items() if k not in drop}
        for path, default in LATER.items():
            *folders, name = path.split(".")
            place: Any = plain
            for folder in folders:
                place = place[folder]
            if place[name] == default:
                del place[name]
        return plain


# Fields that older runs do not have, and the value that makes a run the same without: such a run resumes.
LATER = {"model.mlp_bias": False, "model.rope_scaling.short_factors": (), "model.rope_scaling.long_factors": ()}


def with_older_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the fields that its version did not have, at the values that mean what it did.

    data.seed: one seed decided everything.
    """
    data = saved.get("data")
    if not isinstance(data, dict) or "seed" in data:
        return saved
    return {**saved, "data": {**data, "seed": saved.get("seed", 0)}}


# What a resumed run may change without becoming another run.
RESUMABLE = (
    "data.cache_dir",
    "optim.nonfinite",
    "optim.max_skips",
    "steps",
    "run_dir",
    "resume",
    "overwrite",
    "report",
    "preset",
    "eval",
    "checkpoint",
    "log",
)
