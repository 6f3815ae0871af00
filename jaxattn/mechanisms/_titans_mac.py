"""Memory as context: attention inside a segment that also sees what the memory retrieved (Titans, Eq. 21-25).

    h_j = M_{s-1}(q_j)      y_i = Attn(q_i; P, h, x)      M_i written at y_i      o_i = y_i ⊗ M_i(y_i)

M_{s-1} is the memory as segment s (C tokens of a document) finds it; the first segment retrieves nothing. As the
paper writes it, every row sees the retrievals of the whole segment and the gate reads a memory that has learned all
of it, so row i knows the tokens behind it. `mac` lets row i see h_j for j <= i alone and reads M_i; `as_written` is
the paper's form.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import PADDING
from jaxattn.mechanisms._titans_parts import gate, mapped
from jaxattn.mechanisms.softplus import unit
from jaxattn.rope import Rope, rotate
from jaxattn.types import Leaf
from pallas_kernels._dispatch import resolve
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.linear_scan.xla import documents
from pallas_kernels.neural_memory import MemoryState, Weights, empty_memory, mlp, neural_memory
from pallas_kernels.neural_memory.reference import token_step
from pallas_kernels.neural_memory.xla import (
    TILE,
    Group,
    Memory,
    advance,
    coefficients,
    cut,
    enter,
    groups_of,
    over_tiles,
)


class Sizes(NamedTuple):
    """The static numbers: memory chunk, segment length (a multiple of it), when to read, scale of the scores."""

    chunk: int
    segment: int
    read_after_write: bool
    scale: float


class Tokens(NamedTuple):
    """Projections of the layer's tokens in f32 or wider, and their rates."""

    q: Array  # [B, T, H, D]
    k: Array  # [B, T, H, D]
    v: Array  # [B, T, H, V]
    eta: Array  # [B, T, H]
    theta: Array  # [B, T, H]
    alpha: Array  # [B, T, H]
    tables: tuple[Array, Array] | None  # rotary cos and sin [B, T, 1, R]


@struct.dataclass
class SegmentState:
    """What the current segment of each row has seen, in places rank mod C. All of a constant size."""

    retriever: Leaf  # the memory that the segment found, a tuple of [B, H, i, o]
    keys: Leaf  # [B, C, H, D], rotated
    values: Leaf  # [B, C, H, V]
    h_keys: Leaf  # [B, C, H, D], of the retrievals
    h_values: Leaf  # [B, C, H, V]


def empty_segment(batch: int, segment: int, start: Weights, dtype: Any) -> SegmentState:
    """The state of a row that has seen no token: zeros. Of `start` [H, i, o] only the shapes are used."""
    heads, key_dim, value_dim = start[0].shape[0], start[0].shape[1], start[-1].shape[2]
    keys = jnp.zeros((batch, segment, heads, key_dim), dtype)
    values = jnp.zeros((batch, segment, heads, value_dim), dtype)
    return SegmentState(tuple(jnp.zeros((batch, *w.shape), dtype) for w in start), keys, values, keys, values)


def attention(
    q: Float[Array, "B T H D"],
    keys: Float[Array, "B S H D"],
    values: Float[Array, "B S H V"],
    see: Bool[Array, "B T S"],
    params: dict,
    scale: float,
) -> Float[Array, "B T H V"]:
    """Softmax over the keys that `see` allows and the persistent slots."""
    if "slot_k" in params:
        front = lambda slot, x: jnp.broadcast_to(slot.astype(x.dtype), (x.shape[0], *slot.shape))
        slots = params["slot_k"].shape[0]
        keys = jnp.concatenate([front(params["slot_k"], keys), keys], axis=1)
        values = jnp.concatenate([front(params["slot_v"], values), values], axis=1)
        see = jnp.pad(see, ((0, 0), (0, 0), (slots, 0)), constant_values=True)
    s = jnp.where(see[:, None], scale * jnp.einsum("bthd,bshd->bhts", q, keys), NEVER)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(s, axis=-1), values)


