"""The backward kernels for Hopper: dq over tiles of keys, dk and dv over the queries of all grouped heads.

All recompute a tile's weights from two numbers per row. Two warpgroups of 64 rows each compute; the first of them
also starts the copies, one tile ahead, because sums of two products leave no registers for a third warpgroup. The
sums of wide heads leave none for each other: dk and dv then are a kernel each, which costs a fifth product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_biases import (
    NONE,
    SUM,
    VALUE,
    Biases,
    factor_gradient,
    head_of,
    held,
    hiding,
    in_units,
    taken,
)
from pallas_kernels.flash.gpu_rows import FIRST, SECOND, kept_of, score_gradients, weights
from pallas_kernels.flash.gpu_tiles import (
    BLOCK,
    STAGES,
    WGS,
    Feed,
    Plan,
    Tile,
    column_tile,
    nbytes,
    operands,
    places,
    visits,
    walk,
    whoami,
)

BIAS = "bias"  # the name of the key bias's gradient
SUMS = 256  # columns of sums a warpgroup has registers for


def gradients(
    plan: Plan,
    saved: Any,
    do: Array,
    d_stat: Array,
    tables: tuple[Array, Array] | None = None,
    biases: Biases = NONE,
) -> tuple[Array, Array, Array, Biases]:
    """Of q, k, v and what is added, from what the forward pass saved.

    Args:
      tables: what `plan.visit` reads: tiles of keys by block of queries, and of queries by block of keys.
    """
    q, k, v, vis, o, stat = saved
    columns = column_tile(q.shape[3], v.shape[3])
    by_query, by_key = tables or (visits(vis, BLOCK, columns), visits(vis, columns, BLOCK, by_key=True))
    delta = jnp.einsum("bthv,bthv->bht", do.astype(jnp.float32), o.astype(jnp.float32))
    kept = kept_of(plan, stat, delta, d_stat if plan.stats else jnp.zeros_like(stat))
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    arrays = (prefix, q, k, v, do.astype(v.dtype), kept, *at, in_units(plan, biases))
    parts = (("dk", "dv"),) if q.shape[3] + v.shape[3] <= SUMS else (("dk",), ("dv",))
    found = {name: x for some in parts for name, x in _dk_dv(plan, some, by_key, *arrays).items()}
    dq, *by_row = _dq(plan, by_query, *arrays)
    d_biases = Biases(found.get(BIAS), jnp.sum(by_row[0], axis=(0, 2)) if by_row else None)
    return dq, found["dk"], found["dv"], d_biases


def _dq(plan: Plan, table: Array, prefix, q, k, v, do, kept, q_at, k_at, biases: Biases) -> list[Array]:
    """dq, and where heads have a factor a number [B, H, T] whose sums are its gradient."""
    batch, length, heads, dim = q.shape
    v_dim, steps = v.shape[3], length // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    keyed, learned = int(plan.biases > 0), biases.by_head is not None
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    out += [jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)] if learned else []
    again = columns * ((dim + v_dim) * 2 + 4 * keyed)
    return mg.launch(
        mg.Launch(
            f"{plan.OP}_dq",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(q, k, v, (BLOCK, columns), (2, 1), nbytes(q, do, kept, *out), again),
        ),
        partial(_dq_kernel, plan, steps),
        out,
        [
            *([mg.plain(STAGES, columns)] if keyed else []),
            *([mg.plain(WGS, mg.ROWS)] if learned else []),
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 2, mg.ROWS),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 4),
            mg.barriers(STAGES, 3 + keyed),
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        *(table, prefix, q, k, v, do, kept, q_at, k_at, *biases.arrays),
    )


def _dq_kernel(plan: Plan, steps: int, table, prefix, q, k, v, do, kept, q_at, k_at, *refs):
    biases, (dq, *refs) = taken(plan, refs)
    d_factor, refs = (refs[0], refs[1:]) if biases.by_head is not None else (None, refs)
    bias_s, scratch = taken(plan, tuple(refs))
    q_s, do_s, kept_s, q_at_s, k_s, v_s, k_at_s, ready, full, free, *staging = scratch
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    i = steps - 1 - jax.lax.axis_index("block")  # the longest rows first
    head = jax.lax.div(h, jnp.int32(plan.group))
    queries = pl.ds(i * BLOCK + wg * mg.ROWS, mg.ROWS)
    visit = plan.visit(table, (b, h, i), (q.shape[2], steps))
    stage = staging[0].at[wg] if plan.staged else None
    columns = k_s.shape[1]

    def fetch(n: Any, slot: Any) -> None:
        keys = pl.ds(visit.tile(n) * columns, columns)
        mg.fetch(k.at[b, keys, head], k_s.at[slot], full.at[slot])
        mg.fetch(v.at[b, keys, head], v_s.at[slot], full.at[slot])
        mg.fetch(k_at.at[b, :, keys], k_at_s.at[slot], full.at[slot])
        if plan.biases:
            mg.fetch(biases.by_key.at[b, head_of(plan, h), keys], bias_s.by_key.at[slot], full.at[slot])

    feed = Feed(wg, visit.count, free, fetch)
    mg.fetch(q.at[b, queries, h], q_s.at[wg], ready.at[wg])
    mg.fetch(do.at[b, queries, h], do_s.at[wg], ready.at[wg])
    mg.fetch(kept.at[b, h, :, queries], kept_s.at[wg], ready.at[wg])
    mg.fetch(q_at.at[b, :, queries], q_at_s.at[wg], ready.at[wg])
    feed.start()
    mg.wait(ready.at[wg])
    first, second = (mg.load_rows(kept_s.at[wg, n]) for n in (FIRST, SECOND))
    factor = None if biases.by_head is None else biases.by_head[h]

    def tile(hides: bool, n: Any, slot: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        me = whoami(wg, q_s.shape[2], do_s.shape[2], busy=plan.added)
        feed.ahead(n)
        mg.wait(full.at[slot])
        at = q_at_s.at[me], k_at_s.at[slot]
        hide = hiding(plan, hides, *at, prefix[b], Biases(bias_s.by_key.at[slot] if plan.biases else None, factor))
        s = mg.product(q_s.at[me], mg.turned(k_s.at[slot]))
        _, slope = weights(plan, s, hide, mg.down(first, columns))
        dp = mg.product(do_s.at[me], mg.turned(v_s.at[slot]))
        ds = score_gradients(plan, slope, dp, mg.down(first, columns), mg.down(second, columns))
        more = tuple(x + factor_gradient(plan, ds, *at) for x in sums[1:])
        acc = mg.add_product(sums[0], ds.astype(k_s.dtype), k_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return acc, *more

    start = mg.zeros(mg.ROWS, q_s.shape[2]), *([mg.per_row(0.0)] if d_factor is not None else [])
    acc, *more = walk(visit.whole, visit.count, tile, start)
    q_s[wg] = (acc * plan.scale).astype(dq.dtype)
    stores = [(q_s.at[wg], dq.at[b, queries, h])]
    if d_factor is not None:
        bias_s.by_head[wg] = more[0]
        stores.append((bias_s.by_head.at[wg], d_factor.at[b, h, queries]))
    mg.store(*stores)
    feed.finish()


def _dk_dv(
    plan: Plan, parts: tuple[str, ...], table: Array, prefix, q, k, v, do, kept, q_at, k_at, biases: Biases
) -> dict[str, Array]:
    """Those of dk and dv that `parts` names; with dk the gradient of the key bias."""
    batch, keys, kv_heads, dim = k.shape
    v_dim, steps = v.shape[3], keys // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    keyed = int(plan.biases > 0)
    names = (*parts, BIAS) if keyed and "dk" in parts else parts
    inputs = {"dk": k, "dv": v, BIAS: biases.by_key}
    out = [jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype) for name in names]
    products = 1 + ("dk" in parts), len(parts)
    moved = nbytes(k, v, *out, *([biases.by_key] if keyed else []))
    results = mg.launch(
        mg.Launch(
            f"{plan.OP}_{'_'.join(parts)}",
            grid={"head": kv_heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(q, k, v, (columns, BLOCK), products, moved, columns * ((dim + v_dim) * 2 + 8)),
        ),
        partial(_dk_dv_kernel, plan, steps, names),
        out,
        [
            *([mg.plain(WGS, 2, plan.biases, mg.ROWS)] if keyed else []),
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 2, columns),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 2 + ("dk" in parts) + keyed),  # k, its places and its biases, and v for dk
            mg.barriers(STAGES, 4),
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        *(table, prefix, q, k, v, do, kept, q_at, k_at, *biases.arrays),
    )
    return dict(zip(names, results, strict=True))


def _dk_dv_kernel(plan: Plan, steps: int, names, table, prefix, q, k, v, do, kept, q_at, k_at, *refs):
    biases, refs = taken(plan, refs)
    out, scratch = dict(zip(names, refs, strict=False)), refs[len(names) :]
    parts = [name for name in names if name != BIAS]
    bias_s, scratch = held(plan, scratch)
    k_s, v_s, k_at_s, q_s, do_s, kept_s, q_at_s, ready, full, free, *staging = scratch
    b, h, j, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "block", "wg"))
    keys = pl.ds(j * BLOCK + wg * mg.ROWS, mg.ROWS)
    visit = plan.visit(table, (b, h, j), (k.shape[2], steps))
    stage = staging[0].at[wg] if plan.staged else None
    whole, rest = visit.whole, visit.count - visit.whole
    wholes, total = plan.turns * whole, plan.turns * visit.count

    def fetch(n: Any, slot: Any) -> None:
        """Step n: first the whole tiles of each head that shares the table, then the others of each."""
        split = lambda n, by: (jax.lax.div(n, jnp.maximum(by, 1)), jax.lax.rem(n, jnp.maximum(by, 1)))
        (early, at), (late, behind) = split(n, whole), split(n - wholes, rest)
        first, tile = plan.query_tile(visit.tile(jnp.where(n < wholes, at, whole + behind)))
        head = h * plan.group + first + jnp.where(n < wholes, early, late)
        queries = pl.ds(tile * q_s.shape[1], q_s.shape[1])
        mg.fetch(q.at[b, queries, head], q_s.at[slot], full.at[slot])
        mg.fetch(do.at[b, queries, head], do_s.at[slot], full.at[slot])
        mg.fetch(kept.at[b, head, :, queries], kept_s.at[slot], full.at[slot])
        mg.fetch(q_at.at[b, :, queries], q_at_s.at[slot], full.at[slot])

    feed = Feed(wg, total, free, fetch)
    mg.fetch(k.at[b, keys, h], k_s.at[wg], ready.at[wg])
    if "dk" in out:
        mg.fetch(v.at[b, keys, h], v_s.at[wg], ready.at[wg])
    mg.fetch(k_at.at[b, :, keys], k_at_s.at[wg], ready.at[wg])
    if plan.biases:
        mg.fetch(biases.by_key.at[b, pl.ds(h * plan.biases, plan.biases), keys], bias_s.at[wg, VALUE], ready.at[wg])
    if BIAS in out:
        for n in range(plan.biases):
            bias_s[wg, SUM, n] = mg.per_row(0.0)
    feed.start()
    mg.wait(ready.at[wg])

    def own(hides: bool, n: Any, wg: Any) -> tuple[Any, Biases]:
        """Which of a key's biases belongs to step n, and what is added then."""
        at = (n - wholes, jnp.maximum(rest, 1)) if hides else (n, jnp.maximum(whole, 1))
        turn = jax.lax.div(*at)
        if plan.turns < plan.group and plan.biases > 1:  # not all heads of the group share the table's entries
            turn += plan.query_tile(visit.tile(jax.lax.rem(*at) + (whole if hides else 0)))[0]
        which = turn if plan.biases > 1 else 0
        factor = None if biases.by_head is None else biases.by_head[h * plan.group + turn]
        return which, Biases(bias_s.at[wg, VALUE, which] if plan.biases else None, factor)

    def tile(hides: bool, n: Any, slot: Any, sums: dict[str, Tile]) -> dict[str, Tile]:
        sums, me = dict(sums), whoami(wg, k_s.shape[2], v_s.shape[2], busy=plan.added)
        feed.ahead(n)
        mg.wait(full.at[slot])
        which, add = own(hides, n, me) if plan.added else (0, NONE)
        hide = hiding(plan, hides, q_at_s.at[slot], k_at_s.at[me], prefix[b], add, by_key=True)
        number = lambda n: mg.across(mg.load_columns(kept_s.at[slot, n]), mg.ROWS)
        s = mg.product(k_s.at[me], mg.turned(q_s.at[slot]))  # [keys, queries]
        p, slope = weights(plan, s, hide, number(FIRST))
        if "dv" in sums:
            sums["dv"] = mg.add_product(sums["dv"], p.astype(do_s.dtype), do_s.at[slot], stage)
        if "dk" in sums:
            dp = mg.product(v_s.at[me], mg.turned(do_s.at[slot]))
            ds = score_gradients(plan, slope, dp, number(FIRST), number(SECOND))
            if BIAS in out:  # in shared memory: heads take turns, and sums of dk and dv hold the registers
                sum_s = bias_s.at[me, SUM, which]
                sum_s[...] = mg.load_rows(sum_s) + jnp.sum(ds, axis=1)
            sums["dk"] = mg.add_product(sums["dk"], ds.astype(q_s.dtype), q_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return sums

    place = {"dk": k_s, "dv": v_s}
    sums = walk(wholes, total, tile, {name: mg.zeros(mg.ROWS, place[name].shape[2]) for name in parts})
    for name, factor in (("dk", plan.scale), ("dv", 1.0)):
        if name in sums:
            place[name][wg] = (sums[name] * factor).astype(out[name].dtype)
    stores = [(place[name].at[wg], out[name].at[b, keys, h]) for name in parts]
    if BIAS in out:
        stores.append((bias_s.at[wg, SUM], out[BIAS].at[b, pl.ds(h * plan.biases, plan.biases), keys]))
    mg.store(*stores)
    feed.finish()
