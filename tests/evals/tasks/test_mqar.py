"""MQAR against its definition, by counting over many sequences."""

import numpy as np
import pytest

from jaxattn.errors import ConfigError
from train.data.tasks import make_task, parse_task

T, N, V, COUNT = 64, 6, 40, 3000


@pytest.fixture(scope="module")
def examples():
    """tokens, targets, mask [COUNT, T]"""
    task = make_task("mqar", {"pairs": N, "vocab": V})
    found = [task.sample(T, seed=3, stream=0, index=i) for i in range(COUNT)]
    return tuple(np.stack(part) for part in zip(*found, strict=True))


def test_pairs_open_the_sequence(examples):
    tokens = examples[0]
    keys, values = tokens[:, 0 : 2 * N : 2], tokens[:, 1 : 2 * N : 2]
    assert (keys.min(), keys.max()) == (1, V // 2 - 1)  # all of [1, V/2) occur
    assert (values.min(), values.max()) == (V // 2, V - 1)
    for part in (keys, values):
        assert all(len(set(row)) == N for row in part.tolist())


def test_every_key_is_asked_once_and_answered_with_its_value(examples):
    tokens, targets, mask = examples
    assert (mask.sum(1) == N).all()
    assert not mask[:, : 2 * N].any()
    assert not mask[:, 1::2].any()  # the first place of a slot
    for row, answer, scored in zip(tokens.tolist(), targets.tolist(), mask, strict=True):
        value = dict(zip(row[0 : 2 * N : 2], row[1 : 2 * N : 2], strict=True))
        at = np.flatnonzero(scored)
        assert sorted(row[i] for i in at) == sorted(value)
        assert all(answer[i] == value[row[i]] for i in at)
    assert (targets[~mask] == 0).all()


def test_a_value_does_not_follow_its_key(examples):
    """The answer is not in the text: after a returning key comes filler, the value only by chance 1 / V."""
    tokens, targets, mask = examples
    rows, at = np.nonzero(mask)
    share = (tokens[rows, at + 1] == targets[rows, at]).mean()
    assert abs(share - 1 / V) < 4 * np.sqrt(1 / V / rows.size)


def test_fillers_are_uniform_over_the_whole_vocabulary(examples):
    tokens, _, mask = examples
    filler = tokens[:, 2 * N :][~mask[:, 2 * N :]]
    counts = np.bincount(filler, minlength=V)
    expected = filler.size / V
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert counts.size == V
    assert abs(chi2 - (V - 1)) < 5 * np.sqrt(2 * (V - 1))


@pytest.mark.parametrize("power", [0.01, 1.0, 2.0])
def test_slots_are_drawn_by_a_power_law(power):
    """With one pair the slot's distribution is p_i itself: i^(a-1) / sum."""
    task = make_task("mqar", {"pairs": 1, "vocab": 16, "power": power})
    n, length = 4000, 42
    masks = np.stack([task.sample(length, seed=0, stream=0, index=i).mask for i in range(n)])
    slot = (np.argmax(masks, axis=1) - 2) // 2
    counts = np.bincount(slot, minlength=20)
    p = np.arange(1.0, 21) ** (power - 1)
    p /= p.sum()
    assert counts.size == 20
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
    assert chi2 < 19 + 5 * np.sqrt(2 * 19)


def test_drawing_without_replacement_takes_near_slots_first(examples):
    """Successive draws: with 2 keys and slots 1..3 the second key's slot has an exact distribution."""
    task = make_task("mqar", {"pairs": 2, "vocab": 64})
    p = np.arange(1.0, 4) ** -0.99
    p /= p.sum()
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    n = 4000
    counts = np.zeros(3)
    for i in range(n):
        tokens, _, mask = task.sample(10, seed=0, stream=0, index=i)
        (at,) = (i for i in np.flatnonzero(mask) if tokens[i] == tokens[2])
        counts[(at - 4) // 2] += 1
    np.testing.assert_allclose(counts / n, second, atol=4 * np.sqrt(0.25 / n))
    share = examples[2][:, 2 * N :: 2].mean(0)
    assert share[0] > 0.8
    assert share[0] > 2 * share[10] > 0


def test_full_length_fills_every_slot():
    task = make_task("mqar", {"pairs": 4, "vocab": 64})
    assert task.sample(16, seed=0, stream=0, index=0).mask[8::2].all()


def test_several_pair_counts_are_equally_likely():
    task = parse_task("mqar(pairs=[2, 4, 8], vocab=64)")
    counts = np.array([task.sample(32, seed=0, stream=0, index=i).mask.sum() for i in range(900)])
    assert set(counts) == {2, 4, 8}
    assert all(abs((counts == n).mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / 900) for n in (2, 4, 8))


def test_a_sequence_is_a_function_of_its_numbers():
    task = make_task("mqar", {})
    one = task.sample(64, seed=7, stream=1, index=5)
    same = task.sample(64, seed=7, stream=1, index=5)
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.tokens.dtype, one.targets.dtype, one.mask.dtype) == (np.int32, np.int32, bool)
    for other in ({"seed": 8}, {"stream": 0}, {"stream": 2}, {"index": 6}):
        changed = {"seed": 7, "stream": 1, "index": 5} | other
        assert (task.sample(64, **changed).tokens != one.tokens).any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mqar(pairs=0)", ["mqar.pairs is 0", "at least 1"]),
        ("mqar(pairs=[])", ["mqar.pairs is ()"]),
        ("mqar(pairs=[4, 2.5])", ["mqar.pairs is (4, 2.5)"]),
        ("mqar(pairs='4')", ["mqar.pairs is '4'"]),
        ("mqar(pairs=True)", ["mqar.pairs is True"]),
        ("mqar(pairs=[4, 8], vocab=16)", ["mqar.vocab is 16", "nearest is 18"]),
        ("mqar(vocab=64.0)", ["mqar.vocab is 64.0", "whole number"]),
        ("mqar(power=0)", ["mqar.power is 0", "positive"]),
        ("mqar(pair=4)", ["'pair'", "did you mean 'pairs'"]),
        ("mqar(context=64)", ["'context'", "--data.context"]),
        ("mqra(pairs=4)", ["task 'mqra'", "did you mean 'mqar'"]),
        ("mqar(4)", ["'mqar(4)'", "option=value"]),
        ("mqar(pairs=open('x'))", ["not NAME"]),
    ],
)
def test_bad_options_are_one_sentence(text, says):
    with pytest.raises(ConfigError) as error:
        parse_task(text)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(("length", "says"), [(30, "use at least 32"), (33, "use 34")])
def test_lengths_that_do_not_fit(length, says):
    with pytest.raises(ConfigError, match=f"context is {length}.*{says}"):
        make_task("mqar", {"pairs": 8}).check(length)
    make_task("mqar", {"pairs": 8}).check(32)
