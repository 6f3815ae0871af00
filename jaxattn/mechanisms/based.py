"""BASED's linear attention: the second-order Taylor polynomial of exp(q·k/sqrt(D)) as an exact feature map.

Simple linear attention language models balance the recall-throughput tradeoff (arXiv 2402.18668, section 4).

    s_ij = q_i·k_j / sqrt(D)      w_ij = 1 + s_ij + s_ij²/2      o_i = Σ_{j<=i} w_ij v_j / (Σ_{j<=i} w_ij + 1e-12)
    φ(x) = [1, x / D^(1/4), vec(x xᵀ) / (√2 √D)],  φ(q)·φ(k) = w,  1 + D + D² numbers: 273 at D = 16

w = ((s+1)² + 1)/2 >= 1/2 is a weight of any sign of s, but rises again below s = -1. The layer gives it heads
of D = `feature_dim` numbers, whatever the width of the model's other heads, and no position encoding: order
comes from the window and convolution layers around it (`jaxattn.models.based`).

The default features hold each product x_i x_j once, doubled: [1, x / D^(1/4), x_i² / √(2√D √D), x_i x_j / √D
for i < j], 1 + D + D(D+1)/2 = 153 numbers with the same inner product and 0.56 of the state. The forward pass
builds features for `PIECE` tokens at a time; those of the whole sequence never exist, in the backward pass
neither. On a TPU the kernel forms them on chip, chunk by chunk. The state is [H, D', V] and the running sum of
φ(k) as one more column.

Deviations by choice:
- An explicit `scale` replaces 1/sqrt(D) in s.
- Left out: the decay of the authors' later notes, which fades the numerator alone; their released mixer has none.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._linear_family import recurrent_family
from jaxattn.mechanisms._protocol import Call
from pallas_kernels.linear_scan.features import MAPS, feature_width, taylor

PIECE = 256  # tokens whose features exist at one time


@dataclasses.dataclass(frozen=True)
class Spec:
    """feature_dim: D of q and k. map: "symmetric" or "full" features (same function). eps: added to the row sum."""

    feature_dim: int = 16
    map: str = "symmetric"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.feature_dim < 1 or self.feature_dim != int(self.feature_dim):
            raise ConfigError(f"based.feature_dim is {self.feature_dim} but must be a whole number of at least 1.")
        if self.map not in MAPS:
            raise ConfigError(f"based.map is {self.map!r} but must be one of {', '.join(MAPS)}.")
        if not 0 < self.eps < 0.5:
            raise ConfigError(f"based.eps is {self.eps} but must lie between 0 and 0.5, such as 1e-12.")


def scaled(q: Array, k: Array, spec: Spec, scale: float | None) -> tuple[Array, Array, str]:
    """What the features are of. Keys always take D^(-1/4), so that a state means the same under every `scale`."""
    root = q.shape[-1] ** 0.25
    scale = root**-2 if scale is None else scale
    return q * (scale * root), k / root, spec.map


def features(q: Array, k: Array, q_positions: Array, k_positions: Array, call: Call) -> tuple[Array, Array]:
    """φ(q) and φ(k)."""
    q, k, map = scaled(q, k, call.spec, call.scale)
    return taylor(q, map), taylor(k, map)


def kernel(q: Array, k: Array, spec: Spec, scale: float | None) -> tuple[Array, Array]:
    """w and s of all pairs, without features."""
    s = jnp.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return 1 + s + s * s / 2, s


MECHANISM = dataclasses.replace(
    recurrent_family(
        name="based",
        title="BASED (second-order Taylor linear attention)",
        arxiv="2402.18668",
        equation="(1 + s + s²/2) / Σ",
        spec=Spec,
        features=features,
        width=lambda spec, key_dim, depth: feature_width(key_dim, spec.map),
        kernel=kernel,
        polynomial=scaled,
        normaliser_eps=lambda spec: spec.eps,
        piece=PIECE,
        variants=(Spec(map="full"),),
    ),
    key_dim=lambda spec, dim: int(spec.feature_dim),
    rotary="none",
)
