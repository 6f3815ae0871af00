"""Softmax attention with learned constant keys and/or values.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), "biases in attention".

    KV bias  softmax over [k*; K] with values [v*; V]
    K bias   softmax over [k*; K] with values [0; V]      (or the fixed value v* = value_scale · e1)
    V bias   softmax over K, then o_i + v*

The slot carries no position encoding and every live query sees it. Per head means per KEY head here, so
that grouped queries share the slot as they share keys; with H = K it is the paper's form.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import softmax
from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score


@dataclasses.dataclass(frozen=True)
class KBiasSpec:
    """shared: one k* for all heads. key_dims: learnable dims of k*, the rest stay 0 (0 = all).

    value_scale: m of the fixed value v* = m·e1 (0 = the zero value of the plain K bias).
    """

    shared: bool = False
    key_dims: int = 0
    value_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.key_dims < 0:
            raise ConfigError(f"k_bias.key_dims is {self.key_dims} but must be 0 (all) or positive.")


@dataclasses.dataclass(frozen=True)
class KVBiasSpec:
    """shared: one k* and one v* for all heads."""

    shared: bool = False


@dataclasses.dataclass(frozen=True)
class VBiasSpec:
    """shared: one v* for all heads."""

    shared: bool = False


STD = 0.02


def k_bias_params(key: Array, spec: KBiasSpec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    dims = spec.key_dims or key_dim
    if dims > key_dim:
        raise ConfigError(f"k_bias.key_dims is {dims} but the key dim is {key_dim}; use at most that.")
    return {"k": STD * jax.random.normal(key, (1 if spec.shared else kv_heads, dims))}


def k_bias_key(spec: KBiasSpec, params: dict, key_dim: int) -> Array:
    k = params["k"]
    return jnp.pad(k, ((0, 0), (0, key_dim - k.shape[-1])))[None]


def k_bias_value(spec: KBiasSpec, params: dict, value_dim: int) -> Array:
    return jnp.zeros((1, 1, value_dim)).at[..., 0].set(spec.value_scale)


def kv_bias_params(key: Array, spec: KVBiasSpec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    k_key, v_key = jax.random.split(key)
    rows = 1 if spec.shared else kv_heads
    return {
        "k": STD * jax.random.normal(k_key, (rows, key_dim)),
        "v": STD * jax.random.normal(v_key, (rows, value_dim)),
    }


def v_bias_params(key: Array, spec: VBiasSpec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    return {"v": STD * jax.random.normal(key, (1 if spec.shared else heads, value_dim))}


def _softmax_rows(s: Array, see: Array, spec: object) -> Array:
    return softmax.row_weights(s, see, softmax.Spec())


def _biased(name: str, title: str, equation: str, spec: type, variants: tuple, **parts):
    return score_family(
        name=name,
        title=title,
        arxiv="2410.10781",
        equation=equation,
        spec=spec,
        row_weights=_softmax_rows,
        score=lambda _: Score("exp", "sum"),
        variants=variants,
        **parts,
    )


K_BIAS = _biased(
    "k_bias",
    "Softmax with a K bias",
    "softmax([k*; K]), values [0; V]",
    KBiasSpec,
    (KBiasSpec(shared=True), KBiasSpec(key_dims=1), KBiasSpec(value_scale=5.0)),
    init_params=k_bias_params,
    slots=(k_bias_key, k_bias_value),
)
KV_BIAS = _biased(
    "kv_bias",
    "Softmax with a KV bias",
    "softmax([k*; K]), values [v*; V]",
    KVBiasSpec,
    (KVBiasSpec(shared=True),),
    init_params=kv_bias_params,
    slots=(lambda spec, params, dim: params["k"][None], lambda spec, params, dim: params["v"][None]),
)
V_BIAS = _biased(
    "v_bias",
    "Softmax with a V bias",
    "softmax(K) V + v*",
    VBiasSpec,
    (VBiasSpec(shared=True),),
    init_params=v_bias_params,
    output_term=lambda spec, params: params["v"],
)
