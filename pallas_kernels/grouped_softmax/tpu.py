"""The TPU kernel: tiles of whole landmark blocks in VMEM, keys on sublanes, tiles nobody sees are skipped.

A block of keys is a slot of the tile (see `layout`), so its maximum and sums are over neighbouring sublanes. Each
slot enters the running softmax of a query with one number, r, and shares that weight out by p:

    r = log Σ exp s over the own tokens,  p their softmax        in the own block
    r = the landmark's score,             p the softmax inside   in an earlier block

which is A = p · exp(r - log Z). Grid (batch, query head, query block, key tile), the last one in order; outputs are
transposed, queries on lanes, as the tiles are. The backward pass is in `tpu_backward`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxattn.masks import Visibility
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.tiles import LANES, Spans, div, dot
from pallas_kernels.grouped_softmax import layout
from pallas_kernels.grouped_softmax.layout import Places, Plan
from pallas_kernels.grouped_softmax.reference import NEVER
from pallas_kernels.grouped_softmax.tpu_backward import backward
from pallas_kernels.grouped_softmax.tpu_tile import levels

BLOCK = 512  # queries and keys of a tile
WIDEST = 1024  # bytes of a head; above, half the block
LONGEST = 2048  # landmark blocks are kept whole in VMEM
DTYPES = (jnp.float32, jnp.bfloat16)


def unfit(q: Array, k: Array, v: Array, block: int) -> str | None:
    """Why this backend cannot serve a call, or None."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    if block > LONGEST:
        return f"backend 'tpu' keeps at most {LONGEST} tokens of a block on chip but block is {block}: use 'xla'."
    return None


