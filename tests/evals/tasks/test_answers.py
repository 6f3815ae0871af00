"""Tasks with one answer at the end (passkey, copying, selective copying) against their definitions."""

import numpy as np
import pytest

from jaxattn.errors import ConfigError
from train.data.tasks import make_task, names, parse_task
from train.data.tasks.passkey import ASK, FILLER, MARK


def draw(name, length, count, **options):
    task = make_task(name, options)
    task.check(length)
    found = [task.sample(length, seed=1, stream=0, index=i) for i in range(count)]
    return tuple(np.stack(part) for part in zip(*found, strict=True))


def uniform(values, low, high):
    """Whether every number in [low, high) occurs equally often, by chi squared at 5 standard deviations."""
    counts = np.bincount(values - low, minlength=high - low)
    assert values.min() >= low
    assert len(counts) == high - low
    expected = values.size / len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return abs(chi2 - (len(counts) - 1)) < 5 * np.sqrt(2 * (len(counts) - 1))


def test_passkey():
    digits, length, count = 3, 40, 4000
    tokens, targets, mask = draw("passkey", length, count, digits=digits, vocab=32)
    rows = np.arange(count)
    assert (mask == (np.arange(length) >= length - digits)).all()
    assert ((tokens == MARK).sum(1) == 1).all()
    assert ((tokens == ASK).sum(1) == 1).all()
    assert (tokens[:, length - digits] == ASK).all()
    at = np.argmax(tokens == MARK, axis=1)
    key = np.stack([tokens[rows, at + 1 + i] for i in range(digits)], axis=1)
    np.testing.assert_array_equal(key, targets[:, -digits:])
    np.testing.assert_array_equal(key[:, :-1], tokens[:, length - digits + 1 :])  # the answer's earlier digits
    assert (targets[~mask] == 0).all()
    assert uniform(at, 0, length - 2 * digits)  # every depth that fits
    assert uniform(key.ravel(), 2, FILLER)
    filler = np.ones_like(mask)
    filler[:, -digits:] = False
    for i in range(digits + 1):
        filler[rows, at + i] = False
    assert uniform(tokens[filler], FILLER, 32)


def test_passkey_at_its_shortest():
    tokens, targets, _ = draw("passkey", 5, 50, digits=2)
    assert (tokens[:, 0] == MARK).all()
    np.testing.assert_array_equal(tokens[:, 1:3], targets[:, 3:])


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize(("payload", "length"), [(0, 20), (0, 21), (4, 20)])
def test_copy(payload, length, forced):
    tokens, targets, mask = draw("copy", length, 500, payload=payload, vocab=12, forced=forced)
    n = payload or length // 2
    symbols = tokens[:, :n]
    assert uniform(symbols.ravel(), 2, 12)
    assert (tokens[:, n : length - n] == 0).all()
    assert (tokens[:, length - n] == 1).all()
    assert (mask == (np.arange(length) >= length - n)).all()
    np.testing.assert_array_equal(targets[:, length - n :], symbols)
    given = symbols[:, :-1] if forced else np.ones_like(symbols[:, 1:])
    np.testing.assert_array_equal(tokens[:, length - n + 1 :], given)


@pytest.mark.parametrize("forced", [True, False])
def test_selective_copy(forced):
    n, length, count = 5, 20, 3000
    tokens, targets, mask = draw("selective_copy", length, count, payload=n, vocab=10, forced=forced)
    prompt = tokens[:, : length - n]
    assert ((prompt > 1).sum(1) == n).all()
    assert ((prompt == 0).sum(1) == length - 2 * n).all()
    np.testing.assert_array_equal(prompt[prompt > 1].reshape(count, n), targets[:, -n:])  # in order
    assert (mask == (np.arange(length) >= length - n)).all()
    assert uniform(prompt[prompt > 1], 2, 10)
    assert uniform(np.nonzero(prompt > 1)[1], 0, length - n)  # every place
    earlier = targets[:, -n:-1] if forced else np.ones((count, n - 1))
    np.testing.assert_array_equal(tokens[:, length - n + 1 :], earlier)


@pytest.mark.parametrize("name", ["passkey", "copy", "selective_copy"])
def test_a_sequence_is_a_function_of_its_numbers(name):
    task = make_task(name, {})
    one = task.sample(64, seed=7, stream=1, index=5)
    for a, b in zip(one, task.sample(64, seed=7, stream=1, index=5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.tokens.dtype, one.targets.dtype, one.mask.dtype) == (np.int32, np.int32, bool)
    for other in ({"seed": 8}, {"stream": 0}, {"stream": 2}, {"index": 6}):
        assert (task.sample(64, **({"seed": 7, "stream": 1, "index": 5} | other)).tokens != one.tokens).any()


@pytest.mark.parametrize("name", names())
def test_tokens_and_answers_stay_in_their_ranges(name):
    task = make_task(name, {"vocab": 64})
    found = [task.sample(64, seed=0, stream=0, index=i) for i in range(300)]
    assert all(x.tokens.min() >= 0 and x.tokens.max() < task.vocab_size for x in found)
    answers = np.concatenate([x.targets[x.mask] for x in found])
    assert len(set(answers.tolist())) <= task.answers
    # The target with the most votes is a blind guess; none does better than 1 / answers by more than noise.
    best = np.bincount(answers).max() / answers.size
    assert best < 1 / task.answers + 5 * np.sqrt(1 / task.answers / answers.size)


@pytest.mark.parametrize(
    ("text", "length", "says"),
    [
        ("passkey(digits=0)", 64, ["passkey.digits is 0", "nearest is 1"]),
        ("passkey(vocab=12)", 64, ["passkey.vocab is 12", "nearest is 13"]),
        ("passkey(digits=8)", 16, ["context is 16", "use at least 17"]),
        ("copy(payload=-1)", 64, ["copy.payload is -1", "nearest is 0"]),
        ("copy(vocab=2)", 64, ["copy.vocab is 2", "nearest is 3"]),
        ("copy(payload=10)", 19, ["context is 19", "use at least 20"]),
        ("copy(forced=1)", 64, ["copy.forced is 1", "True or False"]),
        ("selective_copy(payload=0)", 64, ["selective_copy.payload is 0", "nearest is 1"]),
        ("selective_copy(payload=10)", 19, ["context is 19", "selective_copy", "use at least 20"]),
        ("selective_copy(payloads=3)", 64, ["'payloads'", "did you mean 'payload'"]),
    ],
)
def test_bad_options_are_one_sentence(text, length, says):
    with pytest.raises(ConfigError) as error:
        parse_task(text).check(length)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert "\n" not in message
    assert message.endswith(".")
