"""Attention to lists of tokens: every query row and head reads the keys it is told, wherever they lie in the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import PADDING, Visibility, sees
from jaxattn.mechanisms._protocol import Core
from jaxattn.stores import KVCache

NEVER = -1e30


def attend_lists(
    core: Core, q: Float[Array, "B T H D"], cache: KVCache, lists: Int[Array, "B n T m"], vis: Visibility
) -> Float[Array, "B T H V"]:
    """The mechanism's output over the listed keys alone, with its constant slots and output term.

    Args:
      q: behind `core.queries`.
      lists: places in the cache, each at most once in a list; n = H: a list for every query head, n = K: for every key
        head. Those that a query may not see are passed over.
      vis: of these queries and the whole cache.
    """
    batch, length, heads, dim = q.shape
    kv_heads, most = cache.head_keys.shape[1], lists.shape[3]
    flat = lists.reshape(batch, kv_heads, -1)
    turned = lambda x: jnp.moveaxis(x.reshape(*lists.shape, *x.shape[3:]), 2, 1)  # [B, T, n, m, ...]
    near = lambda x: turned(jnp.take_along_axis(x[:, None], flat, axis=2))
    positions, segments = near(vis.k_positions), near(vis.k_segments)
    rows = lambda x: turned(jnp.take_along_axis(x, flat[..., None], axis=2))
    keys, values = rows(cache.head_keys), rows(cache.head_values)
    if lists.shape[1] == heads:  # a head of a row is a row of its own, which fast kernels of one query know
        own = lambda x: x.reshape(-1, 1, most, x.shape[4])
        each = lambda x: jnp.repeat(x.reshape(-1, 1), heads, axis=0)
        q_at, k_at = map(each, (vis.q_positions, vis.q_segments)), (x.reshape(-1, most) for x in (positions, segments))
        how: dict[str, Any] = {"folded": True}
    else:  # rules of place are a row's, so what a key head must not see is hidden from it
        own = lambda x: x.reshape(-1, *x.shape[2:])
        live = (vis.q_segments != PADDING).astype(jnp.int32)
        q_at = vis.q_positions[:, :, None, None], vis.q_segments[:, :, None, None]
        seen = sees(q_at, (positions, segments), None, causal=vis.causal, window=vis.window)
        how = {"key_bias": own(jnp.where(seen, 0.0, NEVER)), "places": own(positions)}
        nowhere = jnp.zeros((batch * length, most), jnp.int32)
        q_at, k_at = (x.reshape(-1, 1) for x in (vis.q_positions, live)), (nowhere, jnp.ones_like(nowhere))
    (q_positions, q_segments), (k_positions, k_segments) = q_at, k_at
    window = vis.window if "folded" in how else None
    rules = Visibility(q_positions, k_positions, q_segments, k_segments, causal=vis.causal, window=window)
    part = dataclasses.replace(cache, head_keys=own(keys), head_values=own(values))
    k, v = part.keys.astype(q.dtype), part.values.astype(q.dtype)
    o, stat = core.attend(q.reshape(len(k), 1, -1, dim), k, v, rules, stats=not core.alone, **how)
    back = lambda x: x.reshape(batch, length, heads, *x.shape[3:])
    return core.join([(back(o), None if stat is None else back(stat))], q, vis)