def grouped_softmax_tpu(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    block: int,
    scale: float,
    block_q: int | None = None,
    tile_k: int | None = None,
    page: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.grouped_softmax.grouped_softmax`. For the backward pass q, k, v, o and log Z are kept.

    Beside them memory is for copies of k and v, each block padded to whole registers (a multiple of 8 rows), and
    for f32 sums of o or dq. Documents in another order than their ids' cost time: tiles between them are visited.

    Args:
      block_q, tile_k: queries and keys of a tile; the first a multiple of 128 on the device; None: what fits.
      page: slots there is memory for at least, see `layout`; None: a quarter more than one long document has.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, v, block):
        raise NotImplementedError(f"grouped_softmax: {reason}")
    interpret = interpret_for("grouped_softmax", "tpu")
    batch, length, heads, _ = q.shape
    keys, v_dim = k.shape[1], v.shape[3]
    default = BLOCK if max(q.shape[3], v_dim) * max(q.dtype.itemsize, v.dtype.itemsize) <= WIDEST else BLOCK // 2
    slot = _up(block, 8 if block <= LANES else 16)
    slots, tiles = _tiling(slot, tile_k or default, page or layout.default_page(keys, block))
    room = default * default // (slot * slots) // LANES * LANES
    plan = Plan(
        block=block,
        slot=slot,
        slots=slots,
        tiles=tiles,
        block_q=_fitted(block_q or min(default, max(room, LANES)), length),
        group=heads // k.shape[2],
        scale=float(scale),
        aligned=vis.aligned,
        interpret=interpret,
    )
    dtype = jnp.promote_types(q.dtype, k.dtype)
    pad = -length % plan.block_q
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    vis = Visibility(
        q_positions=wide(vis.q_positions, length),
        q_segments=wide(vis.q_segments, length),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    ).pad_rows(pad)
    q = jnp.pad(q.astype(dtype), ((0, 0), (0, pad), (0, 0), (0, 0)))
    o, log_z = _attend(plan, _filled(q), _filled(k.astype(dtype)), _filled(v), layout.places(vis, plan))
    return jnp.swapaxes(o, 1, 2)[:, :length, :, :v_dim], jnp.swapaxes(log_z, 1, 2)[:, :length]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _fitted(block: int, length: int) -> int:
    """The block size that cuts `length` into as many blocks with the least padding."""
    return min(block, _up(-(-length // -(-length // block)), LANES))


def _tiling(slot: int, tile: int, page: int) -> tuple[int, int]:
    """Slots of a tile, and tiles of a page with least waste: rows of a tile are a multiple of 16 (two bf16 each)."""
    even = 1 if slot % 16 == 0 else 2
    most = max(tile // (even * slot), 1) * even
    tiles = -(-page // most)
    return min(most, _up(-(-page // tiles), even)), tiles


def _filled(x: Float[Array, "B T H D"]) -> Float[Array, "B H T d"]:
    """Heads first; head dims that registers hold without remainder."""
    dim = x.shape[3]
    pad = (64 if dim <= 64 else _up(dim, LANES)) - dim
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, 0), (0, pad)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, place: Places) -> tuple[Array, Array]:
    """[B,H,T,D], [B,K,S,D], [B,K,S,V] to [B,H,T,V] in v's dtype and log Z [B,H,T]; T is in whole blocks."""
    return _forward(plan, q, k, v, place)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, place: Places):
    batch, heads, length, _ = q.shape

    def one(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        here = layout.page(place, plan, n)
        return _page_forward(plan, q, layout.rows(k, here.source), layout.rows(v, here.source), here, k.shape[2], carry)

    start = (
        jnp.zeros((batch, heads, v.shape[3], length), jnp.float32),
        jnp.full((batch, heads, 1, length), NEVER, jnp.float32),
    )
    o, log_z = jax.lax.fori_loop(0, layout.pages(place, plan), one, start)
    o, log_z = jnp.swapaxes(o, 2, 3).astype(v.dtype), log_z[:, :, 0]
    return (o, log_z), (q, k, v, place, o, log_z)


def _page_forward(plan: Plan, q: Array, k: Array, v: Array, here: layout.Page, keys: int, carry):
    """Outputs [B,H,V,T] and log Z [B,H,1,T] of the pages before and of this one; k and v are in slots."""
    batch, heads, length, dim = q.shape
    v_dim, bq, bk = v.shape[3], plan.block_q, plan.tile
    steps = length // bq
    table = layout.tables(here, plan)[0]
    fetch = lambda b, i, j, table: Spans(table, b * steps + i).fetch(j)
    of_key = lambda d: pl.BlockSpec(
        (None, None, bk, d), lambda b, h, i, j, table: (b, div(h, plan.group), fetch(b, i, j, table), 0)
    )
    turned = lambda d: pl.BlockSpec((None, None, d, bq), lambda b, h, i, j, table: (b, h, 0, i))
    moved = sum(x.size * x.dtype.itemsize for x in (q, *carry, *carry))
    return pl.pallas_call(
        partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, steps, plan.tiles),
            in_specs=[
                pl.BlockSpec((None, None, bq, dim), lambda b, h, i, j, table: (b, h, i, 0)),
                of_key(dim),
                of_key(v_dim),
                pl.BlockSpec((None, plan.slots, 1, LANES), lambda b, h, i, j, table: (b, fetch(b, i, j, table), 0, 0)),
                pl.BlockSpec((None, 3, bq), lambda b, h, i, j, table: (b, 0, i)),
                turned(v_dim),
                turned(1),
            ],
            out_specs=[turned(v_dim), turned(1)],
            scratch_shapes=[
                pltpu.VMEM((v_dim, bq), jnp.float32),
                pltpu.VMEM((1, bq), jnp.float32),
                pltpu.VMEM((1, bq), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in carry],
        input_output_aliases={6: 0, 7: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=layout.cost(plan, q, keys, k, v, products=(1, 1), moved=moved),
        interpret=plan.interpret,
        name="grouped_softmax_forward",
    )(table, q, k, v, here.tokens, here.of_query, *carry)


def _kernel(plan: Plan, table, q, k, v, tokens, at, o_before, z_before, o, log_z, acc, top, mass):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def start():
        acc[...] = o_before[...]
        top[...] = jnp.maximum(z_before[...], FLOOR)
        mass[...] = jnp.where(z_before[...] > FLOOR, 1.0, 0.0)

    @pl.when(Spans(table, b * pl.num_programs(2) + i).holds(j))
    def tile():
        p, r, _ = levels(plan, dot(k[...], q[...], (1, 1)), tokens[...], at[...], j)
        before = top[...]
        now = jnp.maximum(before, jnp.max(r, axis=0))
        gate, fade = jnp.exp(r - now), jnp.exp(before - now)
        mass[...] = mass[...] * fade + jnp.sum(gate, axis=0)
        a = (p * gate).reshape(plan.tile, plan.block_q)
        acc[...] = acc[...] * fade + dot(v[...], a.astype(v.dtype), (0, 0))
        top[...] = now

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        m = mass[...]
        safe = jnp.where(m == 0, 1.0, m)
        o[...] = acc[...] / safe
        log_z[...] = jnp.where(m == 0, NEVER, top[...] + jnp.log(safe))


def _backward(plan: Plan, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None]:
    return *backward(plan, saved, *cotangents), None


_attend.defvjp(_forward, _backward)
