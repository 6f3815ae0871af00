"""Parameter holders shared by the blocks: linear maps, norms, feed-forward."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn import checks
from jaxattn.models.config import GATED, ModelConfig
from jaxattn.norms import layer_norm, rms_norm
from pallas_kernels.linear import linear
from pallas_kernels.linear.gemv import gemv

ROWS = "rows"  # variables of decoding: kernels transposed to [out, in], see `jaxattn.nn.decoding`


def kernel_init(cfg: ModelConfig, d_in: int, *, last_of_mlp: bool = False):
    """Initialiser of a linear map with fan-in `d_in` (see `ModelConfig.init`)."""
    if cfg.init == "torch":
        return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    std = {"fan_in": d_in**-0.5, "sink": math.sqrt(2 / (5 * d_in)), "normal": 0.02}[cfg.init]
    if cfg.init == "sink" and last_of_mlp:
        std = 1 / (math.sqrt(d_in) * cfg.num_layers)
    return nn.initializers.normal(std)


def embedding_init(cfg: ModelConfig):
    """Initialiser of token, position and sink-token tables: that of a linear map from E, N(0, 1) for torch."""
    return nn.initializers.normal(1.0) if cfg.init == "torch" else kernel_init(cfg, cfg.d_model)


class Linear(nn.Module):
    """x @ kernel (+ bias) over the last axis; parameters in f32, product in the model's dtype.

    Tokens are flattened first: a weight gradient that contracts two axes is 1.6 times slower on XLA's CPU.
    """

    cfg: ModelConfig
    features: int
    last_of_mlp: bool = False
    bias: bool = False  # also where the config has none
    rounded: bool = True  # else a product with `ROWS` stays in f32, as it comes

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        cfg, width = self.cfg, x.shape[-1]
        flat = x.reshape(-1, width).astype(cfg.dtype)
        if self.has_variable(ROWS, "kernel"):
            kernel = self.get_variable(ROWS, "kernel")
            checks.shape("/".join((*self.path, "kernel")), kernel, (self.features, width))
            y = gemv(flat, kernel)
            y = y.astype(cfg.dtype) if self.rounded else y
        else:
            init = kernel_init(cfg, width, last_of_mlp=self.last_of_mlp)
            y = linear(flat, self.param("kernel", init, (width, self.features), jnp.float32).astype(cfg.dtype))
        if cfg.use_bias or self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(cfg.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """RMSNorm, SimpleRMSNorm or LayerNorm over the last axis, as the config says."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*b E"]) -> Float[Array, "*b E"]:
        if self.cfg.norm == "srmsnorm":
            return rms_norm(x, None, self.cfg.norm_eps)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        if self.cfg.norm == "rmsnorm":
            return rms_norm(x, scale, self.cfg.norm_eps)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x, scale, bias, self.cfg.norm_eps)


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) for gated kinds, down(act(up(x))) otherwise; act is computed in f32."""

    cfg: ModelConfig
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        cfg, width = self.cfg, self.cfg.ff_width(self.kind)
        act = {
            "swiglu": jax.nn.silu,
            "geglu": jax.nn.gelu,
            "gelu": jax.nn.gelu,
            "relu": jax.nn.relu,
            "linear": lambda y: y,
            "sglu": lambda y: y,
        }[self.kind]
        exact = lambda y: act(y.astype(jnp.float32)).astype(y.dtype)  # rounded once, as PyTorch does
        h = Linear(cfg, width, bias=cfg.mlp_bias, rounded=False, name="up")(x)
        gated = self.kind in GATED
        h = exact(Linear(cfg, width, bias=cfg.mlp_bias, rounded=False, name="gate")(x)) * h if gated else exact(h)
        return Linear(cfg, cfg.d_model, last_of_mlp=True, bias=cfg.mlp_bias, name="down")(h)
