"""The key/value cache of landmark attention: keys before rotation, and every row writes at its own place.

Inserting landmarks leaves padding at other places in every row. Padding is not stored, so the capacity that a
user asks for in tokens is what fits, plus one slot for each landmark.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.types import Leaf


@struct.dataclass
class LandmarkCache:
    """Tokens and landmarks seen so far, side by side; unused slots carry segment 0, which nobody sees."""

    keys: Leaf  # [B, S, K, D], not rotated
    values: Leaf  # [B, S, K, V]
    positions: Leaf  # [B, S], landmarks counted
    segments: Leaf  # [B, S]
    length: Leaf  # [B], tokens and landmarks written so far

    @property
    def slots(self) -> int:
        return self.keys.shape[1]


def empty(*, batch: int, slots: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike) -> LandmarkCache:
    """Nothing yet."""
    return LandmarkCache(
        keys=jnp.zeros((batch, slots, kv_heads, key_dim), dtype),
        values=jnp.zeros((batch, slots, kv_heads, value_dim), dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segments=jnp.full((batch, slots), PADDING, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
    )


def places(segment_ids: Int[Array, "B T"]) -> tuple[Bool[Array, "B T"], Int[Array, "B T"], Int[Array, "B"]]:
    """Which of the new tokens are no padding, their number among those (from 0), and how many there are."""
    live = segment_ids != PADDING
    return live, jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1, jnp.sum(live, axis=1, dtype=jnp.int32)


def write(
    cache: LandmarkCache, index: Int[Array, "B T"], k: Array, v: Array, positions: Array, segment_ids: Array
) -> LandmarkCache:
    """Token t of a row goes to slot `index`; slots past the end drop it. The length grows by the live tokens."""
    put = jax.vmap(lambda old, i, new: old.at[i].set(new.astype(old.dtype), mode="drop"))
    return LandmarkCache(
        keys=put(cache.keys, index, k),
        values=put(cache.values, index, v),
        positions=put(cache.positions, index, positions),
        segments=put(cache.segments, index, segment_ids),
        length=cache.length + places(segment_ids)[2],
    )


def append(
    cache: LandmarkCache, k: Array, v: Array, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[LandmarkCache, Bool[Array, "B"]]:
    """Write the live tokens behind those already there, and say which rows are too full to be answered.

    Raises:
      ConfigError: they do not fit, where that is known (outside jit).
    """
    live, rank, count = places(segment_ids)
    full = refuse_overflow(cache, count)
    index = jnp.where(live, cache.length[:, None] + rank, cache.slots)
    return write(cache, index, k, v, positions, segment_ids), full


def refuse_overflow(cache: LandmarkCache, count: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Rows that `count` more tokens do not fit.

    Raises:
      ConfigError: there is one, where that is known (outside jit).
    """
    full = cache.length + count > cache.slots
    if is_known(full) and bool(jnp.any(full)):
        row = int(jnp.argmax(full))
        raise ConfigError(
            f"{int(count[row])} tokens do not fit behind {int(cache.length[row])} in a cache of capacity "
            f"{cache.slots}, landmarks counted; raise the capacity."
        )
    return full


def is_known(x: Array) -> bool:
    """Whether the values are there (outside jit)."""
    return not isinstance(x, jax.core.Tracer)


def visibility(cache: LandmarkCache, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Visibility:
    """Causal rules of new queries against everything in the cache."""
    return Visibility(
        q_positions=positions, k_positions=cache.positions, q_segments=segment_ids, k_segments=cache.segments
    )
