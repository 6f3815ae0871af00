"""The one template of causal linear attention: feature map -> decayed sum of past values -> optional normaliser.

    w_ij = scale · exp(Σ of log decays after j, up to i) · φ(q_i)·φ(k_j),   o_i = Σ_{j<=i} w_ij v_j  (/ Σ_j w_ij)

A mechanism file gives its feature map, its decay per head and whether it divides. The past is one matrix per
head, so a decode step costs the same at any context length. Maps that need positions, parameters or the layer,
or that widen q and k, are `Features`; very wide ones are built for a piece of the tokens at a time, or, where
a kernel can form them on chip, not at all.

Causal means the order of the tokens; inside a segment positions must increase with it. `GLOBAL` keys (sink
tokens) cannot be served: a token that every document sees would have to enter every document's state, so they
count as a document of their own and nobody else sees them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxattn.masks import PADDING, Visibility, live_rows, visible
from jaxattn.mechanisms._protocol import Call, Capabilities, Mechanism, RowWeights, check, for_heads
from jaxattn.types import Leaf
from pallas_kernels.linear_scan import CHUNK, forms_features, linear_scan

Depth = tuple[int | Array, int]  # (layer, num_layers)
AnyDepth = tuple[int | Array | None, int]  # layer None: whichever, they share one shape
FeatureMap = Callable[[Array, Any], Array]  # (q or k in f32, spec) -> the same shape
# (q, k, q_positions, k_positions, call) -> φ(q) times scale, φ(k)
Features = Callable[..., tuple[Array, Array]]
Decay = Callable[[Any, int, Depth], Array | None]  # (spec, heads, depth) -> log decay per token, [H]; None: 0
# (q, k in f32, spec, scale) -> what φ(q) and φ(k) are Taylor features of, and which ones
Polynomial = Callable[[Array, Array, Any, float | None], tuple[Array, Array, str]]
Kernel = Callable[[Array, Array, Any, float | None], tuple[Array, Array]]  # (q, k, spec, scale) -> weights, scores


@struct.dataclass
class RecurrentState:
    """Everything a row has seen of its current document, in a size that does not depend on how much that was."""

    S: Leaf  # [B, H, D', V] in f32, D' features; V + 1 with a normaliser, whose running sum is the last column
    segment: Leaf  # [B], the document it belongs to; 0 before the first live token


def recurrent_family(
    *,
    name: str,
    title: str,
    arxiv: str,
    equation: str,
    spec: type,
    features: Features,
    width: Callable[[Any, int, AnyDepth], int] = lambda spec, key_dim, depth: key_dim,
    kernel: Kernel | None = None,
    polynomial: Polynomial | None = None,
    value_map: Callable[[Array, Any], Array] = lambda v, spec: v,
    log_decay: Decay | None = None,
    normaliser_eps: Callable[[Any], float | None] = lambda spec: None,
    init_params: Callable[..., dict] = lambda key, spec, **dims: {},
    piece: int | None = None,
    depth: bool = False,
    variants: tuple[Any, ...] = (),
) -> Mechanism:
    """Build the protocol's functions for one member of the family (see the module docstring).

    Args:
      features: `elementwise` of a map that needs nothing but the spec, or a function of its own.
      width: D', the width of the features of a key dim.
      kernel: scale · φ(q)·φ(k) of all pairs [B,H,T,S] without features, where it has a closed form, and the
        scores that analysis shows; the reference is made of it. None: the product of the features.
      polynomial: the same features for kernels that form them on chip; used where the backend is one.
      value_map: what values pass on their way in.
      normaliser_eps: what is added to the row sum before dividing by it; None does not divide.
      piece: build the features of this many tokens at a time, forward and backward; None: of all tokens.
    """

    def pairs(q: Array, k: Array, vis: Visibility, call: Call) -> tuple[Array, Array]:
        """Weights before decay and mask, and the scores to show, [B,H,T,S] each."""
        if kernel is not None:
            return kernel(_exact(q), for_heads(_exact(k), q.shape[2]), call.spec, call.scale)
        fq, fk = features(_exact(q), _exact(k), vis.q_positions, vis.k_positions, call)
        s = jnp.einsum("bthd,bshd->bhts", fq, for_heads(fk, q.shape[2]))
        return s, s

    def decay_of(heads: int, call: Call) -> Array | None:
        return None if log_decay is None else log_decay(call.spec, heads, call.depth)

    def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
        check(mechanism, k, k, k, vis, call)  # q may be any of the rows
        w, s = pairs(q, k, vis, call)
        see = visible(vis) & (vis.q_segments[:, :, None] == vis.k_segments[:, None, :])  # without GLOBAL keys
        w = jnp.where(see[:, None], w, 0.0)
        g = decay_of(q.shape[2], call)
        if g is not None:
            # A key fades once for every later key that the query sees; rows may be a slice of all queries.
            later = jnp.cumsum(see[..., ::-1], axis=-1)[..., ::-1] - see
            w = w * jnp.exp(g[:, None, None] * jnp.where(see, later, 0)[:, None])
        eps = normaliser_eps(call.spec)
        return RowWeights(w if eps is None else w / (jnp.sum(w, axis=-1, keepdims=True) + eps), s)

    def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
        check(mechanism, q, k, v, vis, call)
        return mechanism.rebuild(weights(q, k, vis, call), v, live_rows(vis), call).astype(v.dtype)

    def scan(
        q: Array, k: Array, v: Array, positions: Array, segments: Array, state: RecurrentState, call: Call
    ) -> tuple[Array, RecurrentState]:
        """Outputs [B,T,H,V] and the state after the last token."""
        eps = normaliser_eps(call.spec)
        wide = value_map(_exact(v), call.spec)
        if eps is None:
            wide = wide.astype(v.dtype)
        else:  # a column of ones collects the row sum; f32, because it is divided by
            wide = jnp.pad(wide, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)

        def run(state: RecurrentState, x: tuple[Array, ...]) -> tuple[RecurrentState, Array]:
            q, k, wide, positions, segments = x
            fq, fk = features(_exact(q), _exact(k), positions, positions, call)
            if piece is None:  # features of all tokens: no wider than what they are made of
                fq, fk = fq.astype(q.dtype), fk.astype(k.dtype)
            return advance(fq, fk, wide, segments, state)

        def advance(fq: Array, fk: Array, wide: Array, segments: Array, state: RecurrentState, taylor=None):
            o, last = linear_scan(
                fq,
                fk,
                for_heads(wide, fk.shape[2]),  # features may be per query head
                log_decay=decay_of(q.shape[2], call),
                segments=segments,
                initial_state=state.S,
                initial_segment=state.segment,
                taylor=taylor,
                backend=call.backend,
            )
            return RecurrentState(S=last, segment=_newest(segments, state.segment)), o

        on_chip = None
        if polynomial is not None:
            x, y, taylor = polynomial(_exact(q), _exact(k), call.spec, call.scale)
            x, y = x.astype(q.dtype), y.astype(k.dtype)
            if forms_features(x, y, wide, taylor=taylor, backend=call.backend):
                on_chip = advance(x, y, wide, segments, state, taylor)
        state, o = on_chip or _in_pieces(run, state, (q, k, wide, positions, segments), piece)
        return (o if eps is None else (o[..., :-1] / (o[..., -1:] + eps)).astype(v.dtype)), state

    def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
        check(mechanism, q, k, v, vis, call)
        sizes = {"heads": q.shape[2], "kv_heads": k.shape[2], "key_dim": q.shape[3], "value_dim": v.shape[3]}
        state = init_state(call.spec, batch=q.shape[0], capacity=q.shape[1], dtype=q.dtype, depth=call.depth, **sizes)
        return scan(q, k, v, vis.q_positions, vis.q_segments, state, call)[0]

    def init_state(
        spec: Any,
        *,
        batch: int,
        capacity: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: Any,
        depth: AnyDepth = (0, 1),
    ) -> RecurrentState:
        columns = value_dim + (normaliser_eps(spec) is not None)
        zeros = jnp.zeros((batch, heads, width(spec, key_dim, depth), columns), jnp.float32)
        return RecurrentState(S=zeros, segment=jnp.full(batch, PADDING, jnp.int32))

    def step(
        state: RecurrentState, q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, call: Call
    ) -> tuple[Array, RecurrentState]:
        check(mechanism, q, k, v, None, call)
        return scan(q, k, v, positions, segment_ids, state, call)

    def flops(spec: Any, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
        # Per token: a row of the product inside its chunk, a read of the state and a write to it.
        key_dim = width(spec, key_dim, (1, 2))  # any layer but the first, which is the one that may differ
        columns = value_dim + (normaliser_eps(spec) is not None)
        inside = min(CHUNK, queries) * (key_dim + columns)
        return 2.0 * batch * heads * queries * (inside + 2 * key_dim * columns)

    mechanism = Mechanism(
        name=name,
        title=title,
        arxiv=arxiv,
        equation=equation,
        spec=spec,
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
            depth=depth,
        ),
        variants=variants,
        columns=lambda v, call: value_map(_exact(v), call.spec),
    )
    return mechanism


def elementwise(feature_map: FeatureMap) -> Features:
    """The same map for queries and keys."""

    def features(q: Array, k: Array, q_positions: Array, k_positions: Array, call: Call) -> tuple[Array, Array]:
        return feature_map(q, call.spec) * (1.0 if call.scale is None else call.scale), feature_map(k, call.spec)

    return features


def _exact(x: Array) -> Array:
    """In f32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _newest(segments: Array, before: Array) -> Array:
    """[B], the segment of each row's last token that is not padding; `before` where there is none."""
    live = segments != PADDING
    newest = segments.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
    owner = jnp.take_along_axis(segments, newest[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(live, axis=1), owner, before).astype(before.dtype)


def _in_pieces(run: Callable, state: Any, x: tuple[Array, ...], size: int | None) -> tuple[Any, Array]:
    """run(state, x) -> (state, o) on `size` tokens at a time; the backward pass recomputes each piece."""
    batch, length = x[0].shape[:2]
    state = dataclasses.replace(state, S=state.S.astype(jnp.result_type(jnp.float32, *x[:3])))
    if size is None or length <= size:
        return run(state, x)
    fill = -length % size  # with padding tokens, segment 0

    def cut(a: Array) -> Array:
        a = jnp.pad(a, [(0, fill if axis == 1 else 0) for axis in range(a.ndim)])
        return jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0)

    state, o = jax.lax.scan(jax.checkpoint(run, prevent_cse=False), state, tuple(map(cut, x)))
    o = jnp.moveaxis(o, 0, 1)
    return state, o.reshape(batch, -1, *o.shape[3:])[:, :length]


FEATURES: dict[str, Callable[[Array], Array]] = {
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}
