"""The two levels of the softmax on one tile of slots, for the forward and the backward kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.grouped_softmax.layout import FIRST, OWN, SEEN, Plan
from pallas_kernels.grouped_softmax.reference import NEVER


def levels(plan: Plan, product: Array, tokens: Array, at: Array, j: Array) -> tuple[Array, Array, Array]:
    """What is inside the slots, their scores for the gate, and which is a query's own.

    Args:
      product: q·k, [slots · rows, q].
      tokens: ordinary tokens of each slot, [slots, 1, LANES]; -1 without landmark.
      at: rows FIRST, OWN, SEEN of the queries, [3, q].
      j: the tile.

    Returns:
      p [slots, rows, q], zero at landmarks; r [slots, 1, q], NEVER where a query sees nothing of a slot; own, boolean
      [slots, 1, q].
    """
    s = product.reshape(plan.slots, plan.slot, plan.block_q) * plan.scale
    number = jax.lax.broadcasted_iota(jnp.int32, (plan.slots, 1, plan.block_q), 0) + j * plan.slots
    line = lambda n: at[n : n + 1][None]
    own = number == line(OWN)
    tokens = tokens[:, :, :1]
    past = (number >= line(FIRST)) & (number < line(OWN)) & (tokens >= 0)
    see = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1) < jnp.where(own, line(SEEN), tokens)
    x = jnp.where(see, s, NEVER)
    top = jnp.maximum(jnp.max(x, axis=1, keepdims=True), FLOOR)
    e = jnp.exp(x - top)  # masked: exp(NEVER - FLOOR) is exactly 0
    z = jnp.sum(e, axis=1, keepdims=True)
    safe = jnp.where(z == 0, 1.0, z)
    r = jnp.where(own & (z > 0), top + jnp.log(safe), NEVER)
    return e * (1.0 / safe), jnp.where(past, s[:, plan.slot - 1 :], r), own
