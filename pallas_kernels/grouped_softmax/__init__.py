"""`grouped_softmax`: two-level softmax over blocks with a landmark each (arXiv 2305.16300), with O(T) memory.

Position p is a landmark where p % L = L - 1 and belongs to block p // L. For a query i in block b:

    gate   g_i  = softmax of s over { tokens j <= i of block b } ∪ { landmarks of blocks c < b }
    inside p_ij = softmax of s over the ordinary tokens of one block c < b
    A_ij = g_ij in the own block,   p_ij g_{i, landmark of c} in an earlier one,   0 at every landmark

The landmark of the own block is never seen, not even by itself. s_ij = scale · q_i·k_j.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from pallas_kernels._dispatch import resolve
from pallas_kernels.grouped_softmax.gpu import grouped_softmax_gpu
from pallas_kernels.grouped_softmax.gpu import unfit as unfit_gpu
from pallas_kernels.grouped_softmax.reference import grouped_softmax_reference
from pallas_kernels.grouped_softmax.tpu import grouped_softmax_tpu, unfit
from pallas_kernels.grouped_softmax.xla import grouped_softmax_xla

__all__ = ["grouped_softmax"]

IMPLEMENTATIONS = {
    "reference": grouped_softmax_reference,
    "xla": grouped_softmax_xla,
    "tpu": grouped_softmax_tpu,
    "gpu": grouped_softmax_gpu,
}
SHORT = 16  # queries below which "auto" leaves a cache where it lies


def grouped_softmax(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    block: int,
    scale: float,
    backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """A @ v in v's dtype, and the log of the gate's denominator in f32 or wider. Differentiable in both.

    Rows that see nothing give zeros and a denominator of log(0), written as -1e30. Outputs over disjoint sets
    of keys merge by their denominators, as those of any softmax do.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      vis: segments and positions; keys are seen causally within their segment, and `GLOBAL` ones by nobody.
        A document's keys lie in the order of their positions, which differ; padding may lie anywhere.
      block: L, tokens of a block including its landmark.
      scale: multiplies q·k.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back. "gpu" takes bfloat16, head
        dims up to 256 and blocks of at most 64 tokens.

    Raises:
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    few = backend == "auto" and q.shape[1] < SHORT < k.shape[1]
    reason = f"{q.shape[1]} queries do not pay for laying out {k.shape[1]} keys" if few else None
    reasons = {"tpu": reason or unfit(q, k, v, block), "gpu": reason or unfit_gpu(q, k, v, block)}
    run = resolve("grouped_softmax", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    return run(q, k, v, vis, block=block, scale=scale)
