"""Texts with something hidden in them, asked for under the model's chat template or behind the bare text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxattn.analysis.retrieval import Case, span_of
from jaxattn.errors import ConfigError, DataError
from jaxattn.text import Loaded
from jaxattn.tokenizer import Tokenizer

DIGITS = 5
MARK = "HAYSTACK"
WORDS = (
    "apple", "bridge", "candle", "doctor", "engine", "forest", "garden", "hammer", "island", "jacket", "kitchen",
    "ladder", "market", "needle", "orange", "pencil", "rabbit", "silver", "tiger", "uncle", "valley", "window",
    "yellow", "anchor", "basket", "castle", "desert", "eagle", "feather", "guitar", "harbor", "ice", "jungle",
    "knife", "lemon", "mirror",
)  # fmt: skip


class Question(NamedTuple):
    """What is asked, and the sentence that hides the answer and begins it; {} is the answer, {key} which of several."""

    asked: str
    said: str


NUMBER = Question(
    "What is the special magic number that the text mentions? Answer with the number alone.",
    "The special magic number is {}",
)
KEYED = Question(
    "What is the special magic number for {key} that the text mentions? Answer with the number alone.",
    "The special magic number for {key} is {}",
)
PHRASE = Question("What is the secret phrase that the text mentions? Answer with it alone.", "The secret phrase is {}")
LETTERS = 4  # words of a phrase


def frame(loaded: Loaded, asked: str, *, chat: bool) -> tuple[list[int], list[int]]:
    """The tokens in front of a text and behind it, when something is asked about it."""
    encode = lambda part: loaded.tokenizer.encode(part, add_special_tokens=False)
    if not chat:
        return list(loaded.tokenizer.around[0]), encode(f"\n\n{asked}\n")
    messages = [{"role": "user", "content": f"{MARK}\n\n{asked}"}]
    front, end = map(encode, loaded.render(messages, add_generation_prompt=True).split(MARK))
    return front, end


def sentence_ends(tokenizer: Tokenizer, ids: np.ndarray) -> set[int]:
    """Those of the tokens behind which a sentence may begin."""
    return {i for i in np.unique(ids).tolist() if tokenizer.decode([i]).rstrip(" ").endswith((".", "!", "?", "\n"))}


def place(hay: Sequence[int] | np.ndarray, depth: float, ends: Collection[int]) -> int:
    """Where in a text a sentence is put: the last beginning of one at or in front of the share `depth` of it, which is
    that share where none of `ends` is in front."""
    at = int(len(hay) * depth)
    return next((n for n in range(at, 0, -1) if int(hay[n - 1]) in ends), at)


class Asked(NamedTuple):
    """A prompt that ends in a question, the tokens that its answer begins with, the answer as text, and from where on
    in the prompt it is hidden."""

    prompt: list[int]
    said: list[int]
    answer: str
    begin: int


def case_of(tokenizer: Tokenizer, asked: Asked) -> Case:
    """The same for `retrieval`, which wants the places of the answer's tokens.

    Raises:
      DataError: the tokenizer makes other tokens of the answer in its sentence than alone and behind a blank.
    """
    variants = (tokenizer.encode(f"{blank}{asked.answer}", add_special_tokens=False) for blank in ("", " "))
    return Case(asked.prompt, *span_of(asked.prompt, variants, asked.begin), asked.said)


def number(rng: np.random.Generator) -> str:
    """Different digits: which of them a head copied can be told."""
    return "".join(map(str, rng.permutation(np.arange(1, 10))[:DIGITS]))


def phrase(rng: np.random.Generator) -> str:
    """Different words."""
    return " ".join(rng.permutation(WORDS)[:LETTERS])


def ask(
    loaded: Loaded,
    ids: np.ndarray,
    question: Question,
    hidden: Sequence[tuple[str, str]],
    *,
    length: int,
    depth: float,
    ends: Collection[int],
    start: int = 0,
) -> Asked:
    """A prompt that, with the beginning of its answer and the answer, has at most `length` tokens of the text `ids`
    from `start` on.

    Args:
      hidden: (key, answer) of each needle; the first is asked for and lies at `depth`, the others evenly around it.

    Raises:
      ConfigError: the length has no room for a text.
      DataError: the text is too short.
    """
    encode = lambda part: loaded.tokenizer.encode(part, add_special_tokens=False)
    key, answer = hidden[0]
    front, end = frame(loaded, question.asked.format(key=key), chat=bool(loaded.templates))
    needles = [encode(f" {question.said.format(answer, key=key)}.") for key, answer in hidden]
    said = encode(question.said.format("", key=key).rstrip())
    parts = [front, end, *needles, said, encode(f" {answer}.")]
    room = length - sum(map(len, parts))
    if room < 1:
        raise ConfigError(
            f"a length of {length} tokens has no room for a text: the question and what is hidden take "
            f"{length - room}; ask for more."
        )
    if len(ids) < start + room:
        raise DataError(
            f"the text has {len(ids)} tokens but {start + room} are read for a length of {length}: give a longer one."
        )
    hay = ids[start : start + room].tolist()
    depths = [depth, *((depth + n / len(hidden)) % 1.0 for n in range(1, len(hidden)))]
    places = sorted((place(hay, where, ends), n) for n, where in enumerate(depths))
    prompt, last, begin = list(front), 0, 0
    for at, n in places:
        prompt += hay[last:at]
        if n == 0:
            begin = len(prompt)
        prompt += needles[n]
        last = at
    prompt += [*hay[last:], *end]
    return Asked(prompt, said, answer, begin)


class Right(NamedTuple):
    """digits: how many of a number's, each in its place. whole: whether the answer's first number is this."""

    digits: int
    whole: bool


def right(answer: str, wanted: str) -> Right:
    """What the first number of an answer has of the one that was asked for."""
    said = next(iter(re.findall(r"[0-9]+", answer)), "")
    return Right(sum(a == b for a, b in zip(said, wanted, strict=False)), said == wanted)


class Vocabulary(NamedTuple):
    """Token ids: `plain` ones, which are no special tokens, and `breaks`, which hold a line break."""

    plain: list[int]
    breaks: frozenset[int]


def vocabulary(loaded: Loaded) -> Vocabulary:
    """The model's tokens as text."""
    count = min(loaded.tokenizer.vocab_size, loaded.model.vocab_size)
    texts = [loaded.tokenizer.decode([i]) for i in range(count)]
    return Vocabulary(
        [i for i, text in enumerate(texts) if text], frozenset(i for i, text in enumerate(texts) if "\n" in text)
    )


def numbers_of(text: str, flag: str) -> list[int]:
    """``"512,1k"`` -> [512, 1024].

    Raises:
      ConfigError: naming the flag.
    """
    try:
        words = [word.strip().lower() for word in text.split(",")]
        values = [int(word[:-1]) * 1024 if word.endswith("k") else int(word) for word in words]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ConfigError(f"{flag} is {text!r} but must be positive numbers like 512,1k.")
    return sorted(set(values))
