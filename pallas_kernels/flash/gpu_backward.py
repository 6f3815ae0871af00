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
from jaxtyping import Array, Float

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash import rows
from pallas_kernels.flash.gpu_tiles import (
    BLOCK,
    LOG2E,
    SLOPES,
    STAGES,
    WEIGHTS,
    WGS,
    Feed,
    Plan,
    Tile,
    column_tile,
    exponents,
    logits,
    masked,
    nbytes,
    operands,
    places,
    visits,
    walk,
    whoami,
)

FIRST, SECOND = 0, 1  # rows of `kept`
SUMS = 256  # columns of sums a warpgroup has registers for


def backward(
    plan: Plan, saved: Any, do: Array, d_stat: Array, tables: tuple[Array, Array] | None = None
) -> tuple[Array, Array, Array]:
    """dq, dk and dv from what the forward pass saved.

    Args:
      tables: what `plan.visit` reads: tiles of keys by block of queries, and of queries by block of keys.
    """
    q, k, v, vis, o, stat = saved
    columns = column_tile(q.shape[3], v.shape[3])
    by_query, by_key = tables or (visits(vis, BLOCK, columns), visits(vis, columns, BLOCK, by_key=True))
    delta = jnp.einsum("bthv,bthv->bht", do.astype(jnp.float32), o.astype(jnp.float32))
    kept = _kept(plan, stat, delta, d_stat if plan.stats else jnp.zeros_like(stat))
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    arrays = (prefix, q, k, v, do.astype(v.dtype), kept, *at)
    parts = (("dk", "dv"),) if q.shape[3] + v.shape[3] <= SUMS else (("dk",), ("dv",))
    dk, dv = (x for some in parts for x in _dk_dv(plan, some, by_key, *arrays))
    return _dq(plan, by_query, *arrays), dk, dv


def _kept(plan: Plan, stat: Array, delta: Array, d_stat: Array) -> Float[Array, "B H 2 T"]:
    """What `_weights` and `_score_gradients` need of a row: log2 Z or 1/Z, and what its scores' gradients lose.

    All [B, H, T]: the number that was saved, do · o, and the gradient of the number saved.
    """
    score = plan.score
    if score.activation == "exp":
        share = 1.0 / score.row_sum if score.normaliser == "sum" else 1.0
        return jnp.stack([stat * LOG2E - plan.shift, (delta - d_stat) * share], axis=2)
    z = rows.divisor(rows.normaliser(stat, stat, score))
    match score.normaliser:  # dZ / dw
        case "sum":
            slope = jnp.full_like(z, 1.0 / score.row_sum)
        case "sum_plus_one":
            slope = jnp.ones_like(z)
        case "clipped_sum":
            slope = jnp.where(stat < 0, -1.0, 1.0) * (jnp.abs(stat) > 1.0)
        case _:
            slope = jnp.zeros_like(z)
    return jnp.stack([1.0 / z, delta / z * slope - d_stat], axis=2)


def _weights(plan: Plan, s: Tile, hide: Any, first: Tile) -> tuple[Tile, Tile]:
    """Normalised weights, and what `_score_gradients` needs of them, from products and the first kept number."""
    if plan.score.activation == "exp":
        s, factor = exponents(plan, s, hide)
        p = jnp.exp2(s * factor - first)
        return p, p
    s = logits(plan, s, hide)
    w = WEIGHTS[plan.score.activation](s)
    return (w if plan.plain else w * first), SLOPES[plan.score.activation](s, w)


def _score_gradients(plan: Plan, slope: Tile, dp: Tile, first: Tile, second: Tile) -> Tile:
    """From the gradients of the normalised weights; without `scale`."""
    if plan.score.activation == "exp":
        return slope * (dp - second)
    return slope * dp if plan.plain else slope * (dp * first - second)


def _dq(plan: Plan, table: Array, prefix, q, k, v, do, kept, q_at, k_at) -> Array:
    batch, length, heads, dim = q.shape
    v_dim, steps = v.shape[3], length // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    return mg.launch(
        mg.Launch(
            f"{plan.OP}_dq",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(q, k, v, (BLOCK, columns), (2, 1), nbytes(q, q, do, kept), columns * (dim + v_dim) * 2),
        ),
        partial(_dq_kernel, plan, steps),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 2, mg.ROWS),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 4),
            mg.barriers(STAGES, 3),
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        *(table, prefix, q, k, v, do, kept, q_at, k_at),
    )


