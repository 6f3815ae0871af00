"""Texts with passkeys of words hidden in them, each asked for behind the text: what DuoAttention's gates train on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxattn.analysis.duo_gates import Sample
from jaxattn.errors import ConfigError
from jaxattn.tokenizer import Tokenizer

ALPHABET = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
DEPTHS = np.linspace(0.05, 0.95, 1000)
HEADER = "This is a long text with several passkeys in it. Remember them.\n\n"


def passkeys(
    tokenizer: Tokenizer, ids: np.ndarray, *, length: int, keys: int, words: int, seed: int = 0
) -> Iterator[Sample]:
    """Samples of `length` tokens without end: parts of the text `ids`, `keys` passkeys of `words` words each at depths
    drawn anew, and all of them asked for in order.

    Raises:
      ConfigError: no room for a text.
    """
    if not 1 <= keys <= len(ORDINALS):
        raise ConfigError(f"--keys is {keys} but must be from 1 to {len(ORDINALS)}.")
    if words < 1:
        raise ConfigError(f"--words is {words} but must be at least 1.")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    rng = np.random.default_rng(seed)
    while True:
        named = {name: " ".join(rng.choice(ALPHABET, words)) for name in ORDINALS[:keys]}
        hidden = [encode(f"\nThe {name} passkey is: {key}.\n") for name, key in named.items()]
        answer = "What is the {0} passkey? The {0} passkey is: {1}."
        behind = encode("\n\n" + "\n".join(answer.format(*each) for each in named.items()))
        front = [*tokenizer.around[0], *encode(HEADER)]
        room = length - len(front) - len(behind) - sum(map(len, hidden))
        if room < keys:
            raise ConfigError(
                f"--length is {length} but {keys} passkeys of {words} words and their questions take {length - room} "
                "tokens: make it longer, or take fewer --keys or --words."
            )
        if len(ids) < room:
            raise ConfigError(f"the text has {len(ids)} tokens but {room} are read for a sample: give a longer one.")
        start = int(rng.integers(0, len(ids) - room + 1))
        hay, tokens, last = ids[start : start + room], list(front), 0
        for depth, needle in zip(np.sort(rng.choice(DEPTHS, keys, replace=False)), hidden, strict=True):
            at = int(depth * room)
            tokens += [*hay[last:at].tolist(), *needle]
            last = at
        tokens += hay[last:].tolist()
        asked = np.zeros(length, bool)
        asked[len(tokens) :] = True
        yield Sample(np.asarray([*tokens, *behind], np.int32), asked)
