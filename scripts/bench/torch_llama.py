"""The PyTorch rival of `infer_cpu`: a Llama decoder with a static cache, written as well as we can.

Fused QKV and gate/up products, SDPA, weights in the compute dtype as torch wants them, no autograd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def tensor(x: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32)).to(dtype)


class Block(nn.Module):
    """Pre-norm block from one layer of JAX parameters, kernels [in, out] -> [out, in]."""

    def __init__(self, sizes: dict[str, Any], layer: dict[str, Any], room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        turned = lambda group, *names: tensor(
            np.concatenate([np.asarray(layer[group][n]["kernel"]).T for n in names]), dtype
        )
        self.qkv, self.out = turned("attn", "q", "k", "v"), turned("attn", "o")
        self.gate_up, self.down = turned("mlp", "gate", "up"), turned("mlp", "down")
        self.norm1, self.norm2 = (tensor(layer[n]["scale"], dtype) for n in ("attn_norm", "mlp_norm"))
        shape = (1, sizes["kv_heads"], room, sizes["head_dim"])
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, at: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        s = self.sizes
        length, width, dim = x.shape[1], x.shape[2], s["head_dim"]
        qkv = F.linear(F.rms_norm(x, (width,), self.norm1, s["eps"]), self.qkv)
        q, k, v = (
            y.view(1, length, -1, dim).transpose(1, 2)
            for y in qkv.split([s["heads"] * dim, s["kv_heads"] * dim, s["kv_heads"] * dim], -1)
        )
        self.keys.index_copy_(2, at, _rotate(k, cos, sin))
        self.values.index_copy_(2, at, v)
        seen = mask.shape[-1]
        o = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), self.keys[:, :, :seen], self.values[:, :, :seen], attn_mask=mask, enable_gqa=True
        )
        x = x + F.linear(o.transpose(1, 2).reshape(1, length, -1), self.out)
        gate, up = F.linear(F.rms_norm(x, (width,), self.norm2, s["eps"]), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """Tied embeddings; returns the logits of the last token. `room`: the cache's length."""

    def __init__(self, sizes: dict[str, Any], params: dict[str, Any], room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = tensor(params["embed"], dtype)
        self.blocks = nn.ModuleList(Block(sizes, params[f"layer_{i}"], room, dtype) for i in range(sizes["layers"]))
        self.norm = tensor(params["final_norm"]["scale"], dtype)
        half = sizes["head_dim"] // 2
        angle = np.arange(room)[:, None] * sizes["rope_base"] ** (-np.arange(half) / half)
        self.cos, self.sin = tensor(np.cos(angle), dtype), tensor(np.sin(angle), dtype)
        self.causal = torch.ones(room, room, dtype=torch.bool).tril()

    def forward(self, tokens: torch.Tensor, at: torch.Tensor, seen: int) -> torch.Tensor:
        x = F.embedding(tokens, self.embed)
        places = self.cos[at], self.sin[at], at, self.causal[at, :seen]
        for block in self.blocks:
            x = block(x, *places)
        x = F.rms_norm(x[:, -1], (x.shape[-1],), self.norm, self.sizes["eps"])
        return F.linear(x, self.embed)