def retrieve(weights: Weights, x: Tokens, params: dict) -> tuple[Array, Array]:
    """Keys (rotated to their token's position) and values [B,T,H,·] of the retrievals."""
    h = jnp.swapaxes(mlp(weights, jnp.swapaxes(unit(x.q), 1, 2)), 1, 2)
    key = mapped(h, params["h_k"])
    return key if x.tables is None else rotate(key, x.tables), mapped(h, params["h_v"])


def memory_input(y: Float[Array, "B T H V"], params: dict) -> tuple[Array, Array, Array]:
    """What the memory is asked and taught at y: query, key and value."""
    q, k = unit(mapped(y, params["memory_q"])), unit(mapped(y, params["memory_k"]))
    return q, k, mapped(y, params["memory_v"])


def mac(
    x: Tokens,
    segments: Int[Array, "B T"],
    state: tuple[MemoryState, SegmentState],
    *,
    start: Weights,
    params: dict,
    sizes: Sizes,
    tangents: bool,
    backend: str,
) -> tuple[Float[Array, "B T H V"], tuple[MemoryState, SegmentState]]:
    """The causal form behind `state`."""
    run = resolve("titans mac", backend, {"reference": mac_reference, "xla": mac_xla}, default="xla")
    live = segments != PADDING
    clean = lambda a: jnp.where(live.reshape(*live.shape, *[1] * (a.ndim - 2)), a, 0)
    x = jax.tree.map(clean, x)  # padding may hold anything
    return run(x, segments, state, start, params, sizes=sizes, tangents=tangents)


@partial(jax.jit, static_argnames=("sizes", "tangents", "only_keys"))
def mac_xla(
    x: Tokens,
    segments: Int[Array, "B T"],
    state: tuple[MemoryState, SegmentState],
    start: Weights,
    params: dict,
    *,
    sizes: Sizes,
    tangents: bool,
    only_keys: bool = False,
) -> tuple[Float[Array, "B T H _"], tuple[MemoryState, SegmentState]]:
    """In tiles: each retrieves, attends to the segment's earlier tokens and to itself, and teaches the memory."""
    memory, segment = state
    length = segments.shape[1]
    size = min(sizes.chunk, TILE, length)
    groups, begins, count, owner = groups_of(segments, memory.segment, memory.count, chunk=sizes.chunk, size=size)
    tiles = jax.tree.map(lambda a: cut(a, size), x)
    live = cut(segments != PADDING, size)
    c = coefficients(tiles.eta, tiles.theta, tiles.alpha, live, begins, sizes.read_after_write)
    carry = (Memory(memory.M, memory.S, memory.frozen), segment)
    work = partial(_group, sizes, only_keys)
    carry, o = over_tiles(work, (start, params), carry, (tiles, c), groups, tangents=tangents)
    memory, segment = carry
    return o[:, :length], (MemoryState(*memory, count=count, segment=owner), segment)


def _group(
    sizes: Sizes, only_keys: bool, shared: Any, carry: Any, now: Any, group: Group
) -> tuple[Any, Float[Array, "B n H _"]]:
    """The tokens of one group behind `carry`: same chunk, hence same segment, or several new documents.

    only_keys: give the keys of the retrievals instead of the outputs.
    """
    (start, params), (memory, found), (x, c) = shared, carry, now
    memory = enter(memory, group, start)
    first = jnp.min(jnp.where(group.live, group.rank, jnp.iinfo(jnp.int32).max), axis=1)  # rank of the row's first
    opens = jnp.any(group.live, axis=1) & (first % sizes.segment == 0)
    on = lambda new, old: jnp.where(opens[:, None, None, None], new, old)
    retriever = jax.tree.map(on, memory.M, found.retriever)

    rotated = (x.q, x.k) if x.tables is None else (rotate(x.q, x.tables), rotate(x.k, x.tables))
    h_keys, h_values = retrieve(retriever, x, params)
    order = jnp.arange(group.live.shape[1])
    same = group.document[:, :, None] == group.document[:, None, :]
    here = same & group.live[:, None, :] & (order[:, None] >= order)
    before = jnp.arange(sizes.segment) < (first % sizes.segment)[:, None]
    before = jnp.broadcast_to(before[:, None], (*here.shape[:2], sizes.segment))
    recalls = (first >= sizes.segment)[:, None, None]
    see = jnp.concatenate([before & recalls, before, here & recalls, here], axis=-1)
    keys = jnp.concatenate([found.h_keys, found.keys, h_keys, rotated[1]], axis=1)
    values = jnp.concatenate([found.h_values, found.values, h_values, x.v], axis=1)
    y = attention(rotated[0], keys, values, see, params, sizes.scale)

    mq, mk, mv = (jnp.swapaxes(a, 1, 2) for a in memory_input(y, params))
    memory, m, _ = advance(memory, mq, mk, mv, c, group.live)
    newest = jnp.max(jnp.where(group.live, order, -1), axis=1)
    last = jnp.take_along_axis(group.document, jnp.maximum(newest, 0)[:, None], axis=1)
    place = jnp.where(group.live & (group.document == last), group.rank % sizes.segment, sizes.segment)
    put = lambda old, new: jax.vmap(lambda a, at, b: a.at[at].set(b.astype(a.dtype), mode="drop"))(old, place, new)
    found = SegmentState(
        retriever,
        put(found.keys, rotated[1]),
        put(found.values, x.v),
        put(found.h_keys, h_keys),
        put(found.h_values, h_values),
    )
    return (memory, found), h_keys if only_keys else gate(y, jnp.swapaxes(m, 1, 2), params)


