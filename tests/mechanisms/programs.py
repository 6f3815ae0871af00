"""A mechanism, or a model around it, as compiled programs: op by op each operation would be compiled for itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from jaxattn.mechanisms import Call, Mechanism
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder


@partial(jax.jit, static_argnames=("mechanism", "which", "spec", "scale", "depth", "rope", "backend", "window"))
def run(mechanism: Mechanism, which: str, spec: Any, *args: Any, params: Any = None, **options: Any) -> Any:
    """`forward`, `reference`, `weights` or `step` on these arrays; options are those of `Call`."""
    return getattr(mechanism, which)(*args, Call(spec, params or {}, **options))


@partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(cfg: ModelConfig, params: Any, *args: Any, method: str = "__call__") -> Any:
    return Decoder(cfg).apply({"params": params}, *args, method=method)


@partial(jax.jit, static_argnums=(0, 2, 3))
def start(cfg: ModelConfig, params: Any, rows: int, capacity: int) -> Any:
    """States for decoding."""
    return Decoder(cfg).apply({"params": params}, rows, capacity, method="start")


def decode(cfg: ModelConfig, params: Any, tokens: np.ndarray, pieces: list[int], shift: int = 0) -> np.ndarray:
    """Logits of a prompt in pieces; `shift` is added to the positions of all but the first piece."""
    rows, length = tokens.shape
    states, at, out = start(cfg, params, rows, length), 0, []
    for n in pieces:
        positions = np.arange(at, at + n, dtype=np.int32)[None].repeat(rows, 0) + (shift if at else 0)
        o, states = apply(cfg, params, states, tokens[:, at : at + n], positions, method="step")
        out.append(np.asarray(o))
        at += n
    return np.concatenate(out, axis=1)
