"""Running a policy of unequal key heads on arrays, and softmax over listed keys in f64."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxattn.mechanisms import get
from jaxattn.nn.stream import Stream
from tests.decoding import core_of, site_of

HEADS, KV_HEADS, DIM, VALUES = 4, 2, 8, 6
LEFT = 4


def arrays(length: int, seed: int = 0, batch: int = 2) -> tuple[np.ndarray, ...]:
    """q, k, v as f32 [B, T, heads, dim]."""
    rng = np.random.default_rng(seed)
    draw = lambda heads, dim: rng.normal(size=(batch, length, heads, dim)).astype(np.float32)
    return 2 * draw(HEADS, DIM), draw(KV_HEADS, DIM), draw(KV_HEADS, VALUES)


def places(left: tuple[int, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows with so many tokens of padding in front."""
    at = np.arange(length) - np.array(left)[:, None]
    return np.maximum(at, 0).astype(np.int32), (at >= 0).astype(np.int32)


def run(
    policy: Any, spec: Any, qkv: Any, *, prompt: int, left: tuple[int, ...] = (0, LEFT), width: int = 1,
    window: int | None = None, heads: Any = None, room: int = 0, pieces: tuple[int, ...] = (),
) -> tuple[np.ndarray, Any]:  # fmt: skip
    """o [B, T, H, V] of a prompt (in `pieces` of it) and then of `width` tokens at a time; and the last state."""
    q, k, v = qkv
    length, site, core = q.shape[1], site_of(q, k, v, window), core_of(get("softmax"), q.shape[3])

    def one(state: Any, q: Any, k: Any, v: Any, positions: Any, segments: Any, phase: str) -> Any:
        here = Stream(positions, segments, phase=phase, heads=heads or {})
        return policy.step(state, q, k, v, here, spec=spec, site=site, core=core)[:2]

    step = jax.jit(one, static_argnums=6)
    state = policy.init(spec, site, batch=len(q), capacity=room or length)
    positions, segments = places(left, length)
    out, at = [], 0
    calls = [("prompt", size) for size in pieces or (prompt,) * bool(prompt)]
    for phase, size in [*calls, *[("answer", width)] * ((length - prompt) // width)]:
        cut = [x[:, at : at + size] for x in (q, k, v, positions, segments)]
        o, state = step(state, *cut, phase)
        out.append(np.asarray(o))
        at += size
    return np.concatenate(out, axis=1), state


def softmax_over(q: np.ndarray, k: np.ndarray, v: np.ndarray, extra: np.ndarray | float = 0.0) -> np.ndarray:
    """o [G, V] of queries [G, D] over keys [n, D] in f64; `extra` is added to the scores."""
    s = q.astype(np.float64) @ k.astype(np.float64).T / q.shape[-1] ** 0.5 + extra
    w = np.exp(s - s.max(-1, keepdims=True))
    return (w / w.sum(-1, keepdims=True)) @ v.astype(np.float64)
