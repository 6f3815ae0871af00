"""Rows of a table by index, as an embedding reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def lookup(table: Float[Array, "N E"], index: Int[Array, "*b"]) -> Float[Array, "*b E"]:
    """table[index].

    In a loop XLA's CPU backend would widen a whole 16-bit table in front of the loop: seen as one that changes with the
    index, only its rows are widened.
    """
    if table.dtype.itemsize == 2:
        table, index = jax.lax.optimization_barrier((table, index))
    return jnp.take(table, index, axis=0)
