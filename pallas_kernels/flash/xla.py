"""Plain XLA with O(T) memory: blocks of queries, each over the keys it can see, in chunks.

Every query block is recomputed in the backward pass (`jax.checkpoint`), so the residuals are q, k and v.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import GLOBAL, Visibility, visible
from jaxattn.rope import PositionBias
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.score import ACTIVATIONS, Score

BLOCK_Q = 128
CHUNK_K = 1024
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
    length, keys = q.shape[1], k.shape[1]

    def rows(q_block: Array, k_seen: Array, v_seen: Array, vis_block: Visibility) -> Array:
        return _query_block(q_block, k_seen, v_seen, vis_block, score, scale, bias, chunk_k)

    rows = jax.checkpoint(rows)
    if length <= block_q:
        return rows(q, k, v, vis)

    blocks = -(-length // block_q)
    per_group = -(-blocks // MAX_GROUPS)
    group = per_group * block_q
    outputs = []
    for start in range(0, length, group):
        size = min(group, length - start)
        seen = keys if vis.aligned is None else min(keys, start + size + vis.aligned)
        q_group, vis_group = q[:, start : start + size], vis.rows(start, size).columns(0, seen)
        k_seen, v_seen = k[:, :seen], v[:, :seen]
        if size <= block_q:
            outputs.append(rows(q_group, k_seen, v_seen, vis_group))
            continue
        pad = -size % block_q
        q_group, vis_group = jnp.pad(q_group, ((0, 0), (0, pad), (0, 0), (0, 0))), vis_group.pad_rows(pad)

        def block(i: Array, q_group=q_group, vis_group=vis_group, k_seen=k_seen, v_seen=v_seen) -> Array:
            q_block = jax.lax.dynamic_slice_in_dim(q_group, i * block_q, block_q, axis=1)
            return rows(q_block, k_seen, v_seen, vis_group.rows(i * block_q, block_q))

        out = jax.lax.map(block, jnp.arange((size + pad) // block_q))
        out = jnp.moveaxis(out, 0, 1).reshape(q.shape[0], size + pad, *out.shape[3:])
        outputs.append(out[:, :size])
    return jnp.concatenate(outputs, axis=1)


def _query_block(
    q: Array, k: Array, v: Array, vis: Visibility, score: Score, scale: float, bias: PositionBias | None, chunk: int
) -> Array:
    """One block of queries over all keys given, chunk by chunk, with the running row statistics."""
    batch, rows, heads, dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    groups = heads // kv_heads
    # [B, K, G·t, D] against [B, K, S, D]: one batched product per key head, no transposed scores.
    q = jnp.moveaxis(q.reshape(batch, rows, kv_heads, groups, dim), 1, 3)

    def update(carry: tuple[Array, Array, Array], k_c: Array, v_c: Array, vis_c: Visibility):
        top, mass, acc = carry
        s = scale * jnp.einsum("bkgtd,bskd->bkgts", q, k_c, preferred_element_type=jnp.float32)
        if bias is not None:
            extra = jnp.where(
                (vis_c.k_segments != GLOBAL)[:, None, None, :], bias(vis_c.q_positions, vis_c.k_positions), 0.0
            )
            per_head = extra.shape[1] == heads
            s = s + extra.reshape(
                extra.shape[0], *((kv_heads, groups) if per_head else (1, 1)), *extra.shape[2:]
            )
        s = s + score.logit_bias
        see = visible(vis_c)[:, None, None]
        if score.activation == "exp":
            s = jnp.where(see, s, NEVER)
            new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(s, axis=-1)))
            w = jnp.where(see, jnp.exp(s - new_top[..., None]), 0.0)
            fade = jnp.exp(top - new_top)
            power = w if score.p == 1.0 else jnp.where(see, jnp.exp(score.p * (s - new_top[..., None])), 0.0)
            mass = mass * fade**score.p + jnp.sum(power, axis=-1)
            acc = acc * fade[..., None]
        else:
            new_top = top
            w = jnp.where(see, ACTIVATIONS[score.activation](s), 0.0)
            mass = mass + _row_mass(w, see, score)
        acc = acc + jnp.einsum("bkgts,bskv->bkgtv", w.astype(v.dtype), v_c, preferred_element_type=jnp.float32)
        return new_top, mass, acc

    stats = (batch, kv_heads, groups, rows)
    floor = 0.0 if score.normaliser == "sum_plus_one" else NEVER
    carry = (
        jnp.full(stats, floor, jnp.float32),
        jnp.zeros(stats, jnp.float32),
        jnp.zeros((*stats, v.shape[-1]), jnp.float32),
    )
    if keys <= chunk:
        carry = update(carry, k, v, vis)
    else:
        pad = -keys % chunk
        wide = lambda x: jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        k, v, vis = wide(k), wide(v), vis.pad_columns(pad)

        def step(carry, i):
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
            return update(carry, cut(k), cut(v), vis.columns(i * chunk, chunk)), None

        carry, _ = jax.lax.scan(step, carry, jnp.arange((keys + pad) // chunk))
    out = _normalise(carry, score)
    return jnp.moveaxis(out, 3, 1).reshape(batch, rows, heads, v.shape[-1]).astype(v.dtype)


def _row_mass(w: Array, see: Array, score: Score) -> Array:
    """What a chunk adds to the normaliser's running statistic."""
    if score.normaliser == "count":
        return jnp.broadcast_to(jnp.sum(see, axis=-1).astype(jnp.float32), w.shape[:-1])
    if score.normaliser == "p_norm":
        w = jnp.where(see, jnp.abs(jnp.where(see, w, 1.0)) ** score.p, 0.0)
    return jnp.sum(w, axis=-1)


def _normalise(carry: tuple[Array, Array, Array], score: Score) -> Array:
    """Σ w v / Z from the running maximum, statistic and sum; rows without mass give zeros."""
    top, mass, acc = carry
    match score.normaliser:
        case "none":
            return acc
        case "sum":
            z = mass / score.row_sum + (0.0 if score.activation == "exp" else score.eps)
        case "sum_plus_one":
            z = mass + jnp.exp(-top) if score.activation == "exp" else mass + 1.0
        case "clipped_sum":
            z = jnp.maximum(jnp.abs(mass), 1.0)
        case "p_norm":
            z = jnp.where(mass > 0, mass, 1.0) ** (1.0 / score.p)
        case _:
            z = mass
    return acc / jnp.where(z == 0, 1.0, z)[..., None]
