"""What the softplus kernels for Hopper share: φ, its slope and weights of a tile in registers, and what a call costs.

Numbers that belong to rows or columns of a tile come in its shape already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxattn.rope import PositionBias
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import LOG2E, WIDTHS, Plan, Tile, Visit, ring

# log(1 + u) / u on [0, 1], relative error 2.3e-7: the hardware's logarithm is as wrong as that, but absolutely
LOG1P = (
    0.99999996592551, -0.49999444976330, 0.33318121707353, -0.24835398987201, 0.19076880730854,
    -0.13602247612385, 0.07751608662360, -0.02907406460658, 0.00512610212337,
)  # fmt: skip


class Rule(NamedTuple):
    """What is static; p and exempt: see `softplus_attention`."""

    plan: Plan
    p: float | None
    exempt: int


def unfit(q: Array, k: Array, v: Array, bias: PositionBias | None) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(v=v):
        return reason
    if bias is not None:
        return f"backend 'gpu' has no position bias but this is {type(bias).__name__}: use 'xla'."
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"backend 'gpu' takes bfloat16, and float32 to round, but {name} is {x.dtype}: cast it or use 'xla'."
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[3] > WIDTHS[-1]:
            return f"backend 'gpu' has head dims up to {WIDTHS[-1]} but {name} has {x.shape[3]}: use 'xla'."
    return None


def walk_from(first: Any, visit: Visit, body: Callable[[bool, Any, Any, Any], Any], carry: Any) -> Any:
    """`flash.gpu_tiles.walk` whose tile 0 is step `first` of the ring."""
    whole, count = first + visit.whole, first + visit.count
    carry = ring(first + jnp.int32(0), whole, partial(body, False), carry)
    return ring(whole, count, partial(body, True), carry)


def softplus(s: Tile) -> tuple[Tile, Tile]:
    """φ = log(1 + e^s), relatively exact in both tails and 0 where masked, and its slope σ."""
    u = jnp.exp2(jnp.abs(s) * -LOG2E)
    series = jnp.full_like(u, LOG1P[-1])
    for term in LOG1P[-2::-1]:
        series = series * u + term
    return jnp.maximum(s, 0.0) + series * u, jnp.where(s >= 0.0, 1.0, u) / (1.0 + u)


def weights(phi: Tile, m: Tile, inverse: Tile, p: float | None) -> tuple[Tile, Tile]:
    """w before its row sum and dw/dφ, as `reference.raw_weights`: inverse 0 marks rows that keep φ."""
    if p is None:
        return phi, jnp.ones_like(phi)
    above, flat = phi > m, inverse == 0.0
    r = jnp.where(above, phi - m, 0.0) * inverse
    lower = _power(r, p - 1.0)
    return jnp.where(flat, phi, lower * r), jnp.where(flat, 1.0, jnp.where(above, p * inverse * lower, 0.0))


def _power(r: Tile, p: float) -> Tile:
    """r^p for r in [0, 1]; whole p by repeated squaring, others are 0 at 0."""
    if p < 0 or not float(p).is_integer():
        return jnp.where(r > 0.0, jnp.exp2(p * jnp.log2(jnp.where(r > 0.0, r, 1.0))), 0.0)
    result, square, n = None, r, int(p)
    while n:
        if n % 2:
            result = square if result is None else result * square
        n //= 2
        square = square * square if n else square
    return jnp.ones_like(r) if result is None else result


def cost(
    rule: Rule,
    q: Array,
    k: Array,
    v: Array,
    *,
    block: tuple[int, int],
    products: tuple[int, int],
    exponents: int,
    moved: int,
    again: Sequence[int],
) -> pl.CostEstimate:
    """Work of a kernel on tiles of `block`.

    Args:
      products: matrix products a tile does over the key dim and over the value dim.
      exponents: how often a score's φ is computed.
      moved: bytes of everything that is read or written once.
      again: bytes that are fetched for every tile.
    """
    tiles = q.shape[0] * q.shape[2] * rule.plan.tiles(q.shape[1], k.shape[1], *block)
    scores = tiles * block[0] * block[1]
    powers = 0 if rule.p is None or float(rule.p).is_integer() else 2
    return pl.CostEstimate(
        flops=2 * scores * (products[0] * q.shape[3] + products[1] * v.shape[3]),
        transcendentals=scores * (exponents + powers),
        bytes_accessed=moved + tiles * sum(again),
    )
