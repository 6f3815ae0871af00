"""Unigram and bigram entropies of a token stream: what a model without attention can reach."""

from __future__ import annotations

import numpy as np

from train.data.split import Spans
from train.data.store import TokenStore


def _stream(store: TokenStore, spans: Spans, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, starts): up to `limit` tokens [n] int64 of the spans in order, and True at each document's first
    token."""
    ids, starts, total = [], [], 0
    for start, stop in zip(spans.start, spans.stop, strict=True):
        part = store.ids[start : min(stop, start + limit - total)].astype(np.int64)
        first = np.zeros(len(part), bool)
        first[:1] = True
        ids.append(part)
        starts.append(first)
        total += len(part)
        if total >= limit:
            break
    if not ids:
        return np.zeros(0, np.int64), np.zeros(0, bool)
    return np.concatenate(ids), np.concatenate(starts)


def _pairs(ids: np.ndarray, starts: np.ndarray, vocab: int) -> np.ndarray:
    """[pairs] int64 codes x * vocab + y of neighbours within one document."""
    return (ids[:-1] * vocab + ids[1:])[~starts[1:]]


def _plug_in(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def text_entropies(store: TokenStore, train: Spans, val: Spans, vocab: int, max_tokens: int) -> dict[str, float]:
    """Entropies in nats per token, from at most `max_tokens` training tokens and as many validation tokens.

    unigram_nats: plug-in entropy of the training tokens.
    bigram_nats: plug-in conditional entropy H(x_{t+1} | x_t) of the training tokens; too low on small data,
    since
      it is measured on the tokens that were counted.
    bigram_heldout_nats: cross-entropy of the validation pairs under a bigram model of the training tokens
    with
      Witten-Bell interpolation, P(y|x) = (c(x,y) + d(x) P1(y)) / (c(x) + d(x)), d(x) = number of different
      successors of x; P1 is the unigram with one added to every count; an unseen x takes P1. NaN without
      validation pairs.
    """
    ids, starts = _stream(store, train, max_tokens)
    singles = np.bincount(ids, minlength=vocab)
    codes, counts = np.unique(_pairs(ids, starts, vocab), return_counts=True)
    context = np.bincount(codes // vocab, weights=counts, minlength=vocab)
    distinct = np.bincount(codes // vocab, minlength=vocab)
    bigram = (_plug_in(counts) - _plug_in(context[context > 0])) if len(codes) else 0.0

    held = _pairs(*_stream(store, val, max_tokens), vocab)
    heldout = float("nan")
    if len(held):
        x, y = held // vocab, held % vocab
        place = np.minimum(np.searchsorted(codes, held), max(len(codes) - 1, 0))
        joint = np.where(codes[place] == held, counts[place], 0) if len(codes) else np.zeros(len(held))
        p1 = (singles[y] + 1) / (singles.sum() + vocab)
        seen = context[x] + distinct[x]
        p = np.where(seen > 0, (joint + distinct[x] * p1) / np.maximum(seen, 1), p1)
        heldout = float(-np.log(p).mean())
    return {
        "unigram_nats": _plug_in(singles[singles > 0]),
        "bigram_nats": bigram,
        "bigram_heldout_nats": heldout,
    }
