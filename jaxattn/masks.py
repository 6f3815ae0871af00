"""Who sees whom: one value type for causal, windowed, packed, padded and prefix attention.

A key j is visible to a query i when
  1. both are in the same segment and that segment is not padding (0),
  2. with `causal`: pos_j <= pos_i, or pos_j < prefix_len (prefix-LM columns),
  3. with `window` w: pos_i - pos_j < w (the last w positions, the query's own included);
     the prefix columns of rule 2 are exempt.
Keys of segment `GLOBAL` are visible to every query of a non-padding segment whatever 2 and 3 say.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxattn.errors import ConfigError, shown
from jaxattn.types import Leaf

PADDING = 0
GLOBAL = -1
COUNTED = 1024  # keys that are counted at a time


@struct.dataclass
class Visibility:
    """Positions and segments of queries and keys plus the static rules; slices like an array.

    `aligned` = a means that key index j can only be visible to query indices i >= j - a. It lets
    implementations skip blocks above the diagonal without looking at the data, and is set only
    where the caller's own layout guarantees it. None = nothing is known.
    """

    q_positions: Leaf  # [B, T]
    k_positions: Leaf  # [B, S]
    q_segments: Leaf  # [B, T]
    k_segments: Leaf  # [B, S]
    prefix_len: Leaf = None  # [B] or None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    aligned: int | None = struct.field(pytree_node=False, default=None)

    def rows(self, start: int | Array, size: int) -> Visibility:
        """The same rules for queries [start, start + size); forgets `aligned`."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        return dataclasses.replace(
            self, q_positions=cut(self.q_positions), q_segments=cut(self.q_segments), aligned=None
        )

    def columns(self, start: int | Array, size: int) -> Visibility:
        """The same rules for keys [start, start + size); forgets `aligned`."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        return dataclasses.replace(
            self, k_positions=cut(self.k_positions), k_segments=cut(self.k_segments), aligned=None
        )

    def pad_rows(self, count: int) -> Visibility:
        """Append `count` padding queries (they see nothing)."""
        pad = lambda x: jnp.pad(x, ((0, 0), (0, count)))
        return dataclasses.replace(self, q_positions=pad(self.q_positions), q_segments=pad(self.q_segments))

    def pad_columns(self, count: int) -> Visibility:
        """Append `count` padding keys (nobody sees them)."""
        pad = lambda x: jnp.pad(x, ((0, 0), (0, count)))
        return dataclasses.replace(self, k_positions=pad(self.k_positions), k_segments=pad(self.k_segments))

    def prepend_global(self, count: int) -> Visibility:
        """Put `count` keys in front that every live query sees (K/V bias slots)."""
        batch = self.k_positions.shape[0]
        front = lambda x, value: jnp.concatenate([jnp.full((batch, count), value, x.dtype), x], axis=1)
        return dataclasses.replace(
            self,
            k_positions=front(self.k_positions, 0),
            k_segments=front(self.k_segments, GLOBAL),
            aligned=None if self.aligned is None else self.aligned + count,
        )


def visible(vis: Visibility) -> Bool[Array, "B T S"]:
    """The boolean matrix of the rules in the module docstring."""
    prefix = None if vis.prefix_len is None else vis.prefix_len[:, None, None]
    q_at = vis.q_positions[:, :, None], vis.q_segments[:, :, None]
    k_at = vis.k_positions[:, None, :], vis.k_segments[:, None, :]
    return sees(q_at, k_at, prefix, causal=vis.causal, window=vis.window)


def sees(
    q_at: tuple[Array, Array], k_at: tuple[Array, Array], prefix: Any, *, causal: bool, window: int | None
) -> Bool[Array, "*s"]:
    """The rules for any arrays that broadcast against each other, also inside kernels.

    Args:
      q_at, k_at: positions and segments.
      prefix: how many first positions rule 2 and 3 exempt; None: no prefix.
    """
    (q_pos, q_seg), (k_pos, k_seg) = q_at, k_at
    allowed = (q_seg == k_seg) & (q_seg != PADDING)
    rules = None
    if causal:
        rules = k_pos <= q_pos
    if window is not None:
        near = q_pos - k_pos < window
        if not causal:
            near &= k_pos - q_pos < window
        rules = near if rules is None else rules & near
    if rules is not None:
        allowed &= rules if prefix is None else rules | (k_pos < prefix)
    return allowed | ((k_seg == GLOBAL) & (q_seg > PADDING))


def count_visible(vis: Visibility) -> Int[Array, "B T"]:
    """How many keys each query sees, without a T×S array."""
    keys = vis.k_positions.shape[1]
    size = min(COUNTED, keys)
    vis = vis.pad_columns(-keys % size)

    def add(total: Array, i: Array) -> tuple[Array, None]:
        return total + jnp.sum(visible(vis.columns(i * size, size)), axis=-1, dtype=jnp.int32), None

    zeros = jnp.zeros(vis.q_positions.shape, jnp.int32)
    return jax.lax.scan(add, zeros, jnp.arange(-(-keys // size)))[0]


def live_rows(vis: Visibility) -> Bool[Array, "B T"]:
    """Queries that are not padding."""
    return vis.q_segments != PADDING


def default_positions(batch: int, length: int) -> Int[Array, "B T"]:
    """0..length-1 for every row."""
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def self_visibility(
    batch: int,
    length: int,
    *,
    causal: bool = True,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
    prefix_len: Int[Array, "B"] | None = None,
) -> Visibility:
    """Self-attention rules; positions must not decrease inside a segment (block skipping relies on it).

    Raises:
      ConfigError: window < 1.
    """
    check_window(window)
    pos = default_positions(batch, length) if positions is None else jnp.asarray(positions, jnp.int32)
    seg = jnp.ones_like(pos) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    return Visibility(
        q_positions=pos,
        k_positions=pos,
        q_segments=seg,
        k_segments=seg,
        prefix_len=prefix_len,
        causal=causal,
        window=window,
        aligned=0 if causal and prefix_len is None else None,
    )


def check_window(window: int | None) -> None:
    """Refuse windows that show nothing."""
    whole = isinstance(window, int) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 1):
        raise ConfigError(
            f"window is {shown(window)} but must be at least 1, a whole number, or None for all positions."
        )
