"""`paged_decode` on Hopper: what the kernel reads, and how the parts of a list become one result.

The kernel is in `gpu_kernel`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.rope import Rope
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.paged_decode.gpu_kernel import decode
from pallas_kernels.paged_decode.gpu_tiles import LEAST, Plan, chunk, most
from pallas_kernels.paged_decode.gradient import without_gradient
from pallas_kernels.paged_decode.units import Units

WIDEST = 256  # head dim
NARROWEST = 16  # and what a head dim is a multiple of: the narrowest tile of a product
PAIRS = 8  # of dims: registers of a product come in eights of columns
MULTIPROCESSORS = 132  # of an H100
ENDS = 2  # chunks that could be read while a block of threads starts and ends


def unfit(q: Array, k_pages: Array, v_pages: Array, rope: Rope | None = None) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if reason := mg.missing() or mg.inexact(q=q):
        return reason
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        if x.dtype != jnp.bfloat16:  # never rounded here, at every step: the cache would be copied
            return f"backend 'gpu' computes bfloat16 but {name} is {x.dtype}: keep the cache in that or use 'xla'."
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.shape[-1] % NARROWEST or x.shape[-1] > WIDEST:
            return (
                f"backend 'gpu' has head dims that are multiples of {NARROWEST} up to {WIDEST} but {name} has "
                f"{x.shape[-1]}: use 'xla'."
            )
    if rope is not None and (half := _pairs(rope, q.shape[-1])) % PAIRS:
        return f"backend 'gpu' turns multiples of {PAIRS} pairs of dims but rope turns {half}: use 'xla'."
    return None


def units(page: int, chunk: int) -> Units:
    """How to read pages of this size: whole, or in equal parts a whole number of which is a chunk."""
    rows = math.gcd(page, chunk)
    return Units(page, rows, chunk // rows)


def parts(blocks: int, chunks: int, places: int) -> int:
    """Into how many parts to split lists of at most `chunks`, for that many blocks of threads without splitting.

    Blocks run in waves of `places`, each for as long as its chunks take and some more to start and to end.
    """
    return min(range(1, chunks + 1), key=lambda n: -(-blocks * n // places) * (-(-chunks // n) + ENDS))


def _pairs(rope: Rope, dim: int) -> int:
    """Pairs of dims that are turned."""
    return int(dim * rope.fraction) // 2


def paged_decode_gpu(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "N K P page D"],
    v_pages: Float[Array, "N K P page V"],
    tables: Int[Array, "B k n"],
    lengths: Int[Array, "B l t"] | None,
    *,
    scale: float,
    key_bias: Float[Array, "B b slots"] | None,
    rope: Rope | None,
    key_positions: Int[Array, "B r slots"] | None,
    splits: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.paged_decode.paged_decode`. The cache stays where it is; memory beside it is O(list).

    Cosines and sines of listed positions are made outside, by the same code as everywhere, and applied inside.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k_pages, v_pages, rope):
        raise NotImplementedError(f"paged_decode: {reason}")
    interpret = mg.mode(interpret_for("paged_decode", "gpu"))
    q, k_pages, v_pages = without_gradient("gpu", q.astype(jnp.bfloat16), k_pages, v_pages)
    batch, length, heads, dim = q.shape
    kv_heads, v_dim = k_pages.shape[1], v_pages.shape[4]
    group = heads // kv_heads
    cut = units(k_pages.shape[3], chunk(dim, v_dim))
    ends, bias = _live(cut, tables, lengths, key_bias)
    half = 0 if rope is None else _pairs(rope, dim)
    angles = None if rope is None or not half else _angles(rope, key_positions, cut, dim)
    rows, whole = group * length, most(dim, v_dim, half > 0)
    short = -rows % (LEAST if rows <= whole else whole)
    fold = lambda x: jnp.pad(x.reshape(batch, -1, rows, x.shape[-1]), ((0, 0), (0, 0), (0, short), (0, 0)))
    limits = None
    if lengths is not None and lengths.shape[2] > 1:  # of the rows [group, query]
        limits = fold(jnp.tile(lengths, (1, 1, group))[..., None].astype(jnp.int32))[..., 0]
    plan = Plan(cut, dim, v_dim, rows + short, float(scale), half, interpret)
    if splits is None:
        blocks = batch * kv_heads * plan.queries // plan.block
        splits = parts(blocks, bias.shape[2], plan.ring()[1] * MULTIPROCESSORS)
    plan = dataclasses.replace(plan, splits=splits)
    folded = fold(jnp.moveaxis(q.reshape(batch, length, kv_heads, group, dim), 1, 3))
    arrays = folded, cut.view(k_pages), cut.view(v_pages), tables.astype(jnp.int32), ends, bias
    o, lse = _joined(*decode(plan, *arrays, limits, angles))
    o = o[:, :, :v_dim]
    back = lambda x: jnp.moveaxis(x[..., :rows].reshape(batch, kv_heads, -1, group, length), (4, 1, 3), (1, 2, 3))
    return back(o).reshape(batch, length, heads, -1).astype(v_pages.dtype), back(lse).reshape(batch, length, heads)


def _live(
    cut: Units, tables: Int[Array, "B k n"], lengths: Int[Array, "B l t"] | None, key_bias: Float[Array, "B b s"] | None
) -> tuple[Int[Array, "B h"], Float[Array, "B H chunks rows"]]:
    """Where lists end, and what is added to the score of every slot, in whole chunks: NEVER where nobody sees it."""
    count, page = tables.shape[2], cut.page
    live = jnp.repeat(tables >= 0, page, axis=2)
    ends = jnp.max(jnp.where(tables >= 0, jnp.arange(1, count + 1, dtype=jnp.int32) * page, 0), axis=2)
    if lengths is not None:
        seen = jnp.max(lengths, axis=2).astype(jnp.int32)
        live = live & (jnp.arange(count * page) < seen[..., None])
        ends = jnp.minimum(jnp.maximum(seen, 0), ends)
    bias = jnp.where(live, 0.0 if key_bias is None else key_bias.astype(jnp.float32), NEVER)
    return ends, _chunks(bias, cut.chunk, NEVER)


def _chunks(x: Array, size: int, value: float | int) -> Array:
    """Numbers per slot [B, _, slots] in rows of `size`."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size)), constant_values=value)
    return x.reshape(*x.shape[:2], -1, size)


def _angles(rope: Rope, positions: Array | None, cut: Units, dim: int) -> tuple[Array, Array]:
    """cos and sin of every slot, [B, 1 or K, chunks, rows, half]."""
    assert positions is not None
    positions = _chunks(positions, cut.chunk, 0)
    cos, sin = rope.tables(positions.reshape(positions.shape[0] * positions.shape[1], -1), dim)
    back = lambda x: x.reshape(*positions.shape, x.shape[-1])
    return back(cos), back(sin)


def _joined(o: Float[Array, "B X K v R"], lse: Float[Array, "B X K R"]) -> tuple[Array, Array]:
    """[B, K, v, R] and [B, K, R] over all splits: `flash.merge` as one pass over parts that are one array."""

    def join(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        total = jnp.logaddexp(one[0], two[0])
        return total, one[1] * jnp.exp(one[0] - total) + two[1] * jnp.exp(two[0] - total)

    start = jnp.float32(NEVER), jnp.float32(0)
    wide = jnp.broadcast_to(lse[:, :, :, None], o.shape)
    total, o = jax.lax.reduce((wide, o), start, join, dimensions=(1,))
    return o, total[:, :, 0]
