"""Greedy answers whose first words are given, token by token, so that somebody can look at the states in between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn._generate import GREEDY, Cursor, decode_block, prefill, state_room
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import decoding_variables

Ids = Sequence[int]


def read_prompts(model: ModelConfig, params: Any, prompts: Sequence[Ids], *, room: int) -> Cursor:
    """The cursor behind prompts of any lengths, with room for so many more tokens a row.

    Raises:
      ConfigError: the model does not know so many positions.
    """
    lengths = np.array([len(ids) for ids in prompts])
    longest = int(lengths.max())
    check_room(model, longest, room)
    rows = np.zeros((len(prompts), longest), np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids)] = ids
    keys = jax.random.split(jax.random.key(0), len(prompts))
    return prefill(model, decoding_variables(model, params), rows, lengths, state_room(model, longest, room), keys)


def check_room(model: ModelConfig, prompt: int, more: int) -> None:
    """Refuse a prompt of so many tokens with so many more behind it.

    Raises:
      ConfigError: the model does not know so many positions.
    """
    if (limit := model.position_limit) and prompt + more > limit:
        raise ConfigError(
            f"a prompt of {prompt} tokens and {more} more exceed the model's {limit} positions: ask for a shorter one."
        )


def answer(
    model: ModelConfig,
    params: Any,
    cursor: Cursor,
    said: Sequence[Ids],
    *,
    new: int,
    stop: Collection[int] = (),
    look: Callable[[Any, int], None] = lambda states, at: None,
) -> list[list[int]]:
    """Up to `new` tokens a row behind the words that it begins with, without the `stop` token that ends it.

    Args:
      cursor: of `read_prompts`, which this call consumes.
      said: the tokens that each row's answer begins with; they are read as an answer, one by one.
      look: is shown the states in front of every token of the answers, the number of which is `at`: their newest row of
        attention is the one that makes it.
    """
    variables = decoding_variables(model, params)
    longest = max(map(len, said))
    out: list[list[int]] = [[] for _ in said]
    ended = [False] * len(said)
    for at in range(longest + new):
        look(cursor.states, at)
        forced = np.array([ids[at] if at < len(ids) else -1 for ids in said], np.int32)
        if forced.max() >= 0:
            cursor = dataclasses.replace(cursor, logits=_saying(cursor.logits, jnp.asarray(forced)))
        tokens, _, cursor = decode_block(model, GREEDY, (), 1, variables, cursor, jnp.int32(0))
        for row, token in enumerate(np.asarray(tokens)[:, 0].tolist()):
            if forced[row] >= 0 or ended[row]:
                continue
            if token in stop:
                ended[row] = True
            else:
                out[row].append(token)
                ended[row] = len(out[row]) == new
        if all(ended):
            break
    return out


@functools.partial(jax.jit, keep_unused=True)
def _saying(logits: Array, tokens: Array) -> Array:
    """Logits that make these tokens, where they are not negative."""
    wanted = jnp.arange(logits.shape[1]) == tokens[:, None]
    return jnp.where(wanted, jnp.inf, jnp.where(tokens[:, None] >= 0, -jnp.inf, logits))
