"""Plain XLA with O(T) memory: blocks of queries, each over the keys it can see, in chunks.

The backward pass recomputes the weights of a block from one saved number per row, as flash attention
does (arXiv 2205.14135); what is kept is q, k, v, the output and that number. Inside, heads come before
tokens, so that every product is a batched matrix product without a transpose.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias
from pallas_kernels.flash import rows as row
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import ACTIVATIONS, Score

store = jax.lax.optimization_barrier  # "compute this once": exp would be repeated in every consumer
BLOCK_Q = 128
CHUNK_K = 1024
SKIPPED_K = 256
MAX_GROUPS = 16  # programs grow with unrolled groups; inside a group blocks are scanned


def flash_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    score: Score,
    *,
    scale: float,
    bias: PositionBias | None = None,
    block_q: int = BLOCK_Q,
    chunk_k: int = CHUNK_K,
) -> Float[Array, "B T H V"]:
    """See `pallas_kernels.flash.flash`. The largest temporary is [B, H, block_q, chunk_k]."""
    batch, length, heads, dim = q.shape
    kv_heads, keys, v_dim = k.shape[2], k.shape[1], v.shape[3]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)  # [B, K, G, T, D]
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)  # [B, K, S, ·]
    if q.dtype == jnp.float32:  # in lower precision the product is scaled instead, after accumulation
        q, scale = q * scale, 1.0
    q, k, v = store((q, k, v))
    if vis.aligned is None:  # behind a cache most keys may be empty: smaller chunks, of which the unseen are skipped
        chunk_k = min(chunk_k, SKIPPED_K)
    rows = partial(_block, score, scale, chunk_k)

    blocks = -(-length // block_q)
    group = -(-blocks // MAX_GROUPS) * block_q
    outputs = []
    for start in range(0, length, group):
        size = min(group, length - start)
        seen = keys if vis.aligned is None else min(keys, start + size + vis.aligned)
        q_group, vis_group = q[..., start : start + size, :], vis.rows(start, size).columns(0, seen)
        k_seen, v_seen = k[:, :, :seen], v[:, :, :seen]
        if size <= block_q:
            outputs.append(rows(q_group, k_seen, v_seen, vis_group, bias))
            continue
        pad = -size % block_q
        q_group, vis_group = _pad(q_group, 3, pad), vis_group.pad_rows(pad)

        def block(i: Array, q_group=q_group, vis_group=vis_group, k_seen=k_seen, v_seen=v_seen) -> Array:
            q_block = jax.lax.dynamic_slice_in_dim(q_group, i * block_q, block_q, axis=3)
            return rows(q_block, k_seen, v_seen, vis_group.rows(i * block_q, block_q), bias)

        out = jax.lax.map(block, jnp.arange((size + pad) // block_q))
        out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:3], size + pad, v_dim)
        outputs.append(out[..., :size, :])
    o = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
    return jnp.moveaxis(o, 3, 1).reshape(batch, length, heads, v_dim)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _block(score: Score, scale: float, chunk: int, q: Array, k: Array, v: Array, vis: Visibility, bias: Any) -> Array:
    """One block of queries [B,K,G,t,D] over all keys given [B,K,S,·]; returns [B,K,G,t,V]."""
    return _block_forward(score, scale, chunk, q, k, v, vis, bias)[0]


def _block_forward(score, scale, chunk, q, k, v, vis, bias):

    def weigh(part: tuple[Array, Array, Visibility]) -> tuple[Array, Array, Array]:
        """Running maximum, mass and weighted values of one chunk alone."""
        k_c, v_c, vis_c = part
        s, see = _scores(score, scale, q, k_c, vis_c, bias)
        if score.activation == "exp":
            top = jnp.maximum(jnp.max(s, axis=-1), row.floor(score))
            w = store(jnp.exp(s - top[..., None]))  # masked: exp(NEVER - FLOOR) is exactly 0
            mass = jnp.sum(row.exp_terms(w, s, top[..., None], score), axis=-1)
        else:
            w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
            mass = jnp.broadcast_to(jnp.sum(row.terms(w, see, score), axis=-1), w.shape[:-1])
            top = jnp.zeros_like(mass)
        acc = jnp.einsum("bkgts,bksv->bkgtv", w.astype(v.dtype), v_c, preferred_element_type=jnp.float32)
        return top, mass, acc

    def merge(one, two):
        top = jnp.maximum(one[0], two[0])
        fade, other = jnp.exp(one[0] - top), jnp.exp(two[0] - top)  # both 1 where there is no maximum
        mass = one[1] * fade**score.p + two[1] * other**score.p
        return top, mass, one[2] * fade[..., None] + two[2] * other[..., None]

    top, mass, acc = _fold_chunks(weigh, merge, k, v, vis, chunk)
    o = (acc / row.divisor(row.normaliser(mass, top, score))[..., None]).astype(v.dtype)
    stat = row.saved(mass, top, score)
    return o, (q, k, v, vis, bias, o, stat)


def _block_backward(score, scale, chunk, saved, do):
    q, k, v, vis, bias, o, stat = saved
    do = do.astype(jnp.float32)
    delta = jnp.sum(do * o.astype(jnp.float32), axis=-1)  # do · o, the part that flows through Z
    # [B,K,·,groups and rows]: groups share their key head; the explicit transposes keep every product row-major.
    turn = lambda x: store(jnp.swapaxes(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, 3))
    q_t, do_t = turn(q), turn(do.astype(v.dtype))

    def add(carry, part):
        dq, d_bias = carry
        k_c, v_c, vis_c = part
        (s, see), bias_vjp = _scores_and_vjp(score, scale, q, k_c, vis_c, bias)
        dp = jnp.einsum("bkgtv,bksv->bkgts", do.astype(v.dtype), v_c, preferred_element_type=jnp.float32)
        p, ds = row.gradients(s, see, stat[..., None], delta[..., None], dp, score, once=store)
        d_bias = jax.tree.map(jnp.add, d_bias, bias_vjp(ds))
        ds, p = store((ds.astype(q.dtype), p.astype(v.dtype)))
        dq = dq + scale * jnp.einsum("bkgts,bksd->bkgtd", ds, k_c, preferred_element_type=jnp.float32)
        fold = lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
        dk = scale * jnp.matmul(q_t, fold(ds), preferred_element_type=jnp.float32)
        dv = jnp.matmul(do_t, fold(p), preferred_element_type=jnp.float32)
        return (dq, d_bias), store((dk.astype(k.dtype), dv.astype(v.dtype)))

    start = (jnp.zeros(q.shape, jnp.float32), jax.tree.map(jnp.zeros_like, bias))
    (dq, d_bias), dk, dv = _map_chunks(add, start, k, v, vis, chunk)
    return dq.astype(q.dtype), jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None, d_bias


_block.defvjp(_block_forward, _block_backward)


def _scores(score: Score, scale: float, q: Array, k: Array, vis: Visibility, bias: Any) -> tuple[Array, Array]:
    """Scaled, biased scores [B,K,G,t,S] (masked to NEVER for exp) and who sees whom."""
    return _scores_and_vjp(score, scale, q, k, vis, bias)[0]


def _scores_and_vjp(score, scale, q, k, vis, bias):
    """As `_scores`, with the function that turns ds into the gradient of the bias's parameters."""
    see = visible(vis)[:, None, None]
    s = scale * jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
    vjp = lambda ds: bias
    if bias is not None:

        def extra(bias: PositionBias) -> Array:
            on = (vis.k_segments != GLOBAL)[:, None, None, :]
            added = jnp.where(on, bias(vis.q_positions, vis.k_positions), 0.0)
            heads = q.shape[1:3] if added.shape[1] > 1 else (1, 1)
            return jnp.broadcast_to(added.reshape(added.shape[0], *heads, *added.shape[2:]), s.shape)

        added, pull = jax.vjp(extra, bias)
        s, vjp = s + added, lambda ds: pull(ds)[0]
    if score.logit_bias:
        s = s + score.logit_bias
    return (jnp.where(see, s, NEVER) if score.activation == "exp" else s, see), vjp


