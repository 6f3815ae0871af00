"""A decoder of softmax layers in numpy: no compilation, so that hundreds of configurations cost seconds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.models import ModelConfig
from jaxattn.rope import rotary_tables


def logits(model: ModelConfig, params: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """[T, N] of one text; rotary tables are those of `jaxattn.rope`."""
    params, length = _numpy(params), len(ids)
    with jax.disable_jit():
        tables = rotary_tables(jnp.arange(length)[None], model.head_dim, model.rope_base, 1.0, model.rope_scaling)
    cos, sin = (np.asarray(table)[0] for table in tables)
    x = params["embed"][ids]
    for i in range(model.num_layers):
        layer, window = params[f"layer_{i}"], model.mixer(i).window
        x = x + _attention(model, layer["attn"], _norm(x, layer["attn_norm"]["scale"], model), cos, sin, window)
        y = _norm(x, layer["mlp_norm"]["scale"], model)
        gate = _linear(layer["mlp"]["gate"], y)
        x = x + _linear(layer["mlp"]["down"], gate / (1 + np.exp(-gate)) * _linear(layer["mlp"]["up"], y))
    x = _norm(x, params["final_norm"]["scale"], model)
    return x @ (params["embed"].T if model.tie_embeddings else params["unembed"])


def _attention(model, p, x, cos, sin, window) -> np.ndarray:
    length, dim = len(x), model.head_dim
    q, k, v = (_linear(p[name], x).reshape(length, -1, dim) for name in "qkv")
    if model.qk_norm:
        q, k = _norm(q, p["q_norm"], model), _norm(k, p["k_norm"], model)
    turn = lambda y: np.concatenate(
        [
            y[..., : dim // 2] * cos - y[..., dim // 2 :] * sin,
            y[..., dim // 2 :] * cos + y[..., : dim // 2] * sin,
        ],
        -1,
    )
    group = model.num_heads // model.kv_heads
    q, k, v = turn(q), np.repeat(turn(k), group, 1), np.repeat(v, group, 1)
    scores = np.einsum("thd,shd->hts", q, k) / dim**0.5
    apart = np.arange(length)[:, None] - np.arange(length)
    scores = np.where((apart >= 0) & (apart < (window or length)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return _linear(p["o"], np.einsum("hts,shd->thd", weights, v).reshape(length, -1))


def _linear(p, x) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", np.float32(0))


def _norm(x, scale, model) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + model.norm_eps) * scale


def _numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _numpy(value) for name, value in tree.items()}
    return np.asarray(tree, np.float32)
