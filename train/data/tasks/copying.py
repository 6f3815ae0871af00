"""Copying: n random symbols, a gap of blanks, then the symbols again.

    s1 ... sn blank ... blank GO s1 ... s(n-1)        scored from GO on: s1 ... sn

Long Short-Term Memory's classic test (arXiv 1511.06464, section 4.1) reads GO and blanks while it answers
(`forced=False`); with `forced` the model reads its earlier symbols, as a language model does (arXiv 2402.01032).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxattn.errors import ConfigError
from train.data.tasks._base import Example, Task, at_least, with_answer

BLANK, GO, SYMBOLS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Copy(Task):
    """payload: n, 0 for as many as the context holds. vocab: V, of which V - 2 are symbols. forced: see above."""

    name = "copy"

    payload: int = 0
    vocab: int = 64
    forced: bool = True

    def __post_init__(self) -> None:
        self.need("payload", self._least)
        self.need("vocab", SYMBOLS + 1)
        if not isinstance(self.forced, bool):
            raise ConfigError(f"{self.name}.forced is {self.forced!r} but must be True or False.")

    @property
    def _least(self) -> int:
        return 0

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def answers(self) -> int:
        return self.vocab - SYMBOLS

    def check(self, length: int) -> None:
        least = 2 * max(self.payload, 1)
        at_least(self.name, length, least, f"with payload={self.payload} needs every symbol twice")

    def generate(self, rng: np.random.Generator, length: int) -> Example:
        count = self.payload or length // 2
        symbols = rng.integers(SYMBOLS, self.vocab, count)
        prompt = np.full(length - count, BLANK)
        prompt[self.places(rng, len(prompt), count)] = symbols
        return with_answer(prompt, GO, symbols, forced=self.forced)

    def places(self, rng: np.random.Generator, room: int, count: int) -> np.ndarray:
        """Where the symbols stand in the prompt, in order."""
        return np.arange(count)
