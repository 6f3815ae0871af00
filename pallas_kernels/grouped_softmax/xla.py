"""Plain XLA with O(T) memory: blocks of queries, each over tiles made of whole landmark blocks.

Packed documents start anywhere in a row, so their landmark blocks are not aligned to it. A table says where
each block begins; a tile gathers the next few blocks side by side, and then every group is a reshape away.
A tile enters the running softmax with one number per earlier block, its landmark's score; what is inside such
a block is normalised within the tile. The backward pass recomputes a tile from the saved gate denominators.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import PADDING, Visibility
from pallas_kernels.grouped_softmax.reference import NEVER, Roles, roles

FLOOR = -1e29  # where running maxima start: far above NEVER, far below any score
BLOCK_Q = 128
TILE_K = 512  # keys gathered at a time, rounded to whole landmark blocks


class Rule(NamedTuple):
    """What is static: block length L, scale, rows of a query block, landmark blocks of a tile."""

    block: int
    scale: float
    rows: int
    blocks: int


class Table(NamedTuple):
    """The landmark blocks of every row: block r is the `size[r]` keys `order[first[r]:]`."""

    order: Array  # [B, S]: keys by segment, padding last
    first: Array  # [B, S]
    size: Array  # [B, S]
    count: Array  # [B]


class Tile(NamedTuple):
    """A few landmark blocks side by side; `index` is S where there is no key."""

    index: Array  # [B, M L]
    k: Array  # [B, K, M, L, D]
    v: Array  # [B, K, M, L, V]
    positions: Array  # [B, M, L]
    segments: Array  # [B, M, L]


def grouped_softmax_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    block: int,
    scale: float,
    block_q: int = BLOCK_Q,
    tile_k: int = TILE_K,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.grouped_softmax.grouped_softmax`. The largest temporary is [B, H, block_q, tile_k]."""
    length, heads, keys = q.shape[1], q.shape[2], k.shape[1]
    rule = Rule(block, scale, min(block_q, length), max(1, min(tile_k, keys + block - 1) // block))
    pad = -length % rule.rows
    vis = vis.pad_rows(pad)
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(
        q.shape[0], -1, k.shape[2], heads // k.shape[2], q.shape[3]
    )
    o, log_z = _run(rule, jnp.moveaxis(q, 1, 3), k, v, vis)  # queries as [B, K, G, T, D]
    o, log_z = jnp.moveaxis(o, 3, 1), jnp.moveaxis(log_z, 3, 1)
    return o.reshape(*o.shape[:2], heads, -1)[:, :length], log_z.reshape(*o.shape[:2], heads)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility) -> tuple[Array, Array]:
    """q [B,K,G,T,D] -> o [B,K,G,T,V] in v's dtype, log Z [B,K,G,T]; T is a multiple of the rule's rows."""
    return _forward(rule, q, k, v, vis)[0]


def _forward(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility):
    kind = jnp.promote_types(q.dtype, jnp.float32)
    table = block_table(vis, rule.block)

    def rows(i: Array) -> tuple[Array, Array]:
        q_block, q_vis = _cut(q, i, rule.rows), vis.rows(i * rule.rows, rule.rows)

        def tile(r: Array, carry):
            keys = _gather(rule, table, r, k, v, vis)
            part = _roles(q_vis, keys, rule.block)
            use = lambda carry: _merge(carry, _weigh(rule, q_block, keys, part))
            return jax.lax.cond(_any(part), use, lambda carry: carry, carry)

        empty = jnp.zeros(q_block.shape[:-1], kind)
        start = (empty + FLOOR, empty, jnp.zeros((*empty.shape, v.shape[-1]), kind))
        top, mass, acc = jax.lax.fori_loop(0, _tiles(rule, table), tile, start)
        safe = jnp.where(mass == 0, 1.0, mass)
        return (acc / safe[..., None]).astype(v.dtype), jnp.where(mass == 0, NEVER, top + jnp.log(safe))

    blocks = q.shape[3] // rule.rows
    if blocks == 1:
        o, log_z = rows(jnp.zeros((), jnp.int32))
    else:
        join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, *x.shape[5:])
        o, log_z = jax.tree.map(join, jax.lax.map(rows, jnp.arange(blocks)))
    return (o, log_z), (q, k, v, vis, table, o, log_z)


