"""The one template of the score family: score -> activation -> optional normaliser -> values.

A mechanism file gives its equation as dense row weights, the kernel's name for it (`Score`), and
optionally a feature map on q and k, constant slots in front of the keys, and an output term.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.masks import Visibility, live_rows, visible
from jaxattn.mechanisms._protocol import Call, Capabilities, Core, Mechanism, RowWeights
from pallas_kernels import Score, flash, merge
from pallas_kernels.block_sparse import block_sparse
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

    def featured(q: Array, k: Array, call: Call) -> tuple[Array, Array]:
        return feature_map(q, k, call.spec, call.params) if feature_map else (q, k)

    def front(slot: Array, x: Array) -> Array:
        """A slot [P, K or 1, dim] in front of x [B, S, K, dim]."""
        return jnp.concatenate(
            [jnp.broadcast_to(slot.astype(x.dtype), (x.shape[0], slot.shape[0], *x.shape[2:])), x], 1
        )

    def with_key_slots(k: Array, vis: Visibility, call: Call) -> tuple[Array, Visibility, int]:
        """Put the constant keys in front; returns k, vis and the number of slots."""
        if slots is None:
            return k, vis, 0
        slot = slots[0](call.spec, call.params, k.shape[-1])
        return front(slot, k), vis.prepend_global(slot.shape[0]), slot.shape[0]

    def columns(v: Array, call: Call) -> Array:
        return v if slots is None else front(slots[1](call.spec, call.params, v.shape[-1]), v)

    def finish(o: Array, vis: Visibility, call: Call) -> Array:
        if output_term is None:
            return o
        live = live_rows(vis)[:, :, None, None]
        return o + jnp.where(live, output_term(call.spec, call.params), 0.0).astype(o.dtype)

    def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
        scale = call.scale_of(q.shape[-1])
        q, k = featured(q, k, call)
        k, vis, count = with_key_slots(k, vis, call)
        s = dense_scores(q, k, vis, scale=scale, bias=call.bias)
        return RowWeights(row_weights(s, visible(vis)[:, None], call.spec), s, count)

    def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
        return mechanism.rebuild(weights(q, k, vis, call), v, live_rows(vis), call).astype(v.dtype)

    def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
        scale = call.scale_of(q.shape[-1])
        q, k = featured(q, k, call)
        k, wide, _ = with_key_slots(k, vis, call)
        how: dict[str, Any] = {"scale": scale, "bias": call.bias, "backend": call.backend}
        return finish(flash(q, k, columns(v, call), wide, score(call.spec), **how), vis, call)

    def core(call: Call, key_dim: int) -> Core:
        member, scale = score(call.spec), call.scale_of(key_dim)
        hidden = member.activation == "exp" and member.normaliser == "sum_plus_one"  # counted once, by `join`
        part = dataclasses.replace(member, normaliser="sum") if hidden else member

        def attend(
            q: Array,
            k: Array,
            v: Array,
            vis: Visibility,
            *,
            key_bias: Array | None = None,
            blocks: dict[str, Any] | None = None,
            places: Array | None = None,  # of score-space methods
            folded: bool = False,
            stats: bool = True,
        ) -> tuple[Array, Array | None]:
            how: dict[str, Any] = {"scale": scale, "key_bias": key_bias, "backend": call.backend}
            run = (
                functools.partial(flash, bias=call.bias)
                if blocks is None
                else functools.partial(block_sparse, **blocks)
            )
            out: Any = run(q, k, v, vis, part, stats=stats, **how)
            return out if stats else (out, None)

        def join(parts: Sequence[tuple[Array, Array | None]], q: Array, vis: Visibility) -> Array:
            joined: list[Any] = list(parts)
            if slots is not None:
                wide = lambda slot: jnp.broadcast_to(slot, (q.shape[0], *slot.shape)).astype(q.dtype)
                dims = (key_dim, parts[0][0].shape[-1])
                k, v = (wide(slot(call.spec, call.params, dim)) for slot, dim in zip(slots, dims, strict=True))
                heads = max(k.shape[2], v.shape[2])  # a slot that all heads share has one
                k, v = (jnp.broadcast_to(x, (*x.shape[:2], heads, x.shape[3])) for x in (k, v))
                joined.append(attend(q, k, v, vis.columns(0, 0).prepend_global(k.shape[1])))
            if hidden:
                joined.append((jnp.zeros_like(parts[0][0]), jnp.zeros(q.shape[:3], jnp.float32)))
            o = joined[0][0] if len(joined) == 1 else merge(joined, part)[0]
            return finish(o, vis, call)

        return Core(
            queries=lambda q: featured(q, q, call)[0],
            keys=lambda k: featured(k, k, call)[1],
            attend=attend,
            join=join,
            scale=scale,
            bias=call.bias,
            alone=slots is None and not hidden,
            activation=member.activation,
            merge=lambda parts: merge(parts, part),
        )

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
        flops=flops,
        core=core,
        variants=variants,
        prefix_tokens=prefix_tokens,
        gains=gains,
        # Factors of values need their positions, which only self-attention shares with the queries.
        capabilities=Capabilities(causal_cross=gains is None, noncausal_cross=gains is None),
        columns=columns,
        offset=None if output_term is None else lambda call: output_term(call.spec, call.params),
        slots="learned" if slots else "",
        maps=feature_map is not None,
    )
    return mechanism


def divide_rows(w: Array, z: Array) -> Array:
    """w / z with zeros where a row has no mass."""
    return w / jnp.where(z == 0, 1.0, z)
