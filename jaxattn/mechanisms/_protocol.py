"""What every attention mechanism offers: one frozen record of pure functions.

    reference(q, k, v, vis, call)                                     -> o      the equation, f32, slow
    forward  (q, k, v, vis, call)                                     -> o      the same, efficient
    weights  (q, k, vis, call)                                        -> A      dense rows, for analysis
    step     (state, q, k, v, positions, segment_ids, call)           -> (o, state)
    init_params(key, spec, *, heads, kv_heads, key_dim, value_dim)    -> dict   {} without parameters
    init_state (spec, *, batch, capacity, heads, kv_heads, key_dim, value_dim, dtype) -> state
    flops    (spec, *, batch, queries, keys, heads, key_dim, value_dim) -> float, forward, no mask discount

q is [B,T,H,D], k [B,S,K,D], v [B,S,K,V], o [B,T,H,V]. `call` is one `Call`: options, parameters and whatever else
shapes the attention; a mechanism reads of it what concerns it. `step` with T > 1 is prefill, with T = 1 decode; the
same parameters serve all of them.

A mechanism whose decode state is the plain keys and values has no `init_state` and `step` but a `core`: attention
over keys that somebody else chose. How they are kept and which are read is a policy's (`jaxattn.policies`).

With `capabilities.depth`, init_state gets ``depth=(layer, num_layers)`` as well; `layer` is None where all layers must
share one state shape. With `rotary` "raw", q and k come unrotated. A mechanism with `gains` scales queries and
values per token before all of these; whoever calls them applies it (`Mechanism.apply_gains`), because only the caller
has the projections before normalisation and rotation.

Weights are checked by rebuilding the forward pass from them (`Mechanism.rebuild`):

    o_i = Σ_j A_ij columns(v)_j + offset          columns: the constant slots' values, then the values

A mechanism whose output is more than that says in `shows` what its rows are instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxattn import checks
from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from jaxattn.registry import make_spec
from jaxattn.rope import PositionBias, Rope
from jaxattn.types import Leaf


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a mechanism can do; what is off must raise `NotImplementedError` with the exact reason.

    state: "kv" (cache of keys and values), "recurrent" (fixed size) or "none".
    depth: not a refusal: whether the mechanism wants to know its layer.
    """

    causal_self: bool = True
    noncausal_self: bool = True
    causal_cross: bool = True
    noncausal_cross: bool = True
    gqa: bool = True
    value_dim: bool = True
    segments: bool = True
    window: bool = True
    prefix: bool = True
    position_bias: bool = True
    state: str = "kv"
    depth: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What a mechanism is told besides its tokens. Made and used inside one trace: it is no pytree.

    spec: its options. params: its own parameters. bias: of the scaled scores.
    scale: of q·k, None for the mechanism's own, which is 1/sqrt(D) where nothing else is said.
    rope: for the mechanisms that rotate by themselves (`rotary` "raw").
    depth: (layer, num_layers); `layer` may be traced.
    rates: what `Surround.rates` made of the layer's input; with None the mechanism takes the constants of its spec.
    window: of `step`, in positions; elsewhere the visibility has it.
    values: of `weights`, [B,S,K,V], for mechanisms in which the influence of a key depends on the values.
    queries: of `weights`, [B,S,H,D], of all tokens, for those in which a row depends on other rows' queries.
    """

    spec: Any
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float | None = None
    bias: PositionBias | None = None
    rope: Rope | None = None
    depth: tuple[Any, int] = (0, 1)
    rates: Any = None
    backend: str = "auto"
    window: int | None = None
    values: Array | None = None
    queries: Array | None = None

    def scale_of(self, key_dim: int) -> float:
        """`scale`, or 1/sqrt(D)."""
        return key_dim**-0.5 if self.scale is None else self.scale


@struct.dataclass
class RowWeights:
    """Dense attention rows for analysis.

    values: [B, H, T, P + S], what multiplies `Mechanism.columns`; rows need not sum to one nor be positive.
    scores: [B, H, T, P + S], the scaled scores before masking and activation.
    slots: P, constant keys (K/V bias) in front of the S real ones.
    """

    values: Leaf
    scores: Leaf
    slots: int = struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class Surround:
    """What a paper's layer does around its mechanism with the layer's own input x [B,T,E]. None: nothing.

    init_params(key, spec, *, d_model, heads, kv_heads, key_dim, value_dim) -> dict of f32 arrays
    rates (x, *, spec, params)    -> pytree of [B,T,H], passed to the mechanism as `rates`
    finish(o, x, *, spec, params) -> o [B,T,H,V], just before W_O (norms, gates)
    conv(spec) -> width of a causal depthwise convolution, followed by SiLU, on the projected q, k and v
    adds: the same in words, for callers of the bare mechanism, who go without
    variants: further settings that differ around the mechanism alone; conformance runs them inside the layer
    """

    init_params: Callable[..., dict[str, Any]]
    rates: Callable[..., Any] | None = None
    finish: Callable[..., Array] | None = None
    conv: Callable[[Any], int] = lambda spec: 0
    adds: str = "what the paper's layer computes from its own input"
    variants: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Core:
    """A mechanism over keys that somebody else chose and kept; options and parameters are bound.

    queries(q) -> q, keys(k) -> k: feature maps; keys pass once, before they are kept.
    attend(q, k, v, vis, *, key_bias, blocks, places, folded, stats) -> (o, statistic): over one set of keys, q and k
      behind their maps. key_bias: [1 or B, 1 or K or H, S], added to the scores, -1e30 hides a key. blocks: the
      keywords `blocks`, `block_q`, `block_k` of `pallas_kernels.block_sparse`. places: [B, K or H, S], positions of
      the keys where heads hold other ones than `vis` says. folded: rows of the batch are heads, [B·H, T, 1, D].
      All of these may be left out. statistic: what `join` needs, None with stats=False.
    join(parts, q, vis) -> o: the output from (o, statistic) over disjoint sets of keys, with the mechanism's constant
      slots and output term; q behind `queries`, as dense attention rotates it.
    merge(parts) -> (o, statistic): over the keys of all parts, still without slots and output term.
    some(heads) -> attend for these query heads alone, whose key heads lie in the same order; see `of`.
    scale: of q·k. bias: of the scaled scores, by position.
    alone: whether one part needs no statistic.
    activation: what makes weights of scores, as `pallas_kernels.Score` names it; "" where it is no such thing.
    """

    queries: Callable[[Array], Array]
    keys: Callable[[Array], Array]
    attend: Callable[..., tuple[Array, Array | None]]
    join: Callable[..., Array]
    scale: float
    bias: PositionBias | None = None
    alone: bool = True
    activation: str = ""
    merge: Callable[..., tuple[Array, Array | None]] = lambda parts: parts[0]
    some: Callable[[tuple[int, ...]], Callable[..., tuple[Array, Array | None]]] | None = None

    def of(self, heads: tuple[int, ...]) -> Callable[..., tuple[Array, Array | None]]:
        """`attend` for some of the query heads, as they lie in q."""
        return self.attend if self.some is None else self.some(heads)

    def around(self, make: Callable[..., Callable[..., tuple[Array, Array | None]]]) -> Core:
        """The core with `make(attend, heads)` in the place of `attend`; heads: those that it serves, None: all."""
        some = lambda heads: make(self.of(heads), heads)
        return dataclasses.replace(self, attend=make(self.attend, None), some=some)

    def whole(self, q: Array, k: Array, v: Array, vis: Any, **how: Any) -> Float[Array, "B T H V"]:
        """The output over one set of keys, `how` as in `attend`."""
        return self.join([self.attend(q, k, v, vis, stats=not self.alone, **how)], q, vis)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One paper's attention. `variants` are the settings the conformance suite runs besides the default.

    prefix_tokens(spec): learned embeddings the model puts in front of the stream.
    block(spec): f > 0 lets the model insert a learned landmark token after every f tokens of a document; the
      mechanism then sees positions in which every (f+1)-th is a landmark.
    key_dim(spec, D): width of its query and key heads in a model whose key dim is D.
    piece(spec): most tokens of a prompt that `step` may read at once; None sets no limit. Where there is one, every
      piece of a prompt but its last is a multiple of `block(spec)`.
    reads_state(spec): whether `step` attends otherwise than `forward` would, so that texts have to be scored through
      the decode state.
    causal(spec): whether a token sees no later one, as a language model needs.
    rotary: "applied" (the layer rotates q and k), "none" (the mechanism has no use for RoPE) or "raw".
    advice(spec, context): what a comparison with this setting hangs on and what to try instead, "" where it hangs on
      nothing; context: the training context in tokens, None where nobody knows it.
    gains(q, v, positions, *, spec, params): see `apply_gains`.
    columns(v, call): [B, P+S, K, V], what the columns of `weights` multiply.
    offset(call): [H or 1, V], added to every row that is not padding; None adds nothing.
    shows(spec): what the rows are, where weights and columns do not give the output; "" where they do.
    slots: what the constant slots in front are, "learned" or "constant"; "" without any.
    core(call, key_dim) -> `Core`; None: the mechanism has a state of its own.
    inseparable: why its keys cannot be hidden nor be attended in parts, in words; "" where they can.
    maps: whether `core` has feature maps that do not commute with a rotation of queries and keys.
    """

    name: str
    title: str
    arxiv: str
    equation: str
    spec: type
    reference: Callable[..., Any]
    forward: Callable[..., Any]
    weights: Callable[..., RowWeights]
    init_params: Callable[..., dict[str, Any]]
    flops: Callable[..., float]
    init_state: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    core: Callable[..., Core] | None = None
    capabilities: Capabilities = Capabilities()
    variants: tuple[Any, ...] = ()
    prefix_tokens: Callable[[Any], int] = lambda spec: 0
    gains: Callable[..., tuple[Array | None, Array | None]] | None = None
    block: Callable[[Any], int] = lambda spec: 0
    key_dim: Callable[[Any, int], int] = lambda spec, dim: dim
    piece: Callable[[Any], int | None] = lambda spec: None
    reads_state: Callable[[Any], bool] = lambda spec: False
    causal: Callable[[Any], bool] = lambda spec: True
    rotary: Literal["applied", "none", "raw"] = "applied"
    surround: Surround | None = None
    advice: Callable[[Any, int | None], str] = lambda spec, context: ""
    columns: Callable[[Array, Call], Array] = lambda v, call: v
    offset: Callable[[Call], Array] | None = None
    shows: Callable[[Any], str] = lambda spec: ""
    slots: Literal["", "learned", "constant"] = ""
    inseparable: str = ""
    maps: bool = False

    def rebuild(self, rows: RowWeights, v: Array, live: Array, call: Call) -> Float[Array, "B T H V"]:
        """The output that these rows stand for, in f32 or wider.

        Args:
          v: values [B,S,K,V] as the forward pass gets them, behind `gains`.
          live: [B,T], which of the rows are no padding.

        Raises:
          NotImplementedError: the output is more than weights times values; the text says what the rows are.
        """
        if self.shows(call.spec):
            raise NotImplementedError(f"the weights of {self.name} do not rebuild its output: {self.shows(call.spec)}.")
        columns = self.columns(v, call)
        if columns.shape[1] != rows.values.shape[-1]:
            raise ConfigError(
                f"the weights of {self.name} have {rows.values.shape[-1]} columns ({rows.slots} slots) but its "
                f"`columns` are {columns.shape[1]}: make them the same keys."
            )
        columns = for_heads(columns, rows.values.shape[1]).astype(rows.values.dtype)
        o = jnp.einsum("bhts,bshv->bthv", rows.values, columns)
        if self.offset is None:
            return o
        return o + jnp.where(live[:, :, None, None], self.offset(call), 0.0)

    def apply_gains(
        self, raw: tuple[Array, Array], q: Array, v: Array, positions: Array, call: Call
    ) -> tuple[Array, Array]:
        """q [B,T,H,D] and v [B,T,K,V] times the mechanism's factors per token and head, where it has any.

        raw: (q, v) as projected, before normalisation and rotation; the factors are computed from these.
        """
        if self.gains is None:
            return q, v
        q_gain, v_gain = self.gains(*raw, positions, spec=call.spec, params=call.params)
        times = lambda x, gain: x if gain is None else (x * gain[..., None]).astype(x.dtype)
        return times(q, q_gain), times(v, v_gain)

    def make_spec(self, **fields: Any) -> Any:
        """The mechanism's `Spec` with some fields set.

        Raises:
          ConfigError: a field the mechanism does not have, or of another type.
        """
        return make_spec(self.name, self.spec, fields)


