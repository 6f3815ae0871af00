"""Generation with any mechanism's decode state: prompts are read in pieces, then a loop decodes on the device.

Shapes are bucketed: prompts are padded to whole pieces (`jaxattn.reader`), the room for tokens to a power of two
times `BUCKET`, so a second prompt of about the same length compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables
from jaxattn.reader import CHUNK, lay_out, piece_for, read
from jaxattn.sampling import Sampling, sample
from jaxattn.types import Leaf

BLOCK = 16  # tokens decoded per call of the device
BUCKET = 256  # smallest room for tokens
GREEDY = Sampling()


class Generated(NamedTuple):
    """tokens [B, N]: the new tokens, `pad_id` behind a row's end; lengths [B]: how many are its own, stop included."""

    tokens: np.ndarray
    lengths: np.ndarray


@struct.dataclass
class Cursor:
    """Everything between two decode steps."""

    states: Leaf  # decode states of the model
    logits: Leaf  # [B, N] of the next token
    positions: Leaf  # [B] of the next token
    done: Leaf  # [B]
    keys: Leaf  # [B] PRNG keys


def room_for(tokens: int) -> int:
    """The bucket that holds this many tokens."""
    room = BUCKET
    while room < tokens:
        room *= 2
    return room


def state_room(model: ModelConfig, prompt: int, new: int, block: int = BLOCK) -> int:
    """The room of states for `new` tokens behind a prompt of `prompt` tokens."""
    return room_for(prompt + -prompt % piece_for(model, prompt, CHUNK) + new + block)


def checked_rows(tokens: Any, lengths: Any | None) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, T], 0 where they are padded on the right, and how many tokens of each count [B].

    Raises:
      ConfigError: no prompt, or a length that is not from 1 to T.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(f"tokens are {tokens.dtype}{list(tokens.shape)} but must be integers [B, T], none of them 0.")
    batch, length = tokens.shape
    lengths = np.full(batch, length) if lengths is None else np.asarray(lengths)
    if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > length:
        raise ConfigError(f"lengths are {lengths.tolist()} but must be {batch} numbers from 1 to {length}.")
    return np.where(np.arange(length) < lengths[:, None], tokens, 0), lengths


def prefill_chunks(
    model: ModelConfig,
    variables: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    room: int,
    keys: Array,
    piece: int | None = None,
    spare: Any = None,
) -> Iterator[Cursor | None]:
    """Read prompts [B, T] of `lengths` [B] tokens in pieces of `piece` tokens (`piece_for`'s without it): None after a
    piece, the cursor after the last. The memory of `spare` states of this size, where given, is used."""
    piece = piece or piece_for(model, int(lengths.max()), CHUNK)
    layout = lay_out(tokens, lengths, piece)
    left = layout.tokens.shape[1]
    for logits, states in read(model, variables, layout, room=room, piece=piece, spare=spare):
        left -= piece
        if left:
            yield None
        else:
            yield Cursor(states, logits, *_counters(logits, jnp.asarray(lengths, jnp.int32), keys))


@functools.partial(jax.jit, keep_unused=True)  # see `jaxattn.reader`
def _counters(logits: Array, lengths: Array, keys: Array) -> tuple[Array, Array, Array]:
    """Positions, done and keys of a cursor, where the logits are."""
    return lengths, jnp.zeros(len(lengths), bool), keys


