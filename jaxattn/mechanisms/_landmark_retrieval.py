"""Decoding with landmark retrieval: k blocks of the past, the unfinished block and the new tokens; no more.

The past is a ring of complete blocks with keys as projected. A query scores the landmarks of all blocks, fetches
the k best, and attends to [fetched blocks | unfinished block | new tokens] with the same two-level softmax, so the
gate is renormalised over what was fetched. Positions are numbered anew ("stingy", the released code's), which keeps
them below those of training at any length, with P complete blocks in the cache:

    new tokens start at min(P, k+1) L + (length of the unfinished block)
    scoring:   the k newest blocks at slots 1..k, all older ones at slot 0          slot: L positions
    attending: the j-th fetched block in time at slot j, or j+1 if it is one of the k newest

While P <= k (for scoring: k + 1) these are the true positions and nothing is lost. A chunk may have at most
C - C mod L - (k+1) L positions, C those of training.

Here one row holds one document from its first token on. Tokens of a chunk see all of the chunk before them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from jaxattn.mechanisms._landmark_cache import LandmarkCache, is_known, places, refuse_overflow, write
from jaxattn.mechanisms._protocol import Call
from pallas_kernels.grouped_softmax import grouped_softmax
from pallas_kernels.grouped_softmax.reference import NEVER

SELECT = ("per_token_and_head", "max_over_heads", "max_over_tokens")
ROWS = 32  # queries that fetch blocks at one time


class Past(NamedTuple):
    """The complete blocks of a cache with N places for blocks; `order` counts those kept from the oldest, 0."""

    keys: Array  # [B, K, N, L, D], not rotated
    values: Array  # [B, K, N, L, V]
    order: Array  # [B, N], negative where there is no block
    count: Array  # [B], P


class Choice(NamedTuple):
    """k blocks in time order, unused ones last; the axes t and H are 1 where the choice is shared."""

    place: Array  # [B, t, H, k], in the ring
    slot: Array  # [B, t, H, k], where it is attended to
    there: Array  # [B, t, H, k]


def longest_chunk(spec: Any) -> int:
    """Positions, landmarks counted, of the longest chunk: a multiple of L, or nothing positive."""
    return spec.positions - spec.positions % spec.length - (spec.retrieve + 1) * spec.length


def retrieval_step(
    state: LandmarkCache,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array,
    call: Call,
) -> tuple[Array, LandmarkCache]:
    """`step` of the landmark mechanism with `spec.retrieve` > 0.

    Raises:
      ConfigError: a chunk longer than `longest_chunk`; and outside jit, where inside the row becomes NaN: a full
        cache, positions beyond those of training, a row whose tokens are not one document from its start on.
    """
    spec, scale = call.spec, call.scale_of(q.shape[-1])
    length, keep = spec.length, spec.cache_blocks or state.slots // spec.length
    if q.shape[1] > longest_chunk(spec):
        raise ConfigError(
            f"a chunk of {q.shape[1]} positions is too long for landmark.context {spec.context} with "
            f"landmark.retrieve {spec.retrieve}: step at most {longest_chunk(spec) // length * spec.block} tokens at "
            "a time (`jaxattn.reader` does)."
        )
    live, rank, count = places(segment_ids)
    total, tail = state.length // length, state.length % length
    blocks = jnp.minimum(total, keep)
    base = jnp.minimum(blocks, spec.retrieve + 1) * length
    bad = _refuse(state, positions, segment_ids, base + tail, spec)
    local = (base + tail)[:, None] + rank
    rotated = call.rope or (lambda x, at: x)
    q = rotated(q, local)

    # The unfinished block and the chunk itself.
    start = total % (state.slots // length) * length
    take = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, length))
    join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1)
    offset = jnp.arange(length)
    k_positions = join(base[:, None] + offset, local)
    vis = Visibility(
        q_positions=local,
        k_positions=k_positions,
        q_segments=live.astype(jnp.int32),
        k_segments=join(offset < tail[:, None], live).astype(jnp.int32),
    )
    keys, values = rotated(join(take(state.keys, start), k), k_positions), join(take(state.values, start), v)
    near = grouped_softmax(q, keys, values, vis, block=length, scale=scale, backend=call.backend)

    o = _merge(near, _retrieve(_past(state, total, blocks, length), q, live, spec, scale, rotated))
    # Of a chunk longer than the ring only the newest tokens stay.
    stays = live & (rank >= (count - state.slots)[:, None])
    index = jnp.where(stays, (state.length[:, None] + rank) % state.slots, state.slots)
    o = jnp.where(live[..., None, None], o, 0.0)
    o = jnp.where(bad[:, None, None, None], jnp.nan, o).astype(v.dtype)
    return o, write(state, index, k, v, positions, segment_ids)


def _refuse(state: LandmarkCache, positions: Array, segment_ids: Array, start: Array, spec: Any) -> Array:
    """Rows that cannot be answered, [B]; raises outside jit."""
    live, rank, count = places(segment_ids)
    full = jnp.zeros(count.shape, bool) if spec.cache_blocks else refuse_overflow(state, count)
    newest = (state.length - 1) % state.slots
    owner = jnp.take_along_axis(state.segments, newest[:, None], axis=1)
    first = jnp.take_along_axis(segment_ids, jnp.argmax(live, axis=1)[:, None], axis=1)
    owner = jnp.where(state.length[:, None] == 0, first, owner)
    strange = jnp.any(live & ((segment_ids != owner) | (positions != state.length[:, None] + rank)), axis=1)
    far = start + count > spec.positions
    if is_known(strange) and bool(jnp.any(strange)):
        raise ConfigError(
            "landmark.retrieve needs rows of one document each, read from position 0 on without gaps; "
            "start a new state for every document, or set landmark.retrieve to 0."
        )
    if is_known(far) and bool(jnp.any(far)):
        row = int(jnp.argmax(far))
        raise ConfigError(
            f"{int(count[row])} positions behind an unfinished block would end at position "
            f"{int(start[row] + count[row]) - 1}, beyond the {spec.positions} of landmark.context {spec.context}: "
            f"step {int(spec.positions - start[row]) // spec.length * spec.block or 1} tokens first."
        )
    return full | strange | far


def _past(state: LandmarkCache, total: Array, blocks: Array, length: int) -> Past:
    """Block c of the document lies at place c mod N; the newest `blocks` of them count."""
    batch, ring = state.keys.shape[0], state.slots // length
    fold = lambda x: jnp.moveaxis(x.reshape(batch, ring, length, *x.shape[2:]), 3, 1)
    newest = (total - 1)[:, None]
    number = newest - (newest - jnp.arange(ring)) % ring
    return Past(fold(state.keys), fold(state.values), number - (total - blocks)[:, None], blocks)


def _retrieve(past: Past, q: Array, live: Array, spec: Any, scale: float, rotated: Any) -> tuple[Array, Array]:
    """Attention to the fetched blocks alone: output [B,T,H,V] and log of the gate's mass [B,T,H]."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, dim = q.shape
    rows = min(ROWS, length)
    pad = -length % rows

    def fold(x: Array) -> Array:
        """[B, T, ...] -> [T / rows, B, rows, ...]"""
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, rows, *x.shape[2:]), 1, 0)

    parts = (fold(q.astype(kind)), fold(live))

    back = spec.length - 1  # of a landmark in its block
    slot = jnp.maximum(past.order - jnp.maximum(past.count - spec.retrieve - 1, 0)[:, None], 0)
    marks = jnp.moveaxis(past.keys[:, :, :, back], 1, 2).astype(q.dtype)
    marks = rotated(marks, slot * spec.length + back).astype(kind)  # [B, N, K, D]

    def chances(q: Array, live: Array) -> Array:
        """Log of the gate over all blocks, [B, t, H, N], which still ranks where the gate itself underflows."""
        s = jnp.einsum("btkgd,bnkd->btkgn", q.reshape(batch, rows, marks.shape[2], -1, dim), marks) * scale
        s = jnp.where((past.order >= 0)[:, None, None, None], s, NEVER).reshape(batch, rows, heads, -1)
        return jnp.where(live[:, :, None, None], jax.nn.log_softmax(s, axis=-1), NEVER)

    def fetch(chance: Array) -> tuple[Choice, Array, Array]:
        choice = choose(chance, past, spec.retrieve)
        return choice, *_fetched(past, choice, heads, spec.length, q.dtype, rotated)

    shared = None
    if spec.select == "max_over_tokens":
        best = jax.lax.map(lambda part: jnp.max(chances(*part), axis=1, keepdims=True), parts)
        shared = fetch(jnp.max(best, axis=0))

    def answer(part: tuple[Array, Array]) -> tuple[Array, Array]:
        if shared is not None:
            return _attend(part[0], *shared, scale)
        chance = chances(*part)
        if spec.select == "max_over_heads":
            chance = jnp.max(chance, axis=2, keepdims=True)
        return _attend(part[0], *fetch(chance), scale)

    unfold = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length]
    return jax.tree.map(unfold, jax.lax.map(answer, parts))


