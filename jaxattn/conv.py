"""Causal depthwise convolution over packed documents, with a tail of recent tokens as decode state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, DTypeLike, Float, Int

from jaxattn.masks import PADDING
from jaxattn.types import Leaf


@struct.dataclass
class ConvTail:
    """The newest W-1 live tokens of each row, oldest first; unused places carry segment 0."""

    x: Leaf  # [B, W-1, C]
    segments: Leaf  # [B, W-1]


def empty_tail(*, batch: int, width: int, channels: int, dtype: DTypeLike) -> ConvTail:
    """Before the first token."""
    return ConvTail(
        x=jnp.zeros((batch, width - 1, channels), dtype), segments=jnp.full((batch, width - 1), PADDING, jnp.int32)
    )


def causal_conv(
    x: Float[Array, "B T C"], kernel: Float[Array, "W C"], segments: Int[Array, "B T"]
) -> Float[Array, "B T C"]:
    """y_t = Σ_i kernel[i] · x_{t-i} over tokens of t's own segment; zeros at padding.

    A document's tokens lie side by side; with padding between them use `causal_conv_step`.
    """
    live = (segments != PADDING)[..., None]
    y = jnp.where(live, x, 0) * kernel[0]
    for back in range(1, min(kernel.shape[0], x.shape[1])):
        same = (segments[:, back:] == segments[:, :-back])[..., None] & live[:, back:]
        y = y.at[:, back:].add(jnp.where(same, x[:, :-back], 0) * kernel[back])
    return y.astype(x.dtype)


def causal_conv_step(
    tail: ConvTail, x: Float[Array, "B T C"], kernel: Float[Array, "W C"], segments: Int[Array, "B T"]
) -> tuple[Float[Array, "B T C"], ConvTail]:
    """The same behind the tokens of `tail`, and the new tail. Padding may lie anywhere: it is stepped over."""
    keep = kernel.shape[0] - 1
    wide = jnp.concatenate([tail.x.astype(x.dtype), x], axis=1)
    seg = jnp.concatenate([tail.segments, segments.astype(tail.segments.dtype)], axis=1)
    live = seg != PADDING
    order = jnp.argsort(live, axis=1, stable=True)  # padding first, live tokens last and in their order
    take = jax.vmap(lambda rows, index: rows[index])
    y = causal_conv(take(wide, order), kernel, take(seg, order))
    place = jnp.argsort(order, axis=1)
    y = take(y, place)[:, keep:]
    newest = order[:, order.shape[1] - keep :]
    return y, ConvTail(x=take(wide, newest).astype(tail.x.dtype), segments=take(seg, newest))
