"""Passkey retrieval, on tokens (the test of Landmark Attention, arXiv 2305.16300, without the English).

    filler ... MARK d1 ... dn filler ... ASK d1 ... d(n-1)        scored from ASK on: d1 ... dn

MARK and ASK are tokens of their own, the key's n digits are uniform, MARK's place is uniform over all that fit,
and the filler is uniform over the rest of the vocabulary. The earlier digits of the answer are given, so a whole
answer is right exactly when greedy decoding would give it.

The English test repeats three sentences as filler; random filler is harder, because no place looks like another's
continuation.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.tasks._base import Example, Task, at_least, with_answer

MARK, ASK, DIGITS = 0, 1, 10
FILLER = 2 + DIGITS  # the first filler token; digit d is token 2 + d


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """digits: n. vocab: V, of which V - 12 tokens are filler."""

    name = "passkey"

    digits: int = 4
    vocab: int = 64

    def __post_init__(self) -> None:
        self.need("digits", 1)
        self.need("vocab", FILLER + 1)

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def answers(self) -> int:
        return DIGITS

    def check(self, length: int) -> None:
        least = 2 * self.digits + 1
        at_least("passkey", length, least, f"with digits={self.digits} needs the key, its mark and the answer")

    def generate(self, rng: np.random.Generator, length: int) -> Example:
        key = 2 + rng.integers(0, DIGITS, self.digits)
        prompt = rng.integers(FILLER, self.vocab, length - self.digits)
        at = rng.integers(0, len(prompt) - self.digits)
        prompt[at], prompt[at + 1 : at + 1 + self.digits] = MARK, key
        return with_answer(prompt, ASK, key)
