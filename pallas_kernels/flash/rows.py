"""The formulas of one tile of scores, for every backend that walks over tiles.

Statistics of a row (maximum, mass, what is saved for the backward pass) come in a shape that broadcasts
against the tile, whichever of its axes the keys are on.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import ACTIVATIONS, Score

FLOOR = -1e29  # where running maxima start: far above NEVER, far below any score


def floor(score: Score) -> float:
    """Where the running maximum of the exponents starts; sum_plus_one has a hidden logit 0."""
    return 0.0 if score.normaliser == "sum_plus_one" else FLOOR


def exp_terms(w: Array, s: Array, top: Array, score: Score) -> Array:
    """What each key adds to the mass of an exp row, relative to the maximum `top`."""
    return w if score.power == 1.0 else jnp.exp(score.power * (s - top))


def terms(w: Array, see: Array, score: Score) -> Array:
    """What each key adds to the running statistic of an elementwise activation."""
    match score.normaliser:
        case "count":
            return see.astype(jnp.float32)
        case "p_norm":
            return jnp.where(see, jnp.abs(jnp.where(see, w, 1.0)) ** score.p, 0.0)
        case _:
            return w


def normaliser(mass: Float[Array, "*r"], top: Float[Array, "*r"], score: Score) -> Float[Array, "*r"]:
    """Z from the running statistic; for exp relative to the running maximum. Rows without mass give 0."""
    match score.normaliser:
        case "none":
            return jnp.ones_like(mass)
        case "sum":
            return mass / score.row_sum + (0.0 if score.activation == "exp" else score.eps)
        case "sum_plus_one":
            return mass + (jnp.exp(-top) if score.activation == "exp" else 1.0)
        case "clipped_sum":
            return jnp.maximum(jnp.abs(mass), 1.0)
        case "p_norm":
            return jnp.where(mass > 0, jnp.where(mass > 0, mass, 1.0) ** (1.0 / score.p), 0.0)
        case _:
            return mass


def divisor(z: Float[Array, "*r"]) -> Float[Array, "*r"]:
    """Z, or 1 for rows that see nothing: their weights are zero already."""
    return jnp.where(z == 0, 1.0, z)


def saved(mass: Float[Array, "*r"], top: Float[Array, "*r"], score: Score) -> Float[Array, "*r"]:
    """The one number per row the backward pass needs.

    exp: log Z over the true scale, so that weights are exp(s - saved); others: the running statistic.
    """
    return top + jnp.log(divisor(normaliser(mass, top, score))) if score.activation == "exp" else mass


def reported(stat: Float[Array, "*r"], score: Score) -> Float[Array, "*r"]:
    """`saved` as callers get it: the log of an exp row's normaliser is NEVER where the row sees nothing."""
    return jnp.where(stat <= FLOOR, NEVER, stat) if score.activation == "exp" else stat


def gradients(
    s: Array,
    see: Array,
    stat: Array,
    delta: Array,
    dp: Array,
    score: Score,
    once: Callable[[Array], Array] = lambda x: x,
    d_stat: Array | None = None,
) -> tuple[Array, Array]:
    """Normalised weights and the gradient of the scores of one tile.

    Args:
      s: scores, masked to NEVER for exp.
      see: who sees whom.
      stat: `saved` of the rows.
      delta: do · o of the rows, the part of the gradient that flows through Z; for exp minus the gradient of
        `saved`, which has the same derivative.
      dp: gradient of the normalised weights, do · v.
      once: marks what should be computed once.
      d_stat: gradient of `saved` of the rows, for elementwise activations.
    """
    if score.activation == "exp":
        p = once(jnp.exp(s - stat))
        return p, p * dp - delta * _exp_share(p, s, stat, score)
    z = divisor(normaliser(stat, stat, score))
    w, slope = jax.vjp(ACTIVATIONS[score.activation], s)
    w = jnp.where(see, w, 0.0)
    dw = dp / z - (delta / z) * _mass_slope(w, see, stat, z, score)
    if d_stat is not None:
        dw = dw + d_stat * _term_slope(w, see, score)
    return w / z, slope(jnp.where(see, dw, 0.0))[0]


def _exp_share(p: Array, s: Array, stat: Array, score: Score) -> Array:
    """d log Z / ds: p over its row sum, or p^p for the p-norm."""
    if score.power != 1.0:
        return jnp.exp(score.power * (s - stat))
    return p / score.row_sum if score.normaliser == "sum" else p


def _mass_slope(w: Array, see: Array, mass: Array, z: Array, score: Score) -> Array:
    """dZ / dw for the normalisers of elementwise activations."""
    match score.normaliser:
        case "sum":
            return jnp.full_like(w, 1.0 / score.row_sum)
        case "sum_plus_one":
            return jnp.ones_like(w)
        case "clipped_sum":
            return jnp.broadcast_to(_sign(mass) * (jnp.abs(mass) > 1.0), w.shape)
        case "p_norm":
            some = see & (w != 0)
            size = jnp.where(some, jnp.abs(w), 1.0)
            return jnp.where(some, (z / size) ** (1.0 - score.p) * _sign(w), 0.0)
        case _:
            return jnp.zeros_like(w)


def _term_slope(w: Array, see: Array, score: Score) -> Array:
    """d `terms` / dw."""
    match score.normaliser:
        case "count":
            return jnp.zeros_like(w)
        case "p_norm":
            some = see & (w != 0)
            size = jnp.where(some, jnp.abs(w), 1.0)
            return jnp.where(some, score.p * size ** (score.p - 1.0) * _sign(w), 0.0)
        case _:
            return jnp.ones_like(w)


def _sign(x: Array) -> Array:
    """±1; `jnp.sign` asks the attached device, which compiling ahead of time must not."""
    return jnp.where(x < 0, -1.0, 1.0)
