"""Tiny GGUF files with chosen metadata and tensors, and the cases that were also run in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HEADS, KV, DIM, WIDTH, FF, LAYERS, VOCAB = 4, 2, 8, 32, 48, 2, 40
IDS = np.random.default_rng(1).integers(0, VOCAB, 24)
FIELDS: dict[str, Any] = {
    "context_length": 64, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": FF,
    "attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 100.0,
}  # fmt: skip
BIAS_ROWS = {
    "attn_q": HEADS * DIM, "attn_k": KV * DIM, "attn_v": KV * DIM, "attn_output": WIDTH, "ffn_gate": FF, "ffn_up": FF,
    "ffn_down": WIDTH,
}  # fmt: skip
TABLE = np.array([1, 2, 4, 8], np.float32)


def tensors(arch: str, dim: int = DIM, biases: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Random weights of the architecture; those of all architectures agree where they share a name."""
    rng, found = np.random.default_rng(0), {}
    random = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)
    norm = lambda *shape: (1 + 0.3 * rng.standard_normal(shape)).astype(np.float32)
    found["token_embd.weight"], found["output_norm.weight"] = random(VOCAB, WIDTH), norm(WIDTH)
    found["output.weight"] = random(VOCAB, WIDTH)
    wanted = ("attn_q", "attn_k", "attn_v") if arch == "qwen2" and biases is None else biases or ()
    for i in range(LAYERS):
        layer: dict[str, np.ndarray] = {
            "attn_norm.weight": norm(WIDTH), "ffn_norm.weight": norm(WIDTH),
            "attn_q.weight": random(HEADS * dim, WIDTH), "attn_k.weight": random(KV * dim, WIDTH),
            "attn_v.weight": random(KV * dim, WIDTH), "attn_output.weight": random(WIDTH, HEADS * dim),
            "ffn_gate.weight": random(FF, WIDTH), "ffn_up.weight": random(FF, WIDTH),
            "ffn_down.weight": random(WIDTH, FF),
        }  # fmt: skip
        made = {name: random(rows) for name, rows in BIAS_ROWS.items()}
        layer |= {f"{name}.bias": made[name] for name in wanted}
        norms = {f"attn_{x}_norm.weight": norm(dim) for x in "qk"}
        layer |= norms if arch == "qwen3" else {}
        found |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    return found


