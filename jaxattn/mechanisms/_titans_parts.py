"""Pieces that the forms of Titans share: maps per head, the gate of two branches, windowed attention with slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxattn.masks import GLOBAL, PADDING, Visibility, visible
from jaxattn.mechanisms._protocol import Call
from jaxattn.norms import rms_norm
from jaxattn.types import Leaf
from pallas_kernels import Score, flash
from pallas_kernels.flash.reference import dense_scores, dense_weights

EPS = 1e-6
NOBODY = jnp.iinfo(jnp.int32).max


@struct.dataclass
class WindowState:
    """The newest live tokens of each row, oldest first; unused places carry segment 0."""

    keys: Leaf  # [B, w, H, D], rotated
    values: Leaf  # [B, w, H, V]
    positions: Leaf  # [B, w]
    segments: Leaf  # [B, w]


def own_documents(segments: Int[Array, "*b T"]) -> Int[Array, "*b T"]:
    """Tokens that every document would see (sink tokens) as a document of their own, which nobody else sees."""
    return jnp.where(segments == GLOBAL, NOBODY, segments)


def mapped(x: Float[Array, "B T H i"], w: Float[Array, "H i o"]) -> Float[Array, "B T H o"]:
    """A linear map per head."""
    return jnp.einsum("bthi,hio->btho", x, w.astype(x.dtype))


def gate(a: Float[Array, "B T H V"], m: Float[Array, "B T H V"], params: dict) -> Float[Array, "B T H V"]:
    """a ⊗ m: both normalised with a learned vector per head, then a silu(m)."""
    normed = lambda x, name: rms_norm(x, None, EPS) * params[name].astype(x.dtype)
    return normed(a, "attention_scale") * jax.nn.silu(normed(m, "memory_scale"))


def windowed(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H V"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    state: WindowState | None,
    call: Call,
) -> tuple[Float[Array, "B T H V"], WindowState | None]:
    """Softmax over the last `attention_window` positions and the persistent slots, behind `state` unless None."""
    params, window = call.params, int(call.spec.attention_window)
    if call.rope is not None:
        q, k = call.rope(q, positions), call.rope(k, positions)
    if state is None:
        keys, values, k_positions, k_segments = k, v, positions, segments
    else:
        join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], axis=1)
        keys, values = join(state.keys, k), join(state.values, v)
        k_positions, k_segments = join(state.positions, positions), join(state.segments, segments)
        newest = jnp.argsort(k_segments != PADDING, axis=1, stable=True)[:, -state.keys.shape[1] :]
        take = lambda x: jax.vmap(lambda rows, index: rows[index])(x, newest)
        kept = WindowState(take(keys), take(values), take(k_positions), take(k_segments))
        state = jax.tree.map(lambda new, old: new.astype(old.dtype), kept, state)
    aligned = 0 if state is None else None
    vis = Visibility(positions, k_positions, segments, k_segments, causal=True, window=window, aligned=aligned)
    slots = params.get("slot_k")
    if slots is not None:
        vis = vis.prepend_global(slots.shape[0])
        front = lambda slot, x: jnp.broadcast_to(slot.astype(x.dtype), (x.shape[0], *slot.shape))
        keys = jnp.concatenate([front(slots, keys), keys], axis=1)
        values = jnp.concatenate([front(params["slot_v"], values), values], axis=1)
    scale = call.scale_of(q.shape[-1])
    return flash(q, keys, values, vis, Score("exp", "sum"), scale=scale, backend=call.backend), state


def windowed_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    call: Call,
) -> tuple[Float[Array, "B H T PT"], Float[Array, "B H T PT"]]:
    """The rows of `windowed` on slots and tokens, and the scores."""
    params, window = call.params, int(call.spec.attention_window)
    if call.rope is not None:
        q, k = call.rope(q, positions), call.rope(k, positions)
    vis = Visibility(positions, positions, segments, segments, causal=True, window=window)
    if "slot_k" in params:
        slots = params["slot_k"].astype(k.dtype)
        vis = vis.prepend_global(slots.shape[0])
        k = jnp.concatenate([jnp.broadcast_to(slots, (k.shape[0], *slots.shape)), k], axis=1)
    s = dense_scores(q, k, vis, scale=call.scale_of(q.shape[-1]))
    return dense_weights(s, visible(vis), Score("exp", "sum")), s


def empty_window(*, batch: int, window: int, heads: int, key_dim: int, value_dim: int, dtype) -> WindowState:
    """Before the first token."""
    return WindowState(
        keys=jnp.zeros((batch, window, heads, key_dim), dtype),
        values=jnp.zeros((batch, window, heads, value_dim), dtype),
        positions=jnp.zeros((batch, window), jnp.int32),
        segments=jnp.full((batch, window), PADDING, jnp.int32),
    )
