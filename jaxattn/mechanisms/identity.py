"""Attention with the scores themselves as weights.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "identity".

    A_ij = s_ij

Weights are signed and unbounded; no normaliser.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """No options."""


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    return jnp.where(see, s, 0.0)


MECHANISM = score_family(
    name="identity",
    title="Identity attention",
    arxiv="2410.10781",
    equation="s",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("identity", "none"),
)
