"""The state a run starts from: random, or the parameters of a checkpoint with what its attention needs anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxattn.new_folder import new_folder
from jaxattn.places import SIDE
from jaxattn.runs.config import RunConfig
from jaxattn.runs.parameters import abstract_params, new_paths
from train.step import init_state

SOME = 4  # names that a message lists


def first_state(cfg: RunConfig) -> Any:
    """The training state at step 0, before a checkpoint's parameters are put into it."""
    if not cfg.lora.rank:
        return init_state(cfg.model, cfg.optim, cfg.steps, cfg.seed)
    return init_state(cfg.model, cfg.optim, cfg.steps, cfg.seed, cfg.lora, new_paths(cfg))


def abstract_state(cfg: RunConfig, sharding: Any = None) -> Any:
    """Shapes and dtypes of the training state."""
    shapes = jax.eval_shape(lambda: first_state(cfg))
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def describe_swap(cfg: RunConfig) -> str:
    """One line: which attention replaces which, what starts anew and what is left behind."""
    ours, theirs = abstract_params(cfg.model), abstract_params(cfg.model.with_attention(cfg.start.attn))
    parts = [f"from {cfg.start.source}, step {cfg.start.step}"]
    if cfg.attn != cfg.start.attn:
        parts.append(f"attention {cfg.start.attn} -> {cfg.attn}")
    for label, paths in (("new", ours.keys() - theirs.keys()), ("not used", theirs.keys() - ours.keys())):
        if paths:
            names = ["/".join(path) for path in sorted(paths)]
            parts.append(f"{len(names)} parameters {label} ({', '.join(names[:SOME])}{', ...' * (len(names) > SOME)})")
    return "; ".join(parts)


def put(params: Any, base: Any) -> Any:
    """`params` with every leaf that `base` also has taken from there."""
    ours, theirs = flatten_dict(params), flatten_dict(base)
    return unflatten_dict({path: theirs.get(path, x) for path, x in ours.items()})


def copy_side_files(cfg: RunConfig, folder: Path) -> None:
    """Tokenizer, chat template and the source's own configuration, so that the run can be used without its start."""
    side = Path(cfg.start.source) / SIDE
    if cfg.start.source and side.is_dir() and not (folder / SIDE).exists():
        with new_folder(folder / SIDE) as partial:
            shutil.copytree(side, partial, dirs_exist_ok=True)
