"""The generic attention layer: projections, position encoding, any registered mechanism, W_O."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxattn import checks
from jaxattn.conv import empty_tail
from jaxattn.masks import PADDING, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms._protocol import Core
from jaxattn.models.config import ModelConfig
from jaxattn.nn.gated_conv import DepthwiseConv, short_conv_state
from jaxattn.nn.layers import Linear
from jaxattn.nn.sharding import over_batch
from jaxattn.nn.stream import Edit, Stream, edits_of
from jaxattn.norms import rms_norm
from jaxattn.policies import Plan
from jaxattn.rope import (
    Alibi,
    PositionBias,
    RawRelativeBias,
    RelativeBias,
    alibi_slopes,
    rotate,
)
from jaxattn.types import Leaf

RELATIVE_BUCKETS = 32
HEADS = "heads"  # variables of inference: numbers [H] for the heads of a layer, by the names of `Plan.tables`


class Attention(nn.Module):
    """One layer's token mixer. With a `state` it appends to it and attends to everything in it.

    Sows into the collection ``capture`` (only when it is mutable): `queries`, `keys`, `values` as the
    mechanism sees them, `head_out` [B,T,H,V], the heads before W_O, and where the mechanism's layer computes from its
    own input, that `input` [B,T,E] and the `rates`.
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
        cfg, choice = self.cfg, self.cfg.mixer(self.layer)
        mechanism, spec = choice.mechanism, choice.spec
        assert mechanism is not None, "a layer without a mixer has no Attention"
        inner, tails = (state.mechanism, state.tails) if isinstance(state, ConvolvedState) else (state, None)
        q, k, v, tails = self._projections(x, stream, tails)
        raw, dims = (q, v), self._dims()
        if cfg.qk_norm:
            ones = nn.initializers.ones
            q = rms_norm(q, self.param("q_norm", ones, (dims["key_dim"],), jnp.float32), cfg.norm_eps)
            k = rms_norm(k, self.param("k_norm", ones, (dims["key_dim"],), jnp.float32), cfg.norm_eps)
        rope = cfg.rope
        plan = self._plan()
        rotates = plan is not None and state is not None and plan.policy.rotates
        if rope is not None and mechanism.rotary == "applied" and not rotates:
            tables = stream.rotary
            if dims["key_dim"] != cfg.head_dim:
                tables = rope.tables(stream.positions, dims["key_dim"], stream.segments != PADDING)
            q, k = rotate(q, tables), rotate(k, tables)
        table = None
        if cfg.position == "relative":
            table = self.param("relative", nn.initializers.zeros, (RELATIVE_BUCKETS, cfg.num_heads), jnp.float32)

        params = self._owned("mechanism", lambda key: mechanism.init_params(key, spec, **dims))
        bias, depth = position_bias(cfg, table), self._depth(stream)
        call = Call(spec, params, bias=bias, rope=rope, depth=depth, backend=cfg.backend)
        q, v = mechanism.apply_gains(raw, q, v, stream.positions, call)
        around, surround = mechanism.surround, {}
        if around is not None:
            surround = self._owned("surround", lambda key: around.init_params(key, spec, d_model=cfg.d_model, **dims))
            self.sow("capture", "input", x)
            if around.rates is not None:
                call = dataclasses.replace(call, rates=around.rates(x, spec=spec, params=surround))
                self.sow("capture", "rates", call.rates)

        for label, value in (("queries", q), ("keys", k), ("values", v)):
            self.sow("capture", label, value)
        o, stream, inner = self._attend(inner, q, k, v, stream, call)
        state = inner if tails is None else ConvolvedState(inner, tails)
        if around is not None and around.finish is not None:
            o = around.finish(o, x, spec=spec, params=surround)
        for edit in edits_of(edits, self.layer, "head"):
            o = o.at[:, :, edit.head].set(0 if edit.value is None else edit.value)
        self.sow("capture", "head_out", o)
        y = Linear(cfg, cfg.d_model, bias=cfg.attention_bias == "qkvo", name="o")(o.reshape(*o.shape[:2], -1))
        return y, stream, state

    def _attend(
        self, state: Any, q: Array, k: Array, v: Array, stream: Stream, call: Call
    ) -> tuple[Float[Array, "B T H V"], Stream, Any]:
        """o, the stream and the new state of T tokens behind `state`; with None they see each other alone."""
        cfg, choice, plan = self.cfg, self.cfg.mixer(self.layer), self._plan()
        mechanism, heads = choice.mechanism, self._heads(plan)
        assert mechanism is not None, "a layer without a mixer has no Attention"
        if state is None:
            vis = self_visibility(
                *q.shape[:2],
                causal=stream.causal,
                positions=stream.positions,
                segment_ids=stream.segments,
                window=choice.window,
                prefix_len=stream.prefix_len,
            )

            def forward(own: Any, shared: Any) -> Array:
                (q, k, v, vis), rates = own
                here = dataclasses.replace(call, rates=rates, **shared)
                if plan is None or not plan.wraps or self.is_initializing():
                    return mechanism.forward(q, k, v, vis, here)
                core = self._core(plan, here, dataclasses.replace(stream, heads=heads))
                return core.whole(core.queries(q), core.keys(k), v, vis)

            shared = {"params": call.params, "bias": call.bias, "depth": call.depth}
            return over_batch(forward, ((q, k, v, vis), call.rates), shared), stream, None
        if plan is None:
            assert mechanism.step is not None, "without a core a mechanism has a state of its own"
            call = dataclasses.replace(call, window=choice.window)
            o, state = mechanism.step(state, q, k, v, stream.positions, stream.segments, call)
            return o, stream, state
        here, site, keep = dataclasses.replace(stream, heads=heads), cfg.site(self.layer), plan.policy.step
        assert keep is not None, "a plan has a policy that keeps"
        core = self._core(plan, call, here)
        o, state, carry = keep(state, q, k, v, here, spec=plan.spec, site=site, core=core)
        return o, dataclasses.replace(stream, carry=carry), state

    def _plan(self) -> Plan | None:
        """How the layer's keys are kept; None where the mechanism has a state of its own."""
        mechanism = self.cfg.mixer(self.layer).mechanism
        return self.cfg.keeping if mechanism is not None and mechanism.core is not None else None

    def _core(self, plan: Plan, call: Call, here: Stream) -> Core:
        """The mechanism over keys that the plan keeps, behind its methods on scores and heads."""
        mechanism = self.cfg.mixer(self.layer).mechanism
        assert mechanism is not None, "a layer without a mixer has no Attention"
        assert mechanism.core is not None, "a plan keeps the keys of a core"
        return plan.wrapped(mechanism.core(call, self._dims()["key_dim"]), here, self.cfg.site(self.layer))

    def _heads(self, plan: Plan | None) -> dict[str, Array]:
        """This layer's rows [H] of the head tables that the plan reads."""
        tables = {}
        for name in plan.tables if plan else ():
            if self.has_variable(HEADS, name):
                tables[name] = self.get_variable(HEADS, name)
                checks.shape(f"heads.{name}", tables[name], (self.cfg.num_heads,))
        return tables

    def _dims(self) -> dict[str, int]:
        return layer_dims(self.cfg, self.layer)

    def _projections(self, x: Array, stream: Stream, tails: Any) -> tuple[Array, Array, Array, Any]:
        """q, k, v as heads, behind the mechanism's short convolution where it has one, and its new tails."""
        cfg, choice, dims = self.cfg, self.cfg.mixer(self.layer), self._dims()
        around = choice.mechanism.surround if choice.mechanism else None
        width = around.conv(choice.spec) if around else 0
        new, out = {}, []
        for name, (heads, dim) in projection_shapes(dims).items():
            y = Linear(cfg, heads * dim, bias=cfg.attention_bias != "none", name=name)(x)
            if width:
                conv = DepthwiseConv(width, name=f"{name}_conv")
                y, new[name] = conv(y, stream, None if tails is None else tails[name])
                y = jax.nn.silu(y)
            out.append(y.reshape(*y.shape[:-1], heads, dim))
        q, k, v = out
        return q, k, v, new if width and tails is not None else None

    def _owned(self, name: str, create: Callable[[Array], dict[str, Any]]) -> dict[str, Any]:
        """The parameter group `name`, left out of the tree where it is empty."""
        wanted = jax.eval_shape(create, jax.random.key(0))
        if self.has_variable("params", name):
            inside = len(self.path) > 1  # of the model: a block by itself stands for all that are alike
            owner = self.cfg.mixer_text(self.layer) + (f" (layer {self.layer})" if inside else "")
            checks.parameters(owner, self.get_variable("params", name), wanted, "use the model they were made for")
        return self.param(name, create) if wanted else {}

    def _depth(self, stream: Stream) -> tuple[Any, int]:
        above = 0 if stream.repetition is None else stream.repetition * self.cfg.period
        return self.layer + above, self.cfg.num_layers


