"""Which documents train and which validate, as ranges of the token store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxattn.errors import DataError


@dataclass(frozen=True)
class Spans:
    """Documents (or parts of them) as token ranges: start, stop [documents] int64, stop exclusive, none
    empty."""

    start: np.ndarray
    stop: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens in all spans together."""
        return int((self.stop - self.start).sum())

    def __len__(self) -> int:
        return len(self.start)


def document_hash(seed: int, documents: int) -> np.ndarray:
    """[documents] float64 in [0, 1): a hash of (seed, document number) (the splitmix64 finaliser)."""
    with np.errstate(over="ignore"):
        x = np.arange(documents, dtype=np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        x *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def split(offsets: np.ndarray, val_fraction: float, seed: int) -> tuple[Spans, Spans]:
    """Train and validation documents, disjoint; empty documents are in neither.

    A document validates if its hash is below `val_fraction`. If chance picks none, the one with the smallest
    hash validates; if it picks all, the one with the largest trains. A corpus of ONE document is cut instead:
    its last `val_fraction` (at least 2 tokens) validate.

    Raises:
      DataError: the only document is too short to cut.
    """
    start, stop = offsets[:-1], offsets[1:]
    full = np.flatnonzero(stop > start)
    if val_fraction == 0:
        return Spans(start[full], stop[full]), Spans(start[:0], stop[:0])
    if len(full) == 1:
        first, last = int(start[full[0]]), int(stop[full[0]])
        cut = last - max(2, round((last - first) * val_fraction))
        if cut - first < 2:
            raise DataError(
                f"the corpus is one document of {last - first} tokens, too short to hold out validation "
                "text: give more text, or set --data.val-fraction=0."
            )
        return Spans(np.array([first]), np.array([cut])), Spans(np.array([cut]), np.array([last]))
    hashes = document_hash(seed, len(start))[full]
    held = hashes < val_fraction
    if not held.any():
        held[hashes.argmin()] = True
    if held.all():
        held[hashes.argmax()] = False
    return (
        Spans(start[full[~held]], stop[full[~held]]),
        Spans(start[full[held]], stop[full[held]]),
    )


def first_tokens(spans: Spans, budget: int) -> Spans:
    """The first `budget` tokens of the spans, the last document cut short; all of them for 0 or a larger
    budget."""
    if budget == 0 or budget >= spans.tokens:
        return spans
    before = np.concatenate([[0], np.cumsum(spans.stop - spans.start)])
    keep = int(np.searchsorted(before, budget, side="left"))
    stop = spans.stop[:keep].copy()
    stop[-1] -= before[keep] - budget
    return Spans(spans.start[:keep], stop)
