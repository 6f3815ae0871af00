"""Named recipes: every number a run needs, with the paper it comes from."""

from __future__ import annotations

from jaxattn.errors import ConfigError, suggest
from jaxattn.models import ModelConfig
from jaxattn.runs.config import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, RunConfig
from train.data import DataConfig


def bb() -> RunConfig:
    """Bigram-Backcopy (arXiv 2410.13835) at unit scale: a sink within 1000 steps, about two minutes on 2 cores."""
    return RunConfig(
        preset="bb",
        steps=1000,
        data=DataConfig(source="bb", context=48, batch_size=32),
        model=ModelConfig(
            num_layers=3,
            d_model=64,
            num_heads=1,
            mlps=("relu",),
            norm="layernorm",
            position="learned",
            init="torch",
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=200, b1=0.9, b2=0.99, eps=1e-5, weight_decay=1e-4),
        eval=EvalConfig(every=50, batches=4, sequences=100, length=48),
        checkpoint=CheckpointConfig(every=250),
    )


def text_tiny() -> RunConfig:
    """Real text (the Python standard library) on 2 cores in about eight minutes."""
    return RunConfig(
        preset="text-tiny",
        steps=900,
        data=DataConfig(source="stdlib", vocab_size=2048, context=256, batch_size=16),
        model=ModelConfig(num_layers=4, d_model=192, num_heads=4, mlps=("swiglu",), init="sink", scan_layers=False),
        optim=OptimConfig(
            lr=2e-3,
            schedule="cosine",
            min_lr_ratio=0.1,
            warmup_steps=60,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            accumulate=4,
        ),
        eval=EvalConfig(every=100, batches=8, sequences=100, length=64),
        checkpoint=CheckpointConfig(every=300),
    )


def _sink_study(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> ModelConfig:
    """The sink study's Llama-like decoder: pre-norm RMSNorm 1e-5, SwiGLU, RoPE 1e4, untied, no biases."""
    return ModelConfig(
        mlps=("swiglu",),
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        position="rope",
        rope_base=10_000.0,
        tie_embeddings=False,
        use_bias=False,
        init="sink",
        dtype="bfloat16",
        scan_layers=True,
        remat=True,
        vocab_size=50_432,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
    )


def sink_60m() -> RunConfig:
    """The study's default run (arXiv 2410.10781): 10 layers, 20k steps of 512 x 2048 tokens, constant lr 4e-4."""
    return RunConfig(
        preset="sink-60m",
        steps=20_000,
        data=DataConfig(source="stdlib", vocab_size=50_432, context=2048, batch_size=512),
        model=_sink_study(num_layers=10, d_model=768, num_heads=8, d_ff=1536),
        optim=OptimConfig(
            name="adamw",
            lr=4e-4,
            schedule="constant",
            warmup_steps=100,
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            accumulate=16,
        ),
        eval=EvalConfig(every=250, batches=8, sequences=100, length=64, epsilon=0.3),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(every=10),
    )


def sink_1b() -> RunConfig:
    """The study's large run: 22 layers, d 2048, H 16, FFN 5632, 40k steps; otherwise as sink-60m."""
    small = sink_60m()
    return RunConfig(
        preset="sink-1b",
        steps=40_000,
        data=small.data,
        model=_sink_study(num_layers=22, d_model=2048, num_heads=16, d_ff=5632),
        optim=small.optim,
        eval=small.eval,
        checkpoint=small.checkpoint,
        log=small.log,
    )


PRESETS = {"bb": bb, "text-tiny": text_tiny, "sink-60m": sink_60m, "sink-1b": sink_1b}


def get_preset(name: str) -> RunConfig:
    """The recipe called `name`.

    Raises:
      ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(suggest("preset", name, sorted(PRESETS)))
    return PRESETS[name]()
