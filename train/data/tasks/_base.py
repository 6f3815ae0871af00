"""What every synthetic task offers: a frozen record of options that turns a random generator into one sequence."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

from jaxattn.errors import ConfigError
from train.data.bb import stream_rng


class Example(NamedTuple):
    """One sequence of T tokens: the model reads `tokens` and is scored on `targets` where `mask` is True.

    `targets` is 0 elsewhere, and need not be the next token.
    """

    tokens: np.ndarray
    """[T] int32"""
    targets: np.ndarray
    """[T] int32"""
    mask: np.ndarray
    """[T] bool"""


@dataclasses.dataclass(frozen=True)
class Task(ABC):
    """A task; subclasses add their options as fields, all with defaults."""

    name: ClassVar[str]
    one_answer: ClassVar[bool] = True
    """Whether the scored positions of a sequence are one answer, which is right only as a whole."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are 0 up to this, excluded."""

    @property
    @abstractmethod
    def answers(self) -> int:
        """How many targets are possible; each is equally likely, so 1 / answers is what a blind guess gets."""

    @abstractmethod
    def check(self, length: int) -> None:
        """Refuse a sequence length that does not fit.

        Raises:
          ConfigError: naming the field, the length and the nearest that is possible.
        """

    @abstractmethod
    def generate(self, rng: np.random.Generator, length: int) -> Example:
        """One sequence of `length` tokens; `check` must have accepted the length."""

    def sample(self, length: int, *, seed: int, stream: int, index: int) -> Example:
        """Sequence `index` of a stream: a pure function of these numbers (streams as in `train.data.bb`)."""
        return self.generate(stream_rng(seed, stream, index), length)

    def need(self, field: str, least: int, most: int | None = None) -> None:
        """Refuse a field that is no whole number from `least` to `most`, naming the nearest one that is."""
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.name}.{field} is {value!r} but must be a whole number; {least} is one.")
        if value < least or (most is not None and value > most):
            span = f"at least {least}" if most is None else f"from {least} to {most}"
            nearest = least if value < least else most
            raise ConfigError(f"{self.name}.{field} is {value} but must be {span}; the nearest is {nearest}.")


def at_least(task: str, length: int, least: int, why: str) -> None:
    """Refuse a context that is too short.

    Raises:
      ConfigError: naming the length that would do.
    """
    if length < least:
        raise ConfigError(f"context is {length} but {task} {why}: use at least {least}.")


def with_answer(prompt: np.ndarray, go: int, answer: np.ndarray, *, forced: bool = True) -> Example:
    """The prompt, then `go` and the answer to be given: [P] and [n] -> a sequence of P + n tokens.

    forced: the model reads the answer's earlier tokens, as a language model does; else `go` at every place.
    """
    earlier = answer[:-1] if forced else np.full(len(answer) - 1, go)
    tokens = np.concatenate([prompt, [go], earlier]).astype(np.int32)
    targets, mask = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    targets[len(prompt) :], mask[len(prompt) :] = answer, True
    return Example(tokens, targets, mask)
