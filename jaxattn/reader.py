"""Reads rows of tokens in a model's own way: prompts into a decode state, texts for their hidden vectors.

A state is read in pieces of one shape. A row's pieces begin at its first token, so that what a layer cuts there into
blocks is cut nowhere else; its last piece lies at the right end, so that all rows of a batch end together:

    piece of 4      row of 6 tokens   | 0 1 2 3 | . . 4 5 |
                    row of 3 tokens   | . . . . | . 0 1 2 |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.errors import ConfigError
from jaxattn.models.config import ModelConfig
from jaxattn.nn import layerwise
from jaxattn.nn.insertion import insertion_block
from jaxattn.nn.transformer import Decoder

CHUNK = 512  # tokens of a piece: the more, the better a matrix product pays
WHOLE = 128  # prompts that are read in one piece are padded to multiples of this
ONES = 128  # tokens that are read one by one in one call of the device
LOGITS = 1024  # tokens whose logits exist at one time


def reads_state(model: ModelConfig) -> bool:
    """Whether some layer attends otherwise when decoding than in one forward pass, so that the state has to be read."""
    if model.keeping.policy.name != "dense":
        return True
    return any(choice.mechanism.reads_state(choice.spec) for choice in _mixers(model))


def whole_prompts(model: ModelConfig) -> bool:
    """Whether a prompt has to be read in one piece, as rotary angles or a policy want it that depend on all of it."""
    by_length = model.rope is not None and model.rope.scaling.by_length
    plan = model.keeping
    return by_length or plan.policy.one_piece(plan.spec)


def longest_piece(model: ModelConfig) -> int | None:
    """Most tokens that every layer can read at once; None: any number."""
    limits = [choice.mechanism.piece(choice.spec) for choice in _mixers(model)]
    return min((limit for limit in limits if limit is not None), default=None)


def piece_for(model: ModelConfig, length: int, most: int = CHUNK) -> int:
    """Tokens of the pieces of a row: a power of two that holds it, or `most`.

    Where the layers set a limit, it takes the place of `most`: what they then answer depends on the pieces, so these
    are the same wherever a prompt is read. What depends on the whole prompt (`whole_prompts`) is read in one piece.
    """
    if whole_prompts(model):
        return -(-length // WHOLE) * WHOLE
    limit = longest_piece(model)
    if limit is not None:
        block = insertion_block(model.mixers) or 1
        most = max(block, limit // block * block)
    return min(most, _cover(length))


def any_piece(model: ModelConfig) -> bool:
    """Whether pieces of any size give the same answers."""
    return not whole_prompts(model) and longest_piece(model) is None


def most_padding(model: ModelConfig, length: int, most: int = CHUNK) -> int:
    """Places that the padding of a row of up to `length` tokens takes at most."""
    return WHOLE if whole_prompts(model) else piece_for(model, length, most)


def _cover(length: int) -> int:
    return 1 << (length - 1).bit_length()


def check_piece(model: ModelConfig, piece: int) -> None:
    """Refuse a piece that some layer cannot read.

    Raises:
      ConfigError: naming the nearest that all can read.
    """
    limit, block = longest_piece(model), insertion_block(model.mixers) or 1
    plan = model.keeping
    if plan.policy.one_piece(plan.spec):
        raise ConfigError(f"policy {plan.policy.name} reads a prompt in one piece, not in pieces of {piece} tokens.")
    if piece < 1:
        raise ConfigError(f"pieces of {piece} tokens are asked for; use at least 1.")
    if limit is not None and piece > limit:
        raise ConfigError(f"{', '.join(model.mixers)} cannot read {piece} tokens at once: use at most {limit}.")
    if limit is not None and piece % block:
        near = max(block, piece - piece % block)
        raise ConfigError(
            f"{', '.join(model.mixers)} cannot read pieces of {piece} tokens, which cut blocks: use {near}."
        )


def _mixers(model: ModelConfig) -> list[Any]:
    return [choice for choice in map(model.mixer, range(model.period)) if choice.mechanism is not None]


class Layout(NamedTuple):
    """Rows as they are read: tokens, positions and live [B, pieces · piece]; places [B, T], where each token went."""

    tokens: np.ndarray
    positions: np.ndarray
    live: np.ndarray
    places: np.ndarray


def lay_out(tokens: np.ndarray, lengths: np.ndarray, piece: int) -> Layout:
    """Rows [B, T], of which the first `lengths` [B] tokens count, in whole pieces."""
    count, at = lengths[:, None], np.arange(tokens.shape[1])
    pieces = -(-count // piece)
    width = int(pieces.max()) * piece
    places = np.where(at < (pieces - 1) * piece, width - pieces * piece + at, width - count + at)
    own = at < count
    row, place = np.nonzero(own)[0], places[own]
    moved, live = np.zeros((2, len(tokens), width), np.int32)
    moved[row, place], live[row, place] = tokens[own], 1
    positions = np.maximum(np.cumsum(live, axis=1, dtype=np.int32) - 1, 0)
    return Layout(moved, positions, live, np.where(own, places, width - 1))


# `keep_unused`: states are committed to a device if the variables are, as all that is made of both will be; an array
# that is committed only from the second call on makes a second program.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def _start(model: ModelConfig, batch: int, room: int, variables: Any) -> Any:
    return Decoder(model).apply(variables, batch, room, method="start")


@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True, donate_argnums=4)
def _start_again(model: ModelConfig, batch: int, room: int, variables: Any, spare: Any) -> Any:
    """`_start` in the memory of states that nobody needs."""
    return Decoder(model).apply(variables, batch, room, method="start")


def read(
    model: ModelConfig, variables: Any, layout: Layout, *, room: int, piece: int, last: bool = True, spare: Any = None
) -> Iterator[tuple[Array, Any]]:
    """Read rows piece by piece into fresh states with room for `room` tokens, in the memory of `spare` ones if given.

    Yields (logits [B, N] of the piece's last token or, unless `last`, hidden vectors [B, piece, E]; the states so
    far, which the next piece consumes).
    """
    size = (model, len(layout.tokens), room)
    states = _start(*size, variables) if spare is None else _start_again(*size, variables, spare)
    for at in range(0, layout.tokens.shape[1], piece):
        cut = [jnp.asarray(x[:, at : at + piece]) for x in (layout.tokens, layout.positions, layout.live)]
        out, states = layerwise.advance(model, variables, states, *cut, last=last)
        yield out, states


def hidden_in_pieces(
    model: ModelConfig, variables: Any, tokens: np.ndarray, lengths: np.ndarray | None = None, *, piece: int = 0
) -> Array:
    """Hidden vectors [B, T, E] of rows [B, T], one document each, read through the decode state.

    Args:
      lengths: [B], the tokens of a row that count, T each without it; the vectors of the others mean nothing.
      piece: tokens at a time; 0 takes as many as every layer allows.

    Raises:
      ConfigError: a piece that some layer cannot read.
    """
    tokens = np.asarray(tokens, np.int32)
    count = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    longest = int(count.max())
    if piece:
        check_piece(model, piece)
    piece = min(piece, _cover(longest)) if piece else piece_for(model, longest)
    layout = lay_out(tokens, count, piece)
    read_through = read(model, variables, layout, room=layout.tokens.shape[1], piece=piece, last=False)
    hidden = jnp.concatenate([part for part, _ in read_through], axis=1)
    return jnp.take_along_axis(hidden, jnp.asarray(layout.places)[..., None], axis=1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _one_by_one(
    model: ModelConfig, variables: Any, states: Any, tokens: Array, positions: Array, live: Array
) -> tuple[Array, Any]:
    """Hidden vectors [B, T, E] of T tokens of an answer, each given those before it; and the states."""

    def one(states: Any, column: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        place = lambda x: x[:, None]
        out: Any = Decoder(model).apply(variables, states, *map(place, column), "answer", method="advance")
        return out[1], out[0][:, 0]

    states, hidden = jax.lax.scan(one, states, (tokens.T, positions.T, live.T))
    return jnp.swapaxes(hidden, 0, 1), states


def hidden_one_by_one(
    model: ModelConfig,
    variables: Any,
    tokens: np.ndarray,
    lengths: np.ndarray | None = None,
    *,
    prefill: int = 0,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
    look: Callable[[Any], None] = lambda states: None,
) -> Array:
    """Hidden vectors [B, T, E] of rows [B, T] as decoding makes them: the first `prefill` tokens as a prompt, in the
    model's own pieces, and the rest one by one as an answer.

    Args:
      lengths: [B], the tokens of a row that count, T each without it; the vectors of the others mean nothing.
      show: what the loop's numbers pass through, such as a progress bar.
      look: gets the decode states behind the last token.

    Raises:
      ConfigError: a prompt longer than a row.
    """
    tokens = np.asarray(tokens, np.int32)
    batch, width = tokens.shape
    count = np.full(batch, width) if lengths is None else np.asarray(lengths)
    if not 0 <= prefill <= count.min():
        raise ConfigError(f"prefill is {prefill} but must be from 0 to the {count.min()} tokens of the shortest row.")
    piece = piece_for(model, prefill) if prefill else 1
    layout = lay_out(tokens[:, :prefill], np.full(batch, prefill), piece) if prefill else None
    read_places = 0 if layout is None else layout.tokens.shape[1]
    room, found = read_places + (width - prefill) + ONES, []
    if layout is None:
        states = _start(model, batch, room, variables)
    else:
        parts = list(read(model, variables, layout, room=room, piece=piece, last=False))
        states, hidden = parts[-1][1], jnp.concatenate([part for part, _ in parts], axis=1)
        found.append(jnp.take_along_axis(hidden, jnp.asarray(layout.places)[..., None], axis=1))
    size = min(ONES, _cover(max(1, width - prefill)))
    for start in show(range(prefill, width, size)):
        at = np.arange(start, start + size)
        live = (at < count[:, None]).astype(np.int32)
        cut = np.pad(tokens[:, start : start + size], ((0, 0), (0, max(0, start + size - width))))
        positions = np.minimum(at, count[:, None] - 1)
        out, states = _one_by_one(model, variables, states, *map(jnp.asarray, (cut, positions, live)))
        found.append(out[:, : width - start])
    look(states)
    return jnp.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def hidden_in_one_pass(
    model: ModelConfig,
    variables: Any,
    tokens: Array,
    positions: Array | None = None,
    segments: Array | None = None,
    prefix_len: Array | None = None,
) -> Array:
    """Hidden vectors [B, T, E] of packed rows, each token attending by the model's forward pass."""
    hidden: Any = Decoder(model).apply(variables, tokens, positions, segments, prefix_len, method="hidden")
    return hidden


