"""Kernelised attention with the identity feature map.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "kernel linear" rows.

    A_ij = s_ij        optionally / max(|Σ_j s_ij|, 1)

Unnormalised by default (then it is `identity`): the normalised run diverges in the paper.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """normalise: divide by max(|row sum|, 1)."""

    normalise: bool = False


def clipped_rows(s: Array, see: Array, normalise: bool) -> Array:
    """s on visible keys, over max(|row sum|, 1) if asked."""
    w = jnp.where(see, s, 0.0)
    return w / jnp.maximum(jnp.abs(jnp.sum(w, axis=-1, keepdims=True)), 1.0) if normalise else w


MECHANISM = score_family(
    name="kernel_linear",
    title="Kernel attention, linear features",
    arxiv="2410.10781",
    equation="s / max(|Σ s|, 1)",
    spec=Spec,
    row_weights=lambda s, see, spec: clipped_rows(s, see, spec.normalise),
    score=lambda spec: Score("identity", "clipped_sum" if spec.normalise else "none"),
    variants=(Spec(normalise=True),),
)