def _dq_kernel(plan: Plan, steps: int, table, prefix, q, k, v, do, kept, q_at, k_at, dq, *scratch):
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

    feed = Feed(wg, visit.count, free, fetch)
    mg.fetch(q.at[b, queries, h], q_s.at[wg], ready.at[wg])
    mg.fetch(do.at[b, queries, h], do_s.at[wg], ready.at[wg])
    mg.fetch(kept.at[b, h, :, queries], kept_s.at[wg], ready.at[wg])
    mg.fetch(q_at.at[b, :, queries], q_at_s.at[wg], ready.at[wg])
    feed.start()
    mg.wait(ready.at[wg])
    first, second = (mg.load_rows(kept_s.at[wg, n]) for n in (FIRST, SECOND))

    def tile(hides: bool, n: Any, slot: Any, acc: Tile) -> Tile:
        me = whoami(wg, q_s.shape[2], do_s.shape[2])
        feed.ahead(n)
        mg.wait(full.at[slot])
        hide = partial(masked, q_at=q_at_s.at[me], k_at=k_at_s.at[slot], prefix=prefix[b], plan=plan)
        s = mg.product(q_s.at[me], mg.turned(k_s.at[slot]))
        _, slope = _weights(plan, s, hide if hides else lambda s: s, mg.down(first, columns))
        dp = mg.product(do_s.at[me], mg.turned(v_s.at[slot]))
        ds = _score_gradients(plan, slope, dp, mg.down(first, columns), mg.down(second, columns))
        acc = mg.add_product(acc, ds.astype(k_s.dtype), k_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return acc

    acc = walk(visit.whole, visit.count, tile, mg.zeros(mg.ROWS, q_s.shape[2]))
    q_s[wg] = (acc * plan.scale).astype(dq.dtype)
    mg.store((q_s.at[wg], dq.at[b, queries, h]))


def _dk_dv(plan: Plan, parts: tuple[str, ...], table: Array, prefix, q, k, v, do, kept, q_at, k_at) -> list[Array]:
    """Those of dk and dv that `parts` names."""
    batch, keys, kv_heads, dim = k.shape
    v_dim, steps = v.shape[3], keys // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ({"dk": k, "dv": v}[name] for name in parts)]
    products = 1 + ("dk" in parts), len(parts)
    return mg.launch(
        mg.Launch(
            f"{plan.OP}_{'_'.join(parts)}",
            grid={"head": kv_heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(q, k, v, (columns, BLOCK), products, nbytes(k, v, *out), columns * ((dim + v_dim) * 2 + 8)),
        ),
        partial(_dk_dv_kernel, plan, steps, parts),
        out,
        [
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 2, columns),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 2 + ("dk" in parts)),  # k and its places, and v for dk
            mg.barriers(STAGES, 4),
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        *(table, prefix, q, k, v, do, kept, q_at, k_at),
    )


def _dk_dv_kernel(plan: Plan, steps: int, parts, table, prefix, q, k, v, do, kept, q_at, k_at, *refs):
    out, scratch = dict(zip(parts, refs, strict=False)), refs[len(parts) :]
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
    feed.start()
    mg.wait(ready.at[wg])

    def tile(hides: bool, n: Any, slot: Any, sums: dict[str, Tile]) -> dict[str, Tile]:
        sums, me = dict(sums), whoami(wg, k_s.shape[2], v_s.shape[2])
        feed.ahead(n)
        mg.wait(full.at[slot])
        hide = partial(masked, q_at=q_at_s.at[slot], k_at=k_at_s.at[me], prefix=prefix[b], plan=plan, by_key=True)
        number = lambda n: mg.across(mg.load_columns(kept_s.at[slot, n]), mg.ROWS)
        s = mg.product(k_s.at[me], mg.turned(q_s.at[slot]))  # [keys, queries]
        p, slope = _weights(plan, s, hide if hides else lambda s: s, number(FIRST))
        if "dv" in sums:
            sums["dv"] = mg.add_product(sums["dv"], p.astype(do_s.dtype), do_s.at[slot], stage)
        if "dk" in sums:
            dp = mg.product(v_s.at[me], mg.turned(do_s.at[slot]))
            ds = _score_gradients(plan, slope, dp, number(FIRST), number(SECOND))
            sums["dk"] = mg.add_product(sums["dk"], ds.astype(q_s.dtype), q_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return sums

    place = {"dk": k_s, "dv": v_s}
    sums = walk(wholes, total, tile, {name: mg.zeros(mg.ROWS, place[name].shape[2]) for name in parts})
    for name, factor in (("dk", plan.scale), ("dv", 1.0)):
        if name in sums:
            place[name][wg] = (sums[name] * factor).astype(out[name].dtype)
    mg.store(*((place[name].at[wg], out[name].at[b, keys, h]) for name in parts))
