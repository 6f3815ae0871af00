"""`flash`: the score family of attention with O(T) memory.

s_ij = scale_i · q_i·k_j + bias_ij + key_bias_j + logit_bias,  w_ij = g(s_ij) · visible_ij,  o_i = Σ_j w_ij v_j / Z_i
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from jaxattn.rope import PositionBias
from pallas_kernels._dispatch import note, resolve
from pallas_kernels.flash import options
from pallas_kernels.flash.decode import fits, flash_decode
from pallas_kernels.flash.gpu import flash_gpu
from pallas_kernels.flash.gpu import unfit as unfit_gpu
from pallas_kernels.flash.merge import merge
from pallas_kernels.flash.reference import flash_reference
from pallas_kernels.flash.score import Score
from pallas_kernels.flash.tpu import flash_tpu, unfit
from pallas_kernels.flash.xla import flash_xla

__all__ = ["Score", "flash", "merge"]

IMPLEMENTATIONS = {"reference": flash_reference, "xla": flash_xla, "tpu": flash_tpu, "gpu": flash_gpu}


@overload
def flash(
    q: Array,
    k: Array,
    v: Array,
    vis: Visibility,
    score: Score,
    *,
    scale: float | Array,
    bias: PositionBias | None = ...,
    key_bias: Array | None = ...,
    stats: Literal[False] = ...,
    backend: str = ...,
) -> Array: ...


@overload
def flash(
    q: Array,
    k: Array,
    v: Array,
    vis: Visibility,
    score: Score,
    *,
    scale: float | Array,
    bias: PositionBias | None = ...,
    key_bias: Array | None = ...,
    stats: Literal[True],
    backend: str = ...,
) -> tuple[Array, Array]: ...


def flash(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float | Float[Array, "*h"],
    bias: PositionBias | None = None,
    key_bias: Float[Array, "..."] | None = None,
    stats: bool = False,
    backend: str = "auto",
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention of one score family member; rows that see nothing give zeros. Differentiable in all arrays.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      vis: who sees whom.
      score: activation and normaliser.
      scale: multiplies q·k: a float, or an array [] or [H], or [B, T, H] for every query. An array is multiplied into
        q in f32, and the product rounded to q's type.
      bias: added to the scaled scores, zero on `GLOBAL` keys. In kernels: Alibi, RawRelativeBias, and on a TPU
        RelativeBias.
      key_bias: [1 or B, 1 or K or H, S], added to the scaled scores of every query that sees the key, also of `GLOBAL`
        keys. With exp scores -inf (and all below -1e29) hides a key; other members need finite numbers.
      stats: also return a number [B, T, H] in f32 for every row, from which `merge` joins parts. exp: log Z_i, -1e30
        where the row sees nothing (with sum_plus_one 0, its hidden logit). Others: what adds up over keys, Σ_j w_ij;
        with p_norm Σ_j |w_ij|^p, with count how many keys are seen.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back.

    Returns:
      o in v's type, with `stats` (o, stats).

    Raises:
      ConfigError: scale or key_bias of another shape.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    if inspect.isfunction(bias):
        bias = jax.tree_util.Partial(bias)  # a pytree without leaves, so that it may cross a custom_vjp
    options.check(q, k, scale, key_bias)
    if backend != "reference":
        (q, scale), key_bias = options.folded(q, scale), options.dense(key_bias, len(q))
    more: dict[str, Any] = {} if key_bias is None and not stats else {"key_bias": key_bias, "stats": stats}
    if backend == "auto" and fits(q, k, v, vis, score, bias):
        note("flash", "numba", "single rows on a cpu")
        o, stat = flash_decode(q, k, v, vis, key_bias, scale)
        return (o, stat) if stats else o
    reasons = {"tpu": unfit(q, k, v, bias), "gpu": unfit_gpu(q, k, v, score, bias, key_bias)}
    run = resolve("flash", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    return run(q, k, v, vis, score, scale=scale, bias=bias, **more)
