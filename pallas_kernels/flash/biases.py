"""Scores of one tile in the TPU kernels: what is added to q·k, and what of its gradient belongs to which bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL
from jaxattn.rope import Alibi, PositionBias, RawRelativeBias, RelativeBias, relative_bucket
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.tiles import LANES, POSITION, SEGMENT, Places, Plan, row, sees

MOST_BUCKETS = 64
FAR = 2**30  # beyond any distance
Factor = Callable[[int], Any]  # n -> the head's n-th number of the position bias, a scalar in SMEM


def without_kernel(bias: PositionBias | None) -> str | None:
    """Why a bias cannot be evaluated on a tile, or None: what can needs distances and a few numbers per head."""
    if bias is None or isinstance(bias, (Alibi, RawRelativeBias)):
        return None
    if not isinstance(bias, RelativeBias):
        return (
            f"backend 'tpu' cannot add the position bias {type(bias).__name__}: it has Alibi, RawRelativeBias and "
            "RelativeBias, which need distances only; use 'xla'."
        )
    if 2 <= (buckets := bias.table.shape[0]) <= MOST_BUCKETS:
        return None
    return (
        f"backend 'tpu' compares every distance with 2 to {MOST_BUCKETS} buckets but RelativeBias has {buckets}: "
        "use 'xla'."
    )


def factors(bias: PositionBias | None, heads: int) -> Float[Array, "H N"]:
    """The numbers of every head."""
    match bias:
        case Alibi():
            return bias.slopes.astype(jnp.float32)[:, None]
        case RelativeBias():
            return bias.table.astype(jnp.float32).T
        case _:
            return jnp.ones((heads, 1), jnp.float32)


def edges(buckets: int, max_distance: int = 128) -> list[int]:
    """The least distance of each bucket of `relative_bucket` from 1 on: nothing but integers is left to compare."""
    exact = buckets // 2
    distance = np.arange(1, max_distance + 1, dtype=np.float32)
    ratio = np.log(distance / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + np.maximum(ratio * np.float32(buckets - exact), 0).astype(np.int32), buckets - 1)
    bucket = np.where(distance < exact, distance, far)
    return [int(np.argmax(bucket >= n)) + 1 for n in range(1, buckets)]


def ranges(buckets: int) -> list[tuple[int, int]]:
    """First distance and the one behind the last of every bucket."""
    starts = [-FAR, *edges(buckets)]
    return list(zip(starts, [*starts[1:], FAR], strict=True))


def distances(q_at: Places, k_at: Places) -> Array:
    return q_at[POSITION] - k_at[POSITION]


def basis(q_at: Places, k_at: Places, plan: Plan) -> Array:
    """What the head's only factor multiplies in the position bias of a tile; zero on `GLOBAL` keys."""
    distance = distances(q_at, k_at)
    if plan.bias is Alibi:
        x = -jnp.abs(distance).astype(jnp.float32)
    else:
        x = relative_bucket(distance, plan.buckets).astype(jnp.float32)
    return jnp.where(k_at[SEGMENT] != GLOBAL, x, 0.0)


def position_bias(factor: Factor, q_at: Places, k_at: Places, plan: Plan) -> Array:
    """The position bias of a tile; zero on `GLOBAL` keys."""
    if plan.bias is not RelativeBias:
        return factor(0) * basis(q_at, k_at, plan)
    distance = distances(q_at, k_at)
    x = jnp.full(distance.shape, factor(0))
    for n, edge in enumerate(edges(plan.buckets), start=1):
        x = jnp.where(distance >= edge, factor(n), x)
    return jnp.where(k_at[SEGMENT] != GLOBAL, x, 0.0)


def scores(
    product: Array,
    masked: bool,
    prefix: Any,
    factor: Factor | None,
    key_bias: Array | None,
    q_at: Places,
    k_at: Places,
    plan: Plan,
) -> tuple[Array, Array]:
    """Scores from q·k, with NEVER where exp must give exactly 0, and who sees whom.

    Args:
      masked: False where everyone sees everyone.
      factor: None without a position bias.
      key_bias: of the tile's keys, a row or a column.
    """
    s = product if plan.scale == 1.0 else product * plan.scale
    if plan.score.logit_bias:
        s = s + plan.score.logit_bias
    if factor is not None and plan.bias is not None:
        s = s + position_bias(factor, q_at, k_at, plan)
    if key_bias is not None:
        s = s + key_bias
    if not masked:
        return s, jnp.ones(s.shape, bool)
    see = sees(q_at, k_at, prefix, plan)
    return (jnp.where(see, s, NEVER) if plan.score.activation == "exp" else s), see


class FactorGradient:
    """Gradient of `factors`, summed over the keys of one block of queries; a chip's cores may share the blocks.

    A number per row where a head has one factor; per bucket, rounded up to whole registers, where it has many.
    """

    def __init__(self, plan: Plan):
        self.plan, self.many = plan, plan.bias is RelativeBias
        self.rows = -(-plan.buckets // 8) * 8
        self.scratch = (self.rows, plan.block_k) if self.many else (plan.block_q, LANES)
        self.block = (self.rows, LANES) if self.many else (1, plan.block_q)

    def shape(self, batch: int, heads: int, queries: int) -> tuple[int, ...]:
        """Of the kernel's output."""
        steps = queries // self.plan.block_q
        return (batch, heads, steps * self.rows, LANES) if self.many else (batch, heads, 1, queries)

    def index(self, i: Any) -> tuple[Any, Any]:
        """Where in a head's output the block of queries i writes."""
        return (i, 0) if self.many else (0, i)

    def add(self, total: Any, ds: Array, q_at: Places, k_at: Places) -> None:
        """Add a tile's part to the scratch."""
        if self.plan.bias is Alibi:
            total[...] += jnp.sum(ds * basis(q_at, k_at, self.plan), axis=1, keepdims=True)
        if not self.many:
            return
        distance = distances(q_at, k_at)
        ds = jnp.where(k_at[SEGMENT] != GLOBAL, ds, 0.0)
        for n, (first, behind) in enumerate(ranges(self.plan.buckets)):
            inside = (distance >= first) & (distance < behind)
            total[n : n + 1] += jnp.sum(jnp.where(inside, ds, 0.0), axis=0, keepdims=True)

    def finished(self, total: Array) -> Array:
        """The block of the output from the scratch."""
        if not self.many:
            return row(total[:, :1])
        return jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), self.block)

    def sum(self, output: Array) -> Float[Array, "H N"]:
        """The gradient from the kernel's output."""
        if not self.many:
            return jnp.sum(output, axis=(0, 2, 3))[:, None]
        batch, heads = output.shape[:2]
        return jnp.sum(output[..., 0].reshape(batch, heads, -1, self.rows), axis=(0, 2))[:, : self.plan.buckets]
