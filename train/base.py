"""The checkpoint a run starts from: which of its parameters the new model keeps, and which it has to make."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.new_folder import new_folder
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.text import SIDE
from train.config import RunConfig

SOME = 4  # names that a message lists


def abstract_params(model: ModelConfig) -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every parameter, by path."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plain = Decoder(dataclasses.replace(model, backend="xla"))  # parameters do not depend on who computes
    init = lambda tokens: plain.init(jax.random.key(0), tokens)["params"]
    return flatten_dict(jax.eval_shape(init, tokens))


def new_paths(cfg: RunConfig) -> tuple[tuple[str, ...], ...]:
    """Parameters of the model that the checkpoint does not have, () for a run that starts from none.

    Raises:
      ConfigError: a parameter of both has two shapes.
    """
    if not cfg.start.source:
        return ()
    ours, theirs = abstract_params(cfg.model), abstract_params(cfg.model.with_attention(cfg.start.attn))
    for path in ours.keys() & theirs.keys():
        if ours[path].shape != theirs[path].shape:
            raise ConfigError(
                f"attn {cfg.attn!r} needs {'/'.join(path)} as {list(ours[path].shape)} but {cfg.start.source} has "
                f"{list(theirs[path].shape)}; choose an attention, or options of it, with the same projections."
            )
    return tuple(sorted(ours.keys() - theirs.keys()))


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


def keep(base: Any, model: ModelConfig) -> Any:
    """The leaves of `base` that the model has."""
    ours = abstract_params(model)
    return unflatten_dict({path: x for path, x in flatten_dict(base).items() if path in ours})


def copy_side_files(cfg: RunConfig, folder: Path) -> None:
    """Tokenizer, chat template and the source's own configuration, so that the run can be used without its start."""
    side = Path(cfg.start.source) / SIDE
    if cfg.start.source and side.is_dir() and not (folder / SIDE).exists():
        with new_folder(folder / SIDE) as partial:
            shutil.copytree(side, partial, dirs_exist_ok=True)
