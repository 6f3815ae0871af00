"""Packing: every token carries its own successor, position and segment."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxattn.config_fields import check_values
from jaxattn.errors import ConfigError
from jaxattn.runs.data_config import DataConfig
from train.data.pipeline import Layout, Pieces, take, text_batches
from train.data.split import Spans

T, B = 8, 3


def numbered(lengths):
    """A store whose token ids are their own places (from 100), so that a token tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(ids=np.arange(offsets[-1]) + 100), Spans(offsets[:-1], offsets[1:])


def check_row(row, ends):
    """Every promise of `Source.train_iterator` about one row, from token ids that are places."""
    tokens, targets, positions = row["tokens"], row["targets"], row["positions"]
    segments, mask = row["segment_ids"], row["loss_mask"]
    real = segments > 0
    assert not mask[~real].any()
    assert not tokens[~real].any()
    assert (np.diff(real.astype(int)) <= 0).all()  # padding only at the end
    assert set(np.diff(segments[real])) <= {0, 1}
    assert segments[0] == 1
    for s in np.unique(segments[real]):
        place = tokens[segments == s].astype(int) - 100
        np.testing.assert_array_equal(np.diff(place), 1)
        np.testing.assert_array_equal(positions[segments == s], np.arange(len(place)))
        at_end = np.isin(place + 1, ends)
        assert not at_end[:-1].any()  # a piece never crosses a document border
        np.testing.assert_array_equal(mask[segments == s], ~at_end)
        np.testing.assert_array_equal(targets[segments == s][~at_end], place[~at_end] + 101)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 3 * T + 1), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_hold_pieces_of_documents(packing, lengths, seed):
    store, spans = numbered(lengths)
    layout = Layout(T, B, 0, 1, packing, 0, 0, None)
    rows = -(-sum(lengths) // T) if packing == "concat" else 8
    batches = take(text_batches(store, spans, layout, seed), rows)
    for batch in batches:
        for r in range(B):
            check_row({k: v[r] for k, v in batch.items()}, spans.stop)
    if packing == "concat":  # B epochs of rows: each token B times, so padding only behind the last token
        seen = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
        np.testing.assert_array_equal(np.bincount(seen)[100:], np.full(sum(lengths), B))
        assert sum((batch["segment_ids"] == 0).sum() for batch in batches) == B * (-sum(lengths) % T)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 3 * T + 1), min_size=1, max_size=12))
def test_pieces_cover_each_token_once(lengths):
    store, spans = numbered(lengths)
    pieces = Pieces(store, spans, T)
    pairs = [pieces(i)["pairs"] for i in range(len(pieces))]
    assert all(1 <= len(p) <= T for p in pairs)
    np.testing.assert_array_equal(np.concatenate(pairs)[:, 0], store.ids)


def test_best_fit_keeps_documents_of_up_to_t_tokens_whole():
    lengths = [T, 1, 3, 5, T - 1, 2, 4]
    store, spans = numbered(lengths)
    starts = set(spans.start)
    for batch in take(text_batches(store, spans, Layout(T, B, 0, 1, "best_fit", 0, 0, None), 1), 30):
        begins = batch["tokens"][(batch["positions"] == 0) & (batch["segment_ids"] > 0)] - 100
        assert set(begins) <= starts


def test_one_long_document_fills_whole_rows():
    store, spans = numbered([T * 20])
    (batch,) = take(text_batches(store, spans, Layout(T, 20, 0, 1, "concat", 0, 0, None), 1), 1)
    assert (batch["segment_ids"] == 1).all()
    np.testing.assert_array_equal(np.sort(batch["tokens"].ravel()), store.ids)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_empty_one_token_and_long_documents(source_of, packing):
    long = "".join(chr(33 + i) for i in range(60))
    source = source_of(["", "z", "", long, "y", ""], packing=packing, val_fraction=0, batch_size=2)
    assert source.meta["documents"] == 6
    assert source.meta["empty_documents"] == 3
    assert source.meta["train_tokens"] == 61 + 2 + 2
    eos, targets = source.tokenizer.eos, {}
    for batch in take_n(source.train_iterator(), 40):
        for token, target, mask in zip(*(batch[k].ravel() for k in ("tokens", "targets", "loss_mask")), strict=True):
            if mask:
                targets.setdefault(int(token), set()).add(int(target))
            else:
                assert target == 0
    expected = {ord(a): {ord(b)} for a, b in pairwise(long)} | {
        ord(long[-1]): {eos},
        ord("z"): {eos},
        ord("y"): {eos},
    }
    # The alphabet of `long` ends before "y", so no letter has two different successors.
    assert targets == expected


def take_n(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_epochs_are_shuffled_anew(source_of):
    source = source_of(["abcdefghijklmno"] + [c * 15 for c in "ABCDEFGHIJKLMNOPQRSTUVW"], val_fraction=0)
    batches = source.train_iterator()
    epochs = [np.concatenate([next(batches)["tokens"] for _ in range(6)]) for _ in range(3)]
    assert all({r.tobytes() for r in e} == {r.tobytes() for r in epochs[0]} for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()


def test_unique_tokens(source_of, texts):
    docs = [f"{i}:" + "x" * 20 for i in range(10, 60)]
    source = source_of(docs, unique_tokens=60, val_fraction=0)
    assert source.meta["train_tokens"] == 60
    batches = take_n(source.train_iterator(), 30)
    seen = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    assert set(map(chr, seen[seen < 256])) == set("10:2x")  # documents 10, 11 and part of 12
    full = source_of(docs, unique_tokens=10**9, val_fraction=0)
    assert full.meta["train_tokens"] == 50 * 24


def test_prefix(source_of):
    batch = next(source_of(prefix_len=5).train_iterator())
    plain = next(source_of().train_iterator())
    np.testing.assert_array_equal(batch["prefix_len"], np.full(4, 5, np.int32))
    assert batch["prefix_len"].dtype == np.int32
    assert not batch["loss_mask"][:, :5].any()
    np.testing.assert_array_equal(batch["loss_mask"][:, 5:], plain["loss_mask"][:, 5:])
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    bb = next(source_of(source="bb", prefix_len=5).train_iterator())
    assert (bb["loss_mask"].sum(1) == 11).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"context": 1}, "context=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0"),
        ({"prefix_len": 16}, "prefix_len=16"),
        ({"workers": -1}, "workers=-1"),
        ({"unique_tokens": -1}, "unique_tokens=-1"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size=100"),
        ({"max_bad_records": -1}, "max_bad_records=-1"),
        ({"bb_triggers": 0}, "bb_triggers=0"),
        ({"source": " "}, "source=' '"),
    ],
)
def test_impossible_settings_are_refused(source_of, fields, named):
    with pytest.raises(ConfigError, match=named):
        source_of(**fields)


def test_a_packing_that_does_not_exist_is_refused_before_it_is_a_configuration():
    with pytest.raises(ConfigError, match=r"data\.packing is 'tight' but must be one of concat, best_fit"):
        check_values("data", DataConfig, {"packing": "tight"})
