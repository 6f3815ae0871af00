"""Entropies against hand-made streams."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from train.data.entropy import text_entropies
from train.data.split import Spans


def spans(*pairs):
    start, stop = zip(*pairs, strict=True) if pairs else ((), ())
    return Spans(np.array(start, np.int64), np.array(stop, np.int64))


def test_alternation():
    store = SimpleNamespace(ids=np.tile([0, 1], 1000))
    found = text_entropies(store, spans((0, 1000)), spans((1000, 2000)), 2, 10**6)
    assert found["unigram_nats"] == pytest.approx(math.log(2))
    assert found["bigram_nats"] == pytest.approx(0, abs=1e-9)
    assert 0 < found["bigram_heldout_nats"] < 0.01


def test_independent_tokens():
    ids = np.random.default_rng(0).integers(0, 4, 40_000)
    found = text_entropies(SimpleNamespace(ids=ids), spans((0, 20_000)), spans((20_000, 40_000)), 4, 10**6)
    for value in found.values():
        assert value == pytest.approx(math.log(4), abs=0.002)
    assert found["bigram_nats"] < math.log(4) < found["bigram_heldout_nats"]


def test_witten_bell_by_hand():
    # Training 0 1 0 2: c(0,1) = c(0,2) = c(1,0) = 1; unigram plus one: (3, 2, 2, 1) / 8.
    store = SimpleNamespace(ids=np.array([0, 1, 0, 2, 0, 1, 1, 3, 3]))
    found = text_entropies(store, spans((0, 4)), spans((4, 9)), 4, 10**6)
    p01 = (1 + 2 * 2 / 8) / (2 + 2)
    p11 = (0 + 1 * 2 / 8) / (1 + 1)
    p13 = (0 + 1 * 1 / 8) / (1 + 1)
    p33 = 1 / 8
    expected = -sum(map(math.log, (p01, p11, p13, p33))) / 4
    assert found["bigram_heldout_nats"] == pytest.approx(expected)


def test_no_pair_crosses_documents_and_the_limit_holds():
    store = SimpleNamespace(ids=np.array([0, 0, 1, 1, 2, 2]))
    found = text_entropies(store, spans((0, 2), (2, 4), (4, 6)), spans(), 3, 10**6)
    assert found["bigram_nats"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(found["bigram_heldout_nats"])
    assert text_entropies(store, spans((0, 6)), spans(), 3, 2)["unigram_nats"] == 0


def test_source(source_of):
    found = source_of().entropies()
    assert 0 < found["bigram_nats"] < found["unigram_nats"]
    assert found["bigram_nats"] < found["bigram_heldout_nats"]
