"""The attention-sink metric.

When Attention Sink Emerges in Language Models (arXiv 2410.10781), section 3.2:

    alpha_k = 1/(T-k+1) Σ_{i>=k} A_ik        Sink_k^eps = mean over sequences, layers, heads of 1[alpha_k > eps]

The indicator is taken per sequence, layer and head FIRST. Operations whose rows do not sum to one are
measured on the proxy |A| / (Σ_j |A| + 1e-8); for the others the proxy is A itself.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.analysis.capture import AttentionView
from jaxattn.masks import visible

EPSILON = 0.3
ROW_BLOCK = 128


def proxy_weights(a: Float[Array, "*b S"]) -> Float[Array, "*b S"]:
    """|A| with rows scaled to sum to one; rows without any weight stay zero."""
    size = jnp.abs(a)
    return size / (jnp.sum(size, axis=-1, keepdims=True) + 1e-8)


def column_means(a: Float[Array, "B H T S"], see: Bool[Array, "B T S"]) -> Float[Array, "B H S"]:
    """alpha: mean weight of each key over the queries that can see it."""
    count = jnp.sum(see, axis=1)[:, None].astype(jnp.float32)
    return jnp.sum(a, axis=2) / jnp.maximum(count, 1.0)


def sink_rate(alpha: Float[Array, "n L H S"], column: int = 0, epsilon: float = EPSILON) -> Float[Array, ""]:
    """Sink_k^eps in percent, with k = column + 1."""
    return 100.0 * jnp.mean((alpha[..., column] > epsilon).astype(jnp.float32))


def over_query_blocks(
    view: AttentionView, reduce: Callable[[Array, Array, Array], dict[str, Array]], block: int = ROW_BLOCK
) -> dict[str, Array]:
    """Sum `reduce(A, scores, query_index)` over blocks of queries: no T×T array at long T.

    reduce: gets weights and scores [B,H,t,P+S] and the row numbers [t] (rows past the end are numbered
      T and carry zero weights); returns arrays whose sum over blocks is meaningful.
    """
    length = view.queries.shape[1]
    if length <= block:
        rows = view.weights()
        return reduce(rows.values, rows.scores, jnp.arange(length))

    def one(start: Array) -> dict[str, Array]:
        # The last block is moved back inside the sequence; rows already seen are silenced.
        at = jnp.minimum(start, length - block)
        rows, index = view.weights(at, block), at + jnp.arange(block)
        new = index >= start
        return reduce(jnp.where(new[:, None], rows.values, 0.0), rows.scores, jnp.where(new, index, length))

    starts = jnp.arange(0, length, block)
    shapes = jax.eval_shape(one, starts[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda acc, s: (jax.tree.map(jnp.add, acc, one(s)), None), zero, starts)
    return total


def alpha_of(view: AttentionView, block: int = ROW_BLOCK) -> Float[Array, "B H PS"]:
    """alpha_k of one layer for every key, slots (K/V bias) first, from proxy weights."""
    slots = view.weights(0, 1).slots
    vis = view.vis.prepend_global(slots) if slots else view.vis

    def reduce(a: Array, scores: Array, index: Array) -> dict[str, Array]:
        return {"sum": jnp.sum(proxy_weights(a), axis=2)}

    total = over_query_blocks(view, reduce, block)["sum"]
    return total / jnp.maximum(_seen_by(vis, block), 1.0)[:, None]


def _seen_by(vis, block: int) -> Float[Array, "B S"]:
    """How many queries can see each key, counted in blocks."""
    length = vis.q_positions.shape[1]
    pad = -length % block if length > block else 0
    padded = vis.pad_rows(pad)
    size = min(block, length)
    counts = jax.lax.map(lambda s: jnp.sum(visible(padded.rows(s, size)), axis=1), jnp.arange(0, length + pad, size))
    return jnp.sum(counts, axis=0).astype(jnp.float32)
