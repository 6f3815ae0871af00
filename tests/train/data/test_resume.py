"""A restored iterator continues the unbroken stream, in mid-epoch and across epoch ends (fault row 25)."""

import json

import pytest

from jaxattn.errors import Mismatch

CASES = {
    "concat": {},
    "best_fit": {"packing": "best_fit"},
    "perturbed": {"perturb": "random@0,3"},
    "budget": {"unique_tokens": 200},
    "bb": {"source": "bb"},
    "bb budget": {"source": "bb", "unique_tokens": 16 * 10, "perturb": "random@1"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_position(case, source_of, same):
    source = source_of(**CASES[case])
    # 60 documents of 42 bytes are about 40 batches an epoch; the budget cases go round every 3 or 4 batches.
    length = 60 if case in ("concat", "best_fit") else 20
    unbroken, states = [], []
    batches = source.train_iterator()
    for _ in range(length):
        states.append(json.dumps(batches.get_state()))  # Orbax writes JSON
        unbroken.append(next(batches))
    for k in range(0, length - 3, 1 if length < 30 else 4):
        resumed = source.train_iterator()
        resumed.set_state(json.loads(states[k]))
        assert json.dumps(resumed.get_state()) == states[k]
        for i in range(3):
            same(next(resumed), unbroken[k + i])


@pytest.mark.parametrize("case", ["concat", "best_fit", "bb"])
def test_rewind_of_a_running_iterator(case, source_of, same):
    batches = source_of(**CASES[case]).train_iterator()
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    ahead = [next(batches) for _ in range(7)]
    batches.set_state(state)
    for batch in ahead:
        same(next(batches), batch)


def test_it_is_a_grain_iterator(source_of):
    import grain

    assert isinstance(source_of().train_iterator(), grain.DatasetIterator)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size=4"),
        ({"context": 32}, "context=16"),
        ({"packing": "best_fit"}, "packing='concat'"),
        ({"seed": 4}, "seed=3"),
        ({"docs": ["another", "corpus", "of three"]}, "data="),
        ({"workers": 2}, "workers=0"),
    ],
)
def test_a_state_of_other_data_is_refused(source_of, change, named):
    state = source_of().train_iterator().get_state()
    with pytest.raises(Mismatch, match=named):
        source_of(**change).train_iterator().set_state(state)


@pytest.mark.parametrize("case", ["concat", "best_fit"])
def test_orbax_saves_and_restores_the_position(case, source_of, same, tmp_path):
    from orbax.checkpoint import v1 as ocp

    batches = source_of(**CASES[case]).train_iterator()
    for _ in range(7):
        next(batches)
    ocp.save_checkpointables(tmp_path / "saved", {"data": batches})
    resumed = source_of(**CASES[case]).train_iterator()
    ocp.load_checkpointables(tmp_path / "saved", {"data": resumed})
    for _ in range(3):
        same(next(resumed), next(batches))
