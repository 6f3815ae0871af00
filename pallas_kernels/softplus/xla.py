"""Plain XLA with O(T) memory: blocks of queries, each sweeping the keys it can see in chunks.

Forward: count the visible keys (no product), then sum and maximum of φ, then w = r^p and its values; φ is
computed twice, as flash attention would recompute it (arXiv 2205.14135). Backward: one sweep through w,
which also collects the gradient of the row means; a second carries that gradient to every key, because a
mean couples all keys of a row, the clipped ones too. Kept per row: N, m, 1 / (max - m), Σ w and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias
from pallas_kernels.softplus.reference import raw_weights, row_terms, softplus

BLOCK_Q = 128
CHUNK_K = 1024
MAX_GROUPS = 8  # programs grow with unrolled groups; inside a group blocks are scanned


class Rule(NamedTuple):
    """What is static: see `softplus_attention`; `chunk` keys are weighed at a time."""

    scale: float
    p: float | None
    exempt: int
    chunk: int


def softplus_xla(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"],
    vis: Visibility,
    *,
    scale: float,
    p: float | None,
    exempt: int,
    bias: PositionBias | None = None,
    block_q: int = BLOCK_Q,
    chunk_k: int = CHUNK_K,
) -> Float[Array, "B T H V"]:
    """See `pallas_kernels.softplus.softplus_attention`. The largest temporary is [B, H, block_q, chunk_k]."""
    batch, length, heads, dim = q.shape
    kv_heads, keys, v_dim, v_kind = k.shape[2], k.shape[1], v.shape[3], v.dtype
    kind = jnp.promote_types(q.dtype, jnp.float32)
    q = jnp.moveaxis(q.astype(kind).reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)  # [B, K, G, T, D]
    k, v = (jnp.moveaxis(x, 1, 2).astype(kind) for x in (k, v))  # [B, K, S, ·]; gradients add up in f32, too
    if keys > chunk_k:  # whole chunks only: nobody sees padding
        extra = -keys % chunk_k
        k, v, vis, keys = _pad(k, 2, extra), _pad(v, 2, extra), vis.pad_columns(extra), keys + extra
    rows = partial(_block, Rule(scale, p, exempt, chunk_k))

    blocks = -(-length // block_q)
    group = -(-blocks // MAX_GROUPS) * block_q
    outputs: list[Array] = []
    for start in range(0, length, group):
        size = min(group, length - start)
        seen = keys if vis.aligned is None else min(keys, start + size + vis.aligned)
        seen = seen if seen <= chunk_k else min(keys, -(-seen // chunk_k) * chunk_k)
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
    return jnp.moveaxis(o, 3, 1).reshape(batch, length, heads, v_dim).astype(v_kind)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_block(rule: Rule, q: Array, k: Array, v: Array, vis: Visibility, bias: Any) -> Array:
    """One block of queries [B,K,G,t,D] over all keys given [B,K,S,·]; returns [B,K,G,t,V]."""
    return _block_forward(rule, q, k, v, vis, bias)[0]


def _block_forward(rule, q, k, v, vis, bias):
    count = _count(vis, k, v, rule.chunk)
    q_scaled = q * _factor(rule, count, q.dtype)
    zeros = jnp.zeros(q.shape[:-1], q.dtype)
    m, inverse = zeros, zeros
    if rule.p is not None:

        def measure(carry, part):
            k_c, _, vis_c = part
            phi = _phi(q_scaled, k_c, vis_c, bias)
            return (carry[0] + jnp.sum(phi, axis=-1), jnp.maximum(carry[1], jnp.max(phi, axis=-1))), ()

        (total, top), _ = _sweep(measure, (zeros, zeros), k, v, vis, rule.chunk)
        m, inverse = row_terms(count, total, top, rule.exempt)

    def weigh(carry, part):
        k_c, v_c, vis_c = part
        return jax.tree.map(jnp.add, carry, _weigh(rule, q_scaled, k_c, v_c, m, bias, inverse, vis_c)), ()

    (mass, acc), _ = _sweep(weigh, (zeros, jnp.zeros((*zeros.shape, v.shape[-1]), q.dtype)), k, v, vis, rule.chunk)
    o = acc / jnp.where(mass == 0, 1.0, mass)[..., None]
    return o, (q, k, v, vis, bias, o, count, m, inverse, mass)


def _block_backward(rule, saved, do):
    q, k, v, vis, bias, o, count, m, inverse, mass = saved
    factor = _factor(rule, count, q.dtype)
    q_scaled = q * factor
    d_acc = do / jnp.where(mass == 0, 1.0, mass)[..., None]
    d_mass = -jnp.sum(d_acc * o, axis=-1)

    def through_weights(carry, part):
        k_c, v_c, vis_c = part
        run = lambda q, k, v, m, bias: _weigh(rule, q, k, v, m, bias, inverse, vis_c)
        _, pull = jax.vjp(run, q_scaled, k_c, v_c, m, bias)
        dq, dk, dv, dm, d_bias = pull((d_mass, d_acc))
        return jax.tree.map(jnp.add, carry, (dq, dm, d_bias)), (dk, dv)

    start = jax.tree.map(jnp.zeros_like, (q, m, bias))
    (dq, dm, d_bias), (dk, dv) = _sweep(through_weights, start, k, v, vis, rule.chunk)
    if rule.p is not None:
        fixed = (count <= rule.exempt) | (inverse == 0)  # rows whose offset is no mean
        d_total = jnp.where(fixed, 0.0, dm / jnp.maximum(count, 1).astype(dm.dtype))

        def through_mean(carry, part):
            k_c, _, vis_c = part
            _, pull = jax.vjp(lambda q, k, bias: jnp.sum(_phi(q, k, vis_c, bias), axis=-1), q_scaled, k_c, bias)
            dq, dk, d_bias = pull(d_total)
            return jax.tree.map(jnp.add, carry, (dq, d_bias)), dk

        (dq, d_bias), dk_mean = _sweep(through_mean, (dq, d_bias), k, v, vis, rule.chunk)
        dk = dk + dk_mean
    return dq * factor, dk, dv, None, d_bias


_attend_block.defvjp(_block_forward, _block_backward)
_block = jax.jit(_attend_block, static_argnums=(0,))  # outside jit: one program instead of one per operation


def _count(vis: Visibility, k: Array, v: Array, chunk: int) -> Array:
    """N of every row, [B, 1, 1, t]. From visibility, so that it is the same under a cache, packed and padded."""
    add = lambda n, part: (n + jnp.sum(visible(part[2]), axis=-1, dtype=jnp.int32), ())
    return _sweep(add, jnp.zeros(vis.q_positions.shape, jnp.int32), k, v, vis, chunk)[0][:, None, None]


def _factor(rule: Rule, count: Array, kind: Any) -> Array:
    """scale · log N, [B, 1, 1, t, 1]; 0 where nothing is visible."""
    return rule.scale * jnp.log(jnp.maximum(count, 1).astype(kind))[..., None]


def _phi(q_scaled: Array, k: Array, vis: Visibility, bias: Any) -> Array:
    """φ of one chunk, [B, K, G, t, S], exact zeros where masked."""
    # HIGHEST: TensorFloat products would put 1e-3 into φ, and the power multiplies that by p.
    s = jnp.einsum("bkgtd,bksd->bkgts", q_scaled, k, precision=jax.lax.Precision.HIGHEST)
    if bias is not None:
        on = (vis.k_segments != GLOBAL)[:, None, None, :]
        added = jnp.where(on, bias(vis.q_positions, vis.k_positions), 0.0)
        heads = s.shape[1:3] if added.shape[1] > 1 else (1, 1)
        s = s + added.reshape(added.shape[0], *heads, *added.shape[2:])
    return jnp.where(visible(vis)[:, None, None], softplus(s), 0.0)


def _weigh(rule, q_scaled, k, v, m, bias, inverse, vis) -> tuple[Array, Array]:
    """Σ w [B, K, G, t] and Σ w v [B, K, G, t, V] of one chunk."""
    w = raw_weights(_phi(q_scaled, k, vis, bias), m[..., None], inverse[..., None], rule.p)
    return jnp.sum(w, axis=-1), jnp.einsum("bkgts,bksv->bkgtv", w, v)


def _sweep(body: Callable, carry: Any, k: Array, v: Array, vis: Visibility, chunk: int) -> tuple[Any, Any]:
    """Scan `body` (carry, (k, v, vis) of a chunk) -> (carry, [B, K, chunk, ·] arrays), which are joined again."""
    keys = k.shape[2]
    if keys <= chunk:
        return body(carry, (k, v, vis))
    cut = lambda x, i: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=2)
    step = lambda c, i: body(c, (cut(k, i), cut(v, i), vis.columns(i * chunk, chunk)))
    carry, parts = jax.lax.scan(step, carry, jnp.arange(keys // chunk))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], keys, x.shape[-1])
    return carry, jax.tree.map(join, parts)


def _pad(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if a == axis else 0) for a in range(x.ndim)])
