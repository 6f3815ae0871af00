"""Softmax attention, with the row normalisers of the sink-emergence study.

Attention Is All You Need (arXiv 1706.03762, Eq. 1); scaled rows and p-norms: When Attention Sink
Emerges in Language Models (arXiv 2410.10781, section on normalisation).

    A_ij = exp(s_ij) / Z_i,   Z_i = (Σ_j exp(s_ij)^p)^(1/p) / row_sum      p = row_sum = 1: softmax

`row_sum` = a makes rows sum to a, which equals scaling W_O by a. p-norms other than p = 1 and rows
that do not sum to one are ablations: at 60M parameters p >= 2 diverges.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """row_sum: what each row sums to (p = 1). p: exponent of the row norm."""

    row_sum: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        if self.p != 1.0 and self.row_sum != 1.0:
            raise ConfigError(f"softmax.row_sum is {self.row_sum} with p {self.p}: set one of them only.")


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    """exp(s) over its p-norm, in the log domain."""
    s = jnp.where(see, s, -jnp.inf)
    top = jnp.max(s, axis=-1, keepdims=True, initial=-1e30)
    s = s - jax.lax.stop_gradient(top)  # differences first: exact where exp and log would round
    log_z = jax.nn.logsumexp(spec.p * s, axis=-1, keepdims=True) / spec.p
    return spec.row_sum * jnp.where(see, jnp.exp(s - jnp.where(jnp.isfinite(log_z), log_z, 0.0)), 0.0)


def score(spec: Spec) -> Score:
    if spec.p == 1.0:
        return Score("exp", "sum", row_sum=spec.row_sum)
    return Score("exp", "p_norm", p=spec.p)


MECHANISM = score_family(
    name="softmax",
    title="Softmax attention",
    arxiv="1706.03762",
    equation="exp(s) / Σ exp(s)",
    spec=Spec,
    row_weights=row_weights,
    score=score,
    variants=(Spec(row_sum=0.2), Spec(p=0.5), Spec(p=2.0)),
)