@struct.dataclass
class ConvolvedState:
    """Decode state of a layer whose q, k and v pass a short convolution."""

    mechanism: Leaf
    tails: Leaf  # {"q", "k", "v"} -> ConvTail


def layer_dims(cfg: ModelConfig, layer: int) -> dict[str, int]:
    """Head counts and widths of a layer, as the mechanism's functions name them."""
    return {
        "heads": cfg.num_heads,
        "kv_heads": cfg.kv_heads,
        "key_dim": cfg.key_dim_of(layer),
        "value_dim": cfg.v_dim,
    }


def projection_shapes(dims: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Heads and width of q, k and v."""
    key, kv_heads = dims["key_dim"], dims["kv_heads"]
    return {"q": (dims["heads"], key), "k": (kv_heads, key), "v": (kv_heads, dims["value_dim"])}


def layer_state(cfg: ModelConfig, layer: int, batch: int, capacity: int) -> Any:
    """A layer's decode state before the first token; None where it needs none."""
    choice = cfg.mixer(layer)
    if choice.conv:
        return short_conv_state(cfg, choice.conv, batch)
    if choice.mechanism is None:
        return None
    mechanism, dims, dtype = choice.mechanism, layer_dims(cfg, layer), jnp.dtype(cfg.dtype)
    if mechanism.core is not None:
        plan = cfg.keeping
        assert plan.policy.init is not None, "a plan has a policy that keeps"
        state = plan.policy.init(plan.spec, cfg.site(layer), batch=batch, capacity=capacity)
    else:
        assert mechanism.init_state is not None, "without a core a mechanism has a state of its own"
        extra = {"depth": (None if cfg.scan_layers else layer, cfg.num_layers)} if mechanism.capabilities.depth else {}
        state = mechanism.init_state(choice.spec, batch=batch, capacity=capacity, dtype=dtype, **dims, **extra)
    width = mechanism.surround.conv(choice.spec) if mechanism.surround else 0
    if not width:
        return state
    tail = lambda heads, dim: empty_tail(batch=batch, width=width, channels=heads * dim, dtype=dtype)
    return ConvolvedState(state, {name: tail(*shape) for name, shape in projection_shapes(dims).items()})


def position_bias(cfg: ModelConfig, table: Array | None) -> PositionBias | None:
    """The score bias of the config's position encoding; `table` [buckets, H] where it is learned."""
    if cfg.position == "alibi":
        return Alibi(alibi_slopes(cfg.num_heads))
    if cfg.position == "relative":
        assert table is not None
        return RelativeBias(table)
    return RawRelativeBias() if cfg.position == "raw_relative" else None
