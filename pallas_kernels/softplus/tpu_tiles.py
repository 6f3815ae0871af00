"""What the softplus kernels for TPUs share: φ and w of a tile, block specifications, costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxattn.masks import Visibility
from jaxattn.rope import Alibi, PositionBias, RawRelativeBias
from pallas_kernels.flash.biases import scores
from pallas_kernels.flash.tiles import LANES, Plan, Spans, div, places, tables
from pallas_kernels.softplus.reference import raw_weights, softplus

BLOCK = 256
DTYPES = (jnp.float32, jnp.bfloat16)
ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"))


class Rule(NamedTuple):
    """What is static; p and exempt: see `softplus_attention`."""

    plan: Plan
    p: float | None
    exempt: int


class Inputs(NamedTuple):
    """What every kernel gets besides arrays of heads."""

    scalars: tuple[Array, ...]
    places: tuple[Array, Array]


def unfit(q: Array, k: Array, v: Array, bias: PositionBias | None) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if bias is not None and not isinstance(bias, (Alibi, RawRelativeBias)):
        return (
            f"backend 'tpu' cannot add the position bias {type(bias).__name__}: it has Alibi and RawRelativeBias, one "
            "number per head times a distance; use 'xla'."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    return None


def block_sizes(q: Array, k: Array, v: Array, block_q: int | None, block_k: int | None) -> tuple[int, int]:
    """Rows and columns of a tile: as few blocks as fit, with the least padding."""
    default = BLOCK if max(q.shape[3], v.shape[3]) <= 128 else BLOCK // 2

    def fitted(block: int, length: int) -> int:
        count = -(-length // block)
        return min(block, -(-length // (count * LANES)) * LANES)

    return block_q or fitted(default, q.shape[1]), block_k or fitted(default, k.shape[1])


def blocked(x: Array, block: int) -> Array:
    """[B, T, H, D] heads first, in whole blocks of tokens, with head dims that registers hold."""
    dim = x.shape[3]
    pad = (64 if dim <= 64 else -(-dim // LANES) * LANES) - dim
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, pad)))


def phi(product: Array, masked: bool, prefix: Any, factor: Any, q_at: Any, k_at: Any, plan: Plan):
    """φ (0 where masked), the scores behind it, and who sees whom."""
    s, see = scores(product, masked, prefix, lambda _: factor, None, q_at, k_at, plan)
    return jnp.where(see, softplus(s), 0.0), s, see


def weights(x: Array, m: Array, inverse: Array, p: float | None) -> tuple[Array, Any]:
    """w of a tile before its row sum, and the function from dw to dφ with m and the factor held."""
    return jax.vjp(lambda x: raw_weights(x, m, inverse, p), x)


def query_inputs(plan: Plan, vis: Visibility, slopes: Array, table: Array | None = None) -> Inputs:
    """Prefetched numbers (table of tiles, prefixes, slopes), and the places of queries and keys."""
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(vis.q_positions.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    return Inputs((tables(vis, plan)[0] if table is None else table, prefix, slopes), at)


def rows_of(q: Array) -> jax.ShapeDtypeStruct:
    """A number per row."""
    return jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)


def by_query(
    plan: Plan,
    q: Array,
    k: Array,
    row_inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    scratch: Sequence[Any],
    values: Array | None,
    query_values: int = 0,
) -> pltpu.PrefetchScalarGridSpec:
    """Blocks of queries over their tiles of keys. Inputs: q, k, [v, [do]], rows of numbers, places.

    The last scratch holds the places of the queries as columns.

    Args:
      row_inputs: how many numbers per row each input of rows has.
      outputs: width of an output of heads, or 1 for a number per row.
      query_values: width of an input like the output, after v.
    """
    batch, heads, length, dim = q.shape
    steps, bq, bk = length // plan.block_q, plan.block_q, plan.block_k
    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_query = lambda d: pl.BlockSpec((None, None, bq, d), lambda b, h, i, j, table, *_: (b, h, i, 0))
    of_row = lambda n: pl.BlockSpec((None, None, n, bq), lambda b, h, i, j, table, *_: (b, h, 0, i))
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table, *_: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, heads, steps, k.shape[2] // bk),
        in_specs=[
            of_query(dim),
            of_key(dim),
            *([] if values is None else [of_key(values.shape[3])]),
            *([of_query(query_values)] if query_values else []),
            *(of_row(n) for n in row_inputs),
            pl.BlockSpec((None, 2, bq), lambda b, h, i, j, table, *_: (b, 0, i)),
            pl.BlockSpec((None, 2, bk), lambda b, h, i, j, table, *_: (b, 0, fetch(b, i, j, table))),
        ],
        out_specs=[of_row(1) if width == 1 else of_query(width) for width in outputs],
        scratch_shapes=[*scratch, pltpu.VMEM((2, bq, LANES), jnp.int32)],
    )


def fetched(*arrays: Any) -> int:
    """Bytes of arrays that are read or written once."""
    return sum(x.size * x.dtype.itemsize for x in arrays)


def estimate(
    plan: Plan, q: Array, k: Array, v: Array, *, products: tuple[int, int], moved: int, again: Sequence[Array]
) -> pl.CostEstimate:
    """Work of the tiles visited.

    Args:
      products: matrix products a tile does over the key dim and over the value dim.
      moved: bytes read or written once.
      again: what a tile fetches a block of.
    """
    batch, heads, length, dim = q.shape
    tiles = batch * heads * plan.tiles(length, k.shape[2])
    size = plan.block_q * plan.block_k
    return pl.CostEstimate(
        flops=2 * tiles * size * (products[0] * dim + products[1] * v.shape[3]),
        transcendentals=2 * tiles * size,  # exp and log1p
        bytes_accessed=moved + tiles * plan.block_k * sum(x.shape[3] * x.dtype.itemsize for x in again),
    )