def _fold_chunks(weigh, merge, k: Array, v: Array, vis: Visibility, chunk: int):
    """`merge` of `weigh` over the key chunks; one call when all keys fit in one."""
    if k.shape[2] <= chunk:
        return weigh((k, v, vis))
    cut = _chunks(k, v, vis, chunk)

    def fold(carry, i):
        part = cut(i)
        seen = jnp.any(visible(part[2]))
        return jax.lax.cond(seen, lambda: merge(carry, weigh(part)), lambda: carry), None

    return jax.lax.scan(fold, weigh(cut(0)), jnp.arange(1, -(-k.shape[2] // chunk)))[0]


def _map_chunks(add, carry, k: Array, v: Array, vis: Visibility, chunk: int):
    """Carry `add` over the key chunks; it also returns dk and dv of its chunk, [B,K,·,chunk]."""
    keys = k.shape[2]
    if keys <= chunk:
        carry, (dk, dv) = add(carry, (k, v, vis))
        return carry, dk, dv
    cut = _chunks(k, v, vis, chunk)
    carry, parts = jax.lax.scan(lambda c, i: add(c, cut(i)), carry, jnp.arange(-(-keys // chunk)))
    join = lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1)[..., :keys]
    return carry, join(parts[0]), join(parts[1])


def _chunks(k: Array, v: Array, vis: Visibility, chunk: int):
    """index -> (k, v, vis) of that chunk of keys, padded at the end."""
    pad = -k.shape[2] % chunk
    k, v, vis = _pad(k, 2, pad), _pad(v, 2, pad), vis.pad_columns(pad)
    cut = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=2)
    return lambda i: (cut(k, i), cut(v, i), vis.columns(i * chunk, chunk))


def _pad(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if a == axis else 0) for a in range(x.ndim)])
