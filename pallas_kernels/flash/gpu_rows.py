"""What the backward kernels for Hopper make of the two numbers they keep per row: weights and scores' gradients."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash import rows
from pallas_kernels.flash.gpu_tiles import LOG2E, SLOPES, WEIGHTS, Plan, Tile, exponents, logits

FIRST, SECOND = 0, 1  # rows of `kept_of`


def kept_of(plan: Plan, stat: Array, delta: Array, d_stat: Array) -> Float[Array, "B H 2 T"]:
    """What `weights` and `score_gradients` need of a row: log2 Z or 1/Z, and what its scores' gradients lose.

    All [B, H, T]: the number that was saved, do · o, and the gradient of the number saved.
    """
    score = plan.score
    if score.activation == "exp":
        share = 1.0 / score.row_sum if score.normaliser == "sum" else 1.0
        return jnp.stack([stat * LOG2E - plan.shift, (delta - d_stat) * share], axis=2)
    z = rows.divisor(rows.normaliser(stat, stat, score))
    match score.normaliser:  # dZ / dw
        case "sum":
            slope = jnp.full_like(z, 1.0 / score.row_sum)
        case "sum_plus_one":
            slope = jnp.ones_like(z)
        case "clipped_sum":
            slope = jnp.where(stat < 0, -1.0, 1.0) * (jnp.abs(stat) > 1.0)
        case _:
            slope = jnp.zeros_like(z)
    return jnp.stack([1.0 / z, delta / z * slope - d_stat], axis=2)


def weights(plan: Plan, s: Tile, hide: Any, first: Tile) -> tuple[Tile, Tile]:
    """Normalised weights, and what `score_gradients` needs of them, from products and the first kept number."""
    if plan.score.activation == "exp":
        s, factor = exponents(plan, s, hide)
        p = jnp.exp2(s * factor - first)
        return p, p
    s = logits(plan, s, hide)
    w = WEIGHTS[plan.score.activation](s)
    return (w if plan.plain else w * first), SLOPES[plan.score.activation](s, w)


def score_gradients(plan: Plan, slope: Tile, dp: Tile, first: Tile, second: Tile) -> Tile:
    """From the gradients of the normalised weights; without `scale`."""
    if plan.score.activation == "exp":
        return slope * (dp - second)
    return slope * dp if plan.plain else slope * (dp * first - second)
