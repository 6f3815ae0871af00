"""The recurrence, one token after the other, its gradient taken by autodiff: what every backend is tested against."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, DTypeLike, Float, Int

from jaxattn.masks import PADDING
from jaxattn.types import Leaf

Weights = tuple[Array, ...]  # one matrix a layer of the memory
activation = jax.nn.gelu  # between the layers, in its tanh form


@struct.dataclass
class MemoryState:
    """All that a row remembers of its current document, in f32 or wider; the size does not depend on the length."""

    M: Leaf  # weights, a tuple of [B, H, i, o]
    S: Leaf  # momentum, likewise
    frozen: Leaf  # the weights at the newest chunk boundary, likewise
    count: Leaf  # [B], tokens of the document so far
    segment: Leaf  # [B], the document; 0 before the first live token


def empty_memory(batch: int, start: Weights, dtype: DTypeLike = jnp.float32) -> MemoryState:
    """Nobody's state; the first live token replaces it by M_0. Only the shapes of `start` [H, i, o] are used."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    zeros = lambda: tuple(jnp.zeros((batch, *w.shape), dtype) for w in start)
    none = jnp.zeros((batch,), jnp.int32)
    return MemoryState(M=zeros(), S=zeros(), frozen=zeros(), count=none, segment=jnp.full_like(none, PADDING))


def mlp(weights: Weights, x: Array) -> Array:
    """The memory's answer to x [..., D]: matrices with an activation between them, no biases."""
    for i, w in enumerate(weights):
        x = jnp.matmul(activation(x) if i else x, w)
    return x


def token_step(
    state: MemoryState,
    k: Float[Array, "B H D"],
    v: Float[Array, "B H V"],
    eta: Float[Array, "B H"],
    theta: Float[Array, "B H"],
    alpha: Float[Array, "B H"],
    segment: Int[Array, "B"],
    start: Weights,
    chunk: int,
) -> tuple[MemoryState, MemoryState]:
    """The state as the token finds it (its document's, weights renewed at a boundary) and after its write."""
    live, fresh = segment != PADDING, (segment != PADDING) & (segment != state.segment)
    on = lambda rows, new, old: jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, 1, 1, 1), a, b), new, old)
    M = on(fresh, tuple(jnp.broadcast_to(w, m.shape) for w, m in zip(start, state.M, strict=True)), state.M)
    S = on(fresh, jax.tree.map(jnp.zeros_like, state.S), state.S)
    count = jnp.where(fresh, 0, state.count)
    frozen = on(live & (count % chunk == 0), M, state.frozen)
    found = MemoryState(M, S, frozen, count, jnp.where(live, segment, state.segment))

    def loss(w: Weights, k: Array, v: Array) -> Array:
        return jnp.sum((mlp(w, k) - v) ** 2)

    surprise = jax.vmap(jax.vmap(jax.grad(loss)))(frozen, k, v)
    at = lambda rate, x: rate[..., None, None] * x
    momentum = jax.tree.map(lambda s, u: at(eta, s) - at(theta, u), S, surprise)
    written = jax.tree.map(lambda m, s: at(1 - alpha, m) + s, M, momentum)
    after = MemoryState(on(live, written, M), on(live, momentum, S), frozen, count + live, found.segment)
    return found, after


@partial(jax.jit, static_argnames=("chunk", "read_after_write", "tangents"))
def neural_memory_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    eta: Float[Array, "B T H"],
    theta: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    start: Weights,
    state: MemoryState,
    segments: Int[Array, "B T"],
    *,
    chunk: int,
    read_after_write: bool,
    tangents: bool = False,
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """See `pallas_kernels.neural_memory.neural_memory`; `tangents` plays no part."""

    @jax.checkpoint
    def token(state: MemoryState, now: tuple[Array, ...]) -> tuple[MemoryState, Array]:
        q, k, v, eta, theta, alpha, segment = now
        found, after = token_step(state, k, v, eta, theta, alpha, segment, start, chunk)
        y = jax.vmap(jax.vmap(mlp))((after if read_after_write else found).M, q)
        return after, jnp.where((segment != PADDING)[:, None, None], y, 0)

    first = lambda x: jnp.moveaxis(x, 1, 0)  # scan runs over the leading axis
    state, y = jax.lax.scan(token, state, tuple(first(x) for x in (q, k, v, eta, theta, alpha, segments)))
    return first(y), state