@partial(jax.jit, static_argnames=("sizes", "tangents"))
def mac_reference(
    x: Tokens,
    segments: Int[Array, "B T"],
    state: tuple[MemoryState, SegmentState],
    start: Weights,
    params: dict,
    *,
    sizes: Sizes,
    tangents: bool,
) -> tuple[Float[Array, "B T H V"], tuple[MemoryState, SegmentState]]:
    """The equations, one token after the other."""
    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], x)  # [T, B, 1, ...]

    @jax.checkpoint
    def token(carry: tuple[MemoryState, SegmentState], now: tuple[Tokens, Array]) -> tuple[Any, Array]:
        (memory, old), (x, segment) = carry, now
        live = segment != PADDING
        zero = jnp.zeros(x.k[:, 0].shape[:2], x.k.dtype)
        # A step that writes nothing: the token's document, rank and weights before its own write.
        found, _ = token_step(memory, x.k[:, 0], x.v[:, 0], zero, zero, zero, segment, start, sizes.chunk)
        place = found.count % sizes.segment
        opens = live & (place == 0)
        pick = lambda new, old: jnp.where(opens[:, None, None, None], new, old)
        retriever = jax.tree.map(pick, found.M, old.retriever)
        q, k = (x.q, x.k) if x.tables is None else (rotate(x.q, x.tables), rotate(x.k, x.tables))
        at = (jnp.arange(sizes.segment) == place[:, None]) & live[:, None]
        put = lambda old, new: jnp.where(at[:, :, None, None], new, old)
        h_key, h_value = retrieve(retriever, x, params)
        new = SegmentState(
            retriever,
            put(old.keys, k),
            put(old.values, x.v),
            put(old.h_keys, h_key),
            put(old.h_values, h_value),
        )
        seen = (jnp.arange(sizes.segment) <= place[:, None])[:, None]
        recalls = (found.count >= sizes.segment)[:, None, None]
        keys = jnp.concatenate([new.h_keys, new.keys], axis=1)
        values = jnp.concatenate([new.h_values, new.values], axis=1)
        y = attention(q, keys, values, jnp.concatenate([seen & recalls, seen], axis=-1), params, sizes.scale)
        mq, mk, mv = (a[:, 0] for a in memory_input(y, params))
        rates = (x.eta[:, 0], x.theta[:, 0], x.alpha[:, 0])
        _, after = token_step(memory, mk, mv, *rates, segment, start, sizes.chunk)
        m = jax.vmap(jax.vmap(mlp))((after if sizes.read_after_write else found).M, mq)
        o = gate(y, m[:, None], params)[:, 0]
        return (after, new), jnp.where(live[:, None, None], o, 0)

    state, o = jax.lax.scan(token, state, (tokens, segments.T))
    return jnp.moveaxis(o, 0, 1), state


