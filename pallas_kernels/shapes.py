"""Shapes that tests, benches and tuning share: one table, so that what is fast is also what is tested."""

from __future__ import annotations

import dataclasses

LENGTHS = (1, 63, 100, 257, 1000)
DIMS = (60, 64, 96, 128, 192)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: [B, T, H, D] queries against [B, S, K, D] keys and [B, S, K, V] values."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    keys: int = 0  # 0: as many as queries

    @property
    def size(self) -> int:
        """S."""
        return self.keys or self.length


# Every length and every head dim once, grouped heads, and value heads of another width.
ODD = tuple(
    Shape(f"T{length}_D{dim}", batch=1, length=length, heads=2 * kv, kv_heads=kv, dim=dim, value_dim=value)
    for length, dim, value, kv in zip(LENGTHS, DIMS, (60, 96, 64, 128, 192), (1, 2, 1, 2, 1), strict=True)
)
# What models ask for: SmolLM2-135M, Llama-3-8B, Qwen3-8B, and a long document of each kind.
MODELS = (
    Shape("smollm2_2k", 1, 2048, 9, 3, 64, 64),
    Shape("llama3_8b_8k", 1, 8192, 32, 8, 128, 128),
    Shape("qwen3_8b_16k", 1, 16384, 32, 8, 128, 128),
    Shape("long_32k", 1, 32768, 4, 2, 128, 128),
)
