"""The two backward kernels for Hopper: dq over tiles of keys, dk and dv over the queries of all grouped heads.

Both recompute a tile from log Z by the closed form that is in `tpu_backward`. Rows of every tile are queries, so that
sums over a block of keys stay within a warpgroup; what dk and dv need of a tile goes through shared memory. There,
each of the two computing warpgroups weighs 64 queries, and then one sums dk and the other dv over all 128.

Of wide heads so many queries do not fit. Then both warpgroups weigh the same 64, each for itself: the scores are
computed twice, and in dq, of which each sums half of the columns, the products with do as well.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import _mosaic_gpu as mg
from pallas_kernels.flash.gpu_tiles import BLOCK, LOG2E, STAGES, WGS, Feed, Visit, nbytes, ring, whoami
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.grouped_softmax import layout
from pallas_kernels.grouped_softmax.gpu_tile import Plan, gradients, in_slots, levels, tokens_of, weights

TILE = 64  # rows of a tile of keys, where a slot is not longer
DQ_DIM, DK_DV_DIM = 192, 128  # widest heads of which each warpgroup has 64 queries of its own
LOG_Z, DELTA = 0, 1  # rows of `kept`
K, V = 0, 1  # which warpgroup sums what


def backward(plan: Plan, saved: Any, do: Array, d_log_z: Array) -> tuple[Array, Array, Array]:
    """dq, dk and dv from what the forward pass saved; a key is in one page only, a query meets few."""
    q, k, v, place, o, log_z = saved
    delta = jnp.einsum("bthv,bthv->bht", do.astype(jnp.float32), o.astype(jnp.float32)) - d_log_z
    seeing = jnp.where(log_z > FLOOR, log_z * LOG2E, 0.0)  # rows that see nothing: their slots have no score
    kept, do = jnp.stack([seeing, delta], axis=2), do.astype(v.dtype)  # [B, H, 2, T]
    small = plan.tiled(TILE)
    step = lambda most: dataclasses.replace(small, block_q=BLOCK if q.shape[3] <= most else mg.ROWS)
    by_query, by_key = step(DQ_DIM), step(DK_DV_DIM)

    def one(n: Any) -> tuple[Array, Array, Array]:
        here = layout.page(place, small, n)
        tokens = here.tokens[..., 0, 0].reshape(-1)
        args = (tokens, q, in_slots(k, here.source), in_slots(v, here.source), do, kept, here.of_query)
        dk, dv = _dk_dv(by_key, k.shape[1], layout.tables(here, by_key)[1], *args)
        dq = _dq(by_query, k.shape[1], layout.tables(here, by_query)[0], *args)
        return dq, in_slots(dk, here.at), in_slots(dv, here.at)

    add = lambda n, before: jax.tree.map(jnp.add, before, one(n))
    return jax.lax.fori_loop(1, layout.pages(place, plan), add, one(jnp.int32(0)))


def _dq(plan: Plan, keys: int, table, tokens, q, k, v, do, kept, at) -> Array:
    """From `plan.block_q` queries of a block of threads."""
    batch, length, heads, dim = q.shape
    steps, tiles = length // plan.block_q, plan.block_q // mg.ROWS
    return mg.launch(
        mg.Launch(
            "grouped_softmax_dq",
            grid={"head": heads, "block": steps, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(q, keys, products=(2, 1), moved=nbytes(q, q, do, kept), fetched=plan.tile * 2 * dim * 2),
        ),
        partial(_dq_kernel, plan, steps),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [
            mg.operand(tiles, mg.ROWS, dim),
            mg.operand(tiles, mg.ROWS, dim),
            mg.plain(tiles, 2, mg.ROWS),
            mg.plain(tiles, 3, mg.ROWS, dtype=jnp.int32),
            mg.operand(STAGES, plan.tile, dim),
            mg.operand(STAGES, plan.tile, dim),
            mg.barriers(tiles, 4),
            mg.barriers(STAGES, 2),
            mg.barriers(STAGES, WGS),
            *([mg.barriers(1, WGS)] if plan.alone else []),
            *([mg.operand(WGS, mg.ROWS, plan.tile)] if plan.staged else []),
        ],
        *(table, tokens, q, k, v, do, kept, at),
    )


def _dq_kernel(plan: Plan, steps: int, table, tokens, q, k, v, do, kept, at, dq, *scratch):
    q_s, do_s, kept_s, at_s, k_s, v_s, ready, full, free, *more = scratch
    b, h, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "wg"))
    i = steps - 1 - jax.lax.axis_index("block")  # the longest rows first
    visit = Visit(table, b * steps + i)
    head = jax.lax.div(h, jnp.int32(plan.group))
    mine = 0 if plan.alone else wg
    queries = pl.ds(i * plan.block_q + mine * mg.ROWS, mg.ROWS)
    width = q.shape[3] // WGS
    columns = lambda ref: ref.at[:, pl.ds(wg * width, width)] if plan.alone else ref  # that this warpgroup sums
    stage = more[-1].at[wg] if plan.staged else None

    def fetch(n: Any, slot: Any) -> None:
        keys = pl.ds(visit.tile(n) * plan.tile, plan.tile)
        mg.fetch(k.at[b, keys, head], k_s.at[slot], full.at[slot])
        mg.fetch(v.at[b, keys, head], v_s.at[slot], full.at[slot])

    def start() -> None:
        mg.fetch(q.at[b, queries, h], q_s.at[mine], ready.at[mine])
        mg.fetch(do.at[b, queries, h], do_s.at[mine], ready.at[mine])
        mg.fetch(kept.at[b, h, :, queries], kept_s.at[mine], ready.at[mine])
        mg.fetch(at.at[b, :, queries], at_s.at[mine], ready.at[mine])

    feed = Feed(wg, visit.count, free, fetch)
    pl.when(wg == 0)(start) if plan.alone else start()
    feed.start()
    mg.wait(ready.at[mine])
    log_z, delta = (mg.load_rows(kept_s.at[mine, n]) for n in (LOG_Z, DELTA))

    def tile(n: Any, slot: Any, acc: Array) -> Array:
        me = 0 if plan.alone else whoami(wg, q_s.shape[2], do_s.shape[2])
        j = visit.tile(n)
        here = tokens_of(plan, tokens, b, j)
        feed.ahead(n)
        mg.wait(full.at[slot])
        s = mg.product(q_s.at[me], mg.turned(k_s.at[slot]))
        found = levels(plan, s, here, at_s.at[me], j * plan.slots)
        a, gates = weights(plan, found, log_z)
        dp = mg.product(do_s.at[me], mg.turned(v_s.at[slot]))
        ds = gradients(plan, found, gates, a, dp, delta)
        acc = mg.add_product(acc, ds.astype(k_s.dtype), columns(k_s.at[slot]), stage)
        mg.arrive(free.at[slot])
        return acc

    acc = ring(jnp.int32(0), visit.count, tile, mg.zeros(mg.ROWS, width if plan.alone else q.shape[3]))
    store = lambda: mg.store((q_s.at[mine], dq.at[b, queries, h]))
    if not plan.alone:
        q_s[wg] = (acc * plan.scale).astype(dq.dtype)
        store()
        feed.finish()
        return
    _meet(more[0])  # the other one may still read what this is stored over
    part = columns(q_s.at[mine])
    part[...] = (acc * plan.scale).astype(dq.dtype)
    mg.publish()
    _meet(more[0])
    pl.when(wg == 0)(store)
    feed.finish()


def _meet(barrier: Any) -> None:
    """Both computing warpgroups have come here."""
    mg.arrive(barrier.at[0])
    mg.wait(barrier.at[0])


def _dk_dv(plan: Plan, keys: int, table, tokens, q, k, v, do, kept, at) -> tuple[Array, Array]:
    """Of the page's rows, from steps of `plan.block_q` queries."""
    batch, _, kv_heads, dim = k.shape
    out = jax.ShapeDtypeStruct((2, *k.shape), k.dtype)
    both = mg.launch(
        mg.Launch(
            "grouped_softmax_dk_dv",
            grid={"head": kv_heads, "block": plan.tiles, "batch": batch},
            threads=WGS,
            interpret=plan.interpret,
            cost=plan.cost(
                q, keys, products=(1, 3), moved=nbytes(k, v, out), fetched=plan.block_q * (2 * dim * 2 + 20)
            ),
        ),
        partial(_dk_dv_kernel, plan),
        out,
        [
            mg.operand(2, plan.tile, dim),
            mg.operand(STAGES, 2, plan.block_q, dim),
            mg.operand(2, plan.block_q, plan.tile),
            mg.plain(STAGES, 2, plan.block_q),
            mg.plain(STAGES, 3, plan.block_q, dtype=jnp.int32),
            mg.barriers(1, 2),
            mg.barriers(STAGES, 4),
            mg.barriers(STAGES, WGS),
            mg.barriers(1, WGS),
            mg.barriers(1, WGS),
        ],
        *(table, tokens, q, k, v, do, kept, at),
    )
    return both[K], both[V]


