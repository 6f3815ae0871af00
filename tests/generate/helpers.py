"""A run of text with random weights, for what reads checkpoints."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import RunConfig
from jaxattn.runs.rundir import write_json_atomic
from train.data import DataConfig


def byte_run(folder: Path, attn: str = "softmax") -> Path:
    """One layer over bytes; its text lies beside it."""
    text, run = folder / "text.txt", folder / "run"
    text.write_text("some words to train on, over and over. " * 40)
    model = ModelConfig(vocab_size=257, num_layers=1, d_model=16, num_heads=2)
    model = model.with_attention(attn)
    cfg = RunConfig(
        attn=attn, model=model, data=DataConfig(source=str(text), tokenizer="bytes", context=16, val_fraction=0.0)
    )
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    run.mkdir()
    write_json_atomic(run / "config.json", cfg.to_dict())
    with Checkpoints(run / "checkpoints", config=cfg.to_dict()) as checkpoints:
        checkpoints.save(3, {"params": params})
    return run
