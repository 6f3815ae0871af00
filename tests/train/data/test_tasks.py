"""A task as a data source: batches, resuming, processes, refusals."""

import json

import numpy as np
import pytest

from jaxattn.errors import ConfigError, DataError, Mismatch
from train.data import DataConfig, make_source
from train.data.bb import TRAIN
from train.data.tasks import parse_task

TASKS = ["mqar(pairs=[2, 3], vocab=32)", "passkey(digits=2)", "copy(payload=3)", "selective_copy(payload=3)"]


def source_of(source=TASKS[0], *, seed=3, process_index=0, process_count=1, **fields):
    given = {"context": 16, "batch_size": 4} | fields
    cfg = DataConfig(source=source, **given)
    return make_source(cfg, seed=seed, process_index=process_index, process_count=process_count)


@pytest.mark.parametrize("text", TASKS)
def test_batches_are_the_tasks_sequences(text):
    source = source_of(text)
    task = parse_task(text)
    assert (source.name, source.vocab_size, source.tokenizer) == (task.name, task.vocab_size, None)
    assert source.indivisible
    batches = source.train_iterator()
    for step in range(3):
        batch = next(batches)
        for row in range(4):
            want = task.sample(16, seed=3, stream=TRAIN, index=4 * step + row)
            np.testing.assert_array_equal(batch["tokens"][row], want.tokens)
            np.testing.assert_array_equal(batch["targets"][row], want.targets)
            np.testing.assert_array_equal(batch["loss_mask"][row], want.mask)
        np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(16), (4, 1)))
        assert (batch["segment_ids"] == 1).all()
    kinds = {name: value.dtype.name for name, value in batch.items()}
    assert kinds == {name: "int32" for name in ("tokens", "targets", "positions", "segment_ids")} | {
        "loss_mask": "bool"
    }


def test_training_validation_and_held_out_sequences_differ():
    source = source_of("mqar(vocab=512)", batch_size=16)
    val = source.val_batches(2)
    held = source.held_out(16, 16)
    rows = np.concatenate([next(source.train_iterator())["tokens"], val[0]["tokens"], val[1]["tokens"], held])
    assert len(np.unique(rows, axis=0)) == 64
    np.testing.assert_array_equal(held, source.held_out(16, 16))
    np.testing.assert_array_equal(val[1]["tokens"], source.val_batches(2)[1]["tokens"])
    assert source.held_out(2, 32).shape == (2, 32)
    assert source.held_out(0, 16).shape == (0, 16)
    with pytest.raises(ConfigError, match="use 18"):
        source.held_out(1, 17)


@pytest.mark.parametrize("fields", [{}, {"unique_tokens": 16 * 10}])
def test_a_restored_iterator_continues(same, fields):
    source = source_of(**fields)
    batches = source.train_iterator()
    unbroken, states = [], []
    for _ in range(12):
        states.append(json.dumps(batches.get_state()))
        unbroken.append(next(batches))
    for k in range(9):
        resumed = source.train_iterator()
        resumed.set_state(json.loads(states[k]))
        for i in range(3):
            same(next(resumed), unbroken[k + i])


@pytest.mark.parametrize("change", ["mqar(pairs=2, vocab=32)", "mqar(pairs=[2, 3], vocab=34)", "copy(payload=3)"])
def test_a_state_of_another_task_is_refused(change):
    state = source_of().train_iterator().get_state()
    with pytest.raises(Mismatch, match="data="):
        source_of(change).train_iterator().set_state(state)


def test_unique_tokens_repeat_whole_sequences():
    source = source_of(unique_tokens=16 * 8)
    batches = source.train_iterator()
    epochs = [np.concatenate([next(batches)["tokens"] for _ in range(2)]) for _ in range(3)]
    first = {row.tobytes() for row in epochs[0]}
    assert len(first) == 8
    assert all({row.tobytes() for row in epoch} == first for epoch in epochs)


@pytest.mark.parametrize("fields", [{}, {"prefix_len": 7}, {"unique_tokens": 160}])
def test_halves_make_the_global_batch(fields):
    whole = source_of(**fields)
    halves = [source_of(**fields, process_index=i, process_count=2) for i in range(2)]
    iterators = [s.train_iterator() for s in (whole, *halves)]
    for _ in range(4):
        want, *parts = [next(it) for it in iterators]
        for name in want:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), want[name])
    if fields.get("prefix_len"):
        assert not want["loss_mask"][:, :7].any()
        assert want["loss_mask"][:, 7:].any()


def test_workers_give_the_same_batches(same):
    alone, helped = source_of().train_iterator(), source_of(workers=2).train_iterator()
    for _ in range(3):
        same(next(alone), next(helped))
    helped.close()


def test_entropies_are_those_of_the_answers():
    found = source_of("mqar(vocab=41, pairs=2)").entropies()
    assert found == {"unigram_nats": pytest.approx(np.log(21)), "oracle_nats": 0.0}
    meta = source_of("passkey(digits=2)").meta
    assert meta["chance_accuracy"] == 0.1
    assert json.loads(json.dumps(meta))["options"] == {"digits": 2, "vocab": 64}


@pytest.mark.parametrize(
    ("source", "fields", "says"),
    [
        ("mqar(pairs=5)", {}, "data.context is 16 but mqar with pairs=5 .* use at least 20"),
        ("mqar", {"context": 17}, "data.context is 17 .* use 18"),
        ("mqar(pears=5)", {}, "did you mean 'pairs'"),
        ("mqra(pairs=5)", {}, "did you mean 'mqar'"),
        ("mqar", {"perturb": "random@0"}, r"data.perturb='random@0' .* leave it out"),
        ("passkey(context=128)", {}, "--data.context"),
    ],
)
def test_refusals(source, fields, says):
    with pytest.raises(ConfigError, match=says):
        source_of(source, **fields)


def test_text_is_refused():
    with pytest.raises(DataError, match=r"'x.txt'.*data.source='copy\(payload=3\)'.*no tokenizer"):
        source_of(TASKS[2]).encode_text("x.txt", 1, 8)


def test_a_path_that_looks_like_a_call_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="task 'notes' is not known"):
        source_of("notes(a=1)")
    (tmp_path / "notes(a=1)").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        source_of("notes(a=1)")
