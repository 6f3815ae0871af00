"""The one template of causal linear attention: feature map -> decayed sum of past values -> optional normaliser.

    w_ij = scale · exp(Σ of log decays after j, up to i) · φ(q_i)·φ(k_j),   o_i = Σ_{j<=i} w_ij v_j  (/ Σ_j w_ij)

A mechanism file gives its feature map, its decay per head and whether it divides. The past is one matrix per
head, so a decode step costs the same at any context length.

Causal means the order of the tokens; inside a segment positions must increase with it. `GLOBAL` keys (sink
tokens) cannot be served: a token that every document sees would have to enter every document's state, so they
count as a document of their own and nobody else sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxattn.masks import PADDING, Visibility, visible
from jaxattn.mechanisms._protocol import Capabilities, Mechanism, RowWeights
from jaxattn.rope import PositionBias
from jaxattn.types import Leaf
from pallas_kernels.linear_scan import CHUNK, linear_scan

Depth = tuple[int | Array, int]  # (layer, num_layers)
FeatureMap = Callable[[Array, Any], Array]  # (q or k in f32, spec) -> the same shape
Decay = Callable[[Any, int, Depth], Array]  # (spec, heads, depth) -> log decay per token, [H]


@struct.dataclass
class RecurrentState:
    """Everything a row has seen of its current document, in a size that does not depend on how much that was."""

    S: Leaf  # [B, H, D, V] in f32; V + 1 with a normaliser, whose running sum is the last column
    segment: Leaf  # [B], the document it belongs to; 0 before the first live token


def recurrent_family(
    *,
    name: str,
    title: str,
    arxiv: str,
    equation: str,
    spec: type,
    feature_map: FeatureMap,
    log_decay: Decay | None = None,
    normaliser_eps: Callable[[Any], float | None] = lambda spec: None,
    depth: bool = False,
    variants: tuple[Any, ...] = (),
) -> Mechanism:
    """Build the protocol's functions for one member of the family (see the module docstring).

    normaliser_eps: what is added to the row sum before dividing by it; None does not divide.
    """

    def refuse(**used: bool) -> None:
        for capability, needed in used.items():
            if needed:
                raise NotImplementedError(f"{name} does not support {capability}.")

    def refuse_rules(vis: Visibility, bias: PositionBias | None) -> None:
        refuse(
            noncausal_self=not vis.causal,
            window=vis.window is not None,
            prefix=vis.prefix_len is not None,
            position_bias=bias is not None,
        )

    def featured(x: Array, spec: Any) -> Array:
        return feature_map(x.astype(jnp.promote_types(x.dtype, jnp.float32)), spec)

    def decay_of(spec: Any, heads: int, depth: Depth) -> Array | None:
        return None if log_decay is None else log_decay(spec, heads, depth)

    def weights(
        q: Array,
        k: Array,
        vis: Visibility,
        *,
        spec: Any,
        params: dict | None = None,
        scale: float | None = None,
        bias: PositionBias | None = None,
        depth: Depth = (0, 1),
    ) -> RowWeights:
        refuse_rules(vis, bias)
        heads = q.shape[2]
        k = jnp.repeat(k, heads // k.shape[2], axis=2)
        s = jnp.einsum("bthd,bshd->bhts", featured(q, spec), featured(k, spec)) * (1.0 if scale is None else scale)
        see = visible(vis) & (vis.q_segments[:, :, None] == vis.k_segments[:, None, :])  # without GLOBAL keys
        w = jnp.where(see[:, None], s, 0.0)
        g = decay_of(spec, heads, depth)
        if g is not None:
            # A key fades once for every later key that the query sees; rows may be a slice of all queries.
            later = jnp.cumsum(see[..., ::-1], axis=-1)[..., ::-1] - see
            w = w * jnp.exp(g[:, None, None] * jnp.where(see, later, 0)[:, None])
        eps = normaliser_eps(spec)
        return RowWeights(w if eps is None else w / (jnp.sum(w, axis=-1, keepdims=True) + eps), s)

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
        depth: Depth = (0, 1),
    ) -> Array:
        refuse(causal_cross=q.shape[1] != k.shape[1])
        a = weights(q, k, vis, spec=spec, scale=scale, bias=bias, depth=depth).values
        v_all = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(a.dtype)
        return jnp.einsum("bhts,bshv->bthv", a, v_all).astype(v.dtype)

    def scan(q, k, v, segments, state: RecurrentState | None, spec, scale, depth, backend) -> tuple[Array, Array]:
        """Outputs [B,T,H,V] and the final S."""
        eps = normaliser_eps(spec)
        wide = v
        if eps is not None:  # a column of ones collects the row sum; f32, because it is divided by
            wide = jnp.pad(v.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)
        o, last = linear_scan(
            featured(q, spec).astype(q.dtype),
            featured(k, spec).astype(k.dtype),
            wide,
            log_decay=decay_of(spec, q.shape[2], depth),
            segments=segments,
            initial_state=None if state is None else state.S,
            initial_segment=None if state is None else state.segment,
            scale=1.0 if scale is None else scale,
            backend=backend,
        )
        return (o if eps is None else (o[..., :-1] / (o[..., -1:] + eps)).astype(v.dtype)), last

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
        depth: Depth = (0, 1),
    ) -> Array:
        refuse_rules(vis, bias)
        refuse(causal_cross=q.shape[1] != k.shape[1])
        return scan(q, k, v, vis.q_segments, None, spec, scale, depth, backend)[0]

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
        depth: tuple[int | None, int] = (0, 1),
    ) -> RecurrentState:
        width = value_dim + (normaliser_eps(spec) is not None)
        zeros = jnp.zeros((batch, heads, key_dim, width), jnp.float32)
        return RecurrentState(S=zeros, segment=jnp.full(batch, PADDING, jnp.int32))

    def step(
        state: RecurrentState,
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
        depth: Depth = (0, 1),
    ) -> tuple[Array, RecurrentState]:
        refuse(window=window is not None, position_bias=bias is not None)
        o, last = scan(q, k, v, segment_ids, state, spec, scale, depth, backend)
        live = segment_ids != PADDING
        newest = segment_ids.shape[1] - 1 - jnp.argmax(live[:, ::-1], axis=1)
        owner = jnp.take_along_axis(segment_ids, newest[:, None], axis=1)[:, 0]
        return o, RecurrentState(S=last, segment=jnp.where(jnp.any(live, axis=1), owner, state.segment))

    def flops(spec: Any, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
        # Per token: a row of the product inside its chunk, a read of the state and a write to it.
        width = value_dim + (normaliser_eps(spec) is not None)
        inside = min(CHUNK, queries) * (key_dim + width)
        return 2.0 * batch * heads * queries * (inside + 2 * key_dim * width)

    return Mechanism(
        name=name,
        title=title,
        arxiv=arxiv,
        equation=equation,
        spec=spec,
        reference=reference,
        forward=forward,
        weights=weights,
        init_params=lambda key, spec, **dims: {},
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
    )


FEATURES: dict[str, Callable[[Array], Array]] = {
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}
