"""Dense: every key is kept and read, as in training (arXiv 1706.03762). What a policy with room for all must equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.masks import Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.stores import KVCache, append, cache_visibility, empty_cache, overflow


@dataclasses.dataclass(frozen=True)
class Spec:
    """No options."""


def init(spec: Any, site: Site, *, batch: int, capacity: int) -> KVCache:
    """Room for `capacity` tokens a row, none of which are there yet."""
    return empty_cache(
        batch=batch,
        capacity=capacity,
        kv_heads=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        dtype=site.dtype,
    )


def kept(
    state: KVCache, k: Array, v: Array, here: Any, site: Site, core: Core
) -> tuple[KVCache, tuple[Array, Array, Visibility]]:
    """The state behind T new tokens, and all keys [B,S,K,D] and values [B,S,K,V] in it with the rules of who sees."""
    state = append(state, core.keys(k), v, here.positions, here.segments)
    vis = cache_visibility(state, here.positions, here.segments, window=site.window)
    return state, (state.keys.astype(k.dtype), state.values.astype(v.dtype), vis)


def poisoned(o: Array, state: KVCache) -> Array:
    """NaN in rows whose cache is too small: these must never look like answers."""
    return jnp.where(overflow(state)[:, None, None, None], jnp.nan, o)


def step(
    state: KVCache, q: Array, k: Array, v: Array, here: Any, *, spec: Any, site: Site, core: Core
) -> tuple[Array, KVCache, Any]:
    state, (keys, values, vis) = kept(state, k, v, here, site, core)
    return poisoned(core.whole(core.queries(q), keys, values, vis), state), state, here.carry


POLICY = Policy(
    name="dense",
    title="Dense attention",
    arxiv="1706.03762",
    keeps="all",
    reads="all",
    spec=Spec,
    init=init,
    step=step,
    separates=False,
    windows=True,
    biased=True,
    front=True,
    read=lambda spec, site, length: float(min(length + 1, site.window or length + 1)),
)
