"""The TPU kernel: chunks of listed rows come from HBM while the chunk before is computed, key head after key head.

Grid (sequence, split of the list). A step walks over the key heads and the chunks of their lists; it starts the
transfers of the next chunk, of the next head after a head's last, before it waits for its own. Unused entries and
chunks behind a head's last live entry are not transferred, so heads may have budgets of their own.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxattn.rope import Rope
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.merge import merge
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.tiles import LANES, column, dot, rem
from pallas_kernels.paged_decode.gradient import without_gradient
from pallas_kernels.paged_decode.units import Lists, Units, lists, tile, units

DTYPES = (jnp.float32, jnp.bfloat16)
ON_CHIP = 2**20  # bytes of the list's biases that one grid step holds; its table is a few of these in scalar memory


def unfit(q: Array, k_pages: Array, v_pages: Array) -> str | None:
    """Why this backend cannot serve a call, or None."""
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    if _units(k_pages, v_pages) is None:
        least = tile(_itemsize(k_pages, v_pages))
        count, page = k_pages.shape[2:4]
        return (
            f"backend 'tpu' reads tiles of {least} tokens but there are {count} pages of {page}: let {least} divide "
            f"the page size, or the page size divide {least} and {least} divide all tokens; or use 'xla'."
        )
    return None


def _itemsize(k_pages: Array, v_pages: Array) -> int:
    return min(k_pages.dtype.itemsize, v_pages.dtype.itemsize)  # the narrower has the larger tiles


def _units(k_pages: Array, v_pages: Array) -> Units | None:
    return units(k_pages.shape[3], k_pages.shape[2], _itemsize(k_pages, v_pages))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the kernel is compiled."""

    cut: Units
    scale: float
    shared: bool  # one pool of pages for all sequences
    splits: int
    half: int  # pairs of dims that are turned; 0: none
    limited: bool  # queries see different lengths
    interpret: Any


def paged_decode_tpu(
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

    Memory is read in row-major order. XLA lays out float32 arguments of a program whose last axis does not fill lanes
    of 128 with tokens innermost, and copies them: give such caches that layout (`jax.experimental.layout.Format`).
    Cosines and sines of listed positions are made outside, by the same code as everywhere, and applied inside.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k_pages, v_pages):
        raise NotImplementedError(f"paged_decode: {reason}")
    interpret = interpret_for("paged_decode", "tpu")
    q, k_pages, v_pages = without_gradient("tpu", q, k_pages, v_pages)
    batch, length, heads, dim = q.shape
    kv_heads, group = k_pages.shape[1], heads // k_pages.shape[1]
    cut = _units(k_pages, v_pages)
    assert cut is not None
    entries = tables.shape[2] * cut.parts
    wide = max([x.shape[1] for x in (tables, lengths, key_bias) if x is not None])
    splits = splits or math.ceil(wide * entries * cut.rows * 4 / ON_CHIP)
    limited = lengths is not None and lengths.shape[2] > 1
    listed = lists(cut, tables, lengths, key_bias, key_positions, splits)
    angles = None if rope is None or listed.positions is None else _angles(rope, listed.positions, cut, dim)
    plan = Plan(
        cut=cut,
        scale=float(scale),
        shared=k_pages.shape[0] == 1,
        splits=splits,
        half=0 if angles is None else angles.shape[-1] // 2,
        limited=limited,
        interpret=interpret,
    )
    dtype = jnp.promote_types(q.dtype, k_pages.dtype)
    short = -(group * length) % tile(dtype.itemsize)
    fold = lambda x: jnp.pad(x.reshape(batch, -1, group * length, x.shape[-1]), ((0, 0), (0, 0), (0, short), (0, 0)))
    rows = fold(jnp.moveaxis(q.reshape(batch, length, kv_heads, group, dim), 1, 3).astype(dtype))
    limits = None
    if limited:  # of the rows [group, query]
        limits = fold(jnp.tile(lengths, (1, 1, group))[..., None].astype(jnp.int32))
    o, lse = _call(plan, rows, cut.view(k_pages), cut.view(v_pages), listed, limits, angles)
    back = lambda x: jnp.moveaxis(x[:, :, : group * length].reshape(batch, kv_heads, group, length, -1), 3, 1).reshape(
        batch, length, heads, -1
    )
    parts = [(back(o[:, n]), back(lse[:, n])[..., 0]) for n in range(splits)]
    o, lse = parts[0] if splits == 1 else merge(parts)
    return o.astype(v_pages.dtype), lse


