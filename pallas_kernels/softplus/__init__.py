"""`softplus_attention`: rows of softplus scores, re-weighted by their mean (arXiv 2501.13428), with O(T) memory.

s_ij = scale · log(N_i) · q_i·k_j + bias_ij,  φ_ij = softplus(s_ij) · visible_ij,  N_i = Σ_j visible_ij
p None (LSSA): w = φ;  else (LSSAR): w = (max(φ - mean_i φ, 0) / (max_j φ - mean_i φ))^p;  o_i = Σ_j w_ij v_j / Σ_j w_ij
"""

from __future__ import annotations

import inspect

import jax
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from jaxattn.rope import PositionBias
from pallas_kernels._dispatch import resolve
from pallas_kernels.softplus.gpu import softplus_gpu
from pallas_kernels.softplus.gpu import unfit as unfit_gpu
from pallas_kernels.softplus.reference import softplus_reference
from pallas_kernels.softplus.tpu import softplus_tpu, unfit
from pallas_kernels.softplus.xla import softplus_xla

__all__ = ["softplus_attention"]

IMPLEMENTATIONS = {"reference": softplus_reference, "xla": softplus_xla, "tpu": softplus_tpu, "gpu": softplus_gpu}


def softplus_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int = 3,
    bias: PositionBias | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H V"]:
    """LSSA or LSSAR rows times values; rows that see nothing give zeros. Differentiable.

    Everything inside is at least f32: p = 15 multiplies a relative error of φ by 15.

    Args:
      q, k: taken as they are (the paper's are L2-normalised); query head h reads key head h // (H // K).
      v: values, of any width.
      vis: who sees whom; the number of keys a query sees is its N_i.
      scale: multiplies log(N_i) · q·k.
      p: exponent of the re-weighting; None leaves it out.
      exempt: rows with N_i <= exempt keep all their keys (mean 0).
      bias: position bias added to the scaled scores, zero on `GLOBAL` keys.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back. "gpu" takes v in bfloat16,
        rounds q and k to it, and has head dims up to 256.

    Raises:
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    if inspect.isfunction(bias):
        bias = jax.tree_util.Partial(bias)  # a pytree without leaves, so that it may cross a custom_vjp
    reasons = {"tpu": unfit(q, k, v, bias), "gpu": unfit_gpu(q, k, v, bias)}
    run = resolve("softplus_attention", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    return run(q, k, v, vis, scale=scale, p=p, exempt=exempt, bias=bias)
