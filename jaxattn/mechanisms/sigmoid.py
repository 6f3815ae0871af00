"""Sigmoid attention.

Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431, Eq. 3) and the
sink study's variants (arXiv 2410.10781).

    A_ij = sigmoid(s_ij + b)        optionally / (Σ_j A_ij + 1e-8) or / p-norm

Deviation by choice: the default is the sink study's form WITHOUT the -log n bias, so every weight
starts near 1/2. `train_len` = n turns on b = -log n of the sigmoid paper; n is the training context
and stays fixed at inference, however long the cache grows.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._score_family import divide_rows, score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class Spec:
    """train_len: n of b = -log n, 0 = no bias. normalise: rows sum to one. p: p-norm rows (0 = off)."""

    train_len: int = 0
    normalise: bool = False
    p: float = 0.0

    def __post_init__(self) -> None:
        if self.train_len < 0:
            raise ConfigError(f"sigmoid.train_len is {self.train_len} but must be 0 (no bias) or positive.")
        if self.p and self.normalise:
            raise ConfigError(f"sigmoid.p is {self.p} with normalise=True: set one of them only.")
        if self.p < 0:
            raise ConfigError(f"sigmoid.p is {self.p} but must be 0 (off) or positive.")


def bias_of(spec: Spec) -> float:
    """-log n, or 0."""
    return -math.log(spec.train_len) if spec.train_len else 0.0


def row_weights(s: Array, see: Array, spec: Spec) -> Array:
    w = jnp.where(see, jax.nn.sigmoid(s + bias_of(spec)), 0.0)
    if spec.normalise:
        return w / (jnp.sum(w, axis=-1, keepdims=True) + 1e-8)
    if spec.p:
        power = jnp.where(see, jnp.where(see, w, 1.0) ** spec.p, 0.0)
        mass = jnp.sum(power, axis=-1, keepdims=True)
        return divide_rows(w, jnp.where(mass > 0, jnp.where(mass > 0, mass, 1.0) ** (1 / spec.p), 0.0))
    return w


def score(spec: Spec) -> Score:
    normaliser = "sum" if spec.normalise else "p_norm" if spec.p else "none"
    return Score("sigmoid", normaliser, p=spec.p or 1.0, logit_bias=bias_of(spec))


def advice(spec: Spec, context: int | None) -> str:
    """The bias decides: without it a row starts as the sum, not the mean, of half of everything."""
    if spec.normalise or spec.p:
        return ""
    if not spec.train_len:
        return (
            "without train_len weights start near 1/2, so that a row sums to half its length; train_len=context starts "
            "rows at a sum near 1, as the paper trains them."
        )
    if context is not None and spec.train_len != context:
        return f"train_len={spec.train_len} is not the training context of {context} tokens; train_len=context is."
    return ""


MECHANISM = dataclasses.replace(
    score_family(
        name="sigmoid",
        title="Sigmoid attention",
        arxiv="2409.04431",
        equation="sigmoid(s + b)",
        spec=Spec,
        row_weights=row_weights,
        score=score,
        variants=(Spec(train_len=256), Spec(normalise=True), Spec(p=2.0)),
    ),
    advice=advice,
)
