"""TransNormerLLM's gated linear attention: lightning decay, a cosine position map, joint norm and gate.

Scaling TransNormer to 175 Billion Parameters (arXiv 2307.14995, section 3; released `modeling_transnormer.py`).

    o_t = Σ_{j<=t} λ^(t-j) (q̃_t·k̃_j) v_j     q̃ = lrpe(silu(q)), k̃ = lrpe(silu(k)), λ = exp(-s_h) of head and layer
    lrpe(x_t) = [x_t cos(θt), x_t sin(θt)]     so q̃_t·k̃_j = Σ_c q_c k_c cos(θ_c (t-j)), of twice the width
    y = W_O (u ⊙ SimpleRMSNorm(o)),  u = x W_u,  the norm over all heads of a token together

Computed as S_t = λ S_{t-1} + k̃_tᵀ v_t, o_t = q̃_t S_t (the paper's robust inference), never with λ^-t. No
1/sqrt(D) unless `scale` is passed, no denominator. t comes with every call, so a decode state has no counter.
The slopes s_h are lightning's (three conventions, see there). θ [H, D] is learned from 10000^(-2j/(H D)), j
over all channels of all heads. It stands in RoPE's place: queries and keys of this layer are not rotated.

Deviations by choice:
- θ is a parameter of every layer, used or not (H D numbers, gradient 0), so that a model scanned over depth and
  the same model unrolled have one tree. Scanned, a layer does not know its number when it is compiled, hence
  lrpe="first" keeps the double width in all layers there, with θ = 0 outside layer 0; unrolled it does not.
- slopes="none" (λ = 1), v_act, gate and norm are there for the ablations, and for the TNL3 layer of the
  lightning-attention repository: Spec(v_act="silu", gate="low_rank", norm="layernorm"), and MiniMax-Text-01's:
  Spec(slopes="minimax", lrpe="none", v_act="silu", gate="sigmoid", norm="rmsnorm").
- Grouped key heads (K < H) follow from the library's layout; with θ per query head they are repeated first.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import lightning
from jaxattn.mechanisms._linear_family import AnyDepth, Depth, recurrent_family
from jaxattn.mechanisms._protocol import Call, Surround, for_heads
from jaxattn.norms import layer_norm, rms_norm
from pallas_kernels.linear import linear

BASE = 10_000.0
STD = 0.02  # of the gate's matrices
CHOICES = {
    "slopes": (*lightning.CONVENTIONS, "none"),
    "lrpe": ("first", "all", "none"),
    "gate": ("linear", "low_rank", "sigmoid", "none"),
    "norm": ("srmsnorm", "rmsnorm", "layernorm"),
    "v_act": ("none", "silu"),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """slopes: decay convention. lrpe: in which layers. gate: "linear" x W, "low_rank" sigmoid(x A B) through the
    head width, "sigmoid" sigmoid(x W). norm: of o, with norm_eps; srmsnorm has no parameters. v_act: on values.
    """

    slopes: str = "official"
    lrpe: str = "first"
    gate: str = "linear"
    norm: str = "srmsnorm"
    norm_eps: float = 1e-6
    v_act: str = "none"

    def __post_init__(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"transnormer.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}."
                )
        if not self.norm_eps > 0:
            raise ConfigError(f"transnormer.norm_eps is {self.norm_eps} but must be positive, such as 1e-6.")


def initial_theta(heads: int, dim: int) -> Float[Array, "H D"]:
    """10000^(-2j/E), j = 0 .. E-1 over heads and channels, E = H D; most heads start with a nearly constant phase."""
    j = jnp.arange(heads * dim, dtype=jnp.float32).reshape(heads, dim)
    return BASE ** (-2 * j / (heads * dim))


def init_params(key: Array, spec: Spec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    return {} if spec.lrpe == "none" else {"theta": initial_theta(heads, key_dim)}


def doubled(spec: Spec, depth: AnyDepth) -> bool:
    """Whether a layer's features have twice its key dim: where LRPE acts, or may act for all that is known."""
    layer = depth[0]
    elsewhere = isinstance(layer, int) and layer > 0
    return spec.lrpe == "all" or (spec.lrpe == "first" and not elsewhere)


def lrpe(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], theta: Float[Array, "H D"]
) -> Float[Array, "B T H D2"]:
    """[x cos(θt), x sin(θt)]."""
    angle = positions[:, :, None, None].astype(theta.dtype) * theta
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


