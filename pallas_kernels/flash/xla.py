"""Plain XLA with O(T) memory: blocks of queries, each over the keys it can see, in chunks.

The backward pass recomputes the weights of a block from one saved number per row, as flash attention
does (arXiv 2205.14135); what is kept is q, k, v, the output and that number. Inside, heads come before
tokens, so that every product is a batched matrix product without a transpose.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias
from pallas_kernels._blocks import blocks
from pallas_kernels.flash import rows as row
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import ACTIVATIONS, Score

store = jax.lax.optimization_barrier  # "compute this once": exp would be repeated in every consumer
BLOCK_Q = 128
CHUNK_K = 1024
SKIPPED_K = 256
MAX_GROUPS = 16  # programs grow with unrolled groups; inside a group blocks are scanned


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before compiling."""

    score: Score
    scale: float
    chunk: int
    stats: bool  # whether the number kept per row is a result, with a gradient


Part = tuple[Array, Array, Visibility, Any]  # keys, values [B,K,S,·], who sees them, their key bias [B,·,·,S] or None


def flash_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float,
    bias: PositionBias | None = None,
    key_bias: Float[Array, "B n S"] | None = None,
    stats: bool = False,
    block_q: int | None = None,
    chunk_k: int | None = None,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `pallas_kernels.flash.flash`. The largest temporary is [B, H, block_q, chunk_k]; None: as tuned."""
    tuned = blocks("flash", "xla", q.shape[3], block_q=BLOCK_Q, chunk_k=CHUNK_K)
    block_q, chunk_k = block_q or tuned["block_q"], chunk_k or tuned["chunk_k"]
    batch, length, heads, dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)  # [B, K, G, T, D]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, ·]
    if q.dtype == jnp.float32:  # in lower precision the product is scaled instead, after accumulation
        q, scale = q * scale, 1.0
    q, k, v = store((q, k, v))
    if key_bias is not None:  # [B, 1 or K, 1 or G, S]
        count = key_bias.shape[1]
        per_kv_head = (1, 1) if count == 1 else (kv_heads, count // kv_heads)
        key_bias = key_bias.reshape(batch, *per_kv_head, keys)
    if vis.aligned is None:  # behind a cache most keys may be empty: smaller chunks, of which the unseen are skipped
        chunk_k = min(chunk_k, SKIPPED_K)
    rows = partial(_block, Plan(score, scale, chunk_k, stats))

    group = -(-length // (block_q * MAX_GROUPS)) * block_q
    outputs = []
    for start in range(0, length, group):
        size = min(group, length - start)
        seen = keys if vis.aligned is None else min(keys, start + size + vis.aligned)
        q_group, vis_group = q[..., start : start + size, :], vis.rows(start, size).columns(0, seen)
        k_seen, v_seen = k[:, :, :seen], v[:, :, :seen]
        kb_seen = None if key_bias is None else key_bias[..., :seen]
        if size <= block_q:
            outputs.append(rows(q_group, k_seen, v_seen, vis_group, bias, kb_seen))
            continue
        pad = -size % block_q
        q_group, vis_group = _pad(q_group, 3, pad), vis_group.pad_rows(pad)

        def block(i, q_group=q_group, vis_group=vis_group, k_seen=k_seen, v_seen=v_seen, kb_seen=kb_seen):
            q_block = jax.lax.dynamic_slice_in_dim(q_group, i * block_q, block_q, axis=3)
            return rows(q_block, k_seen, v_seen, vis_group.rows(i * block_q, block_q), bias, kb_seen)

        outputs.append(jax.tree.map(partial(_joined, size), jax.lax.map(block, jnp.arange((size + pad) // block_q))))
    join = lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    o = jax.tree.map(join, *outputs)
    result = lambda x: jnp.moveaxis(x, 3, 1).reshape(batch, length, heads, *x.shape[4:])
    return (result(o[0]), row.reported(result(o[1]), score)) if stats else result(o)


def _joined(size: int, blocks: Array) -> Array:
    """[n,B,K,G,t,·] to [B,K,G,size,·]."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :size]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(plan: Plan, q: Array, k: Array, v: Array, vis: Visibility, bias: Any, key_bias: Array | None) -> Any:
    """One block of queries [B,K,G,t,D] over all keys given [B,K,S,·]: [B,K,G,t,V], with stats also [B,K,G,t]."""
    return _block_forward(plan, q, k, v, vis, bias, key_bias)[0]


