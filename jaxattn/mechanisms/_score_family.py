"""The one template of the score family: score -> activation -> optional normaliser -> values.

A mechanism file gives its equation as dense row weights, the kernel's name for it (`Score`), and
optionally a feature map on q and k, constant slots in front of the keys, and an output term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.cache import KVCache, append, cache_visibility, empty_cache, overflow
from jaxattn.masks import Visibility, live_rows, visible
from jaxattn.mechanisms._protocol import Capabilities, Mechanism, RowWeights
from jaxattn.rope import PositionBias
from pallas_kernels import Score, flash
from pallas_kernels.flash.reference import dense_scores

RowEquation = Callable[[Array, Array, Any], Array]  # (scores, visible, spec) -> A, all [B, H, T, P+S]
FeatureMap = Callable[[Array, Array, Any, dict], tuple[Array, Array]]  # (q, k, spec, params) -> (q, k)
Slots = Callable[[Any, dict, int], Array]  # (spec, params, D or V) -> [P, K or 1, D or V]
OutputTerm = Callable[[Any, dict], Array]  # (spec, params) -> [H, V], added to every live row


def score_family(
    *,
    name: str,
    title: str,
    arxiv: str,
    equation: str,
    spec: type,
    row_weights: RowEquation,
    score: Callable[[Any], Score],
    feature_map: FeatureMap | None = None,
    slots: tuple[Slots, Slots] | None = None,
    output_term: OutputTerm | None = None,
    init_params: Callable[..., dict] | None = None,
    variants: tuple[Any, ...] = (),
    prefix_tokens: Callable[[Any], int] = lambda spec: 0,
    gains: Callable[..., tuple[Array | None, Array | None]] | None = None,
) -> Mechanism:
    """Build the protocol's functions for one member of the family (see the module docstring).

    Args:
      slots: keys and values of the constant slots.
    """

    def featured(q: Array, k: Array, spec: Any, params: dict) -> tuple[Array, Array]:
        return feature_map(q, k, spec, params) if feature_map else (q, k)

    def front(slot: Array, x: Array) -> Array:
        """A slot [P, K or 1, dim] in front of x [B, S, K, dim]."""
        return jnp.concatenate(
            [jnp.broadcast_to(slot.astype(x.dtype), (x.shape[0], slot.shape[0], *x.shape[2:])), x], 1
        )

    def with_key_slots(k: Array, vis: Visibility, spec: Any, params: dict) -> tuple[Array, Visibility, int]:
        """Put the constant keys in front; returns k, vis and the number of slots."""
        if slots is None:
            return k, vis, 0
        slot = slots[0](spec, params, k.shape[-1])
        return front(slot, k), vis.prepend_global(slot.shape[0]), slot.shape[0]

    def columns(v: Array, *, spec: Any, params: dict) -> Array:
        return v if slots is None else front(slots[1](spec, params, v.shape[-1]), v)

    def finish(o: Array, vis: Visibility, spec: Any, params: dict) -> Array:
        if output_term is None:
            return o
        live = live_rows(vis)[:, :, None, None]
        return o + jnp.where(live, output_term(spec, params), 0.0).astype(o.dtype)

    def weights(
        q: Array,
        k: Array,
        vis: Visibility,
        *,
        spec: Any,
        params: dict | None = None,
        scale: float | None = None,
        bias: PositionBias | None = None,
    ) -> RowWeights:
        params = params or {}
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = featured(q, k, spec, params)
        k, vis, count = with_key_slots(k, vis, spec, params)
        s = dense_scores(q, k, vis, scale=scale, bias=bias)
        return RowWeights(row_weights(s, visible(vis)[:, None], spec), s, count)

    def reference(
        q: Array,
        k: Array,
        v: Array,
        vis: Visibility,
        *,
        spec: Any,
        params: dict | None = None,
        scale: float | None = None,
        bias: PositionBias | None = None,
    ) -> Array:
        rows = weights(q, k, vis, spec=spec, params=params, scale=scale, bias=bias)
        return mechanism.rebuild(rows, v, live_rows(vis), spec=spec, params=params).astype(v.dtype)

    def forward(
        q: Array,
        k: Array,
        v: Array,
        vis: Visibility,
        *,
        spec: Any,
        params: dict | None = None,
        scale: float | None = None,
        bias: PositionBias | None = None,
        backend: str = "auto",
    ) -> Array:
        params = params or {}
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = featured(q, k, spec, params)
        return attend_featured(q, k, v, vis, spec, params, scale, bias, backend)

    def attend_featured(q, k, v, vis, spec, params, scale, bias, backend) -> Array:
        k, wide, _ = with_key_slots(k, vis, spec, params)
        v = columns(v, spec=spec, params=params)
        o = flash(q, k, v, wide, score(spec), scale=scale, bias=bias, backend=backend)
        return finish(o, vis, spec, params)

    def init_state(
        spec: Any, *, batch: int, capacity: int, heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: Any
    ) -> KVCache:
        return empty_cache(
            batch=batch,
            capacity=capacity,
            kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=dtype,
        )

    def step(
        state: KVCache,
        q: Array,
        k: Array,
        v: Array,
        positions: Array,
        segment_ids: Array,
        *,
        spec: Any,
        params: dict | None = None,
        scale: float | None = None,
        bias: PositionBias | None = None,
        window: int | None = None,
        backend: str = "auto",
    ) -> tuple[Array, KVCache]:
        params = params or {}
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k = featured(q, k, spec, params)  # keys are cached behind their feature map
        state = append(state, k, v, positions, segment_ids)
        vis = cache_visibility(state, positions, segment_ids, window=window)
        keys, values = state.keys.astype(q.dtype), state.values.astype(v.dtype)
        o = attend_featured(q, keys, values, vis, spec, params, scale, bias, backend)
        return jnp.where(overflow(state), jnp.nan, o), state

    def flops(spec: Any, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
        return 2.0 * batch * heads * queries * keys * (key_dim + value_dim)

    mechanism = Mechanism(
        name=name,
        title=title,
        arxiv=arxiv,
        equation=equation,
        spec=spec,
        reference=reference,
        forward=forward,
        weights=weights,
        init_params=init_params or (lambda key, spec, **dims: {}),
        init_state=init_state,
        step=step,
        flops=flops,
        variants=variants,
        prefix_tokens=prefix_tokens,
        gains=gains,
        # Factors of values need their positions, which only self-attention shares with the queries.
        capabilities=Capabilities(causal_cross=gains is None, noncausal_cross=gains is None),
        columns=columns,
        offset=output_term,
        slots="learned" if slots else "",
    )
    return mechanism


def divide_rows(w: Array, z: Array) -> Array:
    """w / z with zeros where a row has no mass."""
    return w / jnp.where(z == 0, 1.0, z)
