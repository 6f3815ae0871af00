"""Aaren: softmax attention of one learned query, so that every prefix is a step of an RNN.

Attention as an RNN (arXiv 2405.13956, section 3): a layer has one query token instead of one per position,
hence scores depend on the key alone and all prefix outputs come from one scan over (maximum, mass, weighted sum).

    s_i = scale · query_h · k_i      o_t = Σ_{i<=t} e^{s_i} v_i / Σ_{i<=t} e^{s_i}      state: H (V + 2) numbers

What it gives up is selection by the content of the current token, so recall tasks fail by construction.

Deviations by choice:
- The paper's query token (width E) times W_q is learned folded, as `query` [H, D], drawn from N(0, 0.02²); the
  paper does not say how it starts. The incoming q lends only its shape: the generic layer's W_q stays unused
  and gets no gradient (with it a layer counts H D more parameters than softmax, as in the paper).
- `scale` is 1/sqrt(D) as in multi-head attention; the paper prints the plain product.
- Grouped key heads (K < H) and value heads of another width follow from the library's layout.

No position encoding (NoPE) is the paper's setting. With RoPE keys arrive rotated while the query is not, so
scores depend on the absolute position; position biases are refused.

Tokens count in the order they lie in, so positions must increase inside a segment, and a segment's tokens must
not be interrupted by another one's. `GLOBAL` keys (sink tokens) would belong to every segment, which one state
a segment cannot hold: they are not supported, and no other segment sees them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxattn.masks import PADDING, Visibility, live_rows, visible
from jaxattn.mechanisms import softmax
from jaxattn.mechanisms._protocol import Call, Capabilities, Mechanism, RowWeights, check, for_heads
from jaxattn.types import Leaf
from pallas_kernels.prefix_softmax import empty, prefix_softmax

STD = 0.02


@dataclasses.dataclass(frozen=True)
class Spec:
    """No options."""


@struct.dataclass
class AarenState:
    """All that decoding remembers, whatever the length; f32 in lower precision too."""

    partial: Leaf  # `Partial`: m, u [B, H], w [B, H, V]
    segment: Leaf  # [B], of the newest token that is not padding; 0 = none yet


def init_params(key: Array, spec: Spec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    return {"query": STD * jax.random.normal(key, (heads, key_dim))}


def _scores(k: Array, call: Call) -> Array:
    """scale · query_h · k_i, [B, S, H], in f32 or wider; query head h reads key head h // (H // K)."""
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    kv_heads, dim = k.shape[2:]
    query = call.params["query"].astype(dtype).reshape(kv_heads, -1, dim)
    s = call.scale_of(dim) * jnp.einsum("kgd,bskd->bskg", query, k.astype(dtype))
    return s.reshape(*k.shape[:2], -1)


def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
    check(MECHANISM, k, k, k, vis, call)  # q may be any of the rows, and their content does not matter
    s = jnp.moveaxis(_scores(k, call), 1, 2)[:, :, None, :]
    s = jnp.broadcast_to(s, (*s.shape[:2], q.shape[1], s.shape[3]))
    see = visible(vis) & (vis.q_segments[:, :, None] == vis.k_segments[:, None, :])  # without GLOBAL keys
    return RowWeights(softmax.row_weights(s, see[:, None], softmax.Spec()), s)


def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    check(MECHANISM, q, k, v, vis, call)
    return MECHANISM.rebuild(weights(q, k, vis, call), v, live_rows(vis), call).astype(v.dtype)


def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    check(MECHANISM, q, k, v, vis, call)
    values = for_heads(v, q.shape[2])
    return prefix_softmax(_scores(k, call), values, segments=vis.q_segments, backend=call.backend)[0]


def init_state(
    spec: Spec,
    *,
    batch: int,
    capacity: int,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: Any,
) -> AarenState:
    """Before the first token; `capacity` is irrelevant."""
    return AarenState(
        partial=empty((batch, heads), value_dim, jnp.promote_types(dtype, jnp.float32)),
        segment=jnp.full((batch,), PADDING, jnp.int32),
    )


def step(
    state: AarenState, q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, call: Call
) -> tuple[Array, AarenState]:
    check(MECHANISM, q, k, v, None, call)
    o, partial = prefix_softmax(
        _scores(k, call),
        for_heads(v, q.shape[2]),
        segments=segment_ids,
        initial=state.partial,
        initial_segment=state.segment,
        backend=call.backend,
    )
    at = jnp.max(jnp.where(segment_ids != PADDING, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    newest = jnp.take_along_axis(segment_ids, jnp.maximum(at, 0)[:, None], axis=1)[:, 0]
    segment = jnp.where(at >= 0, newest, state.segment).astype(state.segment.dtype)
    return o, AarenState(
        partial=jax.tree.map(lambda new, old: new.astype(old.dtype), partial, state.partial), segment=segment
    )


def flops(spec: Spec, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
    """Of the recurrence: one score and one update a token, whatever came before."""
    return 2.0 * batch * heads * queries * (key_dim + value_dim)


MECHANISM = Mechanism(
    name="aaren",
    title="Attention as an RNN",
    arxiv="2405.13956",
    equation="softmax(K q*), prefix by prefix",
    spec=Spec,
    reference=reference,
    forward=forward,
    weights=weights,
    init_params=init_params,
    init_state=init_state,
    step=step,
    flops=flops,
    capabilities=Capabilities(
        noncausal_self=False,
        causal_cross=False,
        noncausal_cross=False,
        window=False,
        prefix=False,
        position_bias=False,
        state="recurrent",
    ),
)
