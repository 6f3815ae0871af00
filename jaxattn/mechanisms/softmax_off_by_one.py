"""Softmax with one added to the denominator ("softmax1", zero sink).

Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453, section 3.3, "Zero Sink").

    A_ij = exp(s_ij) / (1 + Σ_j exp(s_ij))

The same as a K bias with k* = 0 and v* = 0: the missing row mass sits on a slot without a value. The
weights returned for analysis therefore have that slot as their first column.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.masks import Visibility, live_rows, visible
from jaxattn.mechanisms import softmax
from jaxattn.mechanisms._protocol import Call, RowWeights
from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """No options."""


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    """exp(s) / (1 + Σ exp(s)), shifted by the larger of the row maximum and 0."""
    top = jnp.maximum(jnp.max(jnp.where(see, s, -jnp.inf), axis=-1, keepdims=True), 0.0)
    w = jnp.where(see, jnp.exp(jnp.where(see, s, 0.0) - top), 0.0)
    return w / (jnp.exp(-top) + jnp.sum(w, axis=-1, keepdims=True))


_BASE = score_family(
    name="softmax_off_by_one",
    title="Softmax-off-by-one (zero sink)",
    arxiv="2309.17453",
    equation="exp(s) / (1 + Σ exp(s))",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("exp", "sum_plus_one"),
)


def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
    """Rows with the hidden slot in column 0: a softmax over the scores and its logit 0; padding gives it nothing."""
    base = _BASE.weights(q, k, vis, call)
    scores = jnp.pad(base.scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    see = jnp.concatenate([live_rows(vis)[:, :, None], visible(vis)], axis=-1)
    return RowWeights(softmax.row_weights(scores, see[:, None], softmax.Spec()), scores, slots=1)


def columns(v: Array, call: Call) -> Array:
    """The slot's value is zero."""
    return jnp.pad(v, ((0, 0), (1, 0), (0, 0), (0, 0)))


MECHANISM = dataclasses.replace(_BASE, weights=weights, columns=columns, slots="constant")
