"""Read a long text in local chunks, so that no step attends to more than a chunk and what its caches hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._landmark_retrieval import longest_chunk
from jaxattn.mechanisms.landmark import Spec as Landmark
from jaxattn.models.config import ModelConfig
from jaxattn.nn.transformer import Decoder


def logits_in_chunks(
    cfg: ModelConfig, params: dict[str, Any], tokens: Int[Array, "B T"], *, chunk: int = 0, capacity: int = 0
) -> tuple[Float[Array, "B T N"], Any]:
    """Logits of one document a row, read `chunk` tokens at a time, and the decode states behind it.

    This is how landmark retrieval reads contexts longer than it was trained at: a model trained with
    ``landmark(block=15)`` answers a text of any length as ``landmark(block=15, retrieve=2, context=128)``.

    Args:
      cfg: of the model; `params` as trained (scanned or not, as cfg says).
      chunk: tokens of a step; 0 takes the most that every layer's retrieval allows, or all of them.
      capacity: tokens the states have room for, default T; more leaves room to go on with `Decoder.step`.

    Raises:
      ConfigError: a chunk that retrieval does not allow.
    """
    batch, length = tokens.shape
    chunk = _chunk(cfg, chunk, length)
    whole = length // chunk
    states = Decoder(cfg).apply({"params": params}, batch, max(capacity, length), method="start")
    parts = jnp.moveaxis(tokens[:, : whole * chunk].reshape(batch, whole, chunk), 1, 0)
    states, out = _read(cfg, params, states, parts, jnp.zeros((), jnp.int32))
    logits = jnp.moveaxis(out, 0, 1).reshape(batch, whole * chunk, -1)
    if length % chunk:
        states, out = _read(cfg, params, states, tokens[None, :, whole * chunk :], jnp.asarray(whole * chunk))
        logits = jnp.concatenate([logits, out[0]], axis=1)
    return logits, states


@partial(jax.jit, static_argnums=(0,))
def _read(cfg: ModelConfig, params: Any, states: Any, parts: Array, start: Array) -> tuple[Any, Array]:
    """States and logits [n, B, t, N] behind the parts [n, B, t], the first of which begins at `start`."""

    def one(carry, part: Array):
        states, at = carry
        positions = jnp.broadcast_to(at + jnp.arange(part.shape[1]), part.shape)
        logits, states = Decoder(cfg).apply({"params": params}, states, part, positions, method="step")
        return (states, at + part.shape[1]), logits

    (states, _), logits = jax.lax.scan(one, (states, start), parts)
    return states, logits


def _chunk(cfg: ModelConfig, chunk: int, length: int) -> int:
    """The tokens of a step, within what the retrieving layers allow."""
    specs = [cfg.mixer(layer).spec for layer in range(cfg.num_layers)]
    retrieving = [spec for spec in specs if isinstance(spec, Landmark) and spec.retrieve]
    if chunk < 0:
        raise ConfigError(f"chunk is {chunk} but must be 0 (automatic) or a number of tokens.")
    if not retrieving:
        return min(chunk or length, length)
    spec = min(retrieving, key=longest_chunk)
    most = longest_chunk(spec) // spec.length * spec.block
    if chunk > most:
        raise ConfigError(
            f"chunk is {chunk} but landmark.context {spec.context} with {spec.retrieve} retrieved blocks allows "
            f"{most} tokens: use at most {most}."
        )
    if chunk % spec.block:  # an unfinished block in front of a full chunk would lead beyond the trained positions
        near = max(spec.block, chunk - chunk % spec.block)
        raise ConfigError(f"chunk is {chunk} but must be a multiple of landmark.block {spec.block}: use {near}.")
    return min(chunk or most, length)
