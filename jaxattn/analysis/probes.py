"""Extreme-token probes: sink weight, sink logit, value drain and residual peak of the first token.

Active-Dormant Attention Heads (arXiv 2410.13835), sections 2 and 3. Every probe is a mean over the
queries selected by a mask, so it can be split into trigger and non-trigger queries of the
Bigram-Backcopy task. Weights are the operation's own A or, with `proxy`, its row shares.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.analysis.capture import AttentionView, ForwardView
from jaxattn.analysis.sink_rate import over_query_blocks, proxy_weights
from jaxattn.masks import visible


def first_token_weight(
    view: AttentionView, queries: Bool[Array, "B T"], front: int = 0, *, proxy: bool = False
) -> Float[Array, "H"]:
    """Mean A_{i,0} over the selected queries; the query of token 0 itself is never one of them.

    Args:
      queries: which queries count; T includes the `front` sink tokens.
      front: sink tokens in front of the first real token.
      proxy: read the row-normalised |A| instead of A.
    """
    slots = view.weights(0, 1).slots
    chosen = _not_first(queries, front)

    def reduce(a: Array, scores: Array, index: Array) -> dict[str, Array]:
        a = proxy_weights(a) if proxy else a
        pick = _rows(chosen, index)
        return {"sum": jnp.sum(a[..., slots + front] * pick[:, None], axis=(0, 2))}

    return over_query_blocks(view, reduce)["sum"] / jnp.maximum(jnp.sum(chosen), 1)


def sink_logit(
    view: AttentionView, queries: Bool[Array, "B T"], front: int = 0
) -> tuple[Float[Array, "H"], Float[Array, "H"]]:
    """Mean and standard deviation over queries of s_{i,0} - mean_{1<=j<i} s_{i,j} (visible j only)."""
    slots = view.weights(0, 1).slots
    chosen = _not_first(queries, front)
    length = view.queries.shape[1]

    def reduce(a: Array, scores: Array, index: Array) -> dict[str, Array]:
        column = jnp.arange(length)
        earlier = (column[None] > front) & (column[None] < index[:, None])
        safe = jnp.minimum(index, length - 1)
        q_pos, q_seg = view.vis.q_positions[:, safe], view.vis.q_segments[:, safe]
        see = visible(dataclasses.replace(view.vis, q_positions=q_pos, q_segments=q_seg)) & earlier[None]
        count = jnp.sum(see, axis=-1)
        s = scores[..., slots:]
        mean = jnp.sum(jnp.where(see[:, None], s, 0.0), axis=-1) / jnp.maximum(count, 1)[:, None]
        delta = s[..., front] - mean
        pick = (_rows(chosen, index) * (count > 0))[:, None]
        return {
            "n": jnp.sum(pick),
            "sum": jnp.sum(delta * pick, axis=(0, 2)),
            "square": jnp.sum(delta**2 * pick, axis=(0, 2)),
        }

    total = over_query_blocks(view, reduce)
    n = jnp.maximum(total["n"], 1)
    mean = total["sum"] / n
    return mean, jnp.sqrt(jnp.maximum(total["square"] / n - mean**2, 0.0))


def value_norms(
    view: AttentionView, live: Bool[Array, "B T"], front: int = 0
) -> tuple[Float[Array, "H"], Float[Array, "H"]]:
    """Mean ||W_O^h v_j|| of the first real token and of the other live tokens; drain is their ratio."""
    norms = view.value_norms()
    rest = _not_first(live, front)[:, None]
    others = jnp.sum(norms * rest, axis=(0, 2)) / jnp.maximum(jnp.sum(rest), 1)
    return jnp.mean(norms[..., front], axis=0), others


def residual_norms(forward: ForwardView, live: Bool[Array, "B T"]) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
    """Mean residual norm after each block of the first real token and of the other live tokens."""
    norms = jnp.linalg.norm(forward.residuals.astype(jnp.float32), axis=-1)
    rest = _not_first(live, forward.front)[None]
    others = jnp.sum(norms * rest, axis=(1, 2)) / jnp.maximum(jnp.sum(rest), 1)
    return jnp.mean(norms[..., forward.front], axis=1), others


def _not_first(queries: Bool[Array, "B T"], front: int) -> Bool[Array, "B T"]:
    return queries & (jnp.arange(queries.shape[1]) > front)[None]


def _rows(mask: Bool[Array, "B T"], index: Array) -> Float[Array, "B t"]:
    """The mask at row numbers `index`; T (a silenced row) gives 0."""
    padded = jnp.pad(mask, ((0, 0), (0, 1)))
    return padded[:, index].astype(jnp.float32)
