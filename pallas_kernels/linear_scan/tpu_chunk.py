"""What the TPU kernels do with one chunk of one head: weights from decays, Taylor features, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.flash.tiles import column, dot
from pallas_kernels.linear_scan.xla import NEVER


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernels are compiled."""

    scale: float
    chunk: int
    group: int  # query heads of one key head
    decay: str  # "none", "head" or "token"
    taylor: bool  # q and k stand for their Taylor features
    out: Any  # dtype of the outputs
    interpret: Any

    @property
    def decays(self) -> bool:
        return self.decay != "none"


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much of what is left where in a chunk: numbers between 0 and 1.

    The sum of log decays up to token t is rate · steps_t, steps [1, C]; document [1, C] is the running number of a
    token's document, before and after are those that the states before and behind the chunk belong to.
    """

    plan: Plan
    rate: Any
    steps: Array
    document: Array
    before: Any
    after: Any

    def within(self) -> Array:
        """[C, C], in row t of what token s <= t wrote."""
        square = (self.steps.shape[1], self.steps.shape[1])
        here, there = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
        places, total = self._columns()
        return self._fade((places == self.document) & (there <= here), total - self.steps)

    def across(self) -> tuple[Array, Array, Array]:
        """Of the state before the chunk at token t [C, 1], of what token s wrote behind the chunk [C, 1], and of the
        state behind it [1, 1]."""
        places, total = self._columns()
        old = self._fade(places == self.before, total)
        return old, self._fade(places == self.after, total[-1:] - total), old[-1:]

    def _columns(self) -> tuple[Array, Array]:
        return column(self.document)[:, :1], column(self.steps)[:, :1]

    def _fade(self, mask: Array, distance: Array) -> Array:
        if not self.plan.decays:
            return jnp.where(mask, 1.0, 0.0)
        return jnp.exp(jnp.where(mask, self.rate * distance, NEVER))


def pairs(plan: Plan, product: Array) -> Array:
    """φ(q)·φ(k) from q·k; the ones behind q and k make the product of Taylor features 1 + s + s²/2 from s + 1."""
    return 0.5 * (product * product + 1.0) if plan.taylor else product


class Features:
    """φ(x) of a chunk, and the way back of its gradient; φ(x) = x without `plan.taylor`."""

    def __init__(self, plan: Plan, x: Array, select: Any, weight: Any):
        """x [C, d]; select [2, d, F] and weight [1, F] (see `features.selections`)."""
        self.plan, self.dtype, self.select, self.weight = plan, x.dtype, select, weight
        if not plan.taylor:
            self.values = x
            return
        self.first, self.second = (dot(x, select[n], (1, 0)) for n in (0, 1))
        self.values = (self.first * self.second * weight[...]).astype(x.dtype)  # [C, F]

    def pull(self, d: Array) -> Array:
        """The gradient of x from that of the values."""
        if not self.plan.taylor:
            return d
        d = d * self.weight[...]
        first, second = ((d * x).astype(self.dtype) for x in (self.second, self.first))
        return dot(first, self.select[0], (1, 1)) + dot(second, self.select[1], (1, 1))


def cost(
    plan: Plan, q: Array, select: Array, v_dim: int, *, products: tuple[int, int, int], maps: int, moved: int
) -> pl.CostEstimate:
    """Work of a kernel over all chunks of all heads.

    Args:
      products: per chunk, how many products of a chunk's weights with rows of d and of V numbers, and of a
        chunk's rows with a state.
      maps: how many times a chunk's rows pass the selections, one way.
      moved: bytes of everything that is read or written.
    """
    batch, heads, length, dim = q.shape
    width = select.shape[2] if plan.taylor else dim
    inside = plan.chunk * (products[0] * dim + products[1] * v_dim)
    a_token = inside + products[2] * width * v_dim + (2 * maps * dim * width if plan.taylor else 0)
    exponents = (plan.chunk * (products[0] > 0) + 2) if plan.decays else 0
    return pl.CostEstimate(
        flops=2 * batch * heads * length * a_token,
        transcendentals=batch * heads * length * exponents,
        bytes_accessed=moved,
    )
