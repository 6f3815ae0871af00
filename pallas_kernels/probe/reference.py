"""Every statistic from the whole matrix of weights in f32: slow, obvious, what every backend is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import GLOBAL, Visibility, visible
from pallas_kernels.flash.reference import NEVER, dense_scores, dense_weights
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.score import Score
from pallas_kernels.probe.stats import Stats


def probe_reference(
    q: Float[Array, "B P H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    want: frozenset[str],
    block: int,
    key_bias: Float[Array, "b n S"] | None = None,
) -> Stats:
    """See `pallas_kernels.probe.probe`."""
    keys = k.shape[1]
    s = dense_scores(q, k, vis, scale=scale, key_bias=key_bias)  # [B, H, P, S]
    see = visible(vis)[:, None] & ~(s <= FLOOR)  # what the bias hides, maybe of one head only, is not seen
    s = jnp.where(see, s, NEVER)
    some = jnp.any(see, axis=-1)
    fold = lambda x: x.reshape(-1, *x.shape[2:])  # a mask per head: heads as further rows of the batch
    w = dense_weights(fold(s)[:, None], fold(see), Score()).reshape(s.shape)
    cut = jnp.pad(w, ((0, 0), (0, 0), (0, 0), (0, -keys % block))).reshape(*w.shape[:3], -1, block)
    per_row = lambda x: jnp.swapaxes(x, 1, 2)
    every = {
        "lse": per_row(jnp.where(some, jax.nn.logsumexp(s, axis=-1), NEVER)),
        "top_index": per_row(jnp.where(some, jnp.argmax(s, axis=-1), -1).astype(jnp.int32)),
        "top_weight": per_row(jnp.max(w, axis=-1)),
        "columns": jnp.sum(w, axis=2),
        "diagonals": jax.vmap(diagonal_sums)(w, offsets(vis, keys)),
        "blocks": jnp.sum(cut, axis=-1),
        "block_max": jnp.max(cut, axis=-1),
    }
    return Stats(**{name: x for name, x in every.items() if name.split("_")[0] in want or name in want})


def offsets(vis: Visibility, keys: int) -> Int[Array, "B P S"]:
    """Query position - key position where it is a diagonal's, `keys` where it is none."""
    o = vis.q_positions[:, :, None] - vis.k_positions[:, None, :]
    return jnp.where((o >= 0) & (o < keys) & (vis.k_segments != GLOBAL)[:, None, :], o, keys)


def diagonal_sums(w: Float[Array, "H P S"], o: Int[Array, "P S"]) -> Float[Array, "H S"]:
    """Weights added up by offset; offset S is dropped."""
    return jnp.zeros((w.shape[0], w.shape[2])).at[:, o].add(w, mode="drop")
