"""`block_sparse`: the score family of attention over lists of key blocks, with O(T) memory.

Query t of block i = t // block_q sees key j if `vis` allows it and j // block_k is in blocks[i]:

s_tj = scale · q_t·k_j + key_bias_j + logit_bias,  w_tj = g(s_tj) · visible_tj · listed_tj,  o_t = Σ_j w_tj v_j / Z_t

This is the attention of prefill methods that choose blocks first (arXiv 2407.02490, 2410.13276, 2502.20766).
Work and reads are proportional to the number of listed tiles, whatever the width of the lists.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from jaxattn.masks import Visibility
from pallas_kernels._dispatch import resolve
from pallas_kernels.block_sparse.gpu import block_sparse_gpu
from pallas_kernels.block_sparse.gpu import unfit as unfit_gpu
from pallas_kernels.block_sparse.lists import block_lists, check, density
from pallas_kernels.block_sparse.plan import unfit
from pallas_kernels.block_sparse.reference import block_sparse_reference
from pallas_kernels.block_sparse.tpu import block_sparse_tpu
from pallas_kernels.block_sparse.xla import block_sparse_xla
from pallas_kernels.flash import options
from pallas_kernels.flash.score import Score

__all__ = ["block_lists", "block_sparse", "density"]

IMPLEMENTATIONS = {
    "reference": block_sparse_reference,
    "xla": block_sparse_xla,
    "tpu": block_sparse_tpu,
    "gpu": block_sparse_gpu,
}
SOFTMAX = Score()


def block_sparse(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score = SOFTMAX,
    *,
    blocks: Int[Array, "B L I N"],
    block_q: int,
    block_k: int,
    scale: float,
    key_bias: Float[Array, "..."] | None = None,
    backend: str = "auto",
    stats: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention of one score family member over listed blocks; rows that see nothing give zeros. Differentiable.

    Args:
      q, k, v: query head h reads key head h // (H // K).
      vis: who sees whom, in tokens; a listed block shows nothing that it hides.
      score: activation and normaliser.
      blocks: numbers of key blocks, one list per query block, in any order and each counted once however often it
        is listed; what is not in [0, ceil(S / block_k)) is an unused entry, -1 by custom. L = 1: all heads share
        the lists; L = K: one per key head; L = H: one per query head. See `block_lists`.
      block_q, block_k: tokens of a block of queries and of keys.
      scale: multiplies q·k.
      key_bias: [1 or B, 1 or K or H, S], added to the scaled scores of every query that sees the key, as `flash` does.
        With exp scores -inf (and all below -1e29) hides a key; other members need finite numbers.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back.
      stats: also return the f32 statistic of each row by which outputs over disjoint sets of keys merge: log Z_t
        for exp, -1e30 where nothing is seen, else what adds up over keys (Σw, Σ|w|^p, or keys seen).

    Raises:
      ConfigError: lists that do not belong to q and k, or key_bias of another shape.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    check(q, k, blocks, block_q, block_k)
    options.check(q, k, scale, key_bias)
    if backend != "reference":
        key_bias = options.dense(key_bias, len(q))
    reasons = {
        "tpu": unfit(q, k, v, vis, blocks, block_q, block_k, key_bias),
        "gpu": unfit_gpu(q, k, v, score, block_q, block_k, key_bias),
    }
    run = resolve("block_sparse", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    sizes = {"block_q": block_q, "block_k": block_k}
    o, stat = run(q, k, v, vis, score, blocks=blocks, **sizes, scale=scale, stats=stats, key_bias=key_bias)
    return (o, stat) if stats else o