def write(
    path: Path,
    arch: str = "llama",
    fields: dict[str, Any] | None = None,
    *,
    more: dict[str, Any] | None = None,
    whole: dict[str, Any] | None = None,
    **of: Any,
) -> Path:
    """A GGUF file; `fields` change those of the architecture (None: left out), `whole` are keys as they are, `more`
    changes tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    given = {f"{arch}.{k}": v for k, v in (FIELDS | (fields or {})).items()}
    tokens = [*(chr(97 + i) for i in range(26)), "ab", *map(str, range(10)), "Ċ", "Ġ", "<e>"]
    given |= {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (VOCAB - 1) + [3], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": VOCAB - 1,
    }  # fmt: skip
    put = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (given | (whole or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            put[type(value)](key, value)
    for name, value in (tensors(arch, **of) | (more or {})).items():
        if isinstance(value, tuple):  # bytes of a quantised tensor, and their type
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_scaling = lambda **keys: {f"rope.scaling.{key}": value for key, value in keys.items()}
_yarn = lambda **keys: _scaling(**({"type": "yarn", "factor": 4.0} | keys))
# Of every architecture: what `write` is given.
COMMON: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale_linear, the old name": {"fields": {"rope.scale_linear": 4.0}},
    "factor without a type": {"fields": _scaling(factor=4.0)},
    "factor before scale_linear": {"fields": {**_scaling(factor=4.0), "rope.scale_linear": 2.0}},
    "factor under type none": {"fields": _scaling(type="none", factor=4.0)},
    "linear": {"fields": _scaling(type="linear", factor=4.0)},
    "a factor of 0": {"fields": _scaling(factor=0.0)},
    "a factor below 1": {"fields": _scaling(factor=0.5)},
    "yarn": {"fields": _yarn()},
    "yarn from 16": {"fields": _yarn(original_context_length=16)},
    "yarn from 0": {"fields": _yarn(original_context_length=0)},
    "yarn from 1": {"fields": _yarn(original_context_length=1)},
    "yarn without a factor": {"fields": _scaling(type="yarn")},
    "yarn's keys of other architectures": {
        "fields": _yarn(yarn_beta_fast=4.0, yarn_beta_slow=2.0, yarn_ext_factor=0.5, yarn_attn_factor=0.5)
    },
    "longrope without tables": {"fields": _scaling(type="longrope", factor=4.0)},
    "attn_factor": {"fields": _scaling(attn_factor=0.5)},
    "attn_factor under type none": {"fields": _scaling(type="none", attn_factor=0.5)},
    "attn_factor with linear": {"fields": _scaling(factor=4.0, attn_factor=1.5)},
    "attn_factor with yarn": {"fields": _yarn(attn_factor=0.5)},
    "original length alone": {"fields": _scaling(original_context_length=16)},
    "finetuned": {"fields": {"rope.scaling.finetuned": True}},
    "no base": {"fields": {"rope.freq_base": None}},
    "base 10000": {"fields": {"rope.freq_base": 10_000.0}},
    "base 1": {"fields": {"rope.freq_base": 1.0}},
    "all dims rotated": {"fields": {"rope.dimension_count": DIM}},
    "half the dims rotated": {"fields": {"rope.dimension_count": DIM // 2}},
    "key and value length": {"fields": {"attention.key_length": DIM, "attention.value_length": DIM}},
    "key length alone": {"fields": {"attention.key_length": 12}, "dim": 12},
    "heads by layer": {"fields": {"attention.head_count": [HEADS] * 2, "attention.head_count_kv": [KV] * 2}},
    "heads that differ": {"fields": {"attention.head_count_kv": [2, 4]}},
    "widths by layer": {"fields": {"feed_forward_length": [FF] * 2}},
    "too many widths": {"fields": {"feed_forward_length": [FF] * 3}},
    "no kv heads": {"fields": {"attention.head_count_kv": None}},
    "no epsilon": {"fields": {"attention.layer_norm_rms_epsilon": None}},
    "no context": {"fields": {"context_length": None}},
    "a large epsilon": {"fields": {"attention.layer_norm_rms_epsilon": 0.5}},
    "sliding window": {"fields": {"attention.sliding_window": 5}},
    "attention.scale": {"fields": {"attention.scale": 0.5}},
    "logit_scale": {"fields": {"logit_scale": 0.5}},
    "residual_scale": {"fields": {"residual_scale": 0.5}},
    "embedding_scale": {"fields": {"embedding_scale": 0.5}},
    "softcapping": {"fields": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}},
    "not causal": {"fields": {"attention.causal": False}},
    "no experts": {"fields": {"expert_count": 0, "expert_used_count": 0}},
    "a vocabulary size": {"fields": {"vocab_size": 50}},
    "tied": {"more": {"output.weight": None}},
    "an unknown tensor": {"more": {"blk.0.extra.weight": np.ones(4, np.float32)}},
    "a layer more": {"fields": {"block_count": 3}},
    "a layer fewer": {"fields": {"block_count": 1}},
    "heads as text": {"fields": {"attention.head_count": "4"}},
    "rope_freqs": {"more": {"rope_freqs.weight": TABLE}},
    "factors without longrope": {"more": {"rope_factors_long.weight": TABLE, "rope_factors_short.weight": TABLE}},
    "an output norm's bias": {"more": {"output_norm.bias": np.ones(WIDTH, np.float32)}},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "rope_freqs with linear": {"fields": _scaling(factor=4.0), "more": {"rope_freqs.weight": TABLE}},
        "rope_freqs with yarn": {"fields": _yarn(), "more": {"rope_freqs.weight": TABLE}},
        "rope_freqs with attn_factor": {"fields": _scaling(attn_factor=0.5), "more": {"rope_freqs.weight": TABLE}},
        "rope_freqs of three": {"more": {"rope_freqs.weight": TABLE[:3]}},
        "rope_freqs in a layer": {"more": {"blk.0.rope_freqs.weight": TABLE}},
        "longrope": {
            "fields": _scaling(type="longrope", original_context_length=32),
            "more": {"rope_factors_long.weight": TABLE, "rope_factors_short.weight": TABLE / 2},
        },
        "heads of another width": {"fields": {"attention.key_length": 12, "attention.value_length": 12}, "dim": 12},
        "qkv biases": {"biases": ("attn_q", "attn_k", "attn_v")},
        "all attention biases": {"biases": ("attn_q", "attn_k", "attn_v", "attn_output")},
        "one bias of the feed-forward": {"biases": ("ffn_up",)},
        "all biases": {"biases": tuple(BIAS_ROWS)},
        **{f"{name}.bias": {"biases": (name,)} for name in ("attn_q", "attn_k", "attn_output", "ffn_down")},
    },
    "qwen2": {
        "no biases": {"biases": ()},
        "one bias": {"biases": ("attn_k",)},
        "an output bias": {"more": {"output.bias": np.ones(VOCAB, np.float32)}},
    },
    "qwen3": {
        "heads of another width": {"fields": {"attention.key_length": 12, "attention.value_length": 12}, "dim": 12},
        "qkv biases": {"biases": ("attn_q", "attn_k", "attn_v")},
    },
}
CASES = {(arch, name): case for arch in OWN for name, case in (COMMON | OWN[arch]).items()}
PLACES, SHOWN = (7, 23), 20  # whose logits are kept, of how many tokens