def _backward(rule: Rule, saved, cotangents):
    """dk and dv of a tile are summed over its query blocks, then written where its keys came from."""
    q, k, v, vis, table, o, log_z = saved
    do, d_log_z = cotangents
    kind = log_z.dtype
    do = do.astype(kind)
    # Every score of the gate also moves log Z; with g the gate weights, dg = g (dA - (do·o - d log Z)).
    delta = jnp.sum(do * o.astype(kind), axis=-1) - d_log_z
    log_z = jnp.where(log_z <= FLOOR, 0.0, log_z)  # rows that see nothing: their weights are exp(NEVER)

    def tile(r: Array, carry):
        dq, dk, dv = carry
        keys = _gather(rule, table, r, k, v, vis)

        def rows(i: Array, carry):
            part = _roles(vis.rows(i * rule.rows, rule.rows), keys, rule.block)

            def use(carry):
                dq, dk, dv = carry
                cut = [_cut(x, i, rule.rows) for x in (q, do, log_z, delta)]
                new = _pull(rule, keys, part, *cut)
                at = i * rule.rows
                old = jax.lax.dynamic_slice_in_dim(dq, at, rule.rows, axis=3)
                return jax.lax.dynamic_update_slice_in_dim(dq, old + new[0], at, axis=3), dk + new[1], dv + new[2]

            return jax.lax.cond(_any(part), use, lambda carry: carry, carry)

        start = (dq, jnp.zeros(keys.k.shape, kind), jnp.zeros(keys.v.shape, kind))
        dq, dk_tile, dv_tile = jax.lax.fori_loop(0, q.shape[3] // rule.rows, rows, start)
        return dq, _scatter(dk, keys.index, dk_tile), _scatter(dv, keys.index, dv_tile)

    start = (jnp.zeros(q.shape, kind), jnp.zeros(k.shape, kind), jnp.zeros(v.shape, kind))
    dq, dk, dv = jax.lax.fori_loop(0, _tiles(rule, table), tile, start)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
_run = jax.jit(_attend, static_argnums=(0,))  # outside jit: one program instead of one per operation


def block_table(vis: Visibility, block: int) -> Table:
    """Where the landmark blocks of the keys begin. Sorting by segment steps over padding between tokens."""
    last = jnp.iinfo(jnp.int32).max
    segments = jnp.where(vis.k_segments == PADDING, last, vis.k_segments)
    order = jnp.argsort(segments, axis=1, stable=True)
    take = lambda x: jnp.take_along_axis(x, order, axis=1)
    segments, number = take(segments), take(vis.k_positions) // block
    live = segments != last
    new = (segments[:, 1:] != segments[:, :-1]) | (number[:, 1:] != number[:, :-1])
    new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True) & live
    rank = jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1

    def row(new: Array, live: Array, rank: Array) -> tuple[Array, Array]:
        keys, zeros = new.shape[0], jnp.zeros(new.shape, jnp.int32)
        first = zeros.at[jnp.where(new, rank, keys)].set(jnp.arange(keys, dtype=jnp.int32), mode="drop")
        return first, zeros.at[jnp.where(live, rank, keys)].add(1, mode="drop")

    return Table(order, *jax.vmap(row)(new, live, rank), jnp.sum(new, axis=1, dtype=jnp.int32))


