"""The line at the start of a run that says which backend each kernel op got."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from jaxattn.backends import backends_of
from jaxattn.runs.config import RunConfig
from jaxattn.runs.parameters import abstract_params
from train.step import batch_loss


def describe_backends(cfg: RunConfig) -> str:
    """Op, backend and reason, for one device's share of a micro-batch.

    Raises:
      ConfigError: the backend that was named cannot serve the model.
    """
    rows = max(1, cfg.data.batch_size // cfg.optim.accumulate // jax.device_count())
    tokens = jax.ShapeDtypeStruct((rows, cfg.data.context), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "targets"), tokens)
    batch["loss_mask"] = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
    if cfg.data.prefix_len:
        batch["prefix_len"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    params = unflatten_dict(abstract_params(cfg.model))
    return backends_of(cfg.model, lambda params, batch: batch_loss(cfg.model, params, batch), params, batch)
