"""Replaced tokens at given positions of every sequence (data perturbations of arXiv 2410.10781).

The token stream is replaced before inputs and targets are shifted apart: the token at position p changes both
as an input and as the target of position p-1. Positions count from 0 at the start of a packed sequence, not
of a document. Special tokens are never drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from jaxattn.errors import ConfigError


@dataclass(frozen=True)
class Perturbation:
    """`token` None draws uniformly from `vocab` ids without `special`; else that token is used. `positions`
    is sorted."""

    positions: tuple[int, ...]
    token: int | None
    vocab: int
    special: int | None = None

    def __call__(self, row: dict, rng: np.random.Generator) -> dict:
        """A row {"tokens": [T], "targets": [T], "segment_ids": [T], ...} with the tokens replaced; padding
        stays."""
        tokens, targets = row["tokens"].copy(), row["targets"].copy()
        at = np.asarray(self.positions)
        new = self.draw(rng, len(at))
        real = row["segment_ids"][at] > 0
        at, new = at[real], new[real]
        tokens[at] = new
        later = at > 0
        previous = at[later] - 1
        seen = row["loss_mask"][previous]
        targets[previous[seen]] = new[later][seen]
        return {**row, "tokens": tokens, "targets": targets}

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """[count] int32 replacement tokens."""
        if self.token is not None:
            return np.full(count, self.token, np.int32)
        if self.special is None:
            return rng.integers(0, self.vocab, count, dtype=np.int32)
        new = rng.integers(0, self.vocab - 1, count, dtype=np.int32)
        return new + (new >= self.special).astype(np.int32)

    def replace(self, ids: np.ndarray, seed: int) -> np.ndarray:
        """Sequences [n, length] with their tokens replaced; the draw depends on (seed, row). Positions past
        the end are ignored."""
        at = [p for p in self.positions if p < ids.shape[1]]
        out = ids.copy()
        for row in range(len(ids)):
            out[row, at] = self.draw(np.random.default_rng([seed, row]), len(self.positions))[: len(at)]
        return out


def parse_perturbation(text: str, *, context: int, vocab: int, special: int | None = None) -> Perturbation | None:
    """Reads "random@0,1" or "fixed=17@2"; "" is None.

    Raises:
      ConfigError: another form, a position outside the context, or a token outside the vocabulary.
    """
    if not text:
        return None
    match = re.fullmatch(r"(random|fixed=(\d+))@(\d+(?:,\d+)*)", text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"data.perturb={text!r} is not understood: write 'random@0', 'random@0,1' or 'fixed=17@2'.")
    positions = tuple(sorted({int(p) for p in match[3].split(",")}))
    if positions[-1] >= context:
        raise ConfigError(f"data.perturb={text!r}: position {positions[-1]} is outside context={context}.")
    token = None if match[2] is None else int(match[2])
    if token is not None and token >= vocab:
        raise ConfigError(f"data.perturb={text!r}: token {token} is outside the vocabulary of {vocab} tokens.")
    return Perturbation(positions, token, vocab, special)
