"""One residual block: mixer and feed-forward with pre, post or hybrid norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.models.config import ModelConfig
from jaxattn.nn.attention import Attention
from jaxattn.nn.gated_conv import ShortConv
from jaxattn.nn.layers import Mlp, Norm
from jaxattn.nn.stream import Edit, Stream, edits_of


class Block(nn.Module):
    """x, what travels beside it and the decode state -> the same after mixer and MLP.

    Sows `attn_out`, `mlp_out` and `block_out` [B,T,E] into ``capture``.
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
    ) -> tuple[Float[Array, "B T E"], Stream, Any]:
        cfg, start = self.cfg, x

        def residual(x: Array, f: Callable[[Array], Array], label: str) -> Array:
            if cfg.norm_position == "post":
                return Norm(cfg, name=f"{label}_norm")(x + f(x))
            y = f(Norm(cfg, name=f"{label}_norm")(x))
            return x + (Norm(cfg, name=f"{label}_out_norm")(y) if cfg.norm_position == "hybrid" else y)

        def edited(y: Array, label: str) -> Array:
            for edit in edits_of(edits, self.layer, label):
                y = jnp.zeros_like(y) if edit.value is None else edit.value
            self.sow("capture", f"{label}_out", y)
            return y

        choice = cfg.mixer(self.layer)
        if choice.mechanism is not None or choice.conv:

            def mix(y: Array) -> Array:
                nonlocal stream, state
                if choice.conv:
                    out, state = ShortConv(cfg, choice.conv, name="conv")(y, stream, state)
                else:
                    out, stream, state = Attention(cfg, self.layer, name="attn")(y, stream, state, edits)
                return edited(out, "attn")

            x = residual(x, mix, "attn")
        if cfg.mlp(self.layer) != "none":
            feed = lambda y: edited(Mlp(cfg, cfg.mlp(self.layer), name="mlp")(y), "mlp")
            x = residual(x, feed, "mlp")
        for edit in edits_of(edits, self.layer, "block"):
            x = start if edit.value is None else edit.value
        self.sow("capture", "block_out", x)
        return x, stream, state
