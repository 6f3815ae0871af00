"""Which member of the score family: an elementwise activation and a row normaliser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError

NORMALISERS = ("none", "sum", "sum_plus_one", "clipped_sum", "p_norm", "count")


def elu_plus_one(s: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """elu(s) + 1: e^s below zero, s + 1 above."""
    return jnp.where(s > 0, s + 1.0, jnp.exp(jnp.minimum(s, 0.0)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "elu1": elu_plus_one,
    "relu": jax.nn.relu,
    "identity": lambda s: s,
}


@dataclasses.dataclass(frozen=True)
class Score:
    """Static description of one member.

    activation: "exp" (computed in the log domain) or a key of `ACTIVATIONS`.
    normaliser: Z_i = 1 | Σw/row_sum + eps | 1 + Σw | max(|Σw|, 1) | (Σ|w|^p)^(1/p) | visible keys.
    logit_bias: constant added to every scaled score.
    """

    activation: str = "exp"
    normaliser: str = "sum"
    p: float = 1.0
    row_sum: float = 1.0
    eps: float = 1e-8
    logit_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.activation != "exp" and self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is not one of exp, {', '.join(ACTIVATIONS)}.")
        if self.normaliser not in NORMALISERS:
            raise ConfigError(f"normaliser {self.normaliser!r} is not one of {', '.join(NORMALISERS)}.")
        if self.activation == "exp" and self.normaliser not in ("sum", "sum_plus_one", "p_norm"):
            raise ConfigError(f"normaliser {self.normaliser!r} lets exp overflow: use sum, sum_plus_one or p_norm.")
        if self.p <= 0:
            raise ConfigError(f"p is {self.p} but a p-norm needs p > 0.")
        if self.row_sum <= 0:
            raise ConfigError(f"row_sum is {self.row_sum} but rows can only sum to a positive value.")

    @property
    def power(self) -> float:
        """The exponent of the weights in the row mass: p where the normaliser reads it."""
        return self.p if self.normaliser == "p_norm" else 1.0