def features(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    call: Call,
) -> tuple[Array, Array]:
    """q̃ (times scale) and k̃."""
    q, k = jax.nn.silu(q) * (1.0 if call.scale is None else call.scale), jax.nn.silu(k)
    if not doubled(call.spec, call.depth):
        return q, k
    theta = call.params["theta"].astype(q.dtype)
    if call.spec.lrpe == "first":  # cos 0 = 1, sin 0 = 0: other layers fill the second half with zeros
        theta = jnp.where(call.depth[0] == 0, theta, 0.0)
    k = for_heads(k, q.shape[2])
    return lrpe(q, q_positions, theta), lrpe(k, k_positions, theta)


def log_decay(spec: Spec, heads: int, depth: Depth) -> Float[Array, "H"] | None:
    if spec.slopes == "none":
        return None
    return -lightning.head_slopes(lightning.Spec(slopes=spec.slopes), heads, depth)


def surround_params(
    key: Array, spec: Spec, *, d_model: int, heads: int, kv_heads: int, key_dim: int, value_dim: int
) -> dict:
    """Weights of the norm over all heads, and of the gate: [E, H V], or [E, V] and [V, H V] in low rank."""
    first, second = jax.random.split(key)
    wide, params = heads * value_dim, {}
    normal = lambda key, *shape: STD * jax.random.normal(key, shape, jnp.float32)
    if spec.gate == "low_rank":
        params |= {"gate_a": normal(first, d_model, value_dim), "gate_b": normal(second, value_dim, wide)}
    elif spec.gate != "none":
        params["gate"] = normal(first, d_model, wide)
    if spec.norm != "srmsnorm":
        params["norm_scale"] = jnp.ones(wide, jnp.float32)
    if spec.norm == "layernorm":
        params["norm_bias"] = jnp.zeros(wide, jnp.float32)
    return params


def finish(
    o: Float[Array, "B T H V"], x: Float[Array, "B T E"], *, spec: Spec, params: dict
) -> Float[Array, "B T H V"]:
    """norm(o over all heads) ⊙ gate(x)."""
    rows = o.reshape(-1, o.shape[2] * o.shape[3])
    if spec.norm == "layernorm":
        rows = layer_norm(rows, params["norm_scale"], params["norm_bias"], spec.norm_eps)
    else:
        rows = rms_norm(rows, params.get("norm_scale"), spec.norm_eps)
    times = lambda y, name: linear(y, params[name].astype(y.dtype))
    tokens = x.reshape(-1, x.shape[-1]).astype(rows.dtype)
    if spec.gate == "linear":
        rows = rows * times(tokens, "gate")
    elif spec.gate == "sigmoid":
        rows = rows * jax.nn.sigmoid(times(tokens, "gate"))
    elif spec.gate == "low_rank":
        rows = rows * jax.nn.sigmoid(times(times(tokens, "gate_a"), "gate_b"))
    return rows.reshape(o.shape)


MECHANISM = dataclasses.replace(
    recurrent_family(
        name="transnormer",
        title="TransNormerLLM (lightning decay, LRPE, gate)",
        arxiv="2307.14995",
        equation="λ^(i-j) Σ_c silu(q) silu(k) cos(θ(i-j))",
        spec=Spec,
        features=features,
        width=lambda spec, key_dim, depth: 2 * key_dim if doubled(spec, depth) else key_dim,
        value_map=lambda v, spec: jax.nn.silu(v) if spec.v_act == "silu" else v,
        log_decay=log_decay,
        init_params=init_params,
        depth=True,
        variants=(
            Spec(lrpe="none"),
            Spec(lrpe="all", slopes="none"),
            Spec(slopes="minimax", lrpe="none", v_act="silu", gate="sigmoid", norm="rmsnorm"),
            Spec(v_act="silu", gate="low_rank", norm="layernorm"),
        ),
    ),
    rotary="none",
    surround=Surround(
        init_params=surround_params,
        finish=finish,
        adds="the norm over all heads and the gate",
        # Every gate with every norm that the variants above do not have.
        variants=tuple(
            Spec(gate=gate, norm=norm)
            for gate, norm in itertools.product(CHOICES["gate"], CHOICES["norm"])
            if (gate, norm) not in (("linear", "srmsnorm"), ("sigmoid", "rmsnorm"), ("low_rank", "layernorm"))
        ),
    ),
)
