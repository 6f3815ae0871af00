"""The backward kernels of softplus rows on Hopper: dq over tiles of keys, dk and dv over the grouped queries.

With c = scale · log N, w = (max(φ - m, 0) f)^p, z = Σ w and o = Σ w v / z, the gradient of a score before c is

    ds_ij = c_i σ_ij (g_ij + t_i),   g_ij = dw/dφ · (do_i·v_j - do_i·o_i) / z_i,   t_i = -Σ_j g_ij / N_i

where t is the gradient of the row's mean; 0 where the offset is no mean. It is known at the end of a row only, so the
dq kernel walks twice over the keys: Σ g σ k first, and then t Σ σ k, which needs no values. It hands t to the kernel of
dk and dv. σ = softplus'. Registers hold the sums of one head dim, or of two of 64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxattn.masks import Visibility
from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import (
    BLOCK,
    STAGES,
    WGS,
    Feed,
    Tile,
    Visit,
    column_tile,
    masked,
    nbytes,
    operands,
    places,
    visits,
    walk,
    whoami,
)
from pallas_kernels.softplus.gpu_tiles import Rule, cost, softplus, walk_from, weights

# Numbers per row; the last is 1 / N, or 0 where m is no mean, for dq, and t for dk and dv.
C, M, INVERSE, SHARE, DELTA, LAST = range(6)


def backward(rule: Rule, saved: Any, do: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv from what the forward pass saved."""
    q, k, v, vis, known, o, kept = saved
    plan, (m, inverse, mass) = rule.plan, (kept[:, :, n] for n in range(3))
    c, count = (jnp.broadcast_to(known[:, n, None], m.shape) for n in (0, 1))
    share = 1.0 / jnp.where(mass == 0.0, 1.0, mass)
    delta = jnp.einsum("bthv,bthv->bht", do.astype(jnp.float32), o.astype(jnp.float32))
    fixed = (count <= rule.exempt) | (inverse == 0.0)
    per_key = jnp.where(fixed, 0.0, 1.0 / jnp.maximum(count, 1.0))
    prefix = vis.prefix_len if plan.has_prefix else jnp.zeros(q.shape[:1], jnp.int32)
    at = places(vis.q_positions, vis.q_segments), places(vis.k_positions, vis.k_segments)
    numbers = lambda last: jnp.stack([c, m, inverse, share, delta, last], axis=2)
    before = (prefix, q, k, v, do.astype(v.dtype))
    dq, total = _dq(rule, vis, *before, numbers(per_key), *at)
    run = lambda which: _of_keys(which, rule, vis, *before, numbers(total), *at)
    dk, dv = run("kv") if q.shape[3] + v.shape[3] <= 128 else (*run("k"), *run("v"))
    return dq, dk, dv


def _gradients(rule: Rule, s: Tile, dp: Tile, number: Any) -> tuple[Tile, Tile, Tile]:
    """Normalised weights, g and σ; `number(n)` is a kept number in the tile's shape."""
    phi, slope = softplus(s)
    w, through = weights(phi, number(M), number(INVERSE), rule.p)
    share = number(SHARE)
    return w * share, through * share * (dp - number(DELTA)), slope


def _dq(rule: Rule, vis: Visibility, prefix, q, k, v, do, numbers, q_at, k_at) -> tuple[Array, Array]:
    plan, (batch, length, heads, dim) = rule.plan, q.shape
    v_dim, steps = v.shape[3], length // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    walks = 1 if rule.p is None else 2
    dq, total = mg.launch(
        mg.Launch(
            "softplus_dq",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=cost(
                rule, q, k, v, block=(BLOCK, columns), products=(2 * walks, 1), exponents=walks,
                moved=nbytes(q, q, do, numbers), again=[columns * (walks * dim + v_dim) * 2],
            ),
        ),
        partial(_dq_kernel, rule, steps),
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        [
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 6, mg.ROWS),
            mg.plain(WGS, mg.ROWS),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 4),
            mg.barriers(STAGES, 2),  # k and its places
            mg.barriers(STAGES),  # v
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        visits(vis, BLOCK, columns),
        *(prefix, q, k, v, do, numbers, q_at, k_at),
    )  # fmt: skip
    return dq, total