def mac_rows(
    x: Tokens, segments: Int[Array, "B T"], *, start: Weights, params: dict, sizes: Sizes
) -> tuple[Float[Array, "B H T PT"], Float[Array, "B H T PT"]]:
    """Softmax rows on slots and tokens, a retrieval's weight added to its token's; and the tokens' own scores."""
    batch, length = segments.shape
    state = (empty_memory(batch, start, x.k.dtype), empty_segment(batch, sizes.segment, start, x.k.dtype))
    h_keys, _ = mac_xla(x, segments, state, start, params, sizes=sizes, tangents=False, only_keys=True)
    live, document = documents(segments, jnp.zeros((batch,), segments.dtype))
    rank = jnp.sum((document[:, :, None] == document[:, None]) & live[:, None] & jnp.tri(length, k=-1, dtype=bool), -1)
    part = document * length + rank // sizes.segment
    see = live[:, None] & live[:, :, None] & (part[:, :, None] == part[:, None]) & jnp.tri(length, dtype=bool)
    q, k = (x.q, x.k) if x.tables is None else (rotate(x.q, x.tables), rotate(x.k, x.tables))
    s = sizes.scale * jnp.einsum("bthd,bshd->bhts", q, jnp.concatenate([h_keys, k], axis=1))
    see = jnp.concatenate([see & (rank >= sizes.segment)[:, :, None], see], axis=-1)[:, None]
    slots = jnp.zeros((*s.shape[:3], 0), s.dtype)
    if "slot_k" in params:
        slots = sizes.scale * jnp.einsum("bthd,phd->bhtp", q, params["slot_k"].astype(q.dtype))
    a = jax.nn.softmax(jnp.concatenate([slots, jnp.where(see, s, NEVER)], axis=-1), axis=-1)
    a = jnp.where(live[:, None, :, None], a, 0)
    first, h, own = jnp.split(a, [slots.shape[-1], slots.shape[-1] + length], axis=-1)
    return jnp.concatenate([first, h + own], axis=-1), jnp.concatenate([slots, s[..., length:]], axis=-1)


def as_written(
    x: Tokens, memory: MemoryState, *, start: Weights, params: dict, sizes: Sizes, tangents: bool, backend: str
) -> Float[Array, "B T H V"]:
    """The paper's form on rows that are one document each, `memory` nobody's: NOT causal inside a segment."""
    length = x.q.shape[1]
    tiles = jax.tree.map(lambda a: cut(a, sizes.segment), x)
    live = cut(jnp.ones(x.q.shape[:2], jnp.int32), sizes.segment)
    full = tuple(jnp.broadcast_to(w, m.shape) for w, m in zip(start, memory.M, strict=True))
    memory = MemoryState(full, memory.S, full, memory.count, jnp.ones_like(memory.segment))

    def segment(memory: MemoryState, now: tuple[Tokens, Array, Array]) -> tuple[MemoryState, Array]:
        x, live, number = now
        q, k = (x.q, x.k) if x.tables is None else (rotate(x.q, x.tables), rotate(x.k, x.tables))
        h_keys, h_values = retrieve(memory.M, x, params)
        there = jnp.broadcast_to(live[:, None, :] != PADDING, (*live.shape, live.shape[1]))
        order = jnp.arange(live.shape[1])
        see = jnp.concatenate([there & (number > 0), there & (order[:, None] >= order)], axis=-1)
        keys, values = jnp.concatenate([h_keys, k], axis=1), jnp.concatenate([h_values, x.v], axis=1)
        y = attention(q, keys, values, see, params, sizes.scale)
        mq, mk, mv = memory_input(y, params)
        rates = {"eta": x.eta, "theta": x.theta, "alpha": x.alpha}
        _, memory = neural_memory(
            mq,
            mk,
            mv,
            **rates,
            start=start,
            state=memory,
            segments=live,
            chunk=sizes.chunk,
            tangents=tangents,
            backend=backend,
        )
        return memory, gate(y, jnp.swapaxes(mlp(memory.M, jnp.swapaxes(mq, 1, 2)), 1, 2), params)

    _, o = jax.lax.scan(segment, memory, (tiles, live, jnp.arange(live.shape[0])))
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], -1, *o.shape[3:])[:, :length]


def rotary(rope: Rope | None, positions: Int[Array, "B T"], dim: int) -> tuple[Array, Array] | None:
    """The tables of `Tokens`."""
    return None if rope is None else rope.tables(positions, dim)