def _block_forward(plan, q, k, v, vis, bias, key_bias):
    score = plan.score

    def weigh(part: Part) -> tuple[Array, Array, Array]:
        """Running maximum, mass and weighted values of one chunk alone."""
        s, see = _scores_and_vjp(plan, q, part, bias)[0]
        if score.activation == "exp":
            top = jnp.maximum(jnp.max(s, axis=-1), row.floor(score))
            w = store(jnp.exp(s - top[..., None]))  # masked: exp(NEVER - FLOOR) is exactly 0
            mass = jnp.sum(row.exp_terms(w, s, top[..., None], score), axis=-1)
        else:
            w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
            mass = jnp.broadcast_to(jnp.sum(row.terms(w, see, score), axis=-1), w.shape[:-1])
            top = jnp.zeros_like(mass)
        acc = jnp.einsum("bkgts,bksv->bkgtv", w.astype(v.dtype), part[1], preferred_element_type=jnp.float32)
        return top, mass, acc

    def merge(one, two):
        top = jnp.maximum(one[0], two[0])
        fade, other = jnp.exp(one[0] - top), jnp.exp(two[0] - top)  # both 1 where there is no maximum
        mass = one[1] * fade**score.power + two[1] * other**score.power
        return top, mass, one[2] * fade[..., None] + two[2] * other[..., None]

    top, mass, acc = _fold_chunks(weigh, merge, (k, v, vis, key_bias), plan.chunk)
    o = (acc / row.divisor(row.normaliser(mass, top, score))[..., None]).astype(v.dtype)
    stat = row.saved(mass, top, score)
    return ((o, stat) if plan.stats else o), (q, k, v, vis, bias, key_bias, o, stat)


def _block_backward(plan, saved, d_out):
    q, k, v, vis, bias, key_bias, o, stat = saved
    do, d_stat = d_out if plan.stats else (d_out, None)
    do = do.astype(jnp.float32)
    delta = jnp.sum(do * o.astype(jnp.float32), axis=-1)  # do · o, the part that flows through Z
    if d_stat is not None and plan.score.activation == "exp":  # the number kept is log Z
        delta, d_stat = delta - d_stat, None
    d_stat = None if d_stat is None else d_stat[..., None]
    # [B,K,·,groups and rows]: groups share their key head; the explicit transposes keep every product row-major.
    turn = lambda x: store(jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, 3))
    q_t, do_t = turn(q), turn(do.astype(v.dtype))

    def add(carry, part):
        dq, d_bias = carry
        k_c, v_c = part[:2]
        (s, see), bias_vjp = _scores_and_vjp(plan, q, part, bias)
        dp = jnp.einsum("bkgtv,bksv->bkgts", do.astype(v.dtype), v_c, preferred_element_type=jnp.float32)
        p, ds = row.gradients(s, see, stat[..., None], delta[..., None], dp, plan.score, once=store, d_stat=d_stat)
        added, d_kb = bias_vjp(ds)
        d_bias = jax.tree.map(jnp.add, d_bias, added)
        ds, p = store((ds.astype(q.dtype), p.astype(v.dtype)))
        dq = dq + plan.scale * jnp.einsum("bkgts,bksd->bkgtd", ds, k_c, preferred_element_type=jnp.float32)
        fold = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
        dk = plan.scale * jnp.matmul(q_t, fold(ds), preferred_element_type=jnp.float32)
        dv = jnp.matmul(do_t, fold(p), preferred_element_type=jnp.float32)
        return (dq, d_bias), store((dk.astype(k.dtype), dv.astype(v.dtype), d_kb))

    start = (jnp.zeros(q.shape, jnp.float32), jax.tree.map(jnp.zeros_like, bias))
    (dq, d_bias), (dk, dv, d_kb) = _map_chunks(add, start, (k, v, vis, key_bias), plan.chunk)
    return dq.astype(q.dtype), jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None, d_bias, d_kb