def _angles(rope: Rope, positions: Int[Array, "B r X chunks turned"], cut: Units, dim: int) -> Array | None:
    """[B, r, X, chunks, entries, turned, cos | sin], or None where nothing turns."""
    cos, sin = rope.tables(positions.reshape(positions.shape[0] * positions.shape[1], -1), dim)
    both = jnp.concatenate([cos, sin], axis=-1)[:, :, 0]
    return both.reshape(*positions.shape[:4], cut.entries, cut.turned, both.shape[-1]) if both.shape[-1] else None


def _call(plan: Plan, q: Array, k: Array, v: Array, listed: Lists, limits: Array | None, angles: Array | None):
    """[B, K, rows, D] over units [N, K, U, unit, D] to o [B, X, K, rows, V] and L repeated over lanes, in f32."""
    batch, kv_heads, rows, dim = q.shape
    v_dim, cut = v.shape[4], plan.cut
    chunks = listed.bias.shape[3]
    each = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda b, n, *_: (b, *(0,) * (x.ndim - 1)))
    split = lambda x, **where: pl.BlockSpec(
        (None, x.shape[1], None, *x.shape[3:]), lambda b, n, *_: (b, 0, n, *(0,) * (x.ndim - 3)), **where
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    table = listed.table[:, :, :, None]
    inputs = [(table, split(table, memory_space=pltpu.SMEM)), (q, each(q))]
    inputs += [(listed.bias, split(listed.bias))]
    if limits is not None:
        inputs += [(listed.slots, split(listed.slots)), (limits, each(limits))]
    inputs += [(k, anywhere), (v, anywhere)]
    if angles is not None:
        inputs += [(angles, anywhere)]
    buffer = lambda x: pltpu.VMEM((2, cut.entries, cut.rows, x.shape[4]), x.dtype)
    out = lambda width: jax.ShapeDtypeStruct((batch, plan.splits, kv_heads, rows, width), jnp.float32)
    of_out = lambda width: pl.BlockSpec((None, None, kv_heads, rows, width), lambda b, n, *_: (b, n, 0, 0, 0))
    scores = batch * kv_heads * plan.splits * chunks * cut.chunk
    moved = scores * (dim * k.dtype.itemsize + v_dim * v.dtype.itemsize)
    moved += scores * cut.turned // cut.rows * 8 * plan.half
    moved += sum(x.size * x.dtype.itemsize for x in (q, table, listed.bias, out(v_dim), out(LANES)))
    return pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.splits),
            in_specs=[spec for _, spec in inputs],
            out_specs=[of_out(v_dim), of_out(LANES)],
            scratch_shapes=[
                buffer(k),
                buffer(v),
                pltpu.VMEM((2, cut.entries, cut.turned, max(2 * plan.half, 1)), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 3)),
                pltpu.VMEM((rows, v_dim), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[out(v_dim), out(LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * rows * (dim + v_dim) + 6 * scores * plan.half,
            transcendentals=scores * rows,
            bytes_accessed=moved,
        ),
        interpret=plan.interpret,
        name="paged_decode",
    )(listed.visits.reshape(-1), *(x for x, _ in inputs))


def _kernel(plan: Plan, visits, table, q, bias, *refs):
    rest = list(refs)
    slots: Any = rest.pop(0) if plan.limited else None
    limits: Any = rest.pop(0) if plan.limited else None
    k, v = rest.pop(0), rest.pop(0)
    angles: Any = rest.pop(0) if plan.half else None
    o, lse, k_buffer, v_buffer, turns, arrived, acc, top, mass = rest
    b, n = pl.program_id(0), pl.program_id(1)
    pool, cut, kv_heads = 0 if plan.shared else b, plan.cut, q.shape[0]
    of = lambda ref, h: 0 if ref.shape[0] == 1 else h  # inputs of one head hold for all

    def transfers(h: Any, chunk: Any, buffer: Any, act: Any) -> None:
        """`act` on every transfer of a chunk: starting and awaiting must name the same ones."""

        def entry(c: Any, carry: Any) -> Any:
            unit = table[of(table, h), 0, chunk * cut.entries + c]

            @pl.when(unit >= 0)
            def used():
                act(pltpu.make_async_copy(k.at[pool, h, unit], k_buffer.at[buffer, c], arrived.at[buffer, 0]))
                act(pltpu.make_async_copy(v.at[pool, h, unit], v_buffer.at[buffer, c], arrived.at[buffer, 1]))

            return carry

        jax.lax.fori_loop(0, cut.entries, entry, 0)
        if angles is not None:
            part = angles.at[b, 0 if angles.shape[1] == 1 else h, n, chunk]
            act(pltpu.make_async_copy(part, turns.at[buffer], arrived.at[buffer, 2]))

    start, wait = (lambda copy: copy.start()), (lambda copy: copy.wait())

    def attend(h: Any, chunk: Any, buffer: Any) -> None:
        added = bias[of(bias, h), pl.ds(chunk, 1)]  # [1, rows of the chunk]
        s = _products(plan, q[h], k_buffer[buffer].reshape(cut.chunk, -1), turns, buffer) * plan.scale
        see = added > NEVER / 2
        if plan.limited:
            see = see & (slots[of(slots, h), pl.ds(chunk, 1)] < limits[of(limits, h)])
        s = jnp.where(see, s + added, NEVER)  # rows that were not read may hold NaN
        values = v_buffer[buffer].reshape(cut.chunk, -1).astype(jnp.float32)
        values = jnp.where(column(added)[:, :1] > NEVER / 2, values, 0.0).astype(v_buffer.dtype)
        before = top[:, :1]
        now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        w, fade = jnp.exp(s - now), jnp.exp(before - now)  # hidden: exp(NEVER - FLOOR) is exactly 0
        mass[...] = mass[...] * fade + jnp.sum(w, axis=1, keepdims=True)
        acc[...] = acc[...] * fade + dot(w.astype(values.dtype), values, (1, 0))
        top[...] = jnp.broadcast_to(now, top.shape)

    def head(h: Any, done: Any) -> Any:
        count = visits[(b * table.shape[0] + of(table, h)) * plan.splits + n]
        acc[...] = jnp.zeros_like(acc)
        mass[...] = jnp.zeros_like(mass)
        top[...] = jnp.full_like(top, FLOOR)

        def step(chunk: Any, carry: Any) -> Any:
            buffer = rem(done + chunk, 2)
            more = chunk + 1 < count
            following = jnp.where(more, h, h + 1), jnp.where(more, chunk + 1, 0)
            pl.when(following[0] < kv_heads)(lambda: transfers(*following, 1 - buffer, start))
            transfers(h, chunk, buffer, wait)
            attend(h, chunk, buffer)
            return carry

        jax.lax.fori_loop(0, count, step, 0)
        some = mass[...] > 0
        o[h] = acc[...] / jnp.where(some, mass[...], 1.0)[:, :1]
        lse[h] = jnp.where(some, top[...] + jnp.log(jnp.where(some, mass[...], 1.0)), NEVER)
        return done + count

    transfers(0, 0, 0, start)
    jax.lax.fori_loop(0, kv_heads, head, 0)


def _products(plan: Plan, q: Array, k: Array, turns: Any, buffer: Any) -> Array:
    """q·k of a chunk, keys turned first where the plan says so; pairs stay apart, so that nothing is moved."""
    if not plan.half:
        return dot(q, k.astype(q.dtype), (1, 1))
    half, cut = plan.half, plan.cut
    angle = jnp.broadcast_to(turns[buffer], (cut.entries, cut.rows, 2 * half)).reshape(cut.chunk, -1)
    cos, sin = angle[:, :half], angle[:, half:]
    first, second = (k[:, n : n + half].astype(jnp.float32) for n in (0, half))
    rounded = lambda x: x.astype(k.dtype).astype(q.dtype)
    s = dot(q[:, :half], rounded(first * cos - second * sin), (1, 1))
    s += dot(q[:, half : 2 * half], rounded(second * cos + first * sin), (1, 1))
    if k.shape[1] > 2 * half:
        s += dot(q[:, 2 * half :], k[:, 2 * half :].astype(q.dtype), (1, 1))
    return s
