"""S sequences that decode together, each with a state of its own: the device's side of continuous batching.

A slot is a row of the decode states, and rows know nothing of each other, whatever a mechanism's state is: each counts
its own tokens, so one may end and another begin while its neighbours go on. A row's
numbers do not depend on what the other slots hold, up to rounding, and a slot that is not live costs little on a CPU:
rows of zeros are not multiplied (`pallas_kernels.linear.gemv`, as long as no bias makes them something else).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxattn._generate import Cursor
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.sampling import Sampling, sample_rows
from jaxattn.types import Leaf

Knobs = dict[str, Array]  # `Sampling.knobs`


@struct.dataclass
class Slots:
    """Everything between two decode steps, leading axis S."""

    states: Leaf  # decode states of the model, batch S
    logits: Leaf  # [S, N] of the next token
    positions: Leaf  # [S] of the next token
    keys: Leaf  # [S] PRNG keys
    knobs: Leaf  # `Sampling.knobs`, each [S]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)  # see `jaxattn.reader`
def empty(model: ModelConfig, count: int, room: int, variables: Any) -> Slots:
    """`count` free slots with room for `room` tokens each."""
    many = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))
    return Slots(
        states=Decoder(model).apply(variables, count, room, method="start"),
        logits=jnp.zeros((count, model.vocab_size), jnp.float32),
        positions=jnp.zeros(count, jnp.int32),
        keys=jax.random.split(jax.random.key(0), count),
        knobs={name: many(x) for name, x in Sampling().knobs().items()},
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(model: ModelConfig, slots: Slots, slot: Array, cursor: Cursor, knobs: Knobs) -> Slots:
    """The sequence behind `cursor` (batch 1) takes over a slot."""
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), slot, 0)
    axis = 1 if model.scan_layers else 0  # of the rows; layers that are scanned come first
    row = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis)
    return Slots(
        states=jax.tree.map(row, slots.states, cursor.states),
        logits=put(slots.logits, cursor.logits[0]),
        positions=put(slots.positions, cursor.positions[0]),
        keys=slots.keys.at[slot].set(cursor.keys[0]),
        knobs=jax.tree.map(put, slots.knobs, knobs),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(model: ModelConfig, count: int, variables: Any, slots: Slots, live: Array) -> tuple[Array, Array, Slots]:
    """`count` tokens of every slot and whether each was made from numbers, both [S, count], and the slots behind them.

    What is said of slots that are not `live` [S] means nothing.
    """

    def step(slots: Slots, _: None) -> tuple[Slots, tuple[Array, Array]]:
        split = jax.vmap(lambda k: jax.random.split(k, 2))(slots.keys)
        knobs = slots.knobs | {"temperature": jnp.where(live, slots.knobs["temperature"], 0)}  # nobody draws in vain
        token = sample_rows(slots.logits, split[:, 1], **knobs)
        column = lambda x: x[:, None].astype(jnp.int32)
        out: Any = Decoder(model).apply(
            variables, slots.states, column(token), column(slots.positions), column(live), "answer", method="step"
        )
        logits, states = out
        after = Slots(states, logits[:, 0], slots.positions + live, split[:, 0], slots.knobs)
        return after, (token, numbers(slots.logits))

    slots, (tokens, fine) = jax.lax.scan(step, slots, None, length=count)
    return tokens.T, fine.T, slots


def program(model: ModelConfig, count: int, variables: Any, slots: int, room: int) -> Any:
    """`decode` compiled for `slots` of `room` tokens, before they take up memory: (variables, slots, live) -> its
    results."""
    wanted = jax.eval_shape(lambda given: empty(model, slots, room, given), variables)
    return decode.lower(model, count, variables, wanted, jax.ShapeDtypeStruct((slots,), bool)).compile()


def numbers(logits: Array) -> Array:
    """Whether rows of logits [B, N] hold a largest number, as any row does that the model is sure to have computed."""
    return jnp.isfinite(jnp.max(logits, axis=-1))
