"""Lightning attention: linear attention that forgets geometrically, at another rate in every head and layer.

Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (arXiv 2405.17381, Alg. 3-6).

    o_t = Σ_{j<=t} exp(-s_h)^(t-j) (φ(q_t)·φ(k_j)) v_j,   φ = silu

No 1/sqrt(D) unless `scale` is passed and no denominator: |o| grows with T, so the caller normalises it.

Three incompatible slopes s_h go by this name. With head h of H and layer l of L, both from 0:
- "official", the released code: ALiBi's 2^(-8(h+1)/H), interleaved where H is no power of two, times
  1 - l/(L-1) + 1e-5;
- "paper", Eq. 10: (8h/H)(1 - l/L), so that head 0 never forgets;
- "minimax", MiniMax-Text-01 in transformers: 2^(-8(h+1)/H) for every H, times 1 - l/(L-1+1e-5) + 1e-5.
The default is "official" because weights trained with the released code need it. Slopes are fixed, not learned.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._linear_family import FEATURES, Depth, elementwise, recurrent_family
from jaxattn.rope import alibi_slopes

CONVENTIONS = ("official", "paper", "minimax")
FEATURE_NAMES = ("silu", "identity")


@dataclasses.dataclass(frozen=True)
class Spec:
    """slopes: "official", "paper" or "minimax" (module docstring). feature: φ, "silu" or "identity"."""

    slopes: str = "official"
    feature: str = "silu"

    def __post_init__(self) -> None:
        if self.slopes not in CONVENTIONS:
            raise ConfigError(f"lightning.slopes is {self.slopes!r} but must be one of {', '.join(CONVENTIONS)}.")
        if self.feature not in FEATURE_NAMES:
            raise ConfigError(f"lightning.feature is {self.feature!r} but must be one of {', '.join(FEATURE_NAMES)}.")


def head_slopes(spec: Spec, heads: int, depth: Depth) -> Float[Array, "H"]:
    """s_h >= 0 of one layer; log λ = -s_h."""
    layer, count = depth
    if spec.slopes == "paper":
        return 8.0 * jnp.arange(heads, dtype=jnp.float32) / heads * (1.0 - layer / count)
    if spec.slopes == "minimax":
        slopes = 2.0 ** (-8.0 * (jnp.arange(heads, dtype=jnp.float32) + 1) / heads)
        return slopes * (1.0 - layer / (count - 1 + 1e-5) + 1e-5)
    return alibi_slopes(heads) * (1.0 - layer / max(count - 1, 1) + 1e-5)  # the code has no model of one layer


MECHANISM = recurrent_family(
    name="lightning",
    title="Lightning attention",
    arxiv="2405.17381",
    equation="λ^(i-j) φ(q)·φ(k)",
    spec=Spec,
    features=elementwise(lambda x, spec: FEATURES[spec.feature](x)),
    log_decay=lambda spec, heads, depth: -head_slopes(spec, heads, depth),
    depth=True,
    variants=(Spec(slopes="paper"), Spec(slopes="minimax", feature="identity")),
)
