"""Drawing lots, for the controls that a choice by attention has to beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.policies._protocol import Site


def lots(positions: Int[Array, "B T"], site: Site) -> Float[Array, "B K T"]:
    """A number in [0, 1) for each token, by layer, key head and position alone; 1 for the first token of a text.

    The first comes along because a model that loses its sink fails for that reason, and shows nothing about a choice.
    """
    key = jax.random.fold_in(jax.random.key(0), site.layer)
    draw = lambda position: jax.random.uniform(jax.random.fold_in(key, position), (site.kv_heads,))
    drawn = jnp.swapaxes(jax.vmap(jax.vmap(draw))(positions), 1, 2)
    return jnp.where((positions == 0)[:, None], 1.0, drawn)