def _tiles(rule: Rule, table: Table) -> Array:
    """How many tiles there are: known only from the data, because documents end inside blocks."""
    return -(-jnp.max(table.count) // rule.blocks)


def _gather(rule: Rule, table: Table, r: Array, k: Array, v: Array, vis: Visibility) -> Tile:
    """Tile r: landmark blocks r M .. (r+1) M - 1."""
    blocks = r * rule.blocks + jnp.arange(rule.blocks)
    offset = jnp.arange(rule.block)

    def row(order, first, size, count):
        keys = order.shape[0]
        known = jnp.minimum(blocks, keys - 1)
        there = (blocks < count)[:, None] & (offset < size[known][:, None])
        at = jnp.minimum(first[known][:, None] + offset, keys - 1)
        return jnp.where(there, order[at], keys).reshape(-1)

    index = jax.vmap(row)(*table)
    safe = jnp.minimum(index, k.shape[1] - 1)
    take = jax.vmap(lambda x, i: x[i])
    shape = (rule.blocks, rule.block)
    heads_first = lambda x: jnp.moveaxis(take(x, safe).reshape(x.shape[0], *shape, *x.shape[2:]), 3, 1)
    segments = jnp.where(index < k.shape[1], take(vis.k_segments, safe), PADDING)
    fold = lambda x: x.reshape(x.shape[0], *shape)
    return Tile(index, heads_first(k), heads_first(v), fold(take(vis.k_positions, safe)), fold(segments))


def _scatter(total: Array, index: Array, part: Array) -> Array:
    """Add a tile's [B,K,M,L,·] to the rows [B,S,K,·] it was gathered from."""
    part = jnp.moveaxis(part, 1, 3).reshape(*index.shape, *total.shape[2:])
    return jax.vmap(lambda x, i, new: x.at[i].add(new, mode="drop"))(total, index, part)


def _roles(vis: Visibility, keys: Tile, block: int) -> Roles:
    """Each [B, 1, 1, t, M, L]."""
    row = lambda x: x[:, None, None, :, None, None]
    column = lambda x: x[:, None, None, None]
    return roles(row(vis.q_positions), row(vis.q_segments), column(keys.positions), column(keys.segments), block)


def _any(part: Roles) -> Array:
    return jnp.any(part.own | part.inside | part.landmark)


def _scores(rule: Rule, q: Array, keys: Tile, part: Roles) -> tuple[Array, Array, Array]:
    """Scores of own tokens [..,t,M,L] and of landmarks [..,t,M], NEVER where masked; p inside earlier blocks."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    s = rule.scale * jnp.einsum("bkgtd,bkmld->bkgtml", q, keys.k, preferred_element_type=kind)
    inside = jnp.where(part.inside, s, NEVER)
    e = jnp.exp(inside - jnp.maximum(jnp.max(inside, axis=-1, keepdims=True), FLOOR))
    z = jnp.sum(e, axis=-1, keepdims=True)
    p = e / jnp.where(z == 0, 1.0, z)
    return jnp.where(part.own, s, NEVER), jnp.max(jnp.where(part.landmark, s, NEVER), axis=-1), p


def _weigh(rule: Rule, q: Array, keys: Tile, part: Roles) -> tuple[Array, Array, Array]:
    """Maximum, mass and weighted values of one tile alone."""
    own, landmark, p = _scores(rule, q, keys, part)
    top = jnp.maximum(jnp.max(own, axis=(-2, -1)), jnp.max(landmark, axis=-1))
    top = jnp.maximum(top, FLOOR)
    own = jnp.exp(own - top[..., None, None])
    gate = jnp.exp(landmark - top[..., None])
    mass = jnp.sum(own, axis=(-2, -1)) + jnp.sum(gate, axis=-1)
    a = (own + p * gate[..., None]).astype(keys.v.dtype)
    return top, mass, jnp.einsum("bkgtml,bkmlv->bkgtv", a, keys.v, preferred_element_type=top.dtype)


def _merge(one: tuple[Array, ...], two: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    top = jnp.maximum(one[0], two[0])
    fade, other = jnp.exp(one[0] - top), jnp.exp(two[0] - top)
    return top, one[1] * fade + two[1] * other, one[2] * fade[..., None] + two[2] * other[..., None]


def _pull(rule: Rule, keys: Tile, part: Roles, q, do, log_z, delta) -> tuple[Array, Array, Array]:
    """dq, dk and dv of one query block and one tile, by the closed form of the two-level softmax."""
    own, landmark, p = _scores(rule, q, keys, part)
    own = jnp.exp(own - log_z[..., None, None])
    gate = jnp.exp(landmark - log_z[..., None])
    da = jnp.einsum("bkgtv,bkmlv->bkgtml", do.astype(keys.v.dtype), keys.v, preferred_element_type=log_z.dtype)
    mean = jnp.sum(p * da, axis=-1)  # what a block's landmark buys
    ds = own * (da - delta[..., None, None]) + gate[..., None] * p * (da - mean[..., None])
    d_landmark = gate * (mean - delta[..., None])
    ds = (ds + jnp.where(part.landmark, d_landmark[..., None], 0.0)).astype(q.dtype)
    a = (own + gate[..., None] * p).astype(keys.v.dtype)
    kind = log_z.dtype
    dq = rule.scale * jnp.einsum("bkgtml,bkmld->bkgtd", ds, keys.k, preferred_element_type=kind)
    dk = rule.scale * jnp.einsum("bkgtml,bkgtd->bkmld", ds, q, preferred_element_type=kind)
    dv = jnp.einsum("bkgtml,bkgtv->bkmlv", a, do.astype(keys.v.dtype), preferred_element_type=kind)
    return dq, dk, dv


def _cut(x: Array, i: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=3)