_block.defvjp(_block_forward, _block_backward)


def _scores_and_vjp(plan: Plan, q: Array, part: Part, bias: Any):
    """Scaled, biased scores [B,K,G,t,S] (masked to NEVER for exp) and who sees whom.

    With the function that turns ds into the gradients of the position bias's parameters and of the key bias.
    """
    k, _, vis, key_bias = part
    score = plan.score
    see = visible(vis)[:, None, None]
    s = plan.scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    pull_bias = lambda ds: bias
    if bias is not None:

        def extra(bias: PositionBias) -> Array:
            on = (vis.k_segments != GLOBAL)[:, None, None, :]
            added = jnp.where(on, bias(vis.q_positions, vis.k_positions), 0.0)
            heads = q.shape[1:3] if added.shape[1] > 1 else (1, 1)
            return jnp.broadcast_to(added.reshape(added.shape[0], *heads, *added.shape[2:]), s.shape)

        added, pull = jax.vjp(extra, bias)
        s, pull_bias = s + added, lambda ds: pull(ds)[0]
    if key_bias is not None:
        s = s + key_bias[..., None, :]
    if score.logit_bias:
        s = s + score.logit_bias
    s = jnp.where(see, s, NEVER) if score.activation == "exp" else s
    return (s, see), lambda ds: (pull_bias(ds), _sum_to(ds, key_bias))


def _sum_to(ds: Array, key_bias: Array | None) -> Array | None:
    """The gradient of the key bias: sums over queries and the heads that share it."""
    if key_bias is None:
        return None
    shared = tuple(axis for axis in (1, 2) if key_bias.shape[axis] == 1)
    return jnp.sum(ds, axis=(*shared, 3), keepdims=True)[:, :, :, 0]


def _fold_chunks(weigh, merge, part: Part, chunk: int):
    """`merge` of `weigh` over the key chunks; one call when all keys fit in one."""
    keys = part[0].shape[2]
    if keys <= chunk:
        return weigh(part)
    cut = _chunks(part, chunk)

    def fold(carry, i):
        part = cut(i)
        seen = jnp.any(visible(part[2]))
        return jax.lax.cond(seen, lambda: merge(carry, weigh(part)), lambda: carry), None

    return jax.lax.scan(fold, weigh(cut(0)), jnp.arange(1, -(-keys // chunk)))[0]


def _map_chunks(add, carry, part: Part, chunk: int):
    """Carry `add` over the key chunks; it also returns what belongs to its chunk's keys, [·,·,·,chunk] each."""
    keys = part[0].shape[2]
    if keys <= chunk:
        return add(carry, part)
    cut = _chunks(part, chunk)
    carry, parts = jax.lax.scan(lambda c, i: add(c, cut(i)), carry, jnp.arange(-(-keys // chunk)))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1)[..., :keys], parts)


def _chunks(part: Part, chunk: int):
    """index -> the part of that chunk of keys, padded at the end."""
    k, v, vis, key_bias = part
    pad = -k.shape[2] % chunk
    k, v, vis = _pad(k, 2, pad), _pad(v, 2, pad), vis.pad_columns(pad)
    key_bias = None if key_bias is None else _pad(key_bias, 3, pad)
    cut = lambda x, i, axis=2: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=axis)
    return lambda i: (
        cut(k, i),
        cut(v, i),
        vis.columns(i * chunk, chunk),
        None if key_bias is None else cut(key_bias, i, 3),
    )


def _pad(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if a == axis else 0) for a in range(x.ndim)])
