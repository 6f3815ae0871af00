"""Which parameters a run's model has, which of them it trains, and which the checkpoint it started from brings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.runs import lora
from jaxattn.runs.config import RunConfig


def abstract_params(model: ModelConfig) -> dict[tuple[str, ...], Any]:
    """Shape and dtype of every parameter, by path."""
    return dict(_traced(dataclasses.replace(model, backend="xla")))  # parameters do not depend on who computes


@functools.lru_cache(maxsize=16)  # one start of a run asks about the same two models many times
def _traced(model: ModelConfig) -> dict[tuple[str, ...], Any]:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = lambda tokens: Decoder(model).init(jax.random.key(0), tokens)["params"]
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


def abstract_trained(cfg: RunConfig) -> Any:
    """Shape and dtype of the tree that a run trains: its model's parameters, or LoRA's updates of them."""
    params = unflatten_dict(abstract_params(cfg.model))
    if not cfg.lora.rank:
        return params
    return jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, cfg.lora, new_paths(cfg)), params)


def keep(base: Any, model: ModelConfig) -> Any:
    """The leaves of `base` that the model has."""
    ours = abstract_params(model)
    return unflatten_dict({path: x for path, x in flatten_dict(base).items() if path in ours})
