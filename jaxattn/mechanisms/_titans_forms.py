"""The forms of Titans: how memory and attention are put together, what their rows are, and the influence of values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxattn.masks import PADDING
from jaxattn.mechanisms import _titans_mac as context
from jaxattn.mechanisms._protocol import Call, for_heads
from jaxattn.mechanisms._titans_parts import empty_window, gate, mapped, own_documents, windowed, windowed_rows
from jaxattn.mechanisms.softplus import unit
from jaxattn.types import Leaf
from pallas_kernels.neural_memory import MemoryState, Weights, empty_memory, memory_rows, neural_memory

STARTS = {"eta": 0.0, "theta": -1.0, "alpha": -4.0}  # of the rates, before the sigmoid
AT_ONCE = 8  # columns of influence per pass


@struct.dataclass
class TitansState:
    """All that decoding remembers, of a size that depends on the Spec alone."""

    memory: Leaf  # `MemoryState`
    window: Leaf = None  # `WindowState` of mag and mal
    segment: Leaf = None  # `SegmentState` of mac


def matrix_shapes(spec: Any, key_dim: int, value_dim: int) -> list[tuple[int, int]]:
    """Of the memory's layers."""
    hidden = [int(spec.width) * key_dim] * (int(spec.depth) - 1)
    return list(zip([key_dim, *hidden], [*hidden, value_dim], strict=True))


def empty_state(spec: Any, *, batch: int, heads: int, key_dim: int, value_dim: int, dtype: Any) -> TitansState:
    """Before the first token, in f32 or wider."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    shapes = tuple(jnp.zeros((heads, *shape), dtype) for shape in matrix_shapes(spec, key_dim, value_dim))
    memory = empty_memory(batch, shapes, dtype)
    if spec.form == "mac":
        return TitansState(memory, segment=context.empty_segment(batch, int(spec.segment), shapes, dtype))
    if spec.form == "lmm":
        return TitansState(memory)
    dims = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    return TitansState(memory, empty_window(batch=batch, window=int(spec.attention_window), dtype=dtype, **dims))


def squash(spec: Any, raw: dict[str, Array]) -> dict[str, Array]:
    """The three rates from their raw numbers, with what the Spec switches off at 0."""
    rates = {name: jax.nn.sigmoid(x) for name, x in raw.items()}
    rates["theta"] = spec.max_lr * rates["theta"]
    off = {"eta": not spec.momentum, "alpha": not spec.decay}
    return {name: jnp.zeros_like(x) if off.get(name) else x for name, x in rates.items()}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One layer's tokens in f32 or wider, keys and values repeated to the query heads; `kind` is what they came in."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T H D"]
    v: Float[Array, "B T H V"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    start: Weights
    call: Call  # with rates
    kind: Any

    def maps(self, user: str, *xs: Array) -> tuple[Array, ...]:
        """q, k and v by the maps of memory or attention."""
        return tuple(mapped(x, self.call.params[f"{user}_{n}"]) for n, x in zip("qkv", xs, strict=True))

    def for_memory(self) -> tuple[Array, Array, Array]:
        """q, k and v of the memory, where it reads the layer's tokens."""
        q, k, v = self.q, self.k, self.v
        if self.call.spec.form == "mag":
            q, k, v = self.maps("memory", q, k, v)
        return unit(q), unit(k), v

    def sizes(self) -> context.Sizes:
        spec, scale = self.call.spec, self.call.scale_of(self.q.shape[-1])
        return context.Sizes(int(spec.chunk), int(spec.segment), spec.read_after_write, float(scale))

    def tokens(self) -> context.Tokens:
        tables = context.rotary(self.call.rope, self.positions, self.q.shape[-1])
        return context.Tokens(q=self.q, k=self.k, v=self.v, tables=tables, **self.call.rates)


def prepare(q: Array, k: Array, v: Array, positions: Array, segments: Array, call: Call) -> Inputs:
    """A layer's call, in one shape for all forms; without rates they are what a layer starts with."""
    exact = jnp.promote_types(v.dtype, jnp.float32)
    k, v, rates = for_heads(k, q.shape[2]), for_heads(v, q.shape[2]), call.rates
    if rates is None:
        rates = squash(call.spec, {name: jnp.full(q.shape[:3], x, exact) for name, x in STARTS.items()})
    wide = lambda x: x.astype(exact)
    start = tuple(wide(call.params[f"memory_{i}"]) for i in range(int(call.spec.depth)))
    call = dataclasses.replace(call, rates=jax.tree.map(wide, rates))
    tokens = (wide(q), wide(k), wide(v), positions, own_documents(segments))
    return Inputs(*tokens, start, call, jnp.result_type(q, k, v))


