"""Tiny random models of every supported family, made by transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A configuration class of transformers, its fields, and how the weights are saved."""

    kind: str
    fields: dict[str, Any]
    shard: str = "1GB"
    dtype: str = "float32"


BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
rope = lambda kind, **more: {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}
EXTRA = {  # not in the matrix
    "llama-bytes": Family("Llama", {"vocab_size": 257}),
    "llama-bf16-sharded": Family("Llama", {}, shard="20KB", dtype="bfloat16"),
}
FAMILIES = {
    "llama": Family("Llama", {}),
    "llama-tied": Family("Llama", {"tie_word_embeddings": True}),
    "llama-sharded": Family("Llama", {}, shard="20KB"),
    "llama-bf16": Family("Llama", {}, dtype="bfloat16"),
    "llama-biases": Family("Llama", {"attention_bias": True}),
    "llama-all-biases": Family("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mlp-biases": Family("Llama", {"mlp_bias": True}),
    "llama-head-dim": Family("Llama", {"head_dim": 12}),
    "llama3-rope": Family(
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-linear": Family("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": Family("Llama", {"max_position_embeddings": 16, **rope("dynamic", factor=4.0)}),
    "llama-yarn": Family("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-longrope": Family(
        "Llama",
        rope(
            "longrope",
            factor=4.0,
            original_max_position_embeddings=16,
            short_factor=[1.0, 1.5, 2.0, 2.5],
            long_factor=[1.0, 2.0, 4.0, 8.0],
        ),
    ),
    "ministral": Family(
        "Ministral",
        {"sliding_window": 6, "head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "mistral": Family("Mistral", {"sliding_window": 7}),
    "mistral-full": Family("Mistral", {"sliding_window": None}),
    "qwen2": Family("Qwen2", {}),
    "qwen2-tied-sharded": Family("Qwen2", {"tie_word_embeddings": True}, shard="20KB"),
    "qwen2-window": Family("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "qwen3-tied": Family("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, dtype="float16"),
}


def build(name: str, folder: Path) -> Any:
    """Save the family's model in `folder` and return it (torch, f32, eager attention, in evaluation mode)."""
    import torch
    import transformers

    family = (FAMILIES | EXTRA)[name]
    config = getattr(transformers, f"{family.kind}Config")(**(BASE | family.fields))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family.kind}ForCausalLM")(config).to(getattr(torch, family.dtype))
    with torch.no_grad():  # norms and biases start at one and zero, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=family.shard)
    # Read back rather than cast, which would round the rotary frequencies too.
    return type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
