"""ReLU attention divided by the number of visible keys.

Active-Dormant Attention Heads (arXiv 2410.13835), the no-sink control of the Bigram-Backcopy task.

    A_ij = relu(s_ij) / n_i,   n_i = number of keys visible to query i (the row number when causal)

No normaliser couples the keys. Row 1 divides by 1, so its self weight is unbounded.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._score_family import divide_rows, score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """No options."""


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    count = jnp.sum(see, axis=-1, keepdims=True).astype(jnp.float32)
    return divide_rows(jnp.where(see, jnp.maximum(s, 0.0), 0.0), count)


MECHANISM = score_family(
    name="relu",
    title="ReLU attention",
    arxiv="2410.13835",
    equation="relu(s) / n",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("relu", "count"),
)
