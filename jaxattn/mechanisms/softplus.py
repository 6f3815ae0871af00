"""Softplus attention with re-weighting (LSSA and LSSAR).

Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
(arXiv 2501.13428).

    s_ij = log(D) · log(N_i) · cos(q_i, k_j)        φ_ij = log(1 + exp(s_ij)), exact 0 where masked
    LSSA   A_ij = φ_ij / Σ_j φ_ij
    LSSAR  A_ij = relu(φ_ij - m_i)^p / Σ_j relu(φ_ij - m_i)^p,  m_i = mean of φ_ij, 0 where N_i <= exempt

N_i is the number of keys the query sees: its position + 1 in a causal document, also under a cache, the
window's size once that is full, all keys without a mask. Logarithms are natural and there is no 1/sqrt(D):
`scale` stands in for log(D). LSSAR is the paper's relu(A·N - 1)^p in collapsed form, and both halves are
divided by (max - m)^p, so that p = 15 cannot overflow. It is trained with, not switched on at inference.

Deviations: a row whose largest φ is its mean (all cosines alike) would be 0/0 and keeps its LSSA weights;
no 1e-8 in the denominators, which would swallow rows of strongly negative scores.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from jaxattn.mechanisms._protocol import Call, Core, Mechanism, RowWeights
from pallas_kernels.softplus import softplus_attention
from pallas_kernels.softplus.reference import dense_rows


@dataclasses.dataclass(frozen=True)
class Spec:
    """reweight: LSSAR, else LSSA. p: its exponent (15 extrapolates best, 3 fits best). exempt: rows without offset."""

    reweight: bool = True
    p: float = 15.0
    exempt: int = 3

    def __post_init__(self) -> None:
        if not (self.p > 0 and math.isfinite(self.p)):
            raise ConfigError(f"softplus.p is {self.p} but must be positive and finite, such as 3 or 15.")
        if self.exempt < 0 or self.exempt != int(self.exempt):
            raise ConfigError(f"softplus.exempt is {self.exempt} but must be a whole number of rows, 0 or more.")


def unit(x: Array) -> Array:
    """x / ||x|| over the last axis in f32 or better; zero vectors stay zero, with gradient zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))  # squares neither over- nor underflow
    x = x / jnp.where(top > 0, top, 1.0)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def options(call: Call, key_dim: int) -> dict[str, Any]:
    """The op's view of a call."""
    return {
        "scale": math.log(key_dim) if call.scale is None else call.scale,
        "p": call.spec.p if call.spec.reweight else None,
        "exempt": int(call.spec.exempt),
        "bias": call.bias,
    }


def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
    return RowWeights(*dense_rows(unit(q), unit(k), vis, **options(call, q.shape[-1])))


def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    return softplus_attention(unit(q), unit(k), v, vis, backend=call.backend, **options(call, q.shape[-1]))


def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    return forward(q, k, v, vis, dataclasses.replace(call, backend="reference"))


def core(call: Call, key_dim: int) -> Core:
    how = options(call, key_dim)

    def attend(q: Array, k: Array, v: Array, vis: Visibility, *, stats: bool = True) -> tuple[Array, None]:
        return softplus_attention(q, k, v, vis, backend=call.backend, **how), None

    return Core(
        queries=unit,
        keys=unit,
        attend=attend,
        join=lambda parts, q, vis: parts[0][0],
        scale=how["scale"],
        bias=call.bias,
    )


def flops(spec: Spec, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
    """Re-weighting needs the scores twice: once for mean and maximum, once for the weights."""
    products = (2 if spec.reweight else 1) * key_dim + value_dim
    return 2.0 * batch * heads * queries * keys * products


def advice(spec: Spec, context: int | None) -> str:
    """The exponent decides between fit and reach."""
    if not spec.reweight or spec.p <= 3:
        return ""
    return f"p={spec.p:g} is for lengths beyond the training context and fits within it worse; p=3 fits best."


MECHANISM = Mechanism(
    name="softplus",
    title="Softplus attention with re-weighting (LSSAR)",
    arxiv="2501.13428",
    equation="relu(φ - mean φ)^p / Σ, φ = softplus(log D · log N · cos)",
    spec=Spec,
    reference=reference,
    forward=forward,
    weights=weights,
    init_params=lambda key, spec, **dims: {},
    flops=flops,
    core=core,
    inseparable="its weights depend on how many keys a query sees and on their mean",
    variants=(Spec(reweight=False), Spec(p=3.0)),
    advice=advice,
)
