"""Run a decoder once and look inside: per-layer tensors, rebuilt into what the probes need.

Capturing is Flax's own `sow`: it costs nothing unless the collection ``capture`` is mutable.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.masks import GLOBAL, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Mechanism, RowWeights
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, unstack_layers
from jaxattn.nn.attention import extra_arguments, position_bias


@dataclasses.dataclass(frozen=True)
class AttentionView:
    """One attention layer of one forward pass. T counts sink tokens in front, where the model has them."""

    layer: int
    mechanism: Mechanism
    spec: Any
    params: dict[str, Any]
    bias: Any
    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T K D"]
    values: Float[Array, "B T K V"]
    heads_out: Float[Array, "B T H V"]
    output_kernel: Float[Array, "H V E"]
    vis: Visibility
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def weights(self, start: int | Array = 0, rows: int | None = None) -> RowWeights:
        """Dense rows [start, start + rows) of the attention matrix (all of them by default)."""
        rows = self.queries.shape[1] if rows is None else rows
        q = jax.lax.dynamic_slice_in_dim(self.queries, start, rows, axis=1)
        vis = self.vis.rows(start, rows)
        extra = self.extra | ({"v": self.values} if self.mechanism.weights_of_values else {})
        return self.mechanism.weights(q, self.keys, vis, spec=self.spec, params=self.params, bias=self.bias, **extra)

    def value_norms(self) -> Float[Array, "B H T"]:
        """||W_O^h v_j||: values seen through their head's slice of the output projection."""
        heads = self.queries.shape[2]
        v = jnp.repeat(self.values, heads // self.values.shape[2], axis=2).astype(jnp.float32)
        return jnp.linalg.norm(jnp.einsum("bthv,hve->bthe", v, self.output_kernel), axis=-1).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class ForwardView:
    """One forward pass: logits, the attention layers, and the residual stream after every block.

    front: sink tokens in front of the sequence, included in every T axis but the logits'.
    """

    logits: Float[Array, "B T N"]
    attention: tuple[AttentionView, ...]
    residuals: Float[Array, "L B Tf E"]
    components: tuple[dict[str, Array], ...]
    front: int


def look(
    cfg: ModelConfig,
    params: dict[str, Any],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> ForwardView:
    """Run the model with every capture point on. `params` as trained (scanned or not)."""
    if cfg.scan_layers:
        params = unstack_layers(params, cfg)
    cfg = dataclasses.replace(cfg, scan_layers=False, remat=False)
    logits, sown = Decoder(cfg).apply({"params": params}, tokens, positions, segment_ids, mutable="capture")
    captured = sown["capture"]
    batch, length = tokens.shape
    front = cfg.prefix_tokens
    pos = (default_positions(batch, length) if positions is None else positions) + front
    seg = jnp.ones_like(pos) if segment_ids is None else segment_ids
    if front:
        pos = jnp.concatenate([default_positions(batch, front), pos], axis=1)
        seg = jnp.concatenate([jnp.full((batch, front), GLOBAL, seg.dtype), seg], axis=1)

    views, components = [], []
    for layer in range(cfg.num_layers):
        here, choice = captured[f"layer_{layer}"], cfg.mixer(layer)
        components.append({name: here[name][0] for name in ("attn_out", "mlp_out", "block_out") if name in here})
        if choice.mechanism is None:
            continue
        own: Any = params[f"layer_{layer}"]["attn"]
        seen: Any = here["attn"]
        views.append(
            AttentionView(
                layer=layer,
                mechanism=choice.mechanism,
                spec=choice.spec,
                params=own.get("mechanism", {}),
                bias=position_bias(cfg, own.get("relative")),
                queries=seen["queries"][0],
                keys=seen["keys"][0],
                values=seen["values"][0],
                heads_out=seen["head_out"][0],
                output_kernel=own["o"]["kernel"].reshape(cfg.num_heads, cfg.v_dim, cfg.d_model),
                vis=self_visibility(batch, length + front, positions=pos, segment_ids=seg, window=choice.window),
                extra=extra_arguments(cfg, choice.mechanism, (layer, cfg.num_layers))
                | ({"rates": seen["rates"][0]} if "rates" in seen else {}),
            )
        )
    residuals = jnp.stack([c["block_out"] for c in components])
    return ForwardView(logits, tuple(views), residuals, tuple(components), front)
