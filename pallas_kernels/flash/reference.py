"""The equation in f32 with the whole T×S matrix: slow, obvious, and what every backend is tested against."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias
from pallas_kernels.flash.score import ACTIVATIONS, Score

NEVER = -1e30  # a masked exponent: finite, so that differences stay finite, and exp gives exactly 0


def dense_scores(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float | Float[Array, "*h"],
    bias: PositionBias | None = None,
    key_bias: Float[Array, "b n S"] | None = None,
) -> Float[Array, "B H T S"]:
    """scale · q·k + bias + key_bias in f32, unmasked; the position bias is zero on `GLOBAL` keys."""
    heads = q.shape[2]
    k = jnp.repeat(k, heads // k.shape[2], axis=2)
    s = jnp.einsum("bthd,bshd->bhts", q.astype(jnp.float32), k.astype(jnp.float32))
    if jnp.ndim(scale) == 0:
        s = scale * s
    else:  # [H] or [B, T, H]
        per_row = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:3])
        s = jnp.moveaxis(per_row, 2, 1)[..., None] * s
    if bias is not None:
        on = (vis.k_segments != GLOBAL)[:, None, None, :]
        s = s + jnp.where(on, bias(vis.q_positions, vis.k_positions), 0.0)
    if key_bias is not None:
        s = s + jnp.repeat(key_bias.astype(jnp.float32), heads // key_bias.shape[1], axis=1)[:, :, None]
    return s


def dense_weights(s: Float[Array, "B H T S"], see: Array, score: Score) -> Float[Array, "B H T S"]:
    """w_ij / Z_i from scores and the visibility matrix [B, T, S]; zero where nothing is visible."""
    see = see[:, None]
    s = s + score.logit_bias
    if score.activation == "exp":
        # The largest exponent of the row cancels between w and Z; sum_plus_one has a hidden logit 0.
        floor = 0.0 if score.normaliser == "sum_plus_one" else NEVER
        s = jnp.where(see, s, NEVER)
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(s, axis=-1, keepdims=True, initial=NEVER), floor))
        w = jnp.where(see, jnp.exp(s - top), 0.0)
    else:
        top = jnp.zeros_like(s[..., :1])
        w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
    total = jnp.sum(w, axis=-1, keepdims=True)
    match score.normaliser:
        case "none":
            return w
        case "sum":
            z = total / score.row_sum + (0.0 if score.activation == "exp" else score.eps)
        case "sum_plus_one":
            z = total + jnp.exp(-top)
        case "clipped_sum":
            z = jnp.maximum(jnp.abs(total), 1.0)
        case "p_norm":
            if score.activation == "exp":
                power = jnp.where(see, jnp.exp(score.p * (s - top)), 0.0)
            else:
                power = jnp.where(see, jnp.abs(jnp.where(see, w, 1.0)) ** score.p, 0.0)
            z = jnp.sum(power, axis=-1, keepdims=True)
            z = jnp.where(z > 0, z, 1.0) ** (1.0 / score.p)
        case _:
            z = jnp.sum(see, axis=-1, keepdims=True).astype(jnp.float32)
    return w / jnp.where(z == 0, 1.0, z)


def dense_stats(s: Float[Array, "B H T S"], see: Array, score: Score) -> Float[Array, "B H T"]:
    """What `flash` reports of a row: log Z_i for exp, else what adds up over keys: Σw, Σ|w|^p, or how many are seen."""
    see = see[:, None]
    s = s + score.logit_bias
    if score.activation == "exp":
        s = jnp.where(see, s, NEVER)
        top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=NEVER))
        total = jnp.sum(jnp.where(see, jnp.exp(score.power * (s - top)), 0.0), axis=-1)
        some = total > 0
        log_z = top[..., 0] + jnp.log(jnp.where(some, total, 1.0)) / score.power
        if score.normaliser == "sum":
            log_z = log_z - math.log(score.row_sum)
        log_z = jnp.where(some, log_z, NEVER)
        return jnp.logaddexp(log_z, 0.0) if score.normaliser == "sum_plus_one" else log_z
    if score.normaliser == "count":
        return jnp.broadcast_to(jnp.sum(see, axis=-1).astype(jnp.float32), s.shape[:-1])
    w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
    if score.normaliser == "p_norm":
        return jnp.sum(jnp.where(see, jnp.abs(jnp.where(see, w, 1.0)) ** score.p, 0.0), axis=-1)
    return jnp.sum(w, axis=-1)


def flash_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float | Float[Array, "*h"],
    bias: PositionBias | None = None,
    key_bias: Float[Array, "b n S"] | None = None,
    stats: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o = weights @ v, all in f32; result in v's dtype. With `stats` also `dense_stats`."""
    s, see = dense_scores(q, k, vis, scale=scale, bias=bias, key_bias=key_bias), visible(vis)
    v_all = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    o = jnp.einsum("bhts,bshv->bthv", dense_weights(s, see, score), v_all).astype(v.dtype)
    return (o, jnp.moveaxis(dense_stats(s, see, score), 1, 2)) if stats else o
