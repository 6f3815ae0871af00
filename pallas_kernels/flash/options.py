"""The optional arguments of `flash` in the one form its kernels take, and what they may not be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from pallas_kernels.flash.reference import NEVER


def check(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], scale: float | Array, key_bias: Array | None) -> None:
    """Refuse shapes that fit no form.

    Raises:
      ConfigError: see `pallas_kernels.flash.flash` for the forms.
    """
    batch, length, heads, _ = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    if jnp.shape(scale) not in ((), (heads,), (batch, length, heads)):
        raise ConfigError(
            f"scale has shape {jnp.shape(scale)} but must be a number, [heads] = {(heads,)} or "
            f"[batch, queries, heads] = {(batch, length, heads)}."
        )
    if key_bias is None:
        return
    shape = key_bias.shape
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, kv_heads, heads) or shape[2] != keys:
        raise ConfigError(
            f"key_bias has shape {shape} but must be [batch, heads, keys] with batch 1 or {batch}, heads 1, "
            f"{kv_heads} or {heads}, and keys {keys}."
        )


def folded(q: Float[Array, "B T H D"], scale: float | Array) -> tuple[Float[Array, "B T H D"], float]:
    """q and the number its products are still to be multiplied with: an array goes into q, in f32."""
    if not isinstance(scale, jax.Array) and jnp.ndim(scale) == 0:
        return q, float(scale)
    per_row = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), q.shape[:3])[..., None]
    return (q.astype(jnp.float32) * per_row).astype(q.dtype), 1.0


def dense(key_bias: Float[Array, "b n S"] | None, batch: int) -> Float[Array, "B n S"] | None:
    """In f32, for every row of the batch, and finite: from NEVER on exp gives exactly 0."""
    if key_bias is None:
        return None
    return jnp.maximum(jnp.broadcast_to(key_bias, (batch, *key_bias.shape[1:])).astype(jnp.float32), NEVER)
