"""What both passes over the keys share on a TPU: settings, inputs and a tile's scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxattn.masks import Visibility
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.tiles import (
    LANES,
    POSITION,
    SEGMENT,
    Spans,
    certain,
    div,
    dot,
    places,
    reachable,
    sees,
    spans,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled."""

    want: frozenset[str]
    scale: float
    count: int  # queries that are not padding
    keys: int  # keys that are not padding
    block_k: int
    block: int
    group: int
    sharing: int  # query heads that share a head of the key bias; 0: there is none
    causal: bool
    window: int | None
    has_prefix: bool
    interpret: Any


def inputs_of(plan: Plan, q: Array, k: Array, vis: Visibility, key_bias: Array | None):
    """The inputs that both passes share, with their blocks; scalars first.

    Args:
      key_bias: [B, n, 1, S].
    """
    batch, _, rows, dim = q.shape
    table = spans(reachable(vis, rows, plan.block_k), certain(vis, rows, plan.block_k))
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros((batch,), jnp.int32)
    q_at = jnp.broadcast_to(places(vis.q_positions, vis.q_segments)[..., None], (batch, 2, rows, LANES))
    fetch = lambda b, j, table: Spans(table, b).fetch(j)
    specs = [
        pl.BlockSpec((None, None, rows, dim), lambda b, h, j, *_: (b, h, 0, 0)),
        pl.BlockSpec(
            (None, None, plan.block_k, dim), lambda b, h, j, table, *_: (b, div(h, plan.group), fetch(b, j, table), 0)
        ),
        pl.BlockSpec((None, 2, rows, LANES), lambda b, h, j, *_: (b, 0, 0, 0)),
        pl.BlockSpec((None, 2, plan.block_k), lambda b, h, j, table, *_: (b, 0, fetch(b, j, table))),
    ]
    inputs = [q, k, q_at, places(vis.k_positions, vis.k_segments)]
    if key_bias is not None:
        inputs.append(key_bias)
        of_key_bias = lambda b, h, j, table, *_: (b, div(h, plan.sharing), 0, fetch(b, j, table))
        specs.append(pl.BlockSpec((None, None, 1, plan.block_k), of_key_bias))
    return (table, prefix), inputs, specs


def cost(q: Array, k: Array, group: int, moved: list[Any], more: int = 0) -> pl.CostEstimate:
    """Every tile as if it were visited: which are is known at run time only."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return pl.CostEstimate(
        flops=2 * scores * q.shape[3] + more * scores,
        transcendentals=scores,
        bytes_accessed=group * k.size * k.dtype.itemsize + sum(x.size * x.dtype.itemsize for x in moved),
    )


def scores(plan: Plan, masked: bool, prefix: Any, q, k, q_at, k_at, key_bias) -> Array:
    """A tile's scores, NEVER where nothing is seen."""
    s = dot(q[...], k[...], (1, 1)) * plan.scale
    if key_bias is not None:
        s = s + key_bias[...]
    if not masked:
        return s
    q_pos, q_seg = (q_at[n][:, :1] for n in (POSITION, SEGMENT))
    k_pos, k_seg = (k_at[n][None] for n in (POSITION, SEGMENT))
    return jnp.where(sees((q_pos, q_seg), (k_pos, k_seg), prefix, plan), s, NEVER)
