"""Plain XLA in chunks: the masked product inside a chunk, one state between chunks (arXiv 2405.17381).

For row t of a chunk, with G_t the sum of its log decays up to t and S the state before the chunk:

    o_t = exp(G_t) q_t S + Σ_{s<=t} exp(G_t - G_s) (q_t·k_s) v_s
    S  <- exp(G_C) S + Σ_s exp(G_C - G_s) k_sᵀ v_s

Chunks go in groups: what happens inside chunks is done for a whole group at once, and only the states, one small
product each, follow each other. So a single long sequence keeps a machine as busy as a batch of short ones.

Every exponent is a difference inside one chunk and never positive, so nothing overflows however strong the
decay; exp(G_t) · exp(-G_s), the global factorisation, would after some hundred tokens.
What the backward pass keeps is the inputs; it recomputes one state a chunk and the products of one group at a
time, so memory grows with T and never with T² or with a state per token.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxattn.masks import PADDING

CHUNK = 64
GROUP = 16  # products of chunks, counted over batch and heads, that are done at once
FORGET = -100.0  # exp(-100) is nothing in f32; a finite floor keeps differences of -inf from being nan
NEVER = -1e30  # a masked exponent: exp gives exactly 0, and so does its gradient


class Chunk(NamedTuple):
    """One chunk of tokens (all of a group along a leading axis)."""

    q: Array  # [B, H, C, D]
    k: Array  # [B, K, C, D]
    v: Array  # [B, K, C, V]
    decay: Array | None  # [B, H, C], this token's log decay; None where it is the same for all tokens
    live: Array  # [B, C]
    document: Array  # [B, C], counts up with every new document
    before: Array  # [B], the document that the state before the chunk belongs to


def linear_scan_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K V"],
    *,
    log_decay: Array | None,
    segments: Int[Array, "B T"],
    initial_state: Float[Array, "B H D V"],
    initial_segment: Int[Array, "B"],
    scale: float,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H D V"]]:
    """See `pallas_kernels.linear_scan.linear_scan`. The largest temporaries are a group's and one state a chunk."""
    live, document = documents(segments, initial_segment)
    chunk = min(chunk or CHUNK, q.shape[1])
    count = -(-q.shape[1] // chunk)
    rounds = -(-count // max(1, GROUP // (q.shape[0] * q.shape[2])))
    group = -(-count // rounds)

    @jax.checkpoint
    def run(q: Array, k: Array, v: Array, log_decay: Array | None, state: Array) -> tuple[Array, Array]:
        per_head = log_decay if log_decay is not None and log_decay.ndim == 1 else None

        @partial(jax.checkpoint, prevent_cse=False)
        def body(state: Array, tokens: Chunk) -> tuple[Array, Array]:
            state, o = _group(scale, per_head, state, _heads_first(tokens, group))  # [G, B, H, C, V]
            o = jnp.moveaxis(o, (0, 3), (1, 2))  # [B, G, C, H, V]
            return state, o.reshape(-1, *o.shape[3:])

        state, o = jax.lax.scan(body, state, _rounds(q, k, v, log_decay, live, document, chunk, group))
        o = jnp.moveaxis(o.reshape(o.shape[0], q.shape[0], -1, *o.shape[2:]), 0, 1)  # [B, N, G·C, H, V]
        return o.reshape(o.shape[0], -1, *o.shape[3:])[:, : q.shape[1]], state

    return run(q, k, v, log_decay, initial_state)


def documents(
    segments: Int[Array, "B T"], initial_segment: Int[Array, "B"]
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Which tokens are live, and each token's document as a running number; 0 owns the initial state.

    Padding belongs to the document around it, so that the state passes through it.
    """
    live = segments != PADDING
    length = segments.shape[1]
    newest = jax.lax.cummax(jnp.where(live, jnp.arange(length), -1), axis=1)  # the last live token up to here
    owner = jnp.take_along_axis(segments, jnp.maximum(newest, 0), axis=1)
    owner = jnp.where(newest >= 0, owner, initial_segment[:, None])
    previous = jnp.concatenate([initial_segment[:, None], owner[:, :-1]], axis=1)
    return live, jnp.cumsum(owner != previous, axis=1, dtype=jnp.int32)


def _group(scale: float, per_head: Array | None, state: Array, x: Chunk) -> tuple[Array, Array]:
    """State [B,H,D,V] before a group of chunks -> the state after it, and the outputs [G,B,H,C,V]."""
    inside, reader, fade, added = jax.vmap(partial(_chunk, per_head, state.dtype))(x)

    def follow(state: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        fade, added = step
        return fade[..., None, None] * state + added, state

    if x.q.shape[0] == 1:
        state, before = fade[0, ..., None, None] * state + added[0], state[None]
    else:
        state, before = jax.lax.scan(follow, state, (fade, added))
    o = inside + jnp.matmul(reader, before)
    return state, (scale * o).astype(x.v.dtype)


def _chunk(per_head: Array | None, exact: DTypeLike, x: Chunk) -> tuple[Array, Array, Array, Array]:
    """What a chunk does by itself.

    Its outputs without the state [B,H,C,V]; what reads the state before it [B,H,C,D]; how much of that state is left
    behind it [B,H]; what it adds [B,H,D,V].
    """
    heads, size = x.q.shape[1], x.q.shape[2]
    alive = x.live[:, None, :, None]
    # Zeroed padding neither reads nor writes, even where it holds nan.
    q, k, v = (jnp.where(alive, y, 0).astype(exact) for y in (x.q, x.k, x.v))
    k, v = (jnp.repeat(y, heads // y.shape[1], axis=1) for y in (k, v))
    same = x.document[:, :, None] == x.document[:, None, :]
    see = (same & jnp.tri(size, dtype=bool))[:, None]  # [B, 1, C, C]
    reads = (x.document == x.before[:, None])[:, None, :]  # tokens that the incoming state belongs to
    writes = same[:, None, -1, :]  # tokens that the outgoing state belongs to
    if per_head is not None:  # whole numbers of steps: their differences are exact
        rate = jnp.maximum(per_head.astype(exact), FORGET)[:, None]
        total = jnp.cumsum(x.live, axis=1, dtype=exact)[:, None, :]
    else:  # without any decay the sums are zero, and what follows are plain masks without a head axis
        rate = jnp.ones((), exact)
        steps = jnp.zeros_like(x.live[:, None], exact) if x.decay is None else x.decay.astype(exact)
        total = jnp.cumsum(jnp.where(x.live[:, None], jnp.maximum(steps, FORGET), 0), axis=-1)
    fade = lambda mask, distance: jnp.exp(jnp.where(mask, distance, NEVER))
    within = fade(see, rate[..., None] * (total[..., :, None] - total[..., None, :]))
    old = fade(reads, rate * total)
    kept = fade(writes, rate * (total[..., -1:] - total))
    inside = jnp.matmul(within * jnp.matmul(q, jnp.swapaxes(k, 2, 3)), v)
    added = jnp.matmul(jnp.swapaxes(kept[..., None] * k, 2, 3), v)
    return inside, old[..., None] * q, jnp.broadcast_to(old[..., -1], q.shape[:2]), added


def _rounds(
    q: Array, k: Array, v: Array, log_decay: Array | None, live: Array, document: Array, size: int, group: int
) -> Chunk:
    """Groups along the first axis, the batch and a group's tokens together along the second one; filled up to whole
    groups with padding.

    They stay where they are, heads behind tokens: turning whole arrays would cost more than the products do. An axis
    for a batch of one, between those two, would make XLA copy them.
    """
    fill = -q.shape[1] % (size * group)

    def cut(x: Array, by: int = size * group, mode: str = "constant") -> Array:
        x = jnp.pad(x, [(0, fill if axis == 1 else 0) for axis in range(x.ndim)], mode=mode) if fill else x
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, by, *x.shape[2:]), 1, 0)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    decay = cut(log_decay) if log_decay is not None and log_decay.ndim == 3 else None
    last = cut(document, size, "edge").reshape(-1, q.shape[0], size)[..., -1]  # [N, B] of chunks
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    before = before.reshape(-1, group, *before.shape[1:])
    return Chunk(cut(q), cut(k), cut(v), decay, cut(live), cut(document, mode="edge"), before)


def _heads_first(tokens: Chunk, group: int) -> Chunk:
    """The chunks of one group along a leading axis, heads before tokens."""

    def cut(x: Array) -> Array:
        batch = tokens.before.shape[1]
        return jnp.moveaxis(x.reshape(batch, group, -1, *x.shape[1:]), 1, 0)  # [G, B, C, ...]

    head_major = lambda x: jnp.moveaxis(cut(x), 2, 3)  # [G, B, C, H, ...] -> [G, B, H, C, ...]
    decay = None if tokens.decay is None else head_major(tokens.decay)
    q, k, v = (head_major(x) for x in (tokens.q, tokens.k, tokens.v))
    return Chunk(q, k, v, decay, cut(tokens.live), cut(tokens.document), tokens.before)