def choose(chance: Array, past: Past, retrieve: int) -> Choice:
    """The likeliest blocks of every row of `chance` [B,t,H,N], in time order, with their slots."""
    order = past.order[:, None, None]
    there = order >= 0
    _, place = jax.lax.top_k(jnp.where(there, chance, -jnp.inf), min(retrieve, chance.shape[-1]))
    pick = lambda x, at: jnp.take_along_axis(jnp.broadcast_to(x, (*at.shape[:3], x.shape[-1])), at, axis=-1)
    never = jnp.iinfo(jnp.int32).max
    place = pick(place, jnp.argsort(pick(jnp.where(there, order, never), place), axis=-1))
    order, count = pick(order, place), past.count[:, None, None, None]
    recent = (count > retrieve) & (order >= count - retrieve)
    return Choice(place, jnp.arange(place.shape[-1]) + recent, order >= 0)


def _fetched(past: Past, choice: Choice, heads: int, length: int, dtype: Any, rotated: Any) -> tuple[Array, Array]:
    """Keys [B,t,H,k,L,D], rotated at their slots, and values [B,t,H,k,L,V] of the chosen blocks."""
    group = heads // past.keys.shape[1]
    owner = jnp.arange(heads) // group
    wide = lambda x: jnp.broadcast_to(x, (*x.shape[:2], heads, x.shape[3]))
    take = jax.vmap(lambda x, place: x[owner[:, None], place])
    keys, values = take(past.keys, wide(choice.place)), take(past.values, wide(choice.place))
    at = jnp.broadcast_to(wide(choice.slot)[..., None] * length + jnp.arange(length), keys.shape[:-1])
    flat = keys.astype(dtype).reshape(keys.shape[0], -1, 1, keys.shape[-1])
    return rotated(flat, at.reshape(at.shape[0], -1)).reshape(keys.shape), values