def _dq_kernel(rule: Rule, steps: int, table, prefix, q, k, v, do, numbers, q_at, k_at, dq, total, *scratch):
    q_s, do_s, numbers_s, total_s, q_at_s, k_s, v_s, k_at_s, ready, k_full, v_full, free, *staging = scratch
    plan = rule.plan
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    i, columns = steps - 1 - jax.lax.axis_index("block"), k_s.shape[1]  # the longest rows first
    head = jax.lax.div(h, jnp.int32(plan.group))
    queries = pl.ds(i * BLOCK + wg * mg.ROWS, mg.ROWS)
    visit = Visit(table, b * steps + i)
    stage = staging[0].at[wg] if plan.staged else None
    dims = q_s.shape[2], do_s.shape[2]
    busy = min(dims) == 128  # both walks at once have no registers left

    def fetch(n: Any, slot: Any) -> None:
        keys = pl.ds(visit.tile(jnp.where(n < visit.count, n, n - visit.count)) * columns, columns)
        mg.fetch(k.at[b, keys, head], k_s.at[slot], k_full.at[slot])
        mg.fetch(k_at.at[b, :, keys], k_at_s.at[slot], k_full.at[slot])
        pl.when(n < visit.count)(lambda: mg.fetch(v.at[b, keys, head], v_s.at[slot], v_full.at[slot]))

    feed = Feed(wg, visit.count if rule.p is None else 2 * visit.count, free, fetch)
    mg.fetch(q.at[b, queries, h], q_s.at[wg], ready.at[wg])
    mg.fetch(do.at[b, queries, h], do_s.at[wg], ready.at[wg])
    mg.fetch(numbers.at[b, h, :, queries], numbers_s.at[wg], ready.at[wg])
    mg.fetch(q_at.at[b, :, queries], q_at_s.at[wg], ready.at[wg])
    feed.start()
    mg.wait(ready.at[wg])
    number = lambda me, n: mg.down(mg.load_rows(numbers_s.at[me, n]), columns)

    def scores(me: Any, hides: bool, n: Any, slot: Any) -> Tile:
        feed.ahead(n)
        mg.wait(k_full.at[slot])
        s = mg.product(q_s.at[me], mg.turned(k_s.at[slot])) * number(me, C)
        return masked(s, q_at_s.at[me], k_at_s.at[slot], prefix[b], plan) if hides else s

    def first(hides: bool, n: Any, slot: Any, carry: tuple[Tile, Array]) -> tuple[Tile, Array]:
        (acc, sums), me = carry, whoami(wg, *dims, busy=busy)
        s = scores(me, hides, n, slot)
        mg.wait(v_full.at[slot])
        dp = mg.product(do_s.at[me], mg.turned(v_s.at[slot]))
        _, g, slope = _gradients(rule, s, dp, partial(number, me))
        acc = mg.add_product(acc, (g * slope).astype(k_s.dtype), k_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return acc, sums + jnp.sum(g, axis=1)

    def second(t: Array, hides: bool, n: Any, slot: Any, acc: Tile) -> Tile:
        slope = softplus(scores(whoami(wg, *dims, busy=busy), hides, n, slot))[1] * mg.down(t, columns)
        acc = mg.add_product(acc, slope.astype(k_s.dtype), k_s.at[slot], stage)
        mg.arrive(free.at[slot])
        return acc

    acc, sums = walk_from(0, visit, first, (mg.zeros(mg.ROWS, q_s.shape[2]), mg.per_row(0.0)))
    t = -sums * mg.load_rows(numbers_s.at[wg, LAST])
    if rule.p is not None:
        acc = walk_from(visit.count, visit, partial(second, t), acc)
    q_s[wg] = (acc * mg.down(mg.load_rows(numbers_s.at[wg, C]), acc.shape[1])).astype(dq.dtype)
    total_s[wg] = t
    mg.store((q_s.at[wg], dq.at[b, queries, h]), (total_s.at[wg], total.at[b, h, queries]))
    feed.finish()


def _of_keys(which: str, rule: Rule, vis: Visibility, prefix, q, k, v, do, numbers, q_at, k_at) -> list[Array]:
    """dk, dv or both: what `which` names."""
    plan, (batch, keys, kv_heads, dim) = rule.plan, k.shape
    v_dim, steps = v.shape[3], keys // BLOCK
    columns = column_tile(dim, v_dim)
    operand = operands(columns)
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in (("k", k), ("v", v)) if name in which]
    return mg.launch(
        mg.Launch(
            f"softplus_d{which}",
            grid={"head": kv_heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=cost(
                rule, q, k, v, block=(columns, BLOCK), products=(1 + ("k" in which), len(which)), exponents=1,
                moved=nbytes(k, v, *outs), again=[columns * ((dim + v_dim) * 2 + 4 * 6)],
            ),
        ),
        partial(_of_keys_kernel, which, rule, steps),
        outs,
        [
            operand(WGS, mg.ROWS, dim),
            operand(WGS, mg.ROWS, v_dim),
            mg.plain(WGS, 2, mg.ROWS, dtype=jnp.int32),
            operand(STAGES, columns, dim),
            operand(STAGES, columns, v_dim),
            mg.plain(STAGES, 6, columns),
            mg.plain(STAGES, 2, columns, dtype=jnp.int32),
            mg.barriers(WGS, 3),
            mg.barriers(STAGES, 4),
            mg.barriers(STAGES, WGS),
            *([operand(WGS, mg.ROWS, columns)] if plan.staged else []),
        ],
        visits(vis, columns, BLOCK, by_key=True),
        *(prefix, q, k, v, do, numbers, q_at, k_at),
    )  # fmt: skip


def _of_keys_kernel(which: str, rule: Rule, steps: int, table, prefix, q, k, v, do, numbers, q_at, k_at, *refs):
    outs, scratch = refs[: len(which)], refs[len(which) :]
    k_s, v_s, k_at_s, q_s, do_s, numbers_s, q_at_s, ready, full, free, *staging = scratch
    plan = rule.plan
    b, h, j, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "block", "wg"))
    keys = pl.ds(j * BLOCK + wg * mg.ROWS, mg.ROWS)
    visit = Visit(table, b * steps + j)
    stage = staging[0].at[wg] if plan.staged else None
    whole, rest = visit.whole, visit.count - visit.whole
    wholes, total = plan.group * whole, plan.group * visit.count

    def fetch(n: Any, slot: Any) -> None:
        """Step n: first the whole tiles of each head of the group, then the others of each."""
        split = lambda n, by: (jax.lax.div(n, jnp.maximum(by, 1)), jax.lax.rem(n, jnp.maximum(by, 1)))
        (early, at), (late, behind) = split(n, whole), split(n - wholes, rest)
        head = h * plan.group + jnp.where(n < wholes, early, late)
        queries = pl.ds(visit.tile(jnp.where(n < wholes, at, whole + behind)) * q_s.shape[1], q_s.shape[1])
        mg.fetch(q.at[b, queries, head], q_s.at[slot], full.at[slot])
        mg.fetch(do.at[b, queries, head], do_s.at[slot], full.at[slot])
        mg.fetch(numbers.at[b, head, :, queries], numbers_s.at[slot], full.at[slot])
        mg.fetch(q_at.at[b, :, queries], q_at_s.at[slot], full.at[slot])

    feed = Feed(wg, total, free, fetch)
    mg.fetch(k.at[b, keys, h], k_s.at[wg], ready.at[wg])
    mg.fetch(v.at[b, keys, h], v_s.at[wg], ready.at[wg])
    mg.fetch(k_at.at[b, :, keys], k_at_s.at[wg], ready.at[wg])
    feed.start()
    mg.wait(ready.at[wg])

    def tile(hides: bool, n: Any, slot: Any, sums: dict[str, Tile]) -> dict[str, Tile]:
        me = whoami(wg, k_s.shape[2], v_s.shape[2])
        feed.ahead(n)
        mg.wait(full.at[slot])
        number = lambda n: mg.across(mg.load_columns(numbers_s.at[slot, n]), mg.ROWS)
        s = mg.product(k_s.at[me], mg.turned(q_s.at[slot])) * number(C)  # [keys, queries]
        if hides:
            s = masked(s, q_at_s.at[slot], k_at_s.at[me], prefix[b], plan, by_key=True)
        dp = mg.product(v_s.at[me], mg.turned(do_s.at[slot])) if "k" in which else s
        w, g, slope = _gradients(rule, s, dp, number)
        of = {"v": (w.astype(do_s.dtype), do_s)}
        if "k" in which:
            of["k"] = ((g + number(LAST)) * slope * number(C)).astype(q_s.dtype), q_s
        new = {name: mg.add_product(sums[name], of[name][0], of[name][1].at[slot], stage) for name in which}
        mg.arrive(free.at[slot])
        return new

    places_of = {"k": k_s, "v": v_s}
    sums = walk(wholes, total, tile, {name: mg.zeros(mg.ROWS, places_of[name].shape[2]) for name in which})
    for name, out in zip(which, outs, strict=True):
        places_of[name][wg] = sums[name].astype(out.dtype)
    mg.store(*((places_of[name].at[wg], out.at[b, keys, h]) for name, out in zip(which, outs, strict=True)))
    feed.finish()
