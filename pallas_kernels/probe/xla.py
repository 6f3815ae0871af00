"""Plain XLA: two scans over chunks of keys, the second with the rows' normalisers known. No P×S array exists."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.masks import GLOBAL, Visibility, visible
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.flash.rows import FLOOR
from pallas_kernels.flash.tiles import div, rem
from pallas_kernels.probe.stats import OVER_KEYS, Stats

CHUNK = 1024
NOWHERE = 2**30  # no position of a key is further from its index


def probe_xla(
    q: Float[Array, "B P H D"],
    k: Float[Array, "B S K D"],
    vis: Visibility,
    *,
    scale: float,
    want: frozenset[str],
    block: int,
    key_bias: Float[Array, "B n S"] | None = None,
) -> Stats:
    """See `pallas_kernels.probe.probe`. The largest temporary is [B, H, P, chunk]."""
    batch, count, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    vis = widened(vis, batch, count, keys)
    size = min(block * max(1, CHUNK // block), -(-keys // block) * block)
    chunks = -(-keys // size)
    pad = chunks * size - keys
    vis = vis.pad_columns(pad)
    rows = jnp.moveaxis(q.reshape(batch, count, kv_heads, -1, dim), 1, 3)  # [B, K, G, P, D]
    k = jnp.pad(jnp.swapaxes(k, 1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))
    dtype = jnp.promote_types(q.dtype, k.dtype)
    if key_bias is not None:
        key_bias = jnp.pad(per_group(key_bias, kv_heads), ((0, 0), (0, 0), (0, 0), (0, pad)))

    def scores(i: Array) -> tuple[Array, Visibility]:
        """[B, H, P, chunk] and the chunk's rules."""
        part, rules = jax.lax.dynamic_slice_in_dim(k, i * size, size, axis=2), vis.columns(i * size, size)
        s = scale * jnp.einsum(
            "bkgpd,bksd->bkgps", rows.astype(dtype), part.astype(dtype), preferred_element_type=jnp.float32
        )
        if key_bias is not None:
            s = s + jax.lax.dynamic_slice_in_dim(key_bias, i * size, size, axis=3)[..., None, :]
        return jnp.where(visible(rules)[:, None], s.reshape(batch, heads, count, size), NEVER), rules

    def first(carry, i):
        top, mass, index, near, far = carry
        s, rules = scores(i)
        best = jnp.max(s, axis=-1)
        index = jnp.where(best > top, i * size + jnp.argmax(s, axis=-1).astype(jnp.int32), index)
        now = jnp.maximum(top, best)
        mass = mass * jnp.exp(top - now) + jnp.sum(jnp.exp(s - now[..., None]), axis=-1)
        low, high = shifts(rules, visible(rules), i * size)
        return (now, mass, index, jnp.minimum(near, low), jnp.maximum(far, high)), None

    shape = (batch, heads, count)
    nowhere = jnp.full((batch, count), NOWHERE, jnp.int32)
    start = (jnp.full(shape, FLOOR), jnp.zeros(shape), jnp.full(shape, -1, jnp.int32), nowhere, -nowhere)
    (top, mass, index, near, far), _ = jax.lax.scan(first, start, jnp.arange(chunks))
    some = mass > 0
    share = jnp.where(some, 1.0 / jnp.where(some, mass, 1.0), 0.0)  # the weight of a row's largest score
    lse = jnp.where(some, top + jnp.log(jnp.where(some, mass, 1.0)), NEVER)
    stats = row_stats(lse, share, index, want)
    if not want & OVER_KEYS:
        return stats

    regular = jnp.all(near >= far)

    def second(carry, i):
        s, rules = scores(i)
        w = jax.lax.optimization_barrier(jnp.exp(s - top[..., None]) * share[..., None])  # hidden: exactly 0
        cut = w.reshape(*shape, size // block, block)
        out = {}
        if "columns" in want:
            out["columns"] = jnp.sum(w, axis=2)
        if "blocks" in want:
            out["blocks"] = jnp.sum(cut, axis=-1)
        if "block_max" in want:
            out["block_max"] = jnp.max(cut, axis=-1)
        if "diagonals" in want:
            w = jnp.where((rules.k_segments != GLOBAL)[:, None, None, :], w, 0.0)
            carry = jax.lax.cond(regular, _shifted, _scattered, carry, w, near, i * size, rules)
        return carry, out

    line = jnp.zeros((batch, heads, keys + 2 * size))
    line, parts = jax.lax.scan(second, line, jnp.arange(chunks))
    over_keys: dict[str, Any] = {}
    for name, x in parts.items():
        joined = jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        over_keys[name] = joined[..., : keys if name == "columns" else -(-keys // block)]
    if "diagonals" in want:
        over_keys["diagonals"] = line[..., size : size + keys][..., ::-1]
    return dataclasses.replace(stats, **over_keys)


def widened(vis: Visibility, batch: int, count: int, keys: int) -> Visibility:
    """Positions and segments at their full shapes, int32."""
    wide = lambda x, n: jnp.broadcast_to(x, (batch, n)).astype(jnp.int32)
    return dataclasses.replace(
        vis,
        q_positions=wide(vis.q_positions, count),
        q_segments=wide(vis.q_segments, count),
        k_positions=wide(vis.k_positions, keys),
        k_segments=wide(vis.k_segments, keys),
    )


def per_group(key_bias: Float[Array, "B n S"], kv_heads: int) -> Float[Array, "B k g S"]:
    """Key biases by key head and query head of it: k is 1 or K, g is 1 or H // K."""
    batch, count, keys = key_bias.shape
    return key_bias.reshape(batch, *((1, 1) if count == 1 else (kv_heads, count // kv_heads)), keys)


def row_stats(lse: Array, weight: Array, index: Array, want: frozenset[str]) -> Stats:
    """Statistics per row, from [B, H, P]."""
    turn = lambda x: jnp.swapaxes(x, 1, 2)
    return Stats(
        lse=turn(lse) if "lse" in want else None,
        top_index=turn(index) if "top" in want else None,
        top_weight=turn(weight) if "top" in want else None,
    )


def shifts(
    vis: Visibility, see: Bool[Array, "B P s"], start: int | Array
) -> tuple[Int[Array, "B P"], Int[Array, "B P"]]:
    """Smallest and largest (key position - key index) over the keys a query sees, the first of which is `start`.

    Where both are equal, the query's weights lie on diagonals in the order of the keys.
    """
    placed = see & (vis.k_segments != GLOBAL)[:, None, :]
    shift = (vis.k_positions - jnp.arange(see.shape[2], dtype=jnp.int32) - start)[:, None, :]
    low = jnp.min(jnp.where(placed, shift, NOWHERE), axis=-1)
    return low, jnp.max(jnp.where(placed, shift, -NOWHERE), axis=-1)


def _shifted(line, w, near, start, vis: Visibility):
    """Adds each query's weights as one run: key index j lies at S - 1 - offset = S - 1 - q_pos + near + j."""
    batch, heads, count, size = w.shape
    keys = line.shape[2] - 2 * size
    base = jnp.where(near == NOWHERE, 0, keys - 1 - vis.q_positions + near)
    places = jnp.clip(base + start, -size, keys) + size  # what lies outside falls into the margins

    def add(i, line):
        b, p = div(i, count), rem(i, count)
        run = jax.lax.dynamic_slice(w, (b, 0, p, 0), (1, heads, 1, size))[:, :, 0]
        at = (b, 0, places[b, p])
        return jax.lax.dynamic_update_slice(line, jax.lax.dynamic_slice(line, at, (1, heads, size)) + run, at)

    return jax.lax.fori_loop(0, batch * count, add, line)


def _scattered(line, w, near, start, vis: Visibility):
    """The same for positions in any order, weight by weight."""
    size = w.shape[3]
    keys = line.shape[2] - 2 * size
    o = vis.q_positions[:, :, None] - vis.k_positions[:, None, :]
    place = jnp.where((o >= 0) & (o < keys), keys - 1 - o + size, line.shape[2])
    return jax.vmap(lambda line, w, place: line.at[:, place].add(w, mode="drop"))(line, w, place)
