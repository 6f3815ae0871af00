"""Two seeds: `data.seed` decides what is held out, the run's own seed everything that training draws."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from jaxattn.errors import ConfigError, Mismatch

SOURCES = {
    "bb": {"source": "bb"},
    "copy": {"source": "copy"},
    "text": {},
    "text, best fit": {"packing": "best_fit", "perturb": "random@0"},
    "bb again": {"source": "bb", "unique_tokens": 16 * 8, "perturb": "random@1"},
    "copy again": {"source": "copy", "unique_tokens": 16 * 8},
}

# Of versions with one seed, at seed 3: sha256 of 6 training batches, 3 validation batches and 40 held-out sequences,
# which are more than there are documents.
ONE_SEED = {
    "bb": ("f428c5e10840e593", "108167f09b64258e", "0a7fef9730c7e066"),
    "copy": ("6533db0a8cbc842b", "2c0e958c88b84bd1", "21828740f0a4839c"),
    "text": ("72b5c48ba0be7964", "13248e563488642d", "634aabdfadc65d7a"),
    "text, best fit": ("e0e96065a172573e", "e59684362afd0aa4", "71994ff29ca83ead"),
    "bb again": ("9ec17d30b0cc6807", "44156749b50695b8", "584fa85fc1ce91c6"),
    "copy again": ("d9a3d2df0c650d56", "2c0e958c88b84bd1", "21828740f0a4839c"),
}


def digest(arrays) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@pytest.fixture
def given(source_of):
    """given(name, seed, data_seed) -> digests of training, validation and held-out data."""

    def look(name: str, seed: int, data_seed: int) -> tuple[str, str, str]:
        source = source_of(**SOURCES[name], seed=seed, data_seed=data_seed)
        iterator = source.train_iterator()
        training = [next(iterator) for _ in range(6)]
        iterator.close()
        flat = lambda batches: [batch[name] for batch in batches for name in sorted(batch)]
        return digest(flat(training)), digest(flat(source.val_batches(3))), digest([source.held_out(40, 12)])

    return look


@pytest.mark.parametrize("name", SOURCES)
def test_the_run_seed_changes_training_alone(given, name):
    training, validation, held_out = zip(*(given(name, seed, 0) for seed in (0, 1, 7)), strict=True)
    assert len(set(training)) == 3
    assert len(set(validation)) == len(set(held_out)) == 1


@pytest.mark.parametrize("name", SOURCES)
def test_the_data_seed_changes_what_is_held_out(given, name):
    _, validation, held_out = zip(*(given(name, 0, data_seed) for data_seed in (0, 1, 7)), strict=True)
    assert len(set(validation)) == len(set(held_out)) == 3


@pytest.mark.parametrize("name", SOURCES)
def test_equal_seeds_are_the_one_seed_of_old_runs_to_the_bit(given, name):
    assert given(name, 3, 3) == ONE_SEED[name]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_no_seed_trains_on_a_held_out_document(source_of, packing):
    """Each document of `texts` starts with its own number, so a 6-letter window tells it."""
    for seed in (0, 5):
        source = source_of(packing=packing, seed=seed, data_seed=2)
        ids = source.store.ids
        documents = [
            {ids[a:b].tobytes() for a, b in zip(part.start, part.stop, strict=True)}
            for part in (source.train, source.val)
        ]
        assert len(source.val) > 5
        assert not documents[0] & documents[1]
        iterator = source.train_iterator()
        seen = b" ".join(next(iterator)["tokens"].astype(np.int32).tobytes() for _ in range(200))
        iterator.close()
        for start in source.val.start[source.val.stop - source.val.start >= 6]:
            assert ids[start : start + 6].astype(np.int32).tobytes() not in seen


@pytest.mark.parametrize("name", ["bb", "copy"])
def test_repeated_sequences_are_the_same_ones_for_every_run(source_of, name):
    def epoch(seed: int) -> list[bytes]:
        iterator = source_of(source=name, unique_tokens=16 * 8, seed=seed, data_seed=1).train_iterator()
        rows = [row.tobytes() for _ in range(2) for row in next(iterator)["tokens"]]
        iterator.close()
        return rows

    first, second = epoch(0), epoch(5)
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize(("saved", "now"), [((3, 3), (3, 0)), ((3, 0), (3, 3)), ((3, 0), (3, 1))])
def test_a_position_under_another_data_seed_is_refused(source_of, saved, now):
    open_at = lambda seeds: source_of(seed=seeds[0], data_seed=seeds[1]).train_iterator()
    state = open_at(saved).get_state()
    with pytest.raises(Mismatch, match="data_seed="):
        open_at(now).set_state(state)
    open_at(saved).set_state(state)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_an_impossible_data_seed_is_refused(source_of, seed):
    with pytest.raises(ConfigError, match=rf"data.seed is {seed} but must lie between 0 and"):
        source_of(data_seed=seed)