def _dk_dv_kernel(plan: Plan, table, tokens, q, k, v, do, kept, at, out, *scratch):
    kv_s, rows_s, pair_s, kept_s, at_s, ready, full, free, written, read = scratch
    b, h, j, wg = (jax.lax.axis_index(name) for name in ("batch", "head", "block", "wg"))
    keys = pl.ds(j * plan.tile, plan.tile)
    visit = Visit(table, b * plan.tiles + j)
    total = plan.group * visit.count

    mine = pl.ds(0 if plan.alone else wg * mg.ROWS, mg.ROWS)
    here = tokens_of(plan, tokens, b, j)

    def fetch(n: Any, slot: Any) -> None:
        """Step n: all blocks of queries of each head of the group."""
        count = jnp.maximum(visit.count, 1)
        head = h * plan.group + jax.lax.div(n, count)
        queries = pl.ds(visit.tile(jax.lax.rem(n, count)) * plan.block_q, plan.block_q)
        mg.fetch(q.at[b, queries, head], rows_s.at[slot, K], full.at[slot])
        mg.fetch(do.at[b, queries, head], rows_s.at[slot, V], full.at[slot])
        mg.fetch(kept.at[b, head, :, queries], kept_s.at[slot], full.at[slot])
        mg.fetch(at.at[b, :, queries], at_s.at[slot], full.at[slot])

    feed = Feed(wg, total, free, fetch)

    @pl.when(wg == 0)
    def start():
        mg.fetch(k.at[b, keys, h], kv_s.at[K], ready.at[0])
        mg.fetch(v.at[b, keys, h], kv_s.at[V], ready.at[0])

    feed.start()
    mg.wait(ready.at[0])

    def tile(n: Any, slot: Any, acc: Array) -> Array:
        me = whoami(wg, kv_s.shape[2], kv_s.shape[2])
        feed.ahead(n)
        mg.wait(full.at[slot])
        s = mg.product(rows_s.at[slot, K, mine], mg.turned(kv_s.at[K]))
        found = levels(plan, s, here, at_s.at[slot, :, mine], j * plan.slots)
        a, gates = weights(plan, found, mg.load_rows(kept_s.at[slot, LOG_Z, mine]))

        def put_weights() -> None:
            pair_s[V, mine] = a.astype(pair_s.dtype)

        def put_gradients() -> None:
            dp = mg.product(rows_s.at[slot, V, mine], mg.turned(kv_s.at[V]))
            ds = gradients(plan, found, gates, a, dp, mg.load_rows(kept_s.at[slot, DELTA, mine]))
            pair_s[K, mine] = ds.astype(pair_s.dtype)

        if plan.alone:
            pl.when(me == V)(put_weights)
            pl.when(me == K)(put_gradients)
            mg.publish()
        else:
            pl.when(n > 0)(lambda: mg.wait(read.at[0]))  # of what the step before put there
            put_weights()
            put_gradients()
            mg.publish()
            mg.arrive(written.at[0])
            mg.wait(written.at[0])
        acc = mg.accumulate(acc, mg.turned(pair_s.at[me]), rows_s.at[slot, me], staged=plan.staged)
        if not plan.alone:
            mg.arrive(read.at[0])
        mg.arrive(free.at[slot])
        return acc

    acc = ring(jnp.int32(0), total, tile, mg.zeros(plan.tile, kv_s.shape[2]))
    if plan.alone:  # the other one may still read what this is stored over
        _meet(read)
    kv_s[wg] = (acc * jnp.where(wg == K, plan.scale, 1.0)).astype(out.dtype)
    mg.store((kv_s.at[wg], out.at[wg, b, keys, h]))
    feed.finish()
    if not plan.alone:
        mg.drain(read, jnp.minimum(total, 1))
