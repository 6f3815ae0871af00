"""Short convolutions: the gated layer of BASED, and the one in front of a mechanism's q, k and v."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.conv import ConvTail, causal_conv, causal_conv_step, empty_tail
from jaxattn.models.config import ModelConfig
from jaxattn.nn.layers import Linear
from jaxattn.nn.stream import Stream


class DepthwiseConv(nn.Module):
    """Causal depthwise convolution of `width` tokens without bias; kernel [W, C], PyTorch's initial values."""

    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], stream: Stream, tail: ConvTail | None = None
    ) -> tuple[Float[Array, "B T C"], ConvTail | None]:
        bound = self.width**-0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        kernel = self.param("kernel", init, (self.width, x.shape[-1]), jnp.float32).astype(x.dtype)
        if tail is None:
            return causal_conv(x, kernel, stream.segments), None
        return causal_conv_step(tail, x, kernel, stream.segments)


def is_depthwise(path: tuple[str, ...]) -> bool:
    """Whether the parameter at this path is a kernel of a `DepthwiseConv`, by the names such modules get."""
    return len(path) > 1 and path[-1] == "kernel" and (path[-2] == "depthwise" or path[-2].endswith("_conv"))


class ShortConv(nn.Module):
    """BASED's BaseConv layer (arXiv 2402.18668): (silu(conv(u1)) * u2) W_out, [u1, u2] = x W_in of width 4E."""

    cfg: ModelConfig
    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], stream: Stream, tail: ConvTail | None = None
    ) -> tuple[Float[Array, "B T E"], ConvTail | None]:
        wide = Linear(self.cfg, 4 * self.cfg.d_model, bias=True, name="in")(x)
        u1, u2 = jnp.split(wide, 2, axis=-1)
        y, tail = DepthwiseConv(self.width, name="depthwise")(u1, stream, tail)
        return Linear(self.cfg, self.cfg.d_model, bias=True, name="out")(jax.nn.silu(y) * u2), tail


def short_conv_state(cfg: ModelConfig, width: int, batch: int) -> ConvTail:
    """The decode state of a `ShortConv` layer."""
    return empty_tail(batch=batch, width=width, channels=2 * cfg.d_model, dtype=jnp.dtype(cfg.dtype))
