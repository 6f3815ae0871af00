"""What the tests of the probe share."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxattn.masks import Visibility
from pallas_kernels.flash.reference import NEVER
from tests.conformance.cases import inputs, normal


def draw_bias(batch, heads, keys, seed=5):
    """A key bias for `heads` heads; every seventh key of the first one is hidden."""
    bias = np.array(normal(seed, (batch, heads, keys)))
    bias[:, 0, 2::7] = NEVER
    return jnp.asarray(bias)


def slots_of_each_head():
    """A cache of 60 slots of which each key head uses others; and a query that finds none of its keys there."""
    q, k, _ = inputs(5, batch=1, heads=4, kv_heads=2, dim=8, keys=60)
    empty = np.zeros((2, 60), bool)
    empty[0, 1::2], empty[1, :40], empty[1, 55:] = True, True, True
    vis = Visibility(
        jnp.array([[59, 50, 30, 59, 41]]),
        jnp.arange(60)[None],
        jnp.ones((1, 5), jnp.int32),
        jnp.ones((1, 60), jnp.int32),
    )
    return q, k, vis, empty
