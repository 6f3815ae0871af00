"""ELU+1 attention on scores.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "elu" rows of the operation table.

    A_ij = elu(s_ij) + 1        optionally / (Σ_j A_ij + 1e-8)

Unnormalised by default: at 60M parameters the normalised form diverges in the paper.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """normalise: divide by the row sum."""

    normalise: bool = False


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    w = jnp.where(see, jax.nn.elu(s) + 1.0, 0.0)
    return w / (jnp.sum(w, axis=-1, keepdims=True) + 1e-8) if spec.normalise else w


MECHANISM = score_family(
    name="elu",
    title="ELU+1 attention",
    arxiv="2410.10781",
    equation="elu(s) + 1",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("elu1", "sum" if spec.normalise else "none"),
    variants=(Spec(normalise=True),),
)
