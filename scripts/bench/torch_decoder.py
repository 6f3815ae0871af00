"""The PyTorch rival of `train_cpu`: the same decoder, loss and AdamW, written as well as we can.

Fused QKV and gate/up projections, SDPA with is_causal, F.rms_norm, F.cross_entropy, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scripts.bench.train_shape import Shape


class Block(nn.Module):
    """Pre-norm block; weights come from the JAX parameters, [in, out] -> [out, in]."""

    def __init__(self, shape: Shape, layer: dict[str, Any]) -> None:
        super().__init__()
        self.shape = shape
        kernel = lambda group, name: np.asarray(layer[group][name]["kernel"])
        turned = lambda *parts: nn.Parameter(torch.from_numpy(np.concatenate(parts, axis=1).T.copy()))
        self.qkv = turned(kernel("attn", "q"), kernel("attn", "k"), kernel("attn", "v"))
        self.out = turned(kernel("attn", "o"))
        self.gate_up = turned(kernel("mlp", "gate"), kernel("mlp", "up"))
        self.down = turned(kernel("mlp", "down"))
        scale = lambda name: nn.Parameter(torch.from_numpy(np.array(layer[name]["scale"])))
        self.norm1, self.norm2 = scale("attn_norm"), scale("mlp_norm")

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        s = self.shape
        b, t, e = x.shape
        qkv = F.linear(F.rms_norm(x, (e,), self.norm1, s.norm_eps), self.qkv)
        q, k, v = qkv.view(b, t, 3, s.heads, e // s.heads).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).reshape(b, t, e), self.out)
        gate, up = F.linear(F.rms_norm(x, (e,), self.norm2, s.norm_eps), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """Tied-embedding decoder that returns the mean next-token loss."""

    def __init__(self, shape: Shape, params: dict[str, Any]) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.from_numpy(np.array(params["embed"])))
        self.blocks = nn.ModuleList(Block(shape, params[f"layer_{i}"]) for i in range(shape.layers))
        self.norm = nn.Parameter(torch.from_numpy(np.array(params["final_norm"]["scale"])))
        half = shape.width // shape.heads // 2
        angle = np.arange(shape.context)[:, None] * shape.rope_base ** (-np.arange(half) / half)
        self.register_buffer("cos", torch.from_numpy(np.cos(angle).astype(np.float32)))
        self.register_buffer("sin", torch.from_numpy(np.sin(angle).astype(np.float32)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.embedding(x, self.embed)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        h = F.rms_norm(h, (self.shape.width,), self.norm, self.shape.norm_eps)
        return F.cross_entropy(F.linear(h, self.embed).view(-1, self.shape.vocab), y.reshape(-1))


def make(shape: Shape, params: dict[str, Any], *, compiled: bool) -> Callable[[int], float]:
    """A training step: step number -> loss before the update."""
    torch.set_num_threads(shape.threads)
    model = Decoder(shape, params)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=shape.lr,
        betas=(shape.b1, shape.b2),
        eps=shape.eps,
        weight_decay=shape.weight_decay,
        fused=True,
    )
    run = torch.compile(model) if compiled else model

    def step(i: int) -> float:
        x, y = (torch.from_numpy(a).long() for a in shape.batch(i))
        optimizer.zero_grad(set_to_none=True)
        loss = run(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape.clip, foreach=True)
        optimizer.step()
        return loss.item()

    return step
