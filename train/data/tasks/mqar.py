"""Multi-query associative recall (Zoology, arXiv 2312.04927, and Based, arXiv 2402.18668).

N distinct keys from [1, V/2) and N distinct values from [V/2, V) open the sequence as k1 v1 k2 v2 ... The other
T - 2N places are (T - 2N) / 2 slots of two tokens. Every key returns once, at the first place of a slot of its
own; slot i = 1, 2, ... is drawn without replacement with p_i ~ i^(a-1), so that near slots are preferred. The
target at a returning key is its value; nothing else is scored. All other places hold random ids of the whole
vocabulary, so a value is not repeated in the text unless by chance.

Beyond the papers: `pairs` may list several N, of which each sequence draws one (a curriculum at one length).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxattn.errors import ConfigError
from train.data.tasks._base import Example, Task, at_least


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """pairs: N, or several to draw from. vocab: V. power: a."""

    name = "mqar"
    one_answer = False

    pairs: int | tuple[int, ...] = 4
    vocab: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.pairs, list):
            object.__setattr__(self, "pairs", tuple(self.pairs))
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.counts)
        if not whole or not self.counts:
            raise ConfigError(
                f"mqar.pairs is {self.pairs!r} but must be a whole number of at least 1, or a list of such; 1 is one."
            )
        self.need("vocab", 2 * max(self.counts) + 2)  # N keys in [1, V/2) and N values in [V/2, V)
        number = isinstance(self.power, int | float) and not isinstance(self.power, bool)
        if not number or not 0 < self.power < np.inf:
            raise ConfigError(f"mqar.power is {self.power!r} but must be a positive number; the paper has 0.01.")

    @property
    def counts(self) -> tuple[int, ...]:
        """The N a sequence may have."""
        return self.pairs if isinstance(self.pairs, tuple) else (self.pairs,)

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def answers(self) -> int:
        return self.vocab - self.vocab // 2

    def check(self, length: int) -> None:
        most = max(self.counts)
        at_least("mqar", length, 4 * most, f"with pairs={most} needs 4 tokens a pair")
        if length % 2:
            raise ConfigError(f"context is {length} but mqar needs an even number of tokens: use {length + 1}.")

    def generate(self, rng: np.random.Generator, length: int) -> Example:
        count = self.counts[rng.integers(len(self.counts))] if len(self.counts) > 1 else self.counts[0]
        half = self.vocab // 2
        keys = 1 + rng.choice(half - 1, count, replace=False)
        values = half + rng.choice(self.vocab - half, count, replace=False)
        slots = (length - 2 * count) // 2
        p = np.arange(1, slots + 1) ** (self.power - 1.0)
        at = 2 * count + 2 * rng.choice(slots, count, replace=False, p=p / p.sum())
        tokens = rng.integers(0, self.vocab, length, dtype=np.int32)
        tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2] = keys, values
        tokens[at] = keys
        targets, mask = np.zeros(length, np.int32), np.zeros(length, bool)
        targets[at], mask[at] = values, True
        return Example(tokens, targets, mask)
