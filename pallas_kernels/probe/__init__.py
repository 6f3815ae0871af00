"""`probe`: statistics of attention rows, without the rows: what sparse methods, evictions and head studies ask for.

w_ps = exp(x_ps - L_p) · visible_ps,  x_ps = scale · q_p·k_s + key_bias_s,  L_p = log Σ_s exp(x_ps) · visible_ps

and from it sums over columns, diagonals and blocks, and each row's largest weight. Two passes over the keys, L first;
memory O(P·H + H·S), for blocks O(P·H·S / block).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from pallas_kernels._dispatch import resolve
from pallas_kernels.flash import options
from pallas_kernels.probe.gpu import probe_gpu
from pallas_kernels.probe.gpu import unfit as unfit_gpu
from pallas_kernels.probe.reference import probe_reference
from pallas_kernels.probe.stats import NAMES, Stats, wanted
from pallas_kernels.probe.tpu import probe_tpu, unfit
from pallas_kernels.probe.xla import probe_xla

__all__ = ["NAMES", "Stats", "probe"]

IMPLEMENTATIONS = {"reference": probe_reference, "xla": probe_xla, "tpu": probe_tpu, "gpu": probe_gpu}


def probe(
    q: Float[Array, "B P H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    want: Iterable[str] = ("columns",),
    block: int = 64,
    key_bias: Float[Array, "..."] | None = None,
    backend: str = "auto",
) -> Stats:
    """Statistics of softmax rows; see `Stats` for each. Not differentiable: gradients through it are zero.

    Diagonals at offsets below 0 or from S on, and the keys of segment `GLOBAL`, which have no place, are left out.
    "tpu" and "gpu" need key positions that advance by one from index to index over what a query sees; where they do
    not, their diagonals (of all queries of the call) are NaN. "gpu" computes bfloat16 and has head dims up to 256.

    Args:
      q: probe queries, such as the last 64 of a prompt; query head h reads key head h // (H // K). At most 128 for
        "tpu"; sums over queries add up over calls.
      k: all keys.
      vis: who sees whom.
      scale: multiplies q·k.
      want: which of `NAMES`; "top" gives index and weight.
      block: keys of a block, of "blocks" and "block_max".
      key_bias: [1 or B, 1 or K or H, S], added to the scaled scores of every query that sees the key, as `flash` does.
        -inf (and all below -1e29) hides a key: it is in no normaliser and has weight 0.
      backend: "auto", "xla", "tpu", "gpu", "reference"; a named backend never falls back.

    Raises:
      ConfigError: an unknown statistic, block < 1, or key_bias of another shape.
      NotImplementedError: a backend this op does not have, or that cannot serve this call.
    """
    names = wanted(want)
    if block < 1:
        raise ConfigError(f"block is {block} but must be at least 1 key.")
    options.check(q, k, scale, key_bias)
    q, k, key_bias = jax.lax.stop_gradient((q, k, key_bias))
    if backend != "reference":
        key_bias = options.dense(key_bias, len(q))
    reasons = {"tpu": unfit(q, k, names, block), "gpu": unfit_gpu(q, k, names, block)}
    run = resolve("probe", backend, IMPLEMENTATIONS, default="xla", unfit=reasons)
    return run(q, k, vis, scale=scale, want=names, block=block, key_bias=key_bias)
