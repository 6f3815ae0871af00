"""Train and validation documents, held-out sequences, a user's own text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxattn.errors import DataError
from train.data.split import first_tokens, split


@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=40).filter(lambda x: sum(n > 0 for n in x) > 1),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_disjoint_and_complete(lengths, fraction, seed):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    train, val = split(offsets, fraction, seed)
    assert len(train) > 0
    assert (len(val) > 0) == (fraction > 0)
    tokens = [set(range(a, b)) for spans in (train, val) for a, b in zip(spans.start, spans.stop, strict=True)]
    assert sum(map(len, tokens)) == len(set().union(*tokens)) == sum(lengths)
    assert all(tokens)
    again = split(offsets, fraction, seed)
    np.testing.assert_array_equal(again[1].start, val.start)


def test_share_and_seed():
    offsets = np.arange(20_001, dtype=np.int64)
    a, b = (split(offsets, 0.1, seed)[1].start for seed in (0, 1))
    assert len(a) == pytest.approx(2000, abs=150)
    assert len(np.intersect1d(a, b)) == pytest.approx(200, abs=60)


def test_one_document_is_cut():
    train, val = split(np.array([0, 1000]), 0.1, 0)
    assert (train.start, train.stop, val.start, val.stop) == ([0], [900], [900], [1000])
    with pytest.raises(DataError, match="one document of 3 tokens"):
        split(np.array([0, 3]), 0.1, 0)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), budget=st.integers(0, 90))
def test_budget(lengths, budget):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    spans = split(offsets, 0, 0)[0]
    cut = first_tokens(spans, budget)
    assert cut.tokens == (min(budget, sum(lengths)) or sum(lengths))
    assert (cut.stop > cut.start).all()
    assert cut.start[0] == 0


def test_no_validation_text_in_the_training_stream(source_of, texts):
    source = source_of()
    assert source.meta["train_documents"] + source.meta["val_documents"] == 60
    marks = {int(t[:2]) for t in texts}
    seen = {}
    for name, batches in (
        ("train", [next(it) for it in [source.train_iterator()] for _ in range(120)]),
        ("val", source.val_batches(40)),
    ):
        rows = [(b["tokens"][r], b["positions"][r]) for b in batches for r in range(4)]
        starts = [(x[i : i + 2]) for x, p in rows for i in np.flatnonzero(p[:-1] == 0)]
        pairs = [bytes(s.astype(np.uint8)) for s in starts]
        seen[name] = {int(p) for p in pairs if p.isdigit()}
    assert seen["val"]
    assert not seen["train"] & seen["val"]
    assert len(seen["train"] | seen["val"]) > 0.8 * len(marks)


def test_validation_batches_are_always_the_same(source_of, same):
    source = source_of()
    first, second = source.val_batches(3), source.val_batches(5)
    iterator = source.train_iterator()
    next(iterator)
    for a, b in zip(first, second[:3], strict=True):
        same(a, b)
    assert source.val_batches(1, batch_size=6)[0]["tokens"].shape == (6, 16)
    with pytest.raises(DataError, match="holds no document out"):
        source_of(val_fraction=0).val_batches(1)


def test_held_out_sequences_lie_inside_one_document(source_of, texts):
    source = source_of()
    out = source.held_out(40, 20)
    assert (out.shape, out.dtype) == ((40, 20), np.int32)
    strings = [bytes(row.astype(np.uint8)).decode() for row in out]
    assert all(sum(s in text for text in texts) == 1 for s in strings)
    held = {text for text in texts if any(s in text for s in strings)}
    starts = [s for s in strings if any(t.startswith(s) for t in texts)]
    assert len(set(starts[: len(held)])) == len(held)
    assert set(strings) != set(starts)
    np.testing.assert_array_equal(out, source.held_out(40, 20))
    with pytest.raises(DataError, match="no held-out document has 1000 tokens"):
        source.held_out(1, 1000)


def test_held_out_sequences_leave_the_end_token_out(source_of):
    source = source_of(["abcdefghij"] * 8)
    assert (source.held_out(50, 10) != source.tokenizer.eos).all()
    assert (source.held_out(50, 4) != source.tokenizer.eos).all()
    with pytest.raises(DataError, match=r"no held-out document has 11 tokens .the longest has 10"):
        source.held_out(1, 11)


def test_encode_text(source_of, tmp_path):
    source = source_of()
    path = tmp_path / "mein text.txt"
    path.write_text("0123456789" * 3, "utf-8")
    rows = source.encode_text(str(path), 3, 8)
    assert [bytes(r.astype(np.uint8)) for r in rows] == [b"01234567"] * 3
    with pytest.raises(DataError, match=r"has 30 tokens, too few for 4 sequences of 8: .* ask for 3 sequences"):
        source.encode_text(str(path), 4, 8)
    with pytest.raises(DataError, match=r"has 30 tokens, too few for 1 sequences of 31: .* ask for shorter ones"):
        source.encode_text(str(path), 1, 31)
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        source.encode_text(str(tmp_path / "no.txt"), 1, 8)