def hidden_of(model: ModelConfig, variables: Any, tokens: np.ndarray, lengths: np.ndarray | None = None) -> Array:
    """Hidden vectors [B, T, E] of rows [B, T], one document each: in one pass, or as the layers have to be read."""
    if reads_state(model):
        return hidden_in_pieces(model, variables, tokens, lengths)
    if lengths is None:
        return hidden_in_one_pass(model, variables, jnp.asarray(tokens))
    at, count = np.arange(tokens.shape[1]), lengths[:, None]
    positions, live = np.minimum(at, count - 1), at < count  # padding has positions that the model knows
    return hidden_in_one_pass(model, variables, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, live)))


@functools.partial(jax.jit, static_argnums=0)
def scores(model: ModelConfig, variables: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """log p (nats) of targets [B, T] behind hidden vectors [B, T, E], and the likeliest tokens [B, T]."""

    def run(decoder: Decoder) -> tuple[Array, Array]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        size = min(LOGITS, flat.shape[0])
        pad = -flat.shape[0] % size
        parts = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, size, flat.shape[1])
        wanted = jnp.pad(targets.reshape(-1), (0, pad)).reshape(-1, size)

        def one(part: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = decoder.logits(part[0][None])[0]
            picked = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
            return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

        back = lambda x: x.reshape(-1)[: targets.size].reshape(targets.shape)
        logp, best = jax.lax.map(one, (parts, wanted))
        return back(logp), back(best)

    out: Any = Decoder(model).apply(variables, method=run)
    return out
