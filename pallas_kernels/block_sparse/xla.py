"""Plain XLA: one query block at a time over the blocks of its list and no others.

The backward pass recomputes a tile's weights from one saved number per row and adds what a tile gives to dk and
dv where its key block lies, so that memory grows with T only. Rows of work are (batch, list, query block); query
heads that share a list and a key head share what is loaded.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import Visibility, visible
from pallas_kernels.block_sparse.lists import Lists, in_blocks, usable
from pallas_kernels.flash import rows as row
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import ACTIVATIONS, Score
from pallas_kernels.flash.tiles import div, rem

store = jax.lax.optimization_barrier  # "compute this once": exp would be repeated in every consumer


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before compiling."""

    score: Score
    scale: float
    block_q: int
    block_k: int
    units: int  # lists of one batch row
    kv_heads: int
    biases: int  # heads of the key bias of one batch row that units differ in, 0: there is none
    stats: bool  # whether the number kept per row is a result, with a gradient


def block_sparse_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    blocks: Int[Array, "B L I N"],
    block_q: int,
    block_k: int,
    scale: float,
    stats: bool = True,
    key_bias: Float[Array, "B n S"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.block_sparse.block_sparse`. The largest temporary beside copies is one tile of scores."""
    batch, length, heads, _ = q.shape
    kv_heads = k.shape[2]
    units = max(kv_heads, blocks.shape[1])
    if q.dtype == jnp.float32:  # in lower precision the product is scaled instead, after accumulation
        q, scale = q * scale, 1.0
    biases = 0 if key_bias is None else min(key_bias.shape[1], units)
    plan = Plan(score, float(scale), block_q, block_k, units, kv_heads, biases, stats)
    vis = in_blocks(vis, batch, block_q, block_k)
    lists = usable(blocks, vis, block_q, block_k)
    lists = Lists(*(jnp.repeat(x, units // blocks.shape[1], axis=1) for x in lists))
    k, v = (_cut(x, block_k, kv_heads)[:, 0] for x in (k, v))
    by_key = None if key_bias is None else _cut(jnp.swapaxes(key_bias, 1, 2)[..., None], block_k, biases)[..., 0]
    o, stat = _attend(plan, *store((_cut(q, block_q, units), k, v)), vis, lists, by_key)
    back = lambda x: _whole(x, batch, units, length, heads)
    return back(o), back(row.reported(stat, score)[..., None])[..., 0]


def _cut(x: Float[Array, "B T H D"], block: int, units: int) -> Float[Array, "R F t D"]:
    """Rows (batch, unit, block) of the heads and tokens of one unit."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, units, heads // units, dim)
    return jnp.transpose(x, (0, 3, 1, 4, 2, 5)).reshape(-1, heads // units, block, dim)


def _whole(x: Float[Array, "R F t D"], batch: int, units: int, length: int, heads: int) -> Float[Array, "B T H D"]:
    """What `_cut` took apart."""
    x = x.reshape(batch, units, -1, *x.shape[1:])
    x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
    return x.reshape(batch, -1, heads, x.shape[-1])[:, :length]


class _Row:
    """One query block: the tiles of its list."""

    def __init__(self, plan: Plan, vis: Visibility, lists: Lists, at: Array):
        steps = lists.count.shape[2]
        self.plan, self.blocks = plan, vis.k_positions.shape[1] // plan.block_k
        batch, unit, i = div(at, plan.units * steps), rem(div(at, steps), plan.units), rem(at, steps)
        flat = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, *x.shape[3:]), at, keepdims=False)
        self.block, self.masked, self.count = (flat(x) for x in lists)
        self.vis = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, batch, 1), vis).rows(
            i * plan.block_q, plan.block_q
        )
        self.head = batch * plan.kv_heads + div(unit, plan.units // plan.kv_heads)
        self.bias_head = batch * plan.biases + div(unit, plan.units // plan.biases) if plan.biases else None

    def place(self, n: Array) -> Array:
        """Where the n-th listed block lies in the arrays of key blocks."""
        return self.head * self.blocks + self.block[n]

    def bias_place(self, n: Array) -> Array:
        """The same in the array of key biases."""
        return self.bias_head * self.blocks + self.block[n]

    def see(self, n: Array) -> Bool[Array, "t s"]:
        """Who sees whom in the n-th tile; looked at only where somebody does not see all."""
        bq, bk = self.plan.block_q, self.plan.block_k
        mask = lambda: visible(self.vis.columns(self.block[n] * bk, bk))[0]
        return jax.lax.cond(self.masked[n], mask, lambda: jnp.ones((bq, bk), bool))

    def scores(self, q: Array, k: Array, n: Array, by_key: Array | None) -> tuple[Array, Array]:
        """Scaled, biased scores [F, t, s] (masked to NEVER for exp) and who sees whom."""
        see = self.see(n)[None]
        s = self.plan.scale * jnp.einsum("ftd,sd->fts", q, k, preferred_element_type=jnp.float32)
        if by_key is not None:
            s = s + _take(by_key, self.bias_place(n))[:, None]
        s = s + self.plan.score.logit_bias
        return (jnp.where(see, s, NEVER) if self.plan.score.activation == "exp" else s), see


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, lists: Lists, by_key: Any) -> Any:
    """[R,F,t,D] over [R',s,D] and [R',s,V] to [R,F,t,V] and the number per row that `rows.saved` describes.

    Args:
      by_key: key biases [R",1 or F,s], or None.
    """
    return _forward(plan, q, k, v, vis, lists, by_key)[0]


def _forward(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, lists: Lists, by_key: Any) -> tuple[Any, Any]:
    score = plan.score

    def one(at: Array) -> tuple[Array, Array]:
        here, q_block = _Row(plan, vis, lists, at), _take(q, at)

        def tile(n: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, mass, acc = carry
            k_block, v_block = _take(k, here.place(n)), _take(v, here.place(n))
            s, see = here.scores(q_block, k_block, n, by_key)
            if score.activation == "exp":
                now = jnp.maximum(top, jnp.max(s, axis=-1))
                w = store(jnp.exp(s - now[..., None]))  # masked: exp(NEVER - FLOOR) is exactly 0
                added, fade = row.exp_terms(w, s, now[..., None], score), jnp.exp(top - now)
                mass, acc, top = mass * fade**score.power, acc * fade[..., None], now
            else:
                w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
                added = jnp.broadcast_to(row.terms(w, see, score), w.shape)
            product = jnp.einsum("fts,sv->ftv", w.astype(v.dtype), v_block, preferred_element_type=jnp.float32)
            return top, mass + jnp.sum(added, axis=-1), acc + product

        zero = jnp.zeros(q.shape[1:3], jnp.float32)
        start = zero + row.floor(score), zero, jnp.zeros((*zero.shape, v.shape[-1]), jnp.float32)
        top, mass, acc = jax.lax.fori_loop(0, here.count, tile, start)
        o = acc / row.divisor(row.normaliser(mass, top, score))[..., None]
        return o.astype(v.dtype), row.saved(mass, top, score)

    o, stat = jax.lax.map(one, jnp.arange(q.shape[0]))
    return (o, stat), (q, k, v, vis, lists, by_key, o, stat)


def _backward(plan: Plan, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array, None, None, Any]:
    q, k, v, vis, lists, by_key, o, stat = saved
    do, d_stat = cotangents
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    if plan.score.activation == "exp":
        delta = delta - d_stat  # both flow through log Z
    apart = plan.stats and plan.score.activation != "exp"
    do = do.astype(v.dtype)

    def one(carry: tuple[Array, ...], at: Array) -> tuple[tuple[Array, ...], Array]:
        here = _Row(plan, vis, lists, at)
        q_block, do_block = _take(q, at), _take(do, at)
        stat_row, delta_row, d_stat_row = (_take(x, at)[..., None] for x in (stat, delta, d_stat))

        def tile(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk, dv, *d_bias = carry
            place = here.place(n)
            k_block, v_block = _take(k, place), _take(v, place)
            s, see = here.scores(q_block, k_block, n, by_key)
            dp = jnp.einsum("ftv,sv->fts", do_block, v_block, preferred_element_type=jnp.float32)
            d_sum = d_stat_row if apart else None
            p, ds = row.gradients(s, see, stat_row, delta_row, dp, plan.score, once=store, d_stat=d_sum)
            if by_key is not None:
                of_head = jnp.sum(ds, axis=1)
                of_head = of_head if by_key.shape[1] > 1 else jnp.sum(of_head, axis=0, keepdims=True)
                d_bias = [_add(d_bias[0], here.bias_place(n), of_head)]
            ds, p = store((ds.astype(q.dtype), p.astype(v.dtype)))
            dq = dq + jnp.einsum("fts,sd->ftd", ds, k_block, preferred_element_type=jnp.float32)
            dk = _add(dk, place, jnp.einsum("fts,ftd->sd", ds, q_block, preferred_element_type=jnp.float32))
            dv = _add(dv, place, jnp.einsum("fts,ftv->sv", p, do_block, preferred_element_type=jnp.float32))
            return dq, dk, dv, *d_bias

        dq, *sums = jax.lax.fori_loop(0, here.count, tile, (jnp.zeros(q_block.shape, jnp.float32), *carry))
        return tuple(sums), (plan.scale * dq).astype(q.dtype)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v, *([] if by_key is None else [by_key])))
    (dk, dv, *d_bias), dq = jax.lax.scan(one, start, jnp.arange(q.shape[0]))
    d_bias = d_bias[0] if d_bias else None
    return dq, (plan.scale * dk).astype(k.dtype), dv.astype(v.dtype), None, None, d_bias


_attend.defvjp(_forward, _backward)


def _take(x: Array, at: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)


def _add(x: Array, at: Array, update: Array) -> Array:
    """x with `update` added at index `at`; inside a loop this happens in place."""
    return jax.lax.dynamic_update_index_in_dim(x, _take(x, at) + update, at, 0)