def prefill(
    model: ModelConfig, variables: Any, tokens: np.ndarray, lengths: np.ndarray, room: int, keys: Array
) -> Cursor:
    """Read prompts [B, T] of `lengths` [B] tokens."""
    cursors = [cursor for cursor in prefill_chunks(model, variables, tokens, lengths, room, keys) if cursor is not None]
    return cursors[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def decode_block(
    model: ModelConfig, how: Sampling, stop: tuple[int, ...], count: int, variables: Any, cursor: Cursor, pad_id: Array
) -> tuple[Array, Array, Cursor]:
    """`count` tokens a row [B, count], whether each is the row's own, and the cursor behind them."""

    def one(cursor: Cursor, _: None) -> tuple[Cursor, tuple[Array, Array]]:
        split = jax.vmap(lambda k: jax.random.split(k, 2))(cursor.keys)
        token = sample(cursor.logits, split[:, 1], how)
        live = ~cursor.done
        token = jnp.where(live, token, pad_id)
        done = cursor.done
        if stop:
            done = done | jnp.isin(token, jnp.asarray(stop))
        out: Any = Decoder(model).apply(
            variables,
            cursor.states,
            token[:, None],
            cursor.positions[:, None],
            live[:, None].astype(jnp.int32),
            "answer",
            method="step",
        )
        logits, states = out
        return Cursor(states, logits[:, 0], cursor.positions + live, done, split[:, 0]), (token, live)

    cursor, (tokens, live) = jax.lax.scan(one, cursor, None, length=count)
    return tokens.T, live.T, cursor


def stream(
    model: ModelConfig,
    params: Any,
    tokens: Any,
    *,
    max_new_tokens: int,
    key: Array | None = None,
    how: Sampling = GREEDY,
    lengths: Any | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    block: int = BLOCK,
    policy: str | None = None,
    watch: Callable[[Any], None] = lambda states: None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New tokens [B, n] as they come, n <= block, and which of them are a row's own; ends when every row has ended.

    Args: see `generate`.
      watch: is shown the decode states behind the prompt, which are gone after it.

    Raises:
      ConfigError: an impossible argument, or prompt and new tokens exceed the positions the model knows.
    """
    model = model if policy is None else dataclasses.replace(model, policy=policy)
    tokens, lengths = checked_rows(tokens, lengths)
    batch = len(tokens)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} but must be at least 1.")
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ConfigError(
            f"token {tokens.min() if tokens.min() < 0 else tokens.max()} is not in 0..{model.vocab_size - 1}."
        )
    longest, limit = int(lengths.max()), model.position_limit
    if limit and longest + max_new_tokens > limit:
        raise ConfigError(
            f"{longest} prompt tokens and max_new_tokens {max_new_tokens} exceed the {limit} positions "
            f"the model was made for; ask for at most {max(0, limit - longest)} new ones."
        )
    if key is None:
        if how.temperature:
            raise ConfigError(
                f"temperature is {how.temperature} but no PRNG key was given: pass key=jax.random.key(seed)."
            )
        key = jax.random.key(0)
    one_each = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == (batch,)
    keys = key if one_each else jax.random.split(key, batch)
    variables = decoding_variables(model, params)
    cursor = prefill(model, variables, tokens, lengths, state_room(model, longest, max_new_tokens, block), keys)
    watch(cursor.states)
    made = 0
    while made < max_new_tokens:
        new, own, cursor = decode_block(model, how, tuple(stop_tokens), block, variables, cursor, jnp.int32(pad_id))
        count = min(block, max_new_tokens - made)
        made += count
        yield np.asarray(new)[:, :count], np.asarray(own)[:, :count]
        if bool(np.all(np.asarray(cursor.done))):
            return


def generate(
    model: ModelConfig,
    params: Any,
    tokens: Any,
    *,
    max_new_tokens: int,
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    lengths: Any | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    policy: str | None = None,
) -> Generated:
    """Continue prompts with any model of this library.

    Args:
      params: the model's, or what `jaxattn.decoding_variables` made of them, which saves the time of every call.
      tokens: prompts, integers [B, T], padded on the right where `lengths` [B] says so.
      key: PRNG key, needed where temperature > 0; every row draws from its own split of it, or from its own of [B].
      temperature, top_k, top_p, min_p: see `jaxattn.sampling.Sampling`; temperature 0 is greedy.
      stop_tokens: a row ends with the first of these that it makes.
      pad_id: stands behind a row's end.
      policy: how keys are kept and read, such as "streaming(sinks=4)" (`jaxattn.policies.names()`); None: the model's.

    Raises:
      ConfigError: an impossible argument, more positions than the model knows, or a policy that it cannot use.
    """
    how = Sampling(temperature, top_k, top_p, min_p)
    parts = list(
        stream(
            model, params, tokens, max_new_tokens=max_new_tokens, key=key, how=how, lengths=lengths,
            stop_tokens=stop_tokens, pad_id=pad_id, policy=policy,
        )
    )  # fmt: skip
    return Generated(np.concatenate([t for t, _ in parts], 1), np.concatenate([own for _, own in parts], 1).sum(1))
