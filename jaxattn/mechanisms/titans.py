"""Titans: a long-term memory that learns while it reads, alone or beside attention.

Titans: Learning to Memorize at Test Time (arXiv 2501.00663). Every head owns a small MLP M whose weights are the
state. A token is one gradient step on how well M answers its key with its value, with momentum η ("past surprise"),
step θ and forgetting α computed from the layer's input; gradients are taken at the weights of the newest chunk
boundary (`pallas_kernels.neural_memory` has the equations 9-15; `chunk` is part of the model, not of its tiling).

    lmm   y_t = M_t(q_t)                              memory alone
    mag   y_t = Attn(q_t; P, window) ⊗ M_t(q_t)       as gate, Eq. 26-28
    mal   y_t = Attn(of M(x); P, window)              as layer, Eq. 29-31
    mac   segments: attention sees P, what the memory retrieved, and the segment; Eq. 21-25, see `_titans_mac`

Choices where the paper is silent, or where it cannot be followed:
- MAC as written lets a row see later tokens of its segment. "mac" is the causal form (row i sees retrievals j <= i
  and reads the memory after token i); "mac_as_written" is the paper's, refuses causal use and has no decoding.
- The read comes after the write, which the paper's linear form implies; `read_after_write=False` is the other one.
- θ = max_lr · sigmoid(linear), η and α sigmoid(linear), one a head and token. They start at max_lr · 0.27, 0.5 and
  0.02, with which a linear memory stays stable even if all keys of a chunk of 16 are alike.
- M has no biases, GELU between the layers, hidden width `width` · D, and starts from a learned M_0; S_0 = 0. All
  documents start from there. With grouped keys every query head has a memory of its own.
- "Gating with a linear layer" is norm(y) · silu(W x), as in the gated models the paper follows; without the SiLU
  (`gate=linear`) a gate starts with mean zero over tokens and recall hardly begins to be learnt.
- x ⊗ m = norm(x) · silu(norm(m)), both with a learned vector per head.
- q, k and v pass one short convolution and SiLU together (in this order) and serve memory and attention; where both
  need them ("mag", "mal", "mac") the second user has maps per head, so that heads stay apart.
- Persistent tokens are N_p learned keys and values a head of the attention, not rows of x: the memory would read
  them the same way in every document, which a learned M_0 covers. Keys of slots are not rotated.
- RoPE, where the model has it, turns the attention's q and k alone; a retrieval gets its own token's position.

The attention window is `attention_window`, a number of positions; the layer option `window` is refused. Tokens count
in the order they lie in and a document's tokens must not be interrupted by another's.

`weights` of mag, mal and mac are the softmax rows of their attention, slots first; in mac the weight of retrieval h_j
is added to token j's. A memory alone has no rows. Its reads are y_i = β_i h_i M_0 + Σ_j A_ij (v_j - v̂_j) with h_i what
the last layer of M sees of q_i and v̂_j what M answered to k_j when it learned v_j, and A is given: the weight in row i
of what token j taught, signed, at one pass for all rows. What v_j also changes, through lower layers and through what
later tokens still had to learn, is in `_titans_forms.influence`, ||(∂y_i/∂v_j) v_j|| / ||v_j||, a pass per key.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Call, Capabilities, Mechanism, RowWeights, Surround, check
from jaxattn.mechanisms._titans_forms import (
    STARTS,
    TitansState,
    empty_state,
    matrix_shapes,
    prepare,
    rows,
    run,
    squash,
)
from jaxattn.mechanisms._titans_parts import EPS
from jaxattn.norms import rms_norm

SHOWS = {  # what `weights` are, none of which gives the output when multiplied by values alone
    "lmm": "row i says how much of what token j taught the memory is in output i, which also has the initial memory's "
    "answer and takes off what the memory had answered before",
    "mac": "they are the softmax rows inside a segment, a retrieval's weight added to its token's",
    "mag": "they are the softmax rows of the windowed attention, whose output the memory gates",
    "mal": "they are the softmax rows of the windowed attention over what the memory made of the tokens",
    "mac_as_written": "this form has no causal rows",
}
FORMS = tuple(SHOWS)
GATES = ("silu", "linear")
RANGES = {
    "depth": (1, 4),
    "width": (1, 64),
    "chunk": (1, 1_000_000),
    "segment": (1, 1_000_000),
    "persistent": (0, 100_000),
    "attention_window": (1, 10_000_000),
    "conv": (0, 64),
}
STD = 0.02


@dataclasses.dataclass(frozen=True)
class Spec:
    """form: see the module docstring. depth, width: layers of M and its hidden width in key dims.

    chunk: tokens between two renewals of the weights that gradients are taken at. segment: C of "mac".
    persistent: N_p slots. conv: width of the short convolution, 0 = none. max_lr: largest θ.
    momentum, decay: False sets η or α to 0. gate: of the output, silu or linear in the layer's input. The paper
    gives depth 1 to 4 and no other number.
    """

    form: str = "lmm"
    depth: int = 2
    width: int = 2
    chunk: int = 16
    segment: int = 32
    persistent: int = 4
    attention_window: int = 32
    conv: int = 4
    max_lr: float = 0.1
    momentum: bool = True
    decay: bool = True
    read_after_write: bool = True
    gate: str = "silu"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"titans.form is {self.form!r} but must be one of {', '.join(FORMS)}.")
        for field, (low, high) in RANGES.items():
            value = getattr(self, field)
            inside = min(max(value, low), high) if value == value else low  # nan is nowhere
            if value != round(inside):
                raise ConfigError(
                    f"titans.{field} is {value} but must be a whole number from {low} to {high}; "
                    f"the nearest is {round(inside)}."
                )
        if self.form.startswith("mac") and self.segment % self.chunk:
            near = max(1, round(self.segment / self.chunk)) * self.chunk
            raise ConfigError(
                f"titans.segment is {self.segment} but must be a multiple of titans.chunk {self.chunk}; "
                f"the nearest is {near}."
            )
        if self.gate not in GATES:
            raise ConfigError(f"titans.gate is {self.gate!r} but must be one of {', '.join(GATES)}.")
        if not (self.max_lr > 0 and math.isfinite(self.max_lr)):
            raise ConfigError(f"titans.max_lr is {self.max_lr} but must be positive and finite, such as 0.1.")

    @property
    def causal(self) -> bool:
        """Whether a row knows nothing of later tokens."""
        return self.form != "mac_as_written"


def init_params(key: Array, spec: Spec, *, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> dict:
    """M_0 as `memory_0`, `memory_1`, ...; all matrices N(0, 1/fan-in), slots N(0, 0.02²), scales one."""
    matrices = {f"memory_{i}": shape for i, shape in enumerate(matrix_shapes(spec, key_dim, value_dim))}
    if spec.form == "mag":
        matrices |= {"memory_q": (key_dim, key_dim), "memory_k": (key_dim, key_dim), "memory_v": (value_dim, value_dim)}
    elif spec.form != "lmm":
        user = "attention" if spec.form == "mal" else "memory"
        matrices |= {f"{user}_{x}": (value_dim, value_dim if x == "v" else key_dim) for x in "qkv"}
    if spec.form.startswith("mac"):
        matrices |= {"h_k": (value_dim, key_dim), "h_v": (value_dim, value_dim)}
    keys = iter(jax.random.split(key, len(matrices) + 2))
    params = {name: jax.random.normal(next(keys), (heads, *s)) * s[0] ** -0.5 for name, s in matrices.items()}
    if spec.form != "lmm" and spec.persistent:
        for name, dim in (("slot_k", key_dim), ("slot_v", value_dim)):
            params[name] = STD * jax.random.normal(next(keys), (int(spec.persistent), heads, dim))
    if spec.form not in ("lmm", "mal"):
        params |= {name: jnp.ones((heads, value_dim)) for name in ("attention_scale", "memory_scale")}
    return params


def surround_params(
    key: Array, spec: Spec, *, d_model: int, heads: int, kv_heads: int, key_dim: int, value_dim: int
) -> dict:
    """The rates' linear maps, zero but for their start; the output norm's scale and the linear gate."""
    start = jnp.array(list(STARTS.values()))[:, None]
    return {
        "rates": jnp.zeros((d_model, len(STARTS), heads)),
        "rates_bias": jnp.broadcast_to(start, (len(STARTS), heads)),
        "scale": jnp.ones((heads, value_dim)),
        "gate": jax.random.normal(key, (d_model, heads, value_dim)) * d_model**-0.5,
    }


def rates(x: Float[Array, "B T E"], *, spec: Spec, params: dict) -> dict[str, Float[Array, "B T H"]]:
    """eta, theta and alpha of every token and head, in f32."""
    raw = jnp.einsum("bte,erh->rbth", x.astype(jnp.float32), params["rates"]) + params["rates_bias"][:, None, None]
    return squash(spec, dict(zip(STARTS, raw, strict=True)))


def finish(
    o: Float[Array, "B T H V"], x: Float[Array, "B T E"], *, spec: Spec, params: dict
) -> Float[Array, "B T H V"]:
    """Normalised per head and times the gate."""
    opened = jnp.einsum("bte,ehv->bthv", x.astype(jnp.float32), params["gate"])
    opened = jax.nn.silu(opened) if spec.gate == "silu" else opened
    return (rms_norm(o.astype(jnp.float32), None, EPS) * params["scale"] * opened).astype(o.dtype)


def _check(q: Array, k: Array, v: Array, vis: Visibility | None, call: Call) -> None:
    """Refuse what no form can do; `vis` None is a step."""
    if call.window is not None or (vis is not None and vis.window is not None):
        raise NotImplementedError("titans does not support window: its memory has none; set attention_window.")
    check(MECHANISM, q, k, v, vis, call)


def _refuse_causal(spec: Spec) -> None:
    if not spec.causal:
        raise NotImplementedError(
            "titans form 'mac_as_written' does not support causal_self: rows see later tokens of their segment, so it "
            "is no language model; use form 'mac'."
        )


def forward(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    """See `_protocol`. "mac_as_written" wants `vis.causal` False and rows of one document each, else NaN."""
    if not call.spec.causal and not vis.causal:
        _check(q, k, v, dataclasses.replace(vis, causal=True), call)
    else:
        _check(q, k, v, vis, call)
        _refuse_causal(call.spec)
    return run(prepare(q, k, v, vis.q_positions, vis.q_segments, call), None)[0].astype(v.dtype)


def reference(q: Array, k: Array, v: Array, vis: Visibility, call: Call) -> Array:
    """The sequential recurrence and dense attention, in f32."""
    return forward(q, k, v, vis, dataclasses.replace(call, backend="reference"))


def weights(q: Array, k: Array, vis: Visibility, call: Call) -> RowWeights:
    """Rows as the module docstring defines them; `call.queries` may be left out where q is all of them."""
    every = dataclasses.replace(vis, q_positions=vis.k_positions, q_segments=vis.k_segments)
    _check(k, k, k, every, call)
    _refuse_causal(call.spec)
    if call.values is None:
        raise NotImplementedError("titans weights depend on the values: pass them as `values` of the call.")
    if call.queries is None and q.shape[1] != k.shape[1]:
        raise NotImplementedError("titans weights of some rows depend on the queries of all: pass `queries`.")
    queries = q if call.queries is None else call.queries
    a, s, slots = rows(prepare(queries, k, call.values, vis.k_positions, vis.k_segments, call))
    same = (vis.q_positions[:, :, None] == vis.k_positions[:, None]) & (
        vis.q_segments[:, :, None] == vis.k_segments[:, None]
    )
    asked = lambda x: jnp.take_along_axis(x, jnp.argmax(same, axis=-1)[:, None, :, None], axis=2)
    live = (vis.q_segments != PADDING)[:, None, :, None]
    return RowWeights(jnp.where(live, asked(a), 0), asked(s), slots)


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
) -> TitansState:
    """Before the first token; `capacity` is irrelevant."""
    _refuse_causal(spec)
    dims = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    return empty_state(spec, batch=batch, dtype=dtype, **dims)


def step(
    state: TitansState, q: Array, k: Array, v: Array, positions: Array, segment_ids: Array, call: Call
) -> tuple[Array, TitansState]:
    _check(q, k, v, None, call)
    _refuse_causal(call.spec)
    o, new = run(prepare(q, k, v, positions, segment_ids, call), state)
    return o.astype(v.dtype), jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)


def flops(spec: Spec, *, batch: int, queries: int, keys: int, heads: int, key_dim: int, value_dim: int) -> float:
    """Per token: M once forward and back at the frozen weights, two reads, two writes, a row inside the chunk."""
    layers = matrix_shapes(spec, key_dim, value_dim)
    size = sum(i * o for i, o in layers)
    row = min(spec.chunk, queries) * sum(i + o for i, o in layers)
    token = 6 * size - key_dim * layers[0][1] + row
    seen = {"mag": spec.attention_window, "mal": spec.attention_window}.get(spec.form, spec.segment)
    if spec.form != "lmm":
        token += (spec.persistent + min(seen, keys)) * (key_dim + value_dim)
        token += 2 * key_dim * (key_dim if spec.form == "mag" else value_dim) + value_dim**2
    if spec.form.startswith("mac"):
        token += size + value_dim * (key_dim + value_dim) + min(seen, keys) * (key_dim + value_dim)
    return 2.0 * batch * heads * queries * token


def advice(spec: Spec, context: int | None) -> str:
    """Attention that sees the whole context leaves the memory nothing to do."""
    option = {"mag": "attention_window", "mal": "attention_window", "mac": "segment"}.get(spec.form)
    reach = getattr(spec, option) if option else 0
    if context is None or option is None or reach < context:
        return ""
    return f"{option}={reach} covers the training context of {context} tokens: its attention sees all of it."


MECHANISM = Mechanism(
    name="titans",
    title="Titans: learning to memorize at test time",
    arxiv="2501.00663",
    equation="M_t = (1 - α) M_{t-1} + S_t, S_t = η S_{t-1} - θ ∇||M(k_t) - v_t||²,  y_t = M_t(q_t)",
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
    # "mal" and further depths are in the tests of this file and of the kernel: a variant compiles for a minute.
    variants=(
        Spec(form="mac", depth=1, momentum=False),
        Spec(form="mag", depth=3, width=1, chunk=5, attention_window=12, decay=False, read_after_write=False),
    ),
    causal=lambda spec: spec.causal,
    rotary="raw",
    surround=Surround(
        init_params=surround_params,
        rates=rates,
        finish=finish,
        conv=lambda spec: int(spec.conv),
        adds="the short convolution, the rates of every token and the gate",
        variants=(
            Spec(depth=1, gate="linear", conv=0, decay=False),
            Spec(form="mal", depth=1, gate="linear", conv=2, momentum=False),
        ),
    ),
    advice=advice,
    shows=lambda spec: SHOWS[spec.form],
    slots="learned",
)
