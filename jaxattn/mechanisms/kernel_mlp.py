"""Kernelised attention with a learned feature map.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "kernel mlp" rows.

    A_ij = φ(q_i)·φ(k_j)/sqrt(D)  / max(|Σ_j A_ij|, 1),   φ(x) = W2 relu(W1 x)

W1 and W2 are D×D without bias; one pair per layer, shared by q, k and all heads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._score_family import score_family
from jaxattn.mechanisms.kernel_linear import clipped_rows
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """normalise: divide by max(|row sum|, 1)."""

    normalise: bool = True


def init_params(key: Array, spec: Spec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    """w1, w2 [D, D], N(0, 2/(5D)) like the study's other linear maps."""
    std = (2 / (5 * key_dim)) ** 0.5
    k1, k2 = jax.random.split(key)
    shape = (key_dim, key_dim)
    return {"w1": std * jax.random.normal(k1, shape), "w2": std * jax.random.normal(k2, shape)}


def feature_map(q: Array, k: Array, spec: Spec, params: dict) -> tuple[Array, Array]:
    phi = lambda x: jnp.maximum(x @ params["w1"].astype(x.dtype), 0) @ params["w2"].astype(x.dtype)
    return phi(q), phi(k)


MECHANISM = score_family(
    name="kernel_mlp",
    title="Kernel attention, MLP features",
    arxiv="2410.10781",
    equation="φ(q)·φ(k) / max(|Σ|, 1)",
    spec=Spec,
    row_weights=lambda s, see, spec: clipped_rows(s, see, spec.normalise),
    score=lambda spec: Score("identity", "clipped_sum" if spec.normalise else "none"),
    feature_map=feature_map,
    init_params=init_params,
    variants=(Spec(normalise=False),),
)