def _attend(q: Array, choice: Choice, keys: Array, values: Array, scale: float) -> tuple[Array, Array]:
    """Two-level softmax over fetched blocks: [B,t,H,V], [B,t,H]; -1e30 and zeros where there is none."""
    if keys.shape[1] == 1 and q.shape[1] > 1:
        keys, values, axes = keys[:, 0], values[:, 0], "bhjl"
    else:
        axes = "bthjl"
    s = scale * jnp.einsum(f"bthd,{axes}d->bthjl", q, keys.astype(q.dtype))
    gate = jnp.where(choice.there, s[..., -1], NEVER)
    log_z = jax.nn.logsumexp(gate, axis=-1)
    weight = jnp.where(choice.there, jnp.exp(gate - log_z[..., None]), 0.0)
    p = jax.nn.softmax(s[..., :-1], axis=-1) * weight[..., None]
    return jnp.einsum(f"bthjl,{axes}v->bthv", p, values[..., :-1, :].astype(q.dtype)), log_z


def _merge(one: tuple[Array, Array], two: tuple[Array, Array]) -> Array:
    """Outputs over disjoint keys by their masses."""
    top = jnp.maximum(one[1], two[1])
    a, b = (jnp.exp(part[1] - top)[..., None] for part in (one, two))
    return (one[0] * a + two[0] * b) / (a + b)
