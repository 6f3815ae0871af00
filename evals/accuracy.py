"""Accuracy on the scored positions of a batch, with logits only there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, logits_in_chunks

Batch = dict[str, np.ndarray]


def scored_places(mask: np.ndarray) -> np.ndarray:
    """[b, T] bool -> [b, M] int32: the scored positions of each row in order, -1 behind the last."""
    most = int(mask.sum(1).max(initial=0))
    order = np.argsort(~mask, axis=1, kind="stable")[:, :most]
    return np.where(np.take_along_axis(mask, order, 1), order, -1).astype(np.int32)


def make_hits(model: ModelConfig, chunk: int | None = None) -> Callable[[Any, Batch], np.ndarray]:
    """Build ``hits(params, batch) -> [b, M] float``: 1 right, 0 wrong, NaN behind a row's last scored position.

    chunk: read that many tokens at a time through the decode state, as in generation, 0 as many as the attention
    allows; None is one forward pass. `hits` raises `ConfigError` for a chunk that the attention does not allow.
    """
    predicted = _in_one_pass(model) if chunk is None else _in_chunks(model, chunk)

    def hits(params: Any, batch: Batch) -> np.ndarray:
        places = scored_places(batch["loss_mask"])
        at = np.maximum(places, 0)
        right = predicted(params, batch, at) == np.take_along_axis(batch["targets"], at, 1)
        return np.where(places >= 0, right.astype(np.float64), np.nan)

    return hits


def _in_one_pass(model: ModelConfig) -> Callable[[Any, Batch, np.ndarray], np.ndarray]:
    @jax.jit
    def run(params: Any, tokens: Any, positions: Any, segments: Any, prefix: Any, at: Any) -> Any:
        def pick(decoder: Decoder) -> Any:
            hidden = decoder.hidden(tokens, positions, segments, prefix)
            return decoder.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))

        logits: Any = Decoder(model).apply({"params": params}, method=pick)
        return jnp.argmax(logits, axis=-1)

    def predicted(params: Any, batch: Batch, at: np.ndarray) -> np.ndarray:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("prefix_len"))
        return np.asarray(run(params, *inputs, at))

    return predicted


def _in_chunks(model: ModelConfig, chunk: int) -> Callable[[Any, Batch, np.ndarray], np.ndarray]:
    def predicted(params: Any, batch: Batch, at: np.ndarray) -> np.ndarray:
        logits, _ = logits_in_chunks(model, params, jnp.asarray(batch["tokens"]), chunk=chunk)
        if not jnp.all(jnp.isfinite(logits)):
            raise ConfigError(
                f"{', '.join(model.mixers)} gives no numbers for {batch['tokens'].shape[1]} tokens in chunks of "
                f"{chunk or 'automatic size'}: use smaller chunks."
            )
        return np.take_along_axis(np.asarray(jnp.argmax(logits, axis=-1)), at, axis=1)

    return predicted


def accuracy(hits: Callable[[Any, Batch], np.ndarray], params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """accuracy: share of right tokens; exact: share of sequences with every token right."""
    found = [hits(params, batch) for batch in batches]
    tokens = np.concatenate([h[np.isfinite(h)] for h in found])
    rows = np.concatenate([np.nanmin(h, axis=1, initial=1.0) for h in found])
    return {"accuracy": float(tokens.mean()), "exact": float(rows.mean())}
