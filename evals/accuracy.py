"""Accuracy on the scored positions of a batch, with logits only there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import variables_of
from jaxattn.reader import hidden_in_one_pass, hidden_in_pieces, reads_state, scores

Batch = dict[str, np.ndarray]


def scored_places(mask: np.ndarray) -> np.ndarray:
    """[b, T] bool -> [b, M] int32: the scored positions of each row in order, -1 behind the last."""
    most = int(mask.sum(1).max(initial=0))
    order = np.argsort(~mask, axis=1, kind="stable")[:, :most]
    return np.where(np.take_along_axis(mask, order, 1), order, -1).astype(np.int32)


def make_hits(model: ModelConfig, piece: int | None = None) -> Callable[[Any, Batch], np.ndarray]:
    """Build ``hits(params, batch) -> [b, M] float``: 1 right, 0 wrong, NaN behind a row's last scored position.

    piece: read that many tokens at a time through the decode state, as in generation, 0 as many as the layers allow;
    None is one forward pass, unless some layer has to be read through its state. `hits` raises `ConfigError` for a
    piece that a layer cannot read, and for rows of several documents or with a prefix that are read so.
    """
    piece = 0 if piece is None and reads_state(model) else piece

    def hits(params: Any, batch: Batch) -> np.ndarray:
        places = scored_places(batch["loss_mask"])
        at, variables = np.maximum(places, 0), variables_of(params)
        if piece is None:
            inputs = (batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("prefix_len"))
            hidden = hidden_in_one_pass(model, variables, *inputs)
        else:
            hidden = hidden_in_pieces(model, variables, batch["tokens"], _one_document(batch), piece=piece)
        targets = np.take_along_axis(batch["targets"], at, 1)
        _, best = scores(model, variables, jnp.take_along_axis(hidden, at[..., None], axis=1), targets)
        return np.where(places >= 0, (np.asarray(best) == targets).astype(np.float64), np.nan)

    return hits


def _one_document(batch: Batch) -> np.ndarray:
    """Tokens of every row [b], if it is one document from its start on."""
    segments = batch["segment_ids"]
    lengths = (segments == segments[:, :1]).sum(1)
    alone = (segments[:, :1] > 0).all() and not segments[np.arange(segments.shape[1]) >= lengths[:, None]].any()
    if not alone or batch.get("prefix_len") is not None:
        raise ConfigError(
            "rows that are read through the decode state have to be one document each, without a prefix: set "
            "data.prefix_len to 0, and give sequences of one document."
        )
    return lengths


def accuracy(hits: Callable[[Any, Batch], np.ndarray], params: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """accuracy: share of right tokens; exact: share of sequences with every token right."""
    found = [hits(params, batch) for batch in batches]
    tokens = np.concatenate([h[np.isfinite(h)] for h in found])
    rows = np.concatenate([np.nanmin(h, axis=1, initial=1.0) for h in found])
    return {"accuracy": float(tokens.mean()), "exact": float(rows.mean())}
