"""What the Hopper kernels add to scaled scores: a number per key and head, and a function of the distance.

The gradient of the first belongs to the kernel of dk, whose rows are keys; that of a head's factor to the one of dq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxattn.masks import GLOBAL
from jaxattn.rope import Alibi, PositionBias, RawRelativeBias
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import (
    LOG2E,
    POSITION,
    SEGMENT,
    Plan,
    Tile,
    column_tile,
    in_pieces,
    key_tile,
    masked,
    readers,
    veiled,
)

MOST_HEADS = 16  # of a group with a key bias each: what a block of threads holds for them is 1 kB a head
BUCKETS = range(2, 61)  # whose edges `bucket` puts between the right distances, checked one by one
MOST_DISTANCE = 128  # of `relative_bucket`: from here on distances share a bucket
NUDGE = 1e-4  # more than the hardware's logarithm is wrong by, less than the next distance is away
PIECE = 16  # columns of which all that is added and the mask fit in registers: fewer than of a mask alone
VALUE, SUM = 0, 1  # what the kernel of dk holds of a head's key biases: they, and their gradients so far


class Biases(NamedTuple):
    """Arrays that are added to scores, or what a kernel has of them.

    by_key: of every key, for each key head or for each query head.
    by_head: what the distance is multiplied by.
    """

    by_key: Any = None  # [B, K or H, S] in whole blocks
    by_head: Any = None  # [H]

    @property
    def arrays(self) -> list[Any]:
        return [x for x in self if x is not None]


NONE = Biases()


def without_kernel(q: Array, k: Array, bias: PositionBias | None, key_bias: Array | None) -> str | None:
    """Why biases cannot be added, or None."""
    group = q.shape[2] // k.shape[2]
    if key_bias is not None and key_bias.shape[1] not in (1, k.shape[2]) and group > MOST_HEADS:
        return (
            f"backend 'gpu' has a key_bias per query head for up to {MOST_HEADS} query heads of a key head but "
            f"these are {group}: use 'xla'."
        )
    if bias is None or isinstance(bias, Alibi):
        return None
    if not isinstance(bias, RawRelativeBias):
        name = type(bias).__name__
        return f"backend 'gpu' has the position biases Alibi and RawRelativeBias but this is {name}: use 'xla'."
    if bias.buckets not in BUCKETS:
        return (
            f"backend 'gpu' has RawRelativeBias with {BUCKETS[0]} to {BUCKETS[-1]} buckets but this has "
            f"{bias.buckets}: use 'xla'."
        )
    return None


def settings(k: Array, bias: PositionBias | None, key_bias: Array | None, group: int) -> dict[str, Any]:
    """The fields of `Plan` that say what is added."""
    own = key_bias is not None and key_bias.shape[1] not in (1, k.shape[2])
    return {
        "biases": 0 if key_bias is None else group if own else 1,
        "bias": None if bias is None else type(bias),
        "buckets": getattr(bias, "buckets", 0),
    }


def gathered(
    k: Float[Array, "B S K D"], bias: PositionBias | None, key_bias: Float[Array, "B n S"] | None, fill: int
) -> Biases:
    """The arrays as kernels read them, with `fill` keys behind; gradients reach what they were made of."""
    by_key = None
    if key_bias is not None:
        heads = max(key_bias.shape[1], k.shape[2])
        by_key = jnp.broadcast_to(key_bias.astype(jnp.float32), (len(k), heads, k.shape[1]))
        by_key = jnp.pad(by_key, ((0, 0), (0, 0), (0, fill)))
    return Biases(by_key, bias.slopes.astype(jnp.float32) if isinstance(bias, Alibi) else None)


def in_units(plan: Plan, biases: Biases) -> Biases:
    """Of the scores a kernel computes: powers of two for exp."""
    return Biases(*(x if x is None else x * _unit(plan) for x in biases))


def _unit(plan: Plan) -> float:
    return LOG2E if plan.score.activation == "exp" else 1.0


def taken(plan: Plan, refs: tuple[Any, ...]) -> tuple[Biases, tuple[Any, ...]]:
    """The refs of `Biases.arrays` at the front of a kernel's, and the others."""
    rest = list(refs)
    by_key = rest.pop(0) if plan.biases else None
    by_head = rest.pop(0) if plan.bias is Alibi else None
    return Biases(by_key, by_head), tuple(rest)


