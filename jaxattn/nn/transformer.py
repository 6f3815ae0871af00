"""The decoder language model: embed -> blocks -> norm -> logits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from jaxtyping import Array, Float, Int

from jaxattn import checks
from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, PADDING, default_positions
from jaxattn.models.config import ModelConfig
from jaxattn.nn.attention import layer_state
from jaxattn.nn.block import Block
from jaxattn.nn.insertion import Insertion, insert, insertion_block
from jaxattn.nn.layers import ROWS, Norm, embedding_init, kernel_init
from jaxattn.nn.lookup import lookup
from jaxattn.nn.stream import TAGS, Edit, Phase, Stream
from jaxattn.rope import sinusoid
from pallas_kernels.linear.gemv import gemv

# What Flax raises for parameters that do not belong to a module.
FOREIGN = (
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeCollectionNotFound,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ApplyScopeInvalidVariablesStructureError,
)


@contextlib.contextmanager
def of_this_model() -> Iterator[None]:
    """Parameters that do not belong to a module are one sentence.

    Raises:
      ConfigError: they do not.
    """
    try:
        yield
    except FOREIGN as error:
        reason = str(error).split(" (https://")[0].rstrip(".")
        raise ConfigError(f"the params are not those of this model: {reason}.") from error


class _Period(nn.Module):
    """The layers of one repetition of the pattern; what `nn.scan` repeats."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Array, states: tuple, repetition: Array, stream: Stream) -> tuple[Array, tuple]:
        out = []
        stream = dataclasses.replace(stream, repetition=repetition)
        for i in range(self.cfg.period):
            x, _, state = _block_class(self.cfg)(self.cfg, i, name=f"layer_{i}")(x, stream, states[i])
            out.append(state)
        return x, tuple(out)


def _block_class(cfg: ModelConfig) -> type[nn.Module]:
    return nn.remat(Block, prevent_cse=not cfg.scan_layers) if cfg.remat else Block


