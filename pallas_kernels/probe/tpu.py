"""The TPU kernels: two passes over the keys, one tile of all probe queries at a time.

Pass 1, grid (batch, head, key block): normaliser and largest score of each row. Pass 2, the same grid: the tile's
weights, of which only sums leave the chip. A query's run of weights lies on diagonals in the order of the keys, so it
is turned by its distance to a register's edge and added to a line of all diagonals that stays on chip.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxattn.masks import Visibility, visible
from pallas_kernels._dispatch import interpret_for
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.tiles import LANES, Spans
from pallas_kernels.probe.stats import OVER_KEYS, Stats
from pallas_kernels.probe.tiles import Plan, cost, inputs_of, scores
from pallas_kernels.probe.tpu_sums import sums
from pallas_kernels.probe.xla import NOWHERE, row_stats, shifts, widened

DTYPES = (jnp.float32, jnp.bfloat16)
QUERIES = 128
BLOCK = 512
MOST = 2048
DIAGONALS = 2**20  # keys whose diagonals fit on chip


def unfit(q: Array, k: Array, want: frozenset[str], block: int) -> str | None:
    """Why this backend cannot serve a call, or None."""
    for name, x in (("q", q), ("k", k)):
        if x.dtype not in DTYPES:
            return f"backend 'tpu' computes float32 and bfloat16 but {name} is {x.dtype}: cast it or use 'xla'."
    if q.shape[1] > QUERIES:
        return (
            f"backend 'tpu' holds {QUERIES} probe queries but q has {q.shape[1]}: probe them in several calls, whose "
            "sums over queries add up, or use 'xla'."
        )
    if want & {"blocks", "block_max"} and (block % 8 or _unit(want, block) > MOST):
        return f"backend 'tpu' sums blocks of 8, 16, 32, 64, 128 or 256 keys but block is {block}: take one, or 'xla'."
    if "diagonals" in want and k.shape[1] > DIAGONALS:
        return f"backend 'tpu' holds {DIAGONALS} diagonals but there are {k.shape[1]} keys: use 'xla' for diagonals."
    return None


def _unit(want: frozenset[str], block: int) -> int:
    """What divides a tile's keys: whole lanes, and whole registers of block sums."""
    return math.lcm(LANES, 8 * block) if want & {"blocks", "block_max"} else LANES


def probe_tpu(
    q: Float[Array, "B P H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    want: frozenset[str],
    block: int,
    key_bias: Float[Array, "B n S"] | None = None,
) -> Stats:
    """See `pallas_kernels.probe.probe`.

    Raises:
      NotImplementedError: see `unfit`, or the process computes on another platform.
    """
    if reason := unfit(q, k, want, block):
        raise NotImplementedError(f"probe: {reason}")
    interpret = interpret_for("probe", "tpu")
    batch, count, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    up = lambda n, multiple: -(-n // multiple) * multiple
    unit = _unit(want, block)
    plan = Plan(
        want=want,
        scale=float(scale),
        count=count,
        keys=keys,
        block_k=min(unit * max(1, BLOCK // unit), up(keys, unit)),
        block=block,
        group=heads // kv_heads,
        sharing=0 if key_bias is None else heads // key_bias.shape[1],
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        interpret=interpret,
    )
    dtype = jnp.promote_types(q.dtype, k.dtype)
    short, pad = up(count, 16) - count, -keys % plan.block_k
    q = jnp.pad(jnp.swapaxes(q, 1, 2).astype(dtype), ((0, 0), (0, 0), (0, short), (0, 0)))
    k = jnp.pad(jnp.swapaxes(k, 1, 2).astype(dtype), ((0, 0), (0, 0), (0, pad), (0, 0)))
    vis = widened(vis, batch, count, keys)
    near, far = shifts(vis, visible(vis), 0)
    base = jnp.where(near == NOWHERE, 0, keys - 1 - vis.q_positions + near)
    vis = vis.pad_rows(short).pad_columns(pad)
    if key_bias is not None:
        key_bias = jnp.pad(key_bias, ((0, 0), (0, 0), (0, pad)))[:, :, None]
    top, mass, index = _first(plan, q, k, vis, key_bias)
    some = mass > 0
    share = jnp.where(some, 1.0 / jnp.where(some, mass, 1.0), 0.0)  # the weight of a row's largest score
    lse = jnp.where(some, top + jnp.log(jnp.where(some, mass, 1.0)), NEVER)
    row = lambda x: x[:, :, :count, 0]
    stats = row_stats(row(lse), row(share), row(jnp.where(some, index, -1)), want)
    if not want & OVER_KEYS:
        return stats
    over_keys = sums(plan, q, k, vis, key_bias, top, share, jnp.pad(base, ((0, 0), (0, short))))
    if "columns" in want:
        over_keys["columns"] = over_keys["columns"][:, :, 0, :keys]
    for name in want & {"blocks", "block_max"}:
        over_keys[name] = jnp.swapaxes(over_keys[name], 2, 3)[:, :, :count, : -(-keys // block)]
    if "diagonals" in want:
        line = over_keys["diagonals"].reshape(batch, heads, -1)
        line = line[..., plan.block_k : plan.block_k + keys][..., ::-1]
        over_keys["diagonals"] = jnp.where(jnp.all(near >= far), line, jnp.nan)
    return dataclasses.replace(stats, **over_keys)


def _first(plan: Plan, q: Array, k: Array, vis: Visibility, key_bias: Array | None) -> tuple[Array, Array, Array]:
    """Largest score, mass relative to it and its index, [B, H, rows, LANES]."""
    batch, heads, rows, _ = q.shape
    scalars, inputs, specs = inputs_of(plan, q, k, vis, key_bias)
    out = lambda dtype: jax.ShapeDtypeStruct((batch, heads, rows, LANES), dtype)
    outs = [out(jnp.float32), out(jnp.float32), out(jnp.int32)]
    per_row = pl.BlockSpec((None, None, rows, LANES), lambda b, h, j, *_: (b, h, 0, 0))
    return pl.pallas_call(
        partial(_first_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, k.shape[2] // plan.block_k),
            in_specs=specs,
            out_specs=[per_row] * 3,
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(q, k, plan.group, [q, *outs, *inputs[4:]]),
        interpret=plan.interpret,
        name="probe_rows",
    )(*scalars, *inputs)


def _first_kernel(plan: Plan, table, prefix, q, k, q_at, k_at, *refs):
    key_bias, (top, mass, index) = (refs[0] if plan.sharing else None), refs[-3:]
    b, j = pl.program_id(0), pl.program_id(2)

    @pl.when(j == 0)
    def start():
        top[...] = jnp.full_like(top, FLOOR)
        mass[...] = jnp.zeros_like(mass)
        index[...] = jnp.zeros_like(index)

    def tile(masked: bool) -> None:
        s = scores(plan, masked, prefix[b], q, k, q_at, k_at, key_bias)
        before, best = top[:, :1], jnp.max(s, axis=1, keepdims=True)
        now = jnp.maximum(before, best)
        place = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1).astype(jnp.float32)
        first = jnp.min(jnp.where(s == best, place, float(plan.block_k)), axis=1, keepdims=True)
        here = jnp.broadcast_to(first, index.shape).astype(jnp.int32) + j * plan.block_k
        index[...] = jnp.where(jnp.broadcast_to(best > before, index.shape), here, index[...])
        mass[...] = mass[...] * jnp.exp(before - now) + jnp.sum(jnp.exp(s - now), axis=1, keepdims=True)
        top[...] = jnp.broadcast_to(now, top.shape)

    Spans(table, b).each(j, tile)
