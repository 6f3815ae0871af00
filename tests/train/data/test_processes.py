"""Two processes see disjoint halves of the batch that one process would see; workers and their death."""

import itertools
import os
import signal
import time

import numpy as np
import pytest

from jaxattn.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packing": "best_fit"},
        {"source": "bb"},
        {"perturb": "random@0"},
        {"source": "bb", "perturb": "random@0", "unique_tokens": 160},
        {"prefix_len": 3},
    ],
)
def test_halves_make_the_global_batch(source_of, fields):
    whole = source_of(**fields)
    halves = [source_of(**fields, process_index=i, process_count=2) for i in range(2)]
    iterators = [s.train_iterator() for s in (whole, *halves)]
    for _ in range(12):
        want, *parts = [next(it) for it in iterators]
        assert all(part["tokens"].shape == (2, 16) for part in parts)
        for name in want:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), want[name])
    want, *parts = [s.val_batches(2, batch_size=6) for s in (whole, *halves)]
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([p[i]["tokens"] for p in parts]), want[i]["tokens"])


def test_processes_must_divide_the_batch(source_of):
    with pytest.raises(ConfigError, match="multiple of the 3 processes"):
        source_of(process_count=3)
    with pytest.raises(ConfigError, match="process_index=2"):
        source_of(process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="batch_size=3"):
        source_of(process_count=2).val_batches(1, batch_size=3)


def test_workers_resume_and_their_death_is_an_error(source_of, same):
    source = source_of(workers=2, context=256, batch_size=4, docs=[c * 700 for c in "abcdefghijklmnop"])
    batches = source.train_iterator()
    unbroken = []
    for i in range(9):
        if i == 5:
            state = batches.get_state()
        unbroken.append(next(batches))
    batches.set_state(state)
    for batch in unbroken[5:]:
        same(next(batches), batch)

    victim = batches._processes[1].pid
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"data worker died, pid {victim} .exit code -9"):
        list(itertools.islice(batches, 100))
    assert time.monotonic() - start < 10
    batches.close()

    resumed = source.train_iterator()
    resumed.set_state(state)
    same(next(resumed), unbroken[5])
    resumed.close()


def test_bigram_backcopy_does_not_depend_on_workers(source_of, same):
    alone = source_of(source="bb").train_iterator()
    helped = source_of(source="bb", workers=2).train_iterator()
    for _ in range(5):
        same(next(alone), next(helped))
    helped.close()
