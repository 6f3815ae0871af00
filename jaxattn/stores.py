"""Where the keys and values of past tokens are kept: static shapes, pure values, every row on its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.types import Leaf


class HeadsFirst:
    """How every store lays out its keys and values.

    Heads come before tokens, as batched products want them: turning a whole cache costs more than attending to it.
    16-bit floats are held as their bits, because XLA's CPU backend would widen the whole cache to write one token.
    """

    head_keys: Leaf  # [B, K, S, D]
    head_values: Leaf  # [B, K, S, V]
    dtype: str

    @property
    def keys(self) -> Array:
        """[B, S, K, D]; a view inside jit, where the op that turns it back cancels."""
        return jnp.swapaxes(_floats(self.head_keys, self.dtype), 1, 2)

    @property
    def values(self) -> Array:
        """[B, S, K, V]"""
        return jnp.swapaxes(_floats(self.head_values, self.dtype), 1, 2)


def _heads_first(x: Float[Array, "B T K D"], dtype: str) -> Array:
    """New keys or values as a store of this type holds them."""
    return _bits(jnp.swapaxes(x, 1, 2).astype(dtype))


@struct.dataclass
class KVCache(HeadsFirst):
    """Keys and values of the tokens seen so far; unused slots carry segment 0, which nobody sees."""

    head_keys: Leaf  # [B, K, S, D]
    head_values: Leaf  # [B, K, S, V]
    positions: Leaf  # [B, S]
    segments: Leaf  # [B, S]
    length: Leaf  # [B], tokens written so far that take room
    dtype: str = struct.field(pytree_node=False)  # of keys and values

    @property
    def capacity(self) -> int:
        return self.head_keys.shape[2]


def empty_cache(*, batch: int, capacity: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike) -> KVCache:
    """Room for `capacity` tokens a row."""
    zeros = lambda dim: _bits(jnp.zeros((batch, kv_heads, capacity, dim), dtype))
    return KVCache(
        head_keys=zeros(key_dim),
        head_values=zeros(value_dim),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        segments=jnp.full((batch, capacity), PADDING, jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        dtype=str(jnp.dtype(dtype)),
    )


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: Array, dtype: str) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def append(cache: KVCache, k: Array, v: Array, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> KVCache:
    """Write T tokens behind those already there. A row's piece of nothing but padding takes no room.

    A write past the capacity is refused where the length is known (outside jit); inside jit the caller
    reads `overflow` and poisons its output, because a silent clamp would overwrite the newest tokens.

    Raises:
      ConfigError: the tokens do not fit.
    """
    count = k.shape[1]
    if count > cache.capacity:
        raise ConfigError(f"{count} tokens do not fit a cache of capacity {cache.capacity}; raise the capacity.")
    if not isinstance(cache.length, jax.core.Tracer) and int(cache.length.max()) + count > cache.capacity:
        raise ConfigError(
            f"{count} tokens do not fit behind {int(cache.length.max())} in a cache of capacity {cache.capacity}; "
            "raise the capacity."
        )
    live = jnp.any(segment_ids != PADDING, axis=1)
    return KVCache(
        head_keys=_put(cache.head_keys, _heads_first(k, cache.dtype), cache.length, axis=2),
        head_values=_put(cache.head_values, _heads_first(v, cache.dtype), cache.length, axis=2),
        positions=_put(cache.positions, positions, cache.length),
        segments=_put(cache.segments, segment_ids, cache.length),
        length=cache.length + jnp.where(live, count, 0),
        dtype=cache.dtype,
    )


def _put(old: Array, new: Array, start: Int[Array, "B"], axis: int = 1) -> Array:
    """`new` in the place of what lies in each row of `old` from `start` on."""
    new = new.astype(old.dtype)
    if old.shape[0] == 1:  # XLA writes one slice in place; rows of their own are a scatter
        return jax.lax.dynamic_update_slice_in_dim(old, new, start[0], axis)
    return jax.vmap(lambda x, y, at: jax.lax.dynamic_update_slice_in_dim(x, y, at, axis - 1))(old, new, start)


def overflow(cache: KVCache) -> Bool[Array, "B"]:
    """Of which rows more tokens were appended than fit."""
    return cache.length > cache.capacity


def cache_visibility(
    cache: KVCache,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    window: int | None = None,
) -> Visibility:
    """Causal rules of new queries against everything in the cache."""
    return Visibility(
        q_positions=positions,
        k_positions=cache.positions,
        q_segments=segment_ids,
        k_segments=cache.segments,
        causal=True,
        window=window,
    )


@struct.dataclass
class Ring(HeadsFirst):
    """Keys and values in slots that are written again and again; slots of segment 0 are empty.

    Which token goes where is the caller's: a ring counts nothing, so it serves a row's newest tokens and its first.
    """

    head_keys: Leaf  # [B, K, S, D]
    head_values: Leaf  # [B, K, S, V]
    positions: Leaf  # [B, S]
    segments: Leaf  # [B, S]
    dtype: str = struct.field(pytree_node=False)  # of keys and values

    @property
    def slots(self) -> int:
        return self.head_keys.shape[2]


def empty_ring(*, batch: int, slots: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike) -> Ring:
    """A ring of `slots` slots a row, all empty."""
    zeros = lambda dim: _bits(jnp.zeros((batch, kv_heads, slots, dim), dtype))
    nothing = jnp.zeros((batch, slots), jnp.int32)
    return Ring(zeros(key_dim), zeros(value_dim), nothing, jnp.full_like(nothing, PADDING), str(jnp.dtype(dtype)))


def overwrite(
    ring: Ring,
    slot: Int[Array, "B"],
    k: Array,
    v: Array,
    positions: Int[Array, "B 1"],
    segment_ids: Int[Array, "B 1"],
    keep: Bool[Array, "B"] | None = None,
) -> Ring:
    """One token a row (k [B,1,K,D], v [B,1,K,V]) into its `slot`, in place; rows that `keep` what they have do."""

    def put(old: Array, new: Array, axis: int = 1) -> Array:
        if keep is not None:
            cut = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, 1, axis - 1)
            held = keep.reshape(-1, *[1] * (new.ndim - 1))
            new = jnp.where(held, jax.vmap(cut)(old, slot), new.astype(old.dtype))
        return _put(old, new, slot, axis)

    return Ring(
        head_keys=put(ring.head_keys, _heads_first(k, ring.dtype), axis=2),
        head_values=put(ring.head_values, _heads_first(v, ring.dtype), axis=2),
        positions=put(ring.positions, positions),
        segments=put(ring.segments, segment_ids),
        dtype=ring.dtype,
    )


def refill(
    ring: Ring,
    source: Int[Array, "B S"],
    k: Array,
    v: Array,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Ring:
    """Into every slot the token of k [B,T,K,D], v [B,T,K,V] that `source` names; negative leaves the slot as it is."""

    def put(old: Array, new: Array, axis: int = 1) -> Array:
        shape = [1] * old.ndim
        shape[0], shape[axis] = source.shape
        at = source.reshape(shape)
        return jnp.where(at < 0, old, jnp.take_along_axis(new, jnp.maximum(at, 0), axis).astype(old.dtype))

    return Ring(
        head_keys=put(ring.head_keys, _heads_first(k, ring.dtype), axis=2),
        head_values=put(ring.head_values, _heads_first(v, ring.dtype), axis=2),
        positions=put(ring.positions, positions),
        segments=put(ring.segments, segment_ids),
        dtype=ring.dtype,
    )


@struct.dataclass
class Kept(HeadsFirst):
    """Keys and values that each key head keeps for itself, in no order; a place without a token has position -1."""

    head_keys: Leaf  # [B, K, C, D]
    head_values: Leaf  # [B, K, C, V]
    positions: Leaf  # [B, K, C]
    mass: Leaf  # [B, K, C] f32: what a policy measures a token by
    dtype: str = struct.field(pytree_node=False)  # of keys and values


def empty_kept(*, batch: int, room: int, kv_heads: int, key_dim: int, value_dim: int, dtype: DTypeLike) -> Kept:
    """Room for `room` tokens a key head, none of which are there yet."""
    shape = (batch, kv_heads, room)
    zeros = lambda dim: _bits(jnp.zeros((*shape, dim), dtype))
    places, mass = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
    return Kept(zeros(key_dim), zeros(value_dim), places, mass, dtype=str(jnp.dtype(dtype)))


def place(kept: Kept, k: Array, v: Array, positions: Int[Array, "B"], live: Bool[Array, "B"]) -> Kept:
    """One token [B, 1, K, D] in an empty place of every key head, with mass 0; one that is not live takes none."""
    batch, heads, _ = kept.positions.shape
    at = jnp.arange(batch)[:, None], jnp.arange(heads), jnp.argmin(kept.positions, axis=2)
    put = lambda old, new: old.at[at].set(_bits(new[:, 0].astype(kept.dtype)))
    where = jnp.where(live, positions, -1)[:, None]
    return Kept(
        head_keys=put(kept.head_keys, k),
        head_values=put(kept.head_values, v),
        positions=kept.positions.at[at].set(jnp.broadcast_to(where, (batch, heads))),
        mass=kept.mass.at[at].set(0.0),
        dtype=kept.dtype,
    )


def choose(
    empty: Kept,
    k: Array,
    v: Array,
    positions: Int[Array, "B K T"],
    mass: Float[Array, "B K T"],
    keep: Int[Array, "B K n"],
) -> Kept:
    """`empty` with the tokens `keep` of k [B, T, K, D] and v; of these, ones with position -1 are none."""
    room = empty.positions.shape[2]
    wide = lambda x, value: jnp.pad(
        x, ((0, 0), (0, 0), (0, room - keep.shape[2]), *[(0, 0)] * (x.ndim - 3)), constant_values=value
    )
    pick = lambda x: jnp.take_along_axis(x, keep, axis=2)
    rows = lambda x: jnp.take_along_axis(jnp.swapaxes(x, 1, 2), keep[..., None], axis=2).astype(empty.dtype)
    return Kept(
        head_keys=wide(_bits(rows(k)), 0),
        head_values=wide(_bits(rows(v)), 0),
        positions=wide(pick(positions), -1),
        mass=wide(pick(mass), 0),
        dtype=empty.dtype,
    )
