"""Kernelised attention with the feature map elu(x) + 1 on queries and keys.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "kernel elu" rows; the feature map is
that of Transformers are RNNs (arXiv 2006.16236, Eq. 7).

    A_ij = φ(q_i)·φ(k_j)/sqrt(D)  / (Σ_j A_ij + 1e-8),   φ(x) = elu(x) + 1

Normalised by default: without the normaliser the paper's run diverges.
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

    normalise: bool = True


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    w = jnp.where(see, s, 0.0)
    return w / (jnp.sum(w, axis=-1, keepdims=True) + 1e-8) if spec.normalise else w


def feature_map(q: Array, k: Array, spec: Spec, params: dict) -> tuple[Array, Array]:
    return jax.nn.elu(q) + 1, jax.nn.elu(k) + 1


MECHANISM = score_family(
    name="kernel_elu",
    title="Kernel attention, ELU+1 features",
    arxiv="2410.10781",
    equation="φ(q)·φ(k) / Σ",
    spec=Spec,
    row_weights=row_weights,
    score=lambda spec: Score("identity", "sum" if spec.normalise else "none"),
    feature_map=feature_map,
    variants=(Spec(normalise=False),),
)