def check_call(mechanism: Mechanism, q: Array, k: Array, v: Array, **used: bool) -> None:
    """Refuse impossible shapes and switched-off capabilities.

    Args:
      used: capability name -> whether this call needs it.

    Raises:
      ConfigError: shapes that do not fit together, naming the axis and both sizes.
      NotImplementedError: a capability that is off.
    """
    checks.heads(q, k, v, sure=True)
    used = {**used, "gqa": q.shape[2] != k.shape[2], "value_dim": v.shape[-1] != k.shape[-1]}
    for capability, needed in used.items():
        if needed and not getattr(mechanism.capabilities, capability):
            raise NotImplementedError(f"{mechanism.name} does not support {capability}.")


def check(mechanism: Mechanism, q: Array, k: Array, v: Array, vis: Visibility | None, call: Call) -> None:
    """`check_call` of all that a call uses; `vis` None is a step, causal by nature."""
    direction = "causal" if vis is None or vis.causal else "noncausal"
    kind = "self" if q.shape[1] == k.shape[1] else "cross"
    check_call(
        mechanism,
        q,
        k,
        v,
        **{f"{direction}_{kind}": True},
        window=call.window is not None or (vis is not None and vis.window is not None),
        prefix=vis is not None and vis.prefix_len is not None,
        position_bias=call.bias is not None,
    )


def for_heads(x: Array, heads: int) -> Array:
    """Keys or values [B,S,K,·] once for each of the query heads that read them, [B,S,H,·]."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)
