"""Bigram-Backcopy: the definition, the oracle, the table."""

import numpy as np
import pytest

from jaxattn.errors import DataError
from train.data import DataConfig, make_source
from train.data.bb import generate, oracle, trigger_mask
from train.data.bb_table import CHARS, START, VOCAB, estimate_table, load_table, make_table


@pytest.fixture(scope="module")
def table():
    return load_table()


@pytest.fixture(scope="module")
def sequences(table):
    """[800, 129]"""
    return np.stack([generate(table, 129, seed=0, stream=0, index=i) for i in range(800)])


def test_every_trigger_copies_the_token_before_it(table, sequences):
    x, trigger = sequences, trigger_mask(sequences, table.triggers)
    query = trigger[:, 2:-1]
    assert query.sum() > 10_000
    np.testing.assert_array_equal(x[:, 3:][query], x[:, 1:-2][query])


def test_start_and_neighbours(table, sequences):
    trigger = trigger_mask(sequences, table.triggers)
    assert (sequences[:, 0] == START).all()
    assert (sequences[:, 1:] < START).all()
    assert not trigger[:, 1].any()
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()


def test_triggers_are_the_most_frequent_characters(table):
    assert {CHARS[i] for i in table.triggers} == {" ", "e", "t"}
    assert [CHARS[i] for i in make_table(estimate_table("xyxyxyzxyxxab" * 9), 2).triggers] == ["x", "y"]


def test_oracle_is_the_measured_cross_entropy(table, sequences):
    exact = oracle(table, context=128)
    x, y = sequences[:, 1:-1], sequences[:, 2:]
    trigger = trigger_mask(x, table.triggers)
    losses = -np.log(table.probabilities[x[~trigger], y[~trigger]])
    error = losses.std() / np.sqrt(losses.size)
    assert abs(losses.mean() - exact.non_trigger) < 3 * error
    # Trigger positions within a sequence depend on each other: the spread is taken over sequences.
    share = trigger.mean(1)
    assert abs(share.mean() - exact.trigger_fraction) < 3 * share.std() / np.sqrt(len(share))


def test_oracle_bigram_is_the_measured_conditional_entropy(table, sequences):
    exact = oracle(table, context=128)
    x, y = sequences[:, 1:-1].ravel(), sequences[:, 2:].ravel()
    joint = np.bincount(x * 65 + y, minlength=65 * 65).reshape(65, 65) / x.size
    p = joint / np.maximum(joint.sum(1, keepdims=True), 1e-12)
    measured = -(joint * np.log(np.where(p > 0, p, 1))).sum()
    # The plug-in value is low by about (free parameters) / 2n.
    bias = ((joint > 0).sum() - (joint.sum(1) > 0).sum()) / (2 * x.size)
    assert measured + bias == pytest.approx(exact.bigram, abs=0.01)
    single = joint.sum(1)
    single = single[single > 0]
    assert -(single * np.log(single)).sum() == pytest.approx(exact.unigram, abs=0.01)
    assert exact.non_trigger * (1 - exact.trigger_fraction) < exact.bigram < exact.unigram


def test_table_rows(table):
    assert (table.weights.sum(1) == 2**16).all()
    counts = estimate_table("abab\n" * 20 + "éaé")
    assert counts.sum() == 99  # 100 characters in a row; the gap characters give no pair
    small = make_table(counts, 1)
    np.testing.assert_array_equal(small.weights[CHARS.index("Z")], small.unigram)
    assert small.weights[CHARS.index("a"), CHARS.index("b")] == 2**16


def test_table_from_a_file(tmp_path):
    path = tmp_path / "größe.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 50, "utf-8")
    source = make_source(DataConfig(bb_table=str(path), bb_triggers=2), seed=0)
    assert source.trigger_ids == (CHARS.index(" "), CHARS.index("o"))
    path.write_text("aaa", "utf-8")
    with pytest.raises(DataError, match="too few"):
        make_source(DataConfig(bb_table=str(path)), seed=0)
    with pytest.raises(DataError, match=r"bb_table='/no/such"):
        make_source(DataConfig(bb_table="/no/such.txt"), seed=0)


def test_source(same):
    source = make_source(DataConfig(context=32, batch_size=8), seed=5)
    assert (source.name, source.vocab_size, source.tokenizer) == ("bb", VOCAB, None)
    batch = next(source.train_iterator())
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((8, 32), "int32"),
        "targets": ((8, 32), "int32"),
        "positions": ((8, 32), "int32"),
        "segment_ids": ((8, 32), "int32"),
        "loss_mask": ((8, 32), "bool"),
    }
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(32), (8, 1)))
    assert batch["loss_mask"].all()
    assert (batch["segment_ids"] == 1).all()
    same(batch, next(make_source(DataConfig(context=32, batch_size=8), seed=5).train_iterator()))
    other = next(make_source(DataConfig(context=32, batch_size=8), seed=6).train_iterator())
    assert (other["tokens"] != batch["tokens"]).any()


def test_training_validation_and_held_out_sequences_differ():
    source = make_source(DataConfig(context=64, batch_size=16), seed=0)
    val = source.val_batches(2)
    assert [v["tokens"].shape for v in val] == [(16, 64)] * 2
    rows = np.concatenate(
        [next(source.train_iterator())["tokens"], val[0]["tokens"], val[1]["tokens"], source.held_out(16, 64)]
    )
    assert len(np.unique(rows, axis=0)) == 64
    np.testing.assert_array_equal(source.held_out(16, 64), source.held_out(16, 64))
    assert (source.held_out(3, 10)[:, 0] == START).all()


def test_entropies_and_refusals():
    source = make_source(DataConfig(context=64), seed=0)
    found = source.entropies()
    assert found["oracle_trigger_nats"] == 0
    assert 2.0 < found["oracle_non_trigger_nats"] < 2.5
    with pytest.raises(DataError, match="no tokenizer"):
        source.encode_text("x.txt", 1, 8)


def test_unique_tokens_repeat_in_a_new_order_each_epoch():
    source = make_source(DataConfig(context=16, batch_size=4, unique_tokens=16 * 8), seed=1)
    batches = source.train_iterator()
    epochs = [np.concatenate([next(batches)["tokens"] for _ in range(2)]) for _ in range(3)]
    first = {row.tobytes() for row in epochs[0]}
    assert len(first) == 8
    assert all({row.tobytes() for row in epoch} == first for epoch in epochs)
    assert any((epoch != epochs[0]).any() for epoch in epochs[1:])