def keys_of(plan: Plan, dim: int, v_dim: int) -> int:
    """Keys of a tile in the forward pass: fewer where buckets take the registers of the rest."""
    return (column_tile if plan.buckets else key_tile)(dim, v_dim)


def held(plan: Plan, scratch: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Where a kernel holds key biases, if there are any, and the rest of its scratch."""
    return (scratch[0], scratch[1:]) if plan.biases else (None, scratch)


def head_of(plan: Plan, h: Any) -> Any:
    """The head of the key bias that belongs to query head h."""
    return h if plan.biases == plan.group else jax.lax.div(h, jnp.int32(plan.group))


def hiding(
    plan: Plan, hides: bool, q_at: Any, k_at: Any, prefix: Any, biases: Biases = NONE, *, by_key: bool = False
) -> Callable[[Tile], Tile]:
    """From scaled scores of a tile to what its activation sees: with biases, and masked if `hides`.

    Args:
      q_at, k_at: refs [2, n] of a tile's queries and keys.
      biases: a ref [n] of the tile's keys, and the head's factor.
      by_key: rows are keys.
    """
    if not plan.added:
        hide = partial(masked, q_at=q_at, k_at=k_at, prefix=prefix, plan=plan, by_key=by_key)
        return hide if hides else lambda s: s

    def add(s: Tile, at: int) -> Tile:
        rows, columns = s.shape
        q, k = readers(q_at, k_at, at, rows, columns, by_key=by_key)
        if plan.biases:
            s = s + _per_key(biases.by_key, at, rows, columns, by_key)
        if plan.bias is not None:
            factor = _unit(plan) if biases.by_head is None else biases.by_head
            s = s + factor * _basis(plan, q, k)
        return veiled(s, q, k, prefix, plan) if hides else s

    return partial(in_pieces, add, size=PIECE)


def factor_gradient(plan: Plan, ds: Tile, q_at: Any, k_at: Any) -> Float[Array, "m"]:
    """Each query's part of the gradient of its head's factor, from the scores' gradients."""
    part = lambda ds, at: ds * _basis(plan, *readers(q_at, k_at, at, *ds.shape))
    return jnp.sum(in_pieces(part, ds, PIECE), axis=1)


def _per_key(ref: Any, at: int, rows: int, columns: int, by_key: bool) -> Tile:
    if by_key:
        return mg.down(mg.load_rows(ref), columns)
    return mg.across(mg.load_columns(ref.at[pl.ds(at, columns)]), rows)


def _basis(plan: Plan, q: Callable[[int], Tile], k: Callable[[int], Tile]) -> Tile:
    """What a head's factor multiplies; zero on `GLOBAL` keys."""
    distance = q(POSITION) - k(POSITION)
    x = -jnp.abs(distance).astype(jnp.float32) if plan.bias is Alibi else bucket(distance, plan.buckets)
    return jnp.where(k(SEGMENT) != GLOBAL, x, 0.0)


def bucket(distance: Int[Array, "m n"], buckets: int) -> Tile:
    """`relative_bucket`: the whole part of a logarithm, which is nudged for the sake of exact ones."""
    exact = buckets // 2
    steep = (buckets - exact) / math.log2(MOST_DISTANCE / exact)
    near = jnp.maximum(distance, 0).astype(jnp.float32)
    far = jnp.log2(jnp.maximum(near, 1.0)) * steep + (exact - math.log2(exact) * steep + NUDGE)
    far = jnp.minimum(far, buckets - 1.0).astype(jnp.int32).astype(jnp.float32)
    return jnp.where(near < exact, near, far)
