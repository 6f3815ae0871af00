"""Bigram-Backcopy sequences (arXiv 2410.13835): a Markov text with a copy rule.

x_0 = <s>; x_1 follows the unigram without triggers; then x_t = x_{t-2} if x_{t-1} is a trigger, else x_t is
drawn from P(. | x_{t-1}). Triggers are the k most frequent characters and never stand side by side. Sequence
i is a pure function of (seed, stream, i): any sequence can be made at any time by any process.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from train.data.bb_table import START, BigramTable

TRAIN, VALIDATION, HELD_OUT, PERTURB = range(4)


def stream_rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of one sequence; streams (train, validation, ...) never share numbers."""
    return np.random.Generator(np.random.Philox(key=np.array([seed * 4 + stream, index], np.uint64)))


def generate(table: BigramTable, length: int, *, seed: int, stream: int, index: int) -> np.ndarray:
    """One sequence [length] int32, starting with <s>."""
    rng = stream_rng(seed, stream, index)
    first = bisect_right(table.first_cumulative, rng.random())
    draws = rng.integers(0, 1 << 16, length, dtype=np.uint16).tolist()
    rows, copies = table.rows, table.copies
    out = [START, first]
    before, last = out
    for t in range(2, length):
        before, last = last, before if copies[last] else rows[last][draws[t]]
        out.append(last)
    return np.array(out[:length], np.int32)


def trigger_mask(tokens: np.ndarray, triggers: tuple[int, ...]) -> np.ndarray:
    """True where a token is a trigger; same shape as `tokens`. At these queries the next token is a copy."""
    return np.isin(tokens, triggers)


@dataclass(frozen=True)
class Oracle:
    """What a perfect model reaches, exact for sequences of the given length; entropies in nats.

    Queries are positions t >= 1 (the start token is left out, as in the paper).
    """

    trigger: float
    non_trigger: float
    trigger_fraction: float
    unigram: float
    bigram: float


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis; rows are normalised first, empty rows give 0."""
    total = p.sum(-1, keepdims=True)
    q = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    return -(q * np.log(np.where(q > 0, q, 1.0))).sum(-1)


def oracle(table: BigramTable, context: int) -> Oracle:
    """Follows the exact distribution of (x_{t-1}, x_t) through the queries t = 1 .. context-1.

    The state is either a non-trigger character, or a trigger together with the character before it, which is
    the one that comes back.
    """
    p = table.probabilities
    trig = np.zeros(65, bool)
    trig[list(table.triggers)] = True
    plain = table.first.copy()
    pair = np.zeros((65, 65))  # pair[c, e]: trigger e, reached from c
    plain_sum, pair_sum = np.zeros(65), np.zeros((65, 65))
    for _ in range(1, context):
        plain_sum += plain
        pair_sum += pair
        step = plain[:, None] * p
        plain, pair = np.where(trig, 0.0, step.sum(0)) + pair.sum(1), np.where(trig, step, 0.0)
    queries = float(context - 1)
    seen = plain_sum + pair_sum.sum(0)
    return Oracle(
        trigger=0.0,
        non_trigger=float((plain_sum * _entropy(p)).sum() / plain_sum.sum()),
        trigger_fraction=float(pair_sum.sum() / queries),
        unigram=float(_entropy(seen)),
        # Seen from x_t alone, a trigger may copy back any character that stood before it.
        bigram=float(((plain_sum * _entropy(p)).sum() + (pair_sum.sum(0) * _entropy(pair_sum.T)).sum()) / queries),
    )
