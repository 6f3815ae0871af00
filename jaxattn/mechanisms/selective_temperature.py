"""Softmax attention with a temperature per token on queries and values (Selective Self-Attention).

Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892, section 3).

    Q = τ_q(x) · x W_q      V = τ_v(x) · x W_v      τ(x_n) = τ_tok(x_n) + τ_pos(n)
    τ_tok(x) = tanh(w · gelu(x W))                  τ_pos(n) = 1 + slope · ln n

n is the 1-based position in the document; one τ per head and token, for values per key/value head. The
token part is the paper's weight-sharing variant: W is W_q (or W_v), so a head adds one vector and one scalar
for each of q and v. Keys keep their scale. The projections are read before normalisation and rotation, the
factors are applied after both; the attention itself is plain softmax. Without the position part τ_pos is 1.

Forms of the slope: "paper" sigmoid(α); "released" exp(-exp(β)), as the authors' code has it, there with the
position part on queries alone: `released(token=False, value=False)`; "linear" β itself, which starts at
exactly 0, so that a pretrained model's function is unchanged at step 0. Deviation: α starts at -6 (slope
0.0025), since the paper gives no start and α = 0 would multiply the scores at n = 2048 by 4.8.
Left out: a separate MLP for τ_tok and token frequencies as its input.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import softmax
from jaxattn.mechanisms._score_family import score_family
from pallas_kernels import Score

START = {"paper": -6.0, "released": 1.5, "linear": 0.0}  # of the trained scalar, by form


@dataclasses.dataclass(frozen=True)
class Spec:
    """query, value: which side has a temperature. token, position: which parts. form: of the position slope."""

    query: bool = True
    value: bool = True
    token: bool = True
    position: bool = True
    form: str = "paper"

    def __post_init__(self) -> None:
        if self.form not in START:
            raise ConfigError(f"selective_temperature.form is {self.form!r} but must be one of {', '.join(START)}.")
        if not (self.query or self.value) or not (self.token or self.position):
            raise ConfigError(
                "selective_temperature has nothing to do: keep query or value, and token or position, True."
            )


def init_params(key: Array, spec: Spec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    """w zeros (τ_tok = 0), slopes at the form's start; both get their gradient from step 0 on."""
    params = {}
    for side, on, count, dim in (("query", spec.query, heads, key_dim), ("value", spec.value, kv_heads, value_dim)):
        if on and spec.token:
            params[f"{side}_w"] = jnp.zeros((count, dim), jnp.float32)
        if on and spec.position:
            params[f"{side}_slope"] = jnp.full((count,), START[spec.form], jnp.float32)
    return params


def slope(raw: Array, form: str) -> Array:
    """The trained scalar as the factor of ln n."""
    match form:
        case "paper":
            return jax.nn.sigmoid(raw)
        case "released":
            return jnp.exp(-jnp.exp(raw))
        case _:
            return raw


def temperature(
    x: Float[Array, "B T N D"], positions: Int[Array, "B T"], side: str, spec: Spec, params: dict
) -> Float[Array, "B T N"]:
    """τ of one side in f32 from its raw projection."""
    tau = jnp.ones(x.shape[:3], jnp.float32)
    if spec.position:
        log_n = jnp.log(positions.astype(jnp.float32) + 1.0)
        tau = tau + slope(params[f"{side}_slope"], spec.form) * log_n[..., None]
    if spec.token:
        tau = tau + jnp.tanh(jnp.sum(jax.nn.gelu(x.astype(jnp.float32)) * params[f"{side}_w"], axis=-1))
    return tau


def gains(
    q: Float[Array, "B T H D"], v: Float[Array, "B T K V"], positions: Int[Array, "B T"], *, spec: Spec, params: dict
) -> tuple[Float[Array, "B T H"] | None, Float[Array, "B T K"] | None]:
    """Factors of queries and values from their raw projections; None where a side has none."""
    return (
        temperature(q, positions, "query", spec, params) if spec.query else None,
        temperature(v, positions, "value", spec, params) if spec.value else None,
    )


MECHANISM = score_family(
    name="selective_temperature",
    title="Selective temperature (SSA)",
    arxiv="2411.12892",
    equation="softmax(τ_q s) (τ_v v)",
    spec=Spec,
    row_weights=lambda s, see, spec: softmax.row_weights(s, see, softmax.Spec()),
    score=lambda spec: Score("exp", "sum"),
    init_params=init_params,
    gains=gains,
    variants=(Spec(form="linear"), Spec(form="released", token=False, value=False), Spec(position=False)),
)
