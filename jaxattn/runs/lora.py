"""LoRA: a low-rank update beside frozen kernels (arXiv 2106.09685, equation 3): W = W0 + alpha / rank · A B.

What is trained is one tree: `lora`, with A [..., E, r] and B [..., r, F] at the place of each chosen kernel
[..., E, F], and `new`, the parameters that the checkpoint did not have (a swapped attention brings its own), which
are trained as they are. B starts at zero, so training starts from the checkpoint's own function.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.runs.config import LoraConfig

Path = tuple[str, ...]


def targets(params: Any, cfg: LoraConfig, new: Collection[Path] = ()) -> list[Path]:
    """Paths of the kernels that get an update, in order; leaves in `new` are trained whole instead.

    Raises:
      ConfigError: a pattern that matches no kernel, or a rank above the narrower side of one that it matches.
    """
    flat: dict[Path, Any] = flatten_dict(params)
    kernels = {path: x for path, x in flat.items() if path[-1] == "kernel" and path not in new}
    found: set[Path] = set()
    for pattern in cfg.targets:
        hits = {path for path in kernels if fnmatch.fnmatchcase("/".join(path), f"*{pattern}/kernel")}
        if not hits:
            names = sorted({"/".join(path[-3:-1]) for path in kernels})
            raise ConfigError(f"lora.targets {pattern!r} matches no kernel; the model has {', '.join(names)}.")
        found |= hits
    for path in sorted(found):
        if cfg.rank > min(kernels[path].shape[-2:]):
            raise ConfigError(
                f"lora.rank is {cfg.rank} but {'/'.join(path)} is {list(kernels[path].shape)}; "
                f"use at most {min(kernels[path].shape[-2:])}."
            )
    return sorted(found)


def init(key: Array, params: Any, cfg: LoraConfig, new: Collection[Path] = ()) -> dict[str, Any]:
    """The trained tree beside `params`: A from N(0, 1/E), B zero, and the leaves in `new` as they are."""
    flat: dict[Path, Any] = flatten_dict(params)
    pairs = {}
    for number, path in enumerate(targets(params, cfg, new)):
        *lead, rows, columns = flat[path].shape
        a = jax.random.normal(jax.random.fold_in(key, number), (*lead, rows, cfg.rank), jnp.float32)
        pairs[path] = {"a": a * rows**-0.5, "b": jnp.zeros((*lead, cfg.rank, columns), jnp.float32)}
    tree = {"lora": unflatten_dict(pairs)}
    return tree | ({"new": unflatten_dict({path: flat[path] for path in new})} if new else {})


def merge(frozen: Any, trained: dict[str, Any], cfg: LoraConfig) -> Any:
    """The whole parameters: frozen kernels plus alpha / rank · A B, and the new leaves."""
    flat: dict[Path, Any] = flatten_dict(frozen)
    updates: dict[Path, Any] = flatten_dict(trained["lora"])
    for place in {path[:-1] for path in updates}:
        flat[place] += cfg.alpha / cfg.rank * jnp.matmul(updates[*place, "a"], updates[*place, "b"])
    return unflatten_dict(flat | flatten_dict(trained.get("new", {})))
