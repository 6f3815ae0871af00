"""ZeroTuning: the attention to the first token times γ, in every row, and the rows normalised again.

ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training (arXiv 2505.11739).

    a'_0 = γ a_0 / (1 + (γ - 1) a_0),  a'_i = a_i / (1 + (γ - 1) a_0)     for softmax rows: log γ added to score 0

γ > 1 flattens what the other tokens get relative to each other's values, γ < 1 sharpens it; their ratios stay. The
first token is the first that is no padding, in every document. It acts in the forward pass too, not on k* and other
constant slots. γ may differ by head: the head table `zero_tuning` [L, H] takes the place of `gamma`.

Deviations: where weights are sigmoids, log γ is added to the score just the same, which multiplies small weights by γ;
γ = 0, which would leave the first row without a key, is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.bias import check_factor, log_factor, scaled, unfit_layers
from jaxattn.rope import PositionBias

TABLE = "zero_tuning"


@dataclasses.dataclass(frozen=True)
class Spec:
    """gamma: γ. first, last: of the layers it acts in, 0-based; last -1 is the model's last."""

    gamma: float = 2.0
    first: int = 0
    last: int = -1

    def __post_init__(self) -> None:
        check_factor("zero_tuning.gamma", self.gamma, self.first, self.last)


def _log_gamma(spec: Spec, site: Site, heads: dict[str, Array]) -> Array | None:
    """log γ [1 or H]; None where nothing changes."""
    return log_factor(spec, site, spec.gamma, heads.get(TABLE))


def wrap(core: Core, here: Any, *, spec: Spec, site: Site) -> Core:
    log_gamma = _log_gamma(spec, site, here.heads)
    if log_gamma is None:
        return core
    return scaled(core, "zero_tuning", site, log_gamma, lambda places: jnp.where(places == 0, 1.0, 0.0))


def score_bias(spec: Spec, site: Site, heads: dict[str, Array]) -> PositionBias | None:
    log_gamma = _log_gamma(spec, site, heads)
    if log_gamma is None:
        return None
    return lambda q, k: jnp.where(k[:, None, None, :] == 0, log_gamma[:, None, None], 0.0)


POLICY = Policy(
    name="zero_tuning",
    title="ZeroTuning",
    arxiv="2505.11739",
    keeps="what the policy behind it keeps",
    reads="the first token's weight times gamma",
    spec=Spec,
    wrap=wrap,
    score_bias=score_bias,
    windows=True,
    biased=True,
    depth=lambda spec: spec.first > 0 or spec.last != -1,
    tables=(TABLE,),
    unfit=unfit_layers,
    unlimited=lambda spec, length: dataclasses.replace(spec, gamma=1.0),
    variants=(Spec(gamma=4.0), Spec(gamma=0.5, first=1, last=2)),
)
