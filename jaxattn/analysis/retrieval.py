"""Retrieval heads: how often each query head looks most at the very token that the model copies from far back.

Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv 2404.15574). While a model answers greedily with
a needle that lies in its prompt at [s, e), head h copies token w_t if the row that PRODUCES w_t has its largest weight
at a j in [s, e) with prompt[j] = w_t:

    set     |tokens of the needle that h copied| / |tokens of the needle|        the paper's
    count   min(1, copies / (e - s))                                            the released code's, there without a cap

means over the answers that hold more than half of the needle (ROUGE-1 recall, over tokens: a number is one word). An
answer ends at its first line break. Of equal weights the first key counts; all positions compete, the answer's too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn.analysis.answers import answer, check_room, read_prompts
from jaxattn.analysis.heads import unrolled
from jaxattn.errors import DataError
from jaxattn.models import ModelConfig
from jaxattn.nn.attention import ConvolvedState
from jaxattn.policies import watch

RECALL = 0.5  # of the needle, above which an answer counts
THRESHOLD = 0.1  # mean score of a retrieval head
NEW = 50  # most tokens of an answer
ROWS = 8  # prompts that are read at once


class Case(NamedTuple):
    """A prompt with a needle at tokens [start, stop), and what its answer begins with."""

    prompt: list[int]
    start: int
    stop: int
    said: list[int]


class Retrieval(NamedTuple):
    """sets, counts: [n, L, H] by case, zeros in layers without keys. recall: [n]. answers: tokens of each."""

    sets: np.ndarray
    counts: np.ndarray
    recall: np.ndarray
    answers: list[list[int]]

    @property
    def counted(self) -> np.ndarray:
        """[n], which answers hold enough of their needles."""
        return self.recall > RECALL

    def mean(self, form: str = "sets") -> np.ndarray:
        """[L, H], the mean score over the cases that count.

        Raises:
          DataError: there is none.
        """
        if not self.counted.any():
            raise DataError(
                f"none of the {len(self.recall)} answers holds more than {RECALL:.0%} of its needle, so there is "
                "nothing to see heads copy in; take a model that finds needles, or shorter texts."
            )
        return getattr(self, form)[self.counted].mean(axis=0)


def span_of(ids: Sequence[int], wanted: Iterable[Sequence[int]], start: int = 0) -> tuple[int, int]:
    """Where one of the token sequences, the first that is there at all, lies from `start` on: exactly, its first place.

    Raises:
      DataError: none does.
    """
    for part in map(list, wanted):
        for at in range(start, len(ids) - len(part) + 1) if part else ():
            if list(ids[at : at + len(part)]) == part:
                return at, at + len(part)
    raise DataError("the tokens of the needle are not in the prompt as they stand; give another needle.")


def copies(case: Case, answer: Sequence[int], tops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The set and the count score [L, H] of one answer; tops: [T, L, H], where each head of the row that produced each
    token of it looks."""
    needle = set(case.prompt[case.start : case.stop])
    seen: dict[int, np.ndarray] = {}
    total = np.zeros(tops.shape[1:])
    prompt = np.asarray(case.prompt)
    for token, top in zip(answer, tops, strict=True):
        inside = (top >= case.start) & (top < case.stop)
        copied = inside & (prompt[np.clip(top, 0, len(prompt) - 1)] == token)
        total += copied
        if token in needle:
            seen[token] = seen.get(token, False) | copied
    sets = sum(seen.values(), np.zeros(tops.shape[1:])) / len(needle)
    return sets, np.minimum(total / (case.stop - case.start), 1.0)


def recall_of(case: Case, answer: Sequence[int]) -> float:
    """The share of the needle's tokens that the answer has, each as often as it has it."""
    needle = collections.Counter(case.prompt[case.start : case.stop])
    return sum((needle & collections.Counter(answer)).values()) / (case.stop - case.start)


def retrieval(
    model: ModelConfig,
    params: Any,
    cases: Sequence[Case],
    *,
    stop: Collection[int] = (),
    new: int = NEW,
    rows: int = ROWS,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Retrieval:
    """Copy scores of every query head over greedy answers.

    Args:
      stop: tokens that end an answer, those with a line break among them.
      rows: cases that run at once.
      show: what the loop's numbers pass through, such as a progress bar.

    Raises:
      ConfigError: no layer has keys to look at, or a case is longer than the model knows.
    """
    model, params = unrolled(dataclasses.replace(model, policy=""), params)
    model = dataclasses.replace(model, policy="watch")
    for case in cases:
        check_room(model, len(case.prompt), len(case.said) + new)
    shape = (len(cases), model.num_layers, model.num_heads)
    sets, counts, recall = np.zeros(shape), np.zeros(shape), np.zeros(len(cases))
    answers: list[list[int]] = []
    for first in show(range(0, len(cases), rows)):
        part = cases[first : first + rows]
        # A last batch of fewer rows would compile anew
        whole = [*part, *[part[-1]] * (rows - len(part))] if len(cases) > rows else part
        said = [case.said for case in whole]
        cursor = read_prompts(model, params, [case.prompt for case in whole], room=max(map(len, said)) + new)
        tops: list[np.ndarray] = []
        look = lambda states, at, tops=tops: tops.append(_tops(model, states))
        found = answer(model, params, cursor, said, new=new, stop=stop, look=look)
        seen = np.stack(tops)  # [T, L, B, H]
        for n, (case, ids) in enumerate(zip(part, found, strict=False)):
            own = seen[len(case.said) : len(case.said) + len(ids), :, n]
            sets[first + n], counts[first + n] = copies(case, ids, own)
            recall[first + n] = recall_of(case, ids)
            answers.append(ids)
    return Retrieval(sets, counts, recall, answers)


def _tops(model: ModelConfig, states: Any) -> np.ndarray:
    """[L, B, H], the position that each head of the newest rows looks at; negative in layers without keys."""
    inner = [state.mechanism if isinstance(state, ConvolvedState) else state for state in states]
    own = {layer: state.top for layer, state in enumerate(inner) if isinstance(state, watch.State)}
    found = np.full((model.num_layers, *next(iter(own.values())).shape), watch.NOTHING)
    found[list(own)] = np.asarray(_stacked(list(own.values())))
    return found


@jax.jit
def _stacked(tops: list[Array]) -> Array:
    return jnp.stack(tops)