class Decoder(nn.Module):
    """A causal language model whose mixers are any registered mechanisms.

    Parameters are a plain nested dict: ``embed`` [N,E], ``layer_i``/..., ``final_norm``, ``unembed`` [E,N]
    (untied), ``landmark`` [1,E] where a mechanism wants landmarks, and under `scan_layers` ``layers``/``layer_i``
    with a leading axis L / period.

    Landmarks (see `jaxattn.nn.insertion`) are between embedding and final norm only: nobody outside sees them.
    """

    cfg: ModelConfig

    def setup(self) -> None:
        cfg = self.cfg
        if cfg.vocab_size < 1:
            raise ConfigError(f"model.vocab_size is {cfg.vocab_size} but must be at least 1.")
        table = embedding_init(cfg)
        self.embed = self.param("embed", table, (cfg.vocab_size, cfg.d_model), jnp.float32)
        if cfg.prefix_tokens:
            self.sink_tokens = self.param("sink_tokens", table, (cfg.prefix_tokens, cfg.d_model), jnp.float32)
        self.landmark_every = insertion_block(cfg.mixers)
        if self.landmark_every:
            self.landmark = self.param("landmark", table, (1, cfg.d_model), jnp.float32)
        if cfg.position == "learned":
            if cfg.max_positions < 1:
                raise ConfigError("model.max_positions is 0 but learned positions need the longest context.")
            rows = cfg.max_positions + cfg.prefix_tokens
            self.position_table = self.param("positions", table, (rows, cfg.d_model), jnp.float32)
        if cfg.scan_layers:
            self.layers = nn.scan(
                _Period,
                variable_axes={"params": 0, "capture": 0, ROWS: 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast),
                length=cfg.num_layers // cfg.period,
            )(cfg)
        else:
            self.blocks = [_block_class(cfg)(cfg, i, name=f"layer_{i}") for i in range(cfg.num_layers)]
        if cfg.norm_position != "post":
            self.final_norm = Norm(cfg)
        self.turned = self.get_variable(ROWS, "unembed") if self.has_variable(ROWS, "unembed") else None
        if self.turned is not None:
            checks.shape("unembed", self.turned, (cfg.vocab_size, cfg.d_model))
        if not cfg.tie_embeddings and self.turned is None:
            shape, init = (cfg.d_model, cfg.vocab_size), kernel_init(cfg, cfg.d_model)
            self.unembed_kernel = self.param("unembed", init, shape, jnp.float32)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Flax's `apply`.

        Raises:
          ConfigError: variables of another model, or of none; an input that does not fit.
        """
        checks.variables(variables)
        with of_this_model():
            return super().apply(variables, *args, **kwargs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        prefix_len: Int[Array, "B"] | None = None,
        *,
        edits: tuple[Edit, ...] = (),
    ) -> Float[Array, "B T N"]:
        """Next-token logits in f32. Segment 0 is padding; `prefix_len` columns are visible to all."""
        hidden = self.hidden(tokens, positions, segment_ids, prefix_len, edits=edits)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        prefix_len: Int[Array, "B"] | None = None,
        *,
        edits: tuple[Edit, ...] = (),
    ) -> Float[Array, "B T E"]:
        """The residual stream after the final norm; `unembedding` turns it into logits."""
        if self.landmark_every and any(edit.value is not None for edit in edits):
            raise ConfigError("edits with a value do not fit a model that inserts landmarks: leave edit.value None.")
        stream = self._stream(tokens, positions, segment_ids, prefix_len)
        x, stream, plan = self._embed(tokens, stream)
        front = self.cfg.prefix_tokens
        if front:
            sink_stream = self._sink_stream(tokens.shape[0])
            x = jnp.concatenate([self._embed_sinks(sink_stream), x], axis=1)
            join = lambda a, b: jnp.concatenate([a, b], axis=1)
            stream = dataclasses.replace(
                stream,
                positions=join(sink_stream.positions, stream.positions),
                segments=join(sink_stream.segments, stream.segments),
            )
        x, _ = self._blocks(x, stream, None, edits)
        return self._finish(plan.shorten(x) if plan else x[:, front:])

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T N"]:
        """hidden @ unembedding, accumulated in f32."""
        if self.turned is not None:
            flat = gemv(hidden.reshape(-1, hidden.shape[-1]), self.turned)
            return flat.reshape(*hidden.shape[:-1], -1)
        return jnp.einsum(
            "bte,en->btn", hidden, self.unembedding().astype(hidden.dtype), preferred_element_type=jnp.float32
        )

    def unembedding(self) -> Float[Array, "E N"]:
        """The matrix of the logits: its own, or the embedding transposed when tied."""
        if self.turned is not None:
            return self.turned.T
        return self.embed.T if self.cfg.tie_embeddings else self.unembed_kernel

    def start(self, batch: int, capacity: int) -> Any:
        """Decode states with room for `capacity` tokens; sink tokens, where the model has them, are in."""
        cfg, front = self.cfg, self.cfg.prefix_tokens

        def room(layer: int) -> int:
            """A layer that does not know of landmarks stores them, and at worst a padding place for every token."""
            choice = cfg.mixer(layer)
            knows = choice.mechanism is not None and choice.mechanism.block(choice.spec) > 0
            return 2 * capacity if self.landmark_every and not knows else capacity + front

        states: Any = [layer_state(cfg, i, batch, room(i)) for i in range(cfg.num_layers)]
        if cfg.scan_layers:
            stack = lambda *leaves: jnp.stack(leaves)
            per_slot = [states[i :: cfg.period] for i in range(cfg.period)]
            states = [jax.tree.map(stack, *group) for group in per_slot]
        states = tuple(states)
        if front:
            stream = self._sink_stream(batch)
            _, states = self._blocks(self._embed_sinks(stream), stream, states, ())
        return states

    def step(
        self,
        states: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        phase: Phase = "prompt",
    ) -> tuple[Float[Array, "B T N"], Any]:
        """Logits of T new tokens given everything before them, and the states that include them.

        Args:
          phase: whether these tokens belong to a prompt or to an answer, which policies may read differently.
        """
        hidden, states = self.advance(states, tokens, positions, segment_ids, phase)
        return self.logits(hidden), states

    def advance(
        self,
        states: Any,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        phase: Phase = "prompt",
    ) -> tuple[Float[Array, "B T E"], Any]:
        """`step` with the residual stream after the final norm instead of logits."""
        x, stream, plan = self.enter(tokens, positions, segment_ids, phase)
        x, states = self._blocks(x, stream, states, ())
        return self.leave(x, plan), states

    def enter(
        self, tokens: Array, positions: Array, segment_ids: Array | None = None, phase: Phase = "prompt"
    ) -> tuple[Array, Stream, Any]:
        """What the first layer gets from `advance`, and what `leave` wants to be told."""
        stream = dataclasses.replace(self._stream(tokens, positions, segment_ids, None), phase=phase)
        x, stream, plan = self._embed(tokens, stream)
        x = jnp.where((stream.segments == PADDING)[..., None], 0, x)  # products of zeros cost nothing
        return x, self._rotating(stream), plan

    def leave(self, x: Array, plan: Insertion | None) -> Array:
        """What `advance` makes of the last layer's output."""
        return self._finish(plan.shorten(x) if plan else x)

    def _stream(self, tokens: Any, positions: Any, segment_ids: Any, prefix_len: Any) -> Stream:
        """Positions, segments and prefix of what was passed, checked."""
        cfg = self.cfg
        checks.tokens(tokens, cfg.vocab_size)
        checks.ids("segment_ids", segment_ids, tokens.shape, "tokens")
        seg = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        checks.ids("positions", positions, tokens.shape, "tokens", segments=seg)
        checks.prefix_len(prefix_len, tokens.shape[0])
        pos = default_positions(*tokens.shape) if positions is None else jnp.asarray(positions, jnp.int32)
        if cfg.position == "learned":
            last = (
                tokens.shape[1] - 1 if positions is None else int(np.max(positions)) if checks.known(positions) else 0
            )
            if last >= cfg.max_positions:
                raise ConfigError(f"position {last} is not among the {cfg.max_positions} learned ones of the model.")
        tags = jnp.asarray(self.get_variable(TAGS, "prompt")) if self.has_variable(TAGS, "prompt") else None
        return Stream(pos + cfg.prefix_tokens, seg, behind(cfg.prefix_tokens, prefix_len), tags=tags)

    def _sink_stream(self, batch: int) -> Stream:
        pos = default_positions(batch, self.cfg.prefix_tokens)
        return Stream(pos, jnp.full_like(pos, GLOBAL))

    def _embed(self, tokens: Array, stream: Stream) -> tuple[Array, Stream, Insertion | None]:
        """The embedded stream, with landmarks where the model inserts them, and what undoes the insertion."""
        x, positions, plan = lookup(self.embed, tokens), stream.positions, None
        if self.landmark_every:
            plan = insert(positions, stream.segments, self.landmark_every)
            x, positions = plan.lengthen(x, self.landmark[0]), plan.ordinary
            stream = dataclasses.replace(stream, positions=plan.positions, segments=plan.segments)
        if self.cfg.scale_embeddings:
            x = x * self.cfg.d_model**0.5
        return self._positioned(x, positions), stream, plan

    def _embed_sinks(self, stream: Stream) -> Array:
        x = jnp.broadcast_to(self.sink_tokens, (stream.positions.shape[0], *self.sink_tokens.shape))
        return self._positioned(x, stream.positions)

    def _positioned(self, x: Array, positions: Array) -> Array:
        """Plus the embedding of absolute positions, where the model has one; in the compute dtype."""
        if self.cfg.position == "learned":
            x = x + jnp.take(self.position_table, positions, axis=0)
        elif self.cfg.position == "sinusoid":
            x = x + sinusoid(positions, self.cfg.d_model)
        return x.astype(self.cfg.dtype)

    def _rotating(self, stream: Stream) -> Stream:
        """With the rotary tables of its positions, made once for all layers."""
        cfg = self.cfg
        if cfg.rope is None or stream.rotary is not None:
            return stream
        tables = cfg.rope.tables(stream.positions, cfg.head_dim, stream.segments != PADDING)
        return dataclasses.replace(stream, rotary=tables)

    def _blocks(self, x: Array, stream: Stream, states: Any, edits: tuple[Edit, ...]) -> tuple[Array, Any]:
        cfg, stream = self.cfg, self._rotating(stream)
        if cfg.scan_layers:
            if edits:
                raise ConfigError("edits need model.scan_layers=False; `unstack_layers` converts the parameters.")
            repetitions = jnp.arange(cfg.num_layers // cfg.period, dtype=jnp.int32)
            return self.layers(x, states or (None,) * cfg.period, repetitions, stream)
        out = []
        for i, block in enumerate(self.blocks):
            x, stream, state = block(x, stream, states[i] if states else None, edits)
            out.append(state)
        return x, tuple(out)

    def _finish(self, x: Array) -> Array:
        return x if self.cfg.norm_position == "post" else self.final_norm(x)


def behind(front: int, prefix_len: Any) -> Any:
    """`prefix_len` [B] where `front` sink tokens come first; a row without a prefix has none still."""
    return None if prefix_len is None else jnp.where(prefix_len > 0, prefix_len + front, 0)


def unstack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Parameters of a `scan_layers` model for the same model unrolled.

    Raises:
      ConfigError: they are none.
    """
    if not isinstance(params, Mapping) or "layers" not in params:
        raise ConfigError("the params have no 'layers': they are not those of a model with model.scan_layers=True.")
    rest = {k: v for k, v in params.items() if k != "layers"}
    for layer in range(cfg.num_layers):
        group = params["layers"].get(f"layer_{layer % cfg.period}")
        if group is not None:  # a layer of nothing owns nothing
            rest[f"layer_{layer}"] = jax.tree.map(lambda x, i=layer // cfg.period: x[i], group)
    return rest


def stack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `unstack_layers`."""
    rest = {k: v for k, v in params.items() if not k.startswith("layer_")}
    rest["layers"] = {
        f"layer_{i}": jax.tree.map(
            lambda *x: jnp.stack(x), *[params[f"layer_{j}"] for j in range(i, cfg.num_layers, cfg.period)]
        )
        for i in range(cfg.period)
        if f"layer_{i}" in params
    }
    return rest
