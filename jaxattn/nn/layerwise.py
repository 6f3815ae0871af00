"""A forward step of one layer after the other: layers that compute alike share one compiled program.

The program of a whole deep model takes seconds to compile and about 100 MB to hold for every shape it is made for.
Reading a prompt does enough work in a layer to pay for the call of its program; decoding one token does not.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.models.config import ModelConfig
from jaxattn.nn.block import Block
from jaxattn.nn.stream import Stream
from jaxattn.nn.transformer import Decoder, of_this_model


def advance(
    model: ModelConfig, variables: Any, states: Any, tokens: Array, positions: Array, live: Array, *, last: bool
) -> tuple[Array, Any]:
    """Logits [B, N] of the last of T new tokens or, unless `last`, hidden vectors [B, T, E] of all; and the states.

    Args:
      states: decode states of the model, which this call consumes.
      tokens, positions, live: [B, T]; a token that is not live is padding.

    Raises:
      ConfigError: variables of another model, naming the layer.
    """
    if model.scan_layers:
        return _whole(model, last, variables, states, tokens, positions, live)
    x, stream, plan = _enter(model, _outside(variables), tokens, positions, live)
    after = []
    for layer, state in enumerate(states):
        try:
            x, carry, state = _layer(model, _like(model, layer), _of_layer(variables, layer), state, x, stream)
        except ConfigError as error:
            raise ConfigError(f"layer {layer}: {error}") from error
        stream = dataclasses.replace(stream, carry=carry)
        after.append(state)
    return _leave(model, last, _outside(variables), x, plan), tuple(after)


def _like(model: ModelConfig, layer: int) -> int:
    """The first layer that computes what this one does, with parameters of its own."""
    choice = model.mixer(layer)
    if choice.mechanism is not None and (choice.mechanism.capabilities.depth or model.keeping.prompt_depth):
        return layer
    kind = lambda i: (model.mixer_text(i), model.mlp(i))
    return next(i for i in range(layer + 1) if kind(i) == kind(layer))


def _outside(variables: Any) -> Any:
    """Without the layers."""
    outside = lambda tree: {name: x for name, x in tree.items() if not name.startswith("layer_")}
    return {collection: outside(tree) for collection, tree in variables.items()}


def _of_layer(variables: Any, layer: int) -> Any:
    own = {collection: tree.get(f"layer_{layer}", {}) for collection, tree in variables.items()}
    return {"params": own.pop("params"), **{name: tree for name, tree in own.items() if tree}}


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: ModelConfig, variables: Any, tokens: Array, positions: Array, live: Array) -> Any:
    return Decoder(model).apply(variables, tokens, positions, live, method="enter")


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _layer(
    model: ModelConfig, layer: int, variables: Any, state: Any, x: Array, stream: Stream
) -> tuple[Array, Any, Any]:
    with of_this_model():
        out: Any = Block(model, layer).apply(variables, x, stream, state)
    return out[0], out[1].carry, out[2]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _leave(model: ModelConfig, last: bool, variables: Any, x: Array, plan: Any) -> Array:
    def run(decoder: Decoder) -> Array:
        hidden = decoder.leave(x, plan)
        return decoder.logits(hidden[:, -1:])[:, 0] if last else hidden

    out: Any = Decoder(model).apply(variables, method=run)
    return out


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _whole(
    model: ModelConfig, last: bool, variables: Any, states: Any, tokens: Array, positions: Array, live: Array
) -> tuple[Array, Any]:
    """All layers in one program, small where they are scanned."""

    def run(decoder: Decoder) -> tuple[Array, Any]:
        hidden, after = decoder.advance(states, tokens, positions, live)
        return (decoder.logits(hidden[:, -1:])[:, 0] if last else hidden), after

    out: Any = Decoder(model).apply(variables, method=run)
    return out
