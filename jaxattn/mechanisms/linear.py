"""Causal linear attention.

Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (arXiv 2006.16236, Eq. 7-12, 16-20).

    o_i = φ(q_i) Σ_{j<=i} φ(k_j)ᵀ v_j / (φ(q_i)·Σ_{j<=i} φ(k_j) + 1e-6),   φ(x) = elu(x) + 1

The 1e-6 is the released code's. No 1/sqrt(D): `scale` defaults to 1 (with the normaliser it all but cancels).
The equation is that of `kernel_elu`; this file runs it as a recurrence, in time linear in T.
"""

from __future__ import annotations

import dataclasses

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._linear_family import FEATURES, elementwise, recurrent_family

EPS = 1e-6
NOT_NEGATIVE = ("elu1", "relu")


@dataclasses.dataclass(frozen=True)
class Spec:
    """feature: φ, "elu1", "relu", "silu" or "identity". normalise: divide by the row sum (elu1 and relu only)."""

    feature: str = "elu1"
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            raise ConfigError(f"linear.feature is {self.feature!r} but must be one of {', '.join(FEATURES)}.")
        if self.normalise and self.feature not in NOT_NEGATIVE:
            raise ConfigError(
                f"linear.feature is {self.feature!r} with normalise=True, whose row sums can be zero or negative: "
                f"set normalise=False or choose {' or '.join(NOT_NEGATIVE)}."
            )


MECHANISM = recurrent_family(
    name="linear",
    title="Linear attention",
    arxiv="2006.16236",
    equation="φ(q)·φ(k) / Σ",
    spec=Spec,
    features=elementwise(lambda x, spec: FEATURES[spec.feature](x)),
    normaliser_eps=lambda spec: EPS if spec.normalise else None,
    variants=(
        Spec(normalise=False),
        Spec(feature="relu"),
        Spec(feature="silu", normalise=False),
        Spec(feature="identity", normalise=False),
    ),
)
