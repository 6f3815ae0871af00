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
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.bias import joined
from jaxattn.rope import PositionBias

TABLE = "zero_tuning"


@dataclasses.dataclass(frozen=True)
class Spec:
    """gamma: γ. first, last: of the layers it acts in, 0-based; last -1 is the model's last."""

    gamma: float = 2.0
    first: int = 0
    last: int = -1

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ConfigError(f"zero_tuning.gamma is {self.gamma} but must be positive and finite, such as 2.0 or 0.5.")
        if self.first < 0 or self.last < -1 or (self.last != -1 and self.last < self.first):
            raise ConfigError(
                f"zero_tuning.first {self.first} and last {self.last} must be layers in order, counted from 0; last=-1 "
                "is the model's last."
            )


def unfit(spec: Spec, site: Site) -> str:
    last = site.num_layers - 1
    if max(spec.first, spec.last) > last:
        return f"it has layers 0 to {last}, so first={spec.first} and last={spec.last} must be among them."
    return ""


def _log_gamma(spec: Spec, site: Site, heads: dict[str, Array]) -> Array | None:
    """log γ [1 or H]; None where nothing changes."""
    table, last = heads.get(TABLE), site.num_layers - 1 if spec.last == -1 else spec.last
    if not spec.first <= site.layer <= last or (table is None and spec.gamma == 1.0):
        return None
    return jnp.full(1, math.log(spec.gamma)) if table is None else jnp.log(table)


def wrap(core: Core, here: Any, *, spec: Spec, site: Site) -> Core:
    log_gamma = _log_gamma(spec, site, here.heads)
    if log_gamma is None:
        return core
    if core.activation not in ("exp", "sigmoid"):
        raise ConfigError(
            f"policy zero_tuning multiplies weights through the logarithm of their scores, which {site.mechanism} "
            "does not take; use a softmax or sigmoid model."
        )

    def make(attend: Callable[..., Any], some: tuple[int, ...] | None) -> Callable[..., Any]:
        own_gamma = log_gamma if some is None or len(log_gamma) == 1 else log_gamma[jnp.asarray(some)]

        def tuned(
            q: Array,
            k: Array,
            v: Array,
            vis: Visibility,
            *,
            key_bias: Array | None = None,
            places: Array | None = None,
            folded: bool = False,
            **how: Any,
        ) -> tuple[Array, Array | None]:
            own_places = jnp.where(vis.k_segments != PADDING, vis.k_positions, -1)[:, None]
            first = (own_places if places is None else places) == 0  # [B, 1 or K or H, S]
            gamma = jnp.tile(own_gamma, q.shape[0] // len(own_gamma))[:, None, None] if folded else own_gamma[:, None]
            own = joined(jnp.where(first, 1.0, 0.0), gamma, jnp.multiply, heads=q.shape[2])
            key_bias = own if key_bias is None else joined(key_bias, own, jnp.add, heads=q.shape[2])
            return attend(q, k, v, vis, key_bias=key_bias, places=places, folded=folded, **how)

        return tuned

    return core.around(make)


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
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, gamma=1.0),
    variants=(Spec(gamma=4.0), Spec(gamma=0.5, first=1, last=2)),
)