def run(x: Inputs, state: TitansState | None, *, tangents: bool = False) -> tuple[Array, TitansState]:
    """Every form behind `state` (None: behind nothing), in f32. `tangents`: slower, but `jax.jvp` works."""
    spec = x.call.spec
    if state is None:
        dims = {"heads": x.q.shape[2], "key_dim": x.q.shape[3], "value_dim": x.v.shape[3]}
        state = empty_state(spec, batch=x.q.shape[0], dtype=x.v.dtype, **dims)
        state = dataclasses.replace(state, window=None)
    common: dict[str, Any] = {"start": x.start, "backend": x.call.backend, "tangents": tangents}

    def remember(q: Array, k: Array, v: Array) -> tuple[Array, MemoryState]:
        """In the tokens' own precision, which kernels need for speed, and all that the one for GPUs has."""
        how = {"segments": x.segments, "chunk": int(spec.chunk), "read_after_write": spec.read_after_write}
        q, k, v = (t.astype(x.kind) for t in (q, k, v))
        o, memory = neural_memory(q, k, v, state=state.memory, **how, **x.call.rates, **common)
        return o.astype(x.v.dtype), memory

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        # The fast one has no forward-mode derivative.
        call = dataclasses.replace(x.call, backend="reference") if tangents else x.call
        return windowed(q, k, v, x.positions, x.segments, state.window, call)

    match spec.form:
        case "lmm":
            o, memory = remember(*x.for_memory())
            return o, TitansState(memory)
        case "mag":
            a, window = attend(x.q, x.k, x.v)
            m, memory = remember(*x.for_memory())
            return gate(a, m, x.call.params), TitansState(memory, window)
        case "mal":
            y, memory = remember(*x.for_memory())
            o, window = attend(*x.maps("attention", y, y, y))
            return o, TitansState(memory, window)
        case "mac":
            held = (state.memory, state.segment)
            o, held = context.mac(x.tokens(), x.segments, held, params=x.call.params, sizes=x.sizes(), **common)
            return o, TitansState(held[0], segment=held[1])
    o = context.as_written(x.tokens(), state.memory, params=x.call.params, sizes=x.sizes(), **common)
    whole = jnp.all((x.segments == x.segments[:, :1]) & (x.segments != PADDING))
    return jnp.where(whole, o, jnp.nan), TitansState(state.memory)


def rows(x: Inputs) -> tuple[Float[Array, "B H T PT"], Float[Array, "B H T PT"], int]:
    """All rows, their scores, and how many slots lead them; see `titans`."""
    slots = x.call.params["slot_k"].shape[0] if "slot_k" in x.call.params else 0
    rates = tuple(x.call.rates[name] for name in STARTS)
    memory = {"chunk": int(x.call.spec.chunk), "read_after_write": x.call.spec.read_after_write}
    match x.call.spec.form:
        case "lmm":
            q, k, v = x.for_memory()
            cosines = jnp.einsum("bthd,bshd->bhts", q, k)
            return memory_rows(q, k, v, *rates, x.start, x.segments, **memory), cosines, 0
        case "mac":
            how = {"start": x.start, "params": x.call.params, "sizes": x.sizes()}
            return *context.mac_rows(x.tokens(), x.segments, **how), slots
        case "mag":
            q, k = x.q, x.k
        case _:
            more: dict[str, Any] = {"segments": x.segments, **memory, **x.call.rates}
            y, _ = neural_memory(*x.for_memory(), start=x.start, **more)
            q, k, _ = x.maps("attention", y, y, y)
    return *windowed_rows(q, k, x.positions, x.segments, x.call), slots


def influence(x: Inputs) -> Float[Array, "B H T T"]:
    """||(∂y_i/∂v_j) v_j|| / ||v_j|| at fixed queries and keys, through everything a value changes; 0 where v_j = 0.

    Exact, and exactly |A_ij| for a linear memory alone, whose y is affine in the values. One linear pass per key:
    far dearer than `rows`.
    """
    length = x.v.shape[1]
    fixed = dataclasses.replace(x, call=dataclasses.replace(x.call, backend="xla"))
    push = jax.linearize(lambda v: run(dataclasses.replace(fixed, v=v), None, tangents=True)[0], x.v)[1]
    size = jnp.linalg.norm(x.v, axis=-1)  # [B, T, H]

    def column(j: Array) -> Array:
        moved = jnp.linalg.norm(push(jnp.where((jnp.arange(length) == j)[:, None, None], x.v, 0)), axis=-1)
        return moved / jnp.where(size[:, j] == 0, 1, size[:, j])[:, None]

    a = jax.lax.map(column, jnp.arange(length), batch_size=min(AT_ONCE, length))  # [S, B, T, H]
    return jnp.moveaxis(a, (0, 3), (3, 1))
