"""The decoder, optimiser and data that `train_cpu` gives to every framework (NumPy only)."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """A 10M-parameter decoder: tied embeddings, RMSNorm, SwiGLU, rotary, AdamW with clipping."""

    width: int = 256
    layers: int = 8
    heads: int = 4
    feed_forward: int = 1024
    vocab: int = 8192
    context: int = 512
    batch_size: int = 8
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    threads: int = 2
    seed: int = 0

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets [B, T] int32 of one step: a noisy affine sequence, so the loss can fall."""
        rng = np.random.default_rng(1000 + step)
        x = rng.integers(0, self.vocab, (self.batch_size, self.context + 1))
        follow = rng.random(x.shape) < 0.8
        for t in range(1, x.shape[1]):
            x[:, t] = np.where(follow[:, t], (x[:, t - 1] * 5 + 17) % self.vocab, x[:, t])
        return x[:, :-1].astype(np.int32), x[:, 1:].astype(np.int32)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context
