"""`flash`: the score family of attention with O(T) memory.

s_ij = scale · q_i·k_j + bias_ij + logit_bias,  w_ij = g(s_ij) · visible_ij,  o_i = Σ_j w_ij v_j / Z_i
"""

from __future__ import annotations

import inspect

import jax
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from jaxattn.rope import PositionBias
from pallas_kernels._dispatch import resolve
from pallas_kernels.flash.decode import fits, flash_decode
from pallas_kernels.flash.reference import flash_reference
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.tpu import flash_tpu, unfit
from pallas_kernels.flash.xla import flash_xla

__all__ = ["Score", "flash"]

IMPLEMENTATIONS = {"reference": flash_reference, "xla": flash_xla, "tpu": flash_tpu}


def flash(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float,
    bias: PositionBias | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H V"]:
    """Attention of one score family member; rows that see nothing give zeros. Differentiable.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      vis: who sees whom.
      score: activation and normaliser.
      scale: multiplies q·k.
      bias: added to the scaled scores, zero on `GLOBAL` keys.
      backend: "auto", "xla", "tpu", "reference"; a named backend never falls back.

    Raises:
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    if inspect.isfunction(bias):
        bias = jax.tree_util.Partial(bias)  # a pytree without leaves, so that it may cross a custom_vjp
    if backend == "auto" and fits(q, k, v, vis, score, bias):
        return flash_decode(q, k, v, vis, scale)
    run = resolve("flash", backend, IMPLEMENTATIONS, default="xla", unfit={"tpu": unfit(q, k, v, bias)})
    return run(q, k, v, vis, score, scale=scale, bias=bias)
