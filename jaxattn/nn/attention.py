"""The generic attention layer: projections, position encoding, any registered mechanism, W_O."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.masks import self_visibility
from jaxattn.models.config import ModelConfig
from jaxattn.nn.layers import Linear
from jaxattn.nn.stream import Edit, Stream, edits_of
from jaxattn.norms import rms_norm
from jaxattn.rope import Alibi, PositionBias, RawRelativeBias, RelativeBias, alibi_slopes, rotate

RELATIVE_BUCKETS = 32


class Attention(nn.Module):
    """One layer's token mixer. With a `state` it appends to it and attends to everything in it.

    Sows into the collection ``capture`` (only when it is mutable): `queries`, `keys`, `values` as the
    mechanism sees them and `head_out` [B,T,H,V], the heads before W_O.
    """

    cfg: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        stream: Stream,
        state: Any = None,
        edits: tuple[Edit, ...] = (),
    ) -> tuple[Float[Array, "B T E"], Any]:
        cfg, choice = self.cfg, self.cfg.mixer(self.layer)
        mechanism, spec = choice.mechanism, choice.spec
        assert mechanism is not None, "a layer without a mixer has no Attention"
        heads, kv_heads, dim, v_dim = cfg.num_heads, cfg.kv_heads, cfg.head_dim, cfg.v_dim

        split = lambda y, n: y.reshape(*y.shape[:-1], n, -1)
        q = split(Linear(cfg, heads * dim, name="q")(x), heads)
        k = split(Linear(cfg, kv_heads * dim, name="k")(x), kv_heads)
        v = split(Linear(cfg, kv_heads * v_dim, name="v")(x), kv_heads)
        raw = (q, v)
        if cfg.qk_norm:
            ones = nn.initializers.ones
            q = rms_norm(q, self.param("q_norm", ones, (dim,), jnp.float32), cfg.norm_eps)
            k = rms_norm(k, self.param("k_norm", ones, (dim,), jnp.float32), cfg.norm_eps)
        if cfg.position == "rope":
            q, k = rotate(q, stream.rotary), rotate(k, stream.rotary)
        table = None
        if cfg.position == "relative":
            table = self.param("relative", nn.initializers.zeros, (RELATIVE_BUCKETS, heads), jnp.float32)
        bias = position_bias(cfg, table)

        create = lambda key: mechanism.init_params(
            key, spec, heads=heads, kv_heads=kv_heads, key_dim=dim, value_dim=v_dim
        )
        owns = bool(jax.tree.leaves(jax.eval_shape(create, jax.random.key(0))))
        params = self.param("mechanism", create) if owns else {}
        q, v = mechanism.apply_gains(raw, q, v, stream.positions, spec=spec, params=params)
        call = {"spec": spec, "params": params, "bias": bias, "backend": cfg.backend}
        if mechanism.capabilities.depth:
            above = 0 if stream.repetition is None else stream.repetition * cfg.period
            call["depth"] = (self.layer + above, cfg.num_layers)

        for label, value in (("queries", q), ("keys", k), ("values", v)):
            self.sow("capture", label, value)
        if state is None:
            vis = self_visibility(
                *x.shape[:2],
                positions=stream.positions,
                segment_ids=stream.segments,
                window=choice.window,
                prefix_len=stream.prefix_len,
            )
            o = mechanism.forward(q, k, v, vis, **call)
        else:
            o, state = mechanism.step(state, q, k, v, stream.positions, stream.segments, window=choice.window, **call)
        for edit in edits_of(edits, self.layer, "head"):
            o = o.at[:, :, edit.head].set(0 if edit.value is None else edit.value)
        self.sow("capture", "head_out", o)
        y = Linear(cfg, cfg.d_model, name="o")(o.reshape(*o.shape[:2], -1))
        return y, state


def position_bias(cfg: ModelConfig, table: Array | None) -> PositionBias | None:
    """The score bias of the config's position encoding; `table` [buckets, H] where it is learned."""
    if cfg.position == "alibi":
        return Alibi(alibi_slopes(cfg.num_heads))
    if cfg.position == "relative":
        assert table is not None
        return RelativeBias(table)
    return RawRelativeBias() if cfg.position == "raw_relative" else None
