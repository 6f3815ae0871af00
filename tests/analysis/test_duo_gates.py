"""Gates of DuoAttention: what they are trained on, and that they find the head that needs the whole text."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.passkeys import passkeys
from jaxattn.analysis.duo_gates import Sample, Training, distance, train_gates
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.policies.duo import Spec
from tests.conformance.model import params_of

SMALL = {"vocab_size": 17, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "d_ff": 16}
MODEL = ModelConfig(**SMALL)
SPEC = Spec(sinks=2, recent=5)
LENGTH = 40


def samples():
    rng = np.random.default_rng(0)
    while True:
        yield Sample(rng.integers(0, 17, LENGTH).astype(np.int32), np.arange(LENGTH) >= 25)


@pytest.fixture(scope="module")
def params():
    """A model one of whose key heads does nothing: the first of layer 1."""
    params = jax.tree.map(lambda x: jnp.asarray(x) * 1.5, params_of(MODEL))
    kernel = params["layer_1"]["attn"]["o"]["kernel"]
    silent = kernel.at[:16].set(0)  # query heads 0 and 1
    return params | {"layer_1": params["layer_1"] | {"attn": params["layer_1"]["attn"] | {"o": {"kernel": silent}}}}


def test_twins_of_open_gates_are_one_and_of_closed_ones_apart(params):
    model = dataclasses.replace(MODEL, policy="duo(twins=True, sinks=2, recent=5)")
    tokens, asked = (jnp.asarray(x)[None] for x in next(samples()))
    far = jax.jit(lambda gates: distance(model, params, gates, tokens, asked))
    assert float(far(jnp.ones((2, 2)))) == 0
    assert float(far(jnp.zeros((2, 2)))) > 1e-4
    assert float(far(jnp.array([[1.0, 1.0], [0.0, 1.0]]))) < 1e-12, "the silent head may stream"
    near = jnp.arange(LENGTH)[None] <= 7  # tokens whose whole past is among 2 sinks and 5 newest
    assert float(jax.jit(lambda gates: distance(model, params, gates, tokens, near))(jnp.zeros((2, 2)))) < 1e-12


def test_a_head_that_does_nothing_loses_its_gate_first(params):
    """The penalty closes gates that nothing keeps open; from one on, and never below zero."""
    how = Training(steps=30, learning_rate=0.05, penalty=1e-3)
    found = train_gates(MODEL, params, samples(), SPEC, how)
    assert found.values.shape == (2, 2)
    assert found.values[1, 0] == found.values.min() < 0.3
    assert (found.values[[0, 0, 1], [0, 1, 1]] > found.values[1, 0] + 0.1).all()
    assert found.losses[0] == 0
    assert found.losses.shape == (30,)
    np.testing.assert_array_equal(found.table(4), np.repeat(found.values, 2, axis=1))


def test_the_rate_rises_and_falls_as_the_papers():
    how = Training(steps=2000)
    steps = np.array([0, 39, 199, 399, 400, 1600, 1601, 1999])
    factor = np.minimum(1, np.minimum(np.maximum((steps + 1) / 400, 0.1), np.maximum((2000 - steps) / 400, 0.1)))
    np.testing.assert_allclose(how.rate(steps), 0.02 * factor, rtol=1e-6)


class Letters:
    """A tokenizer of single letters."""

    around = ([1], [])

    @staticmethod
    def encode(text, add_special_tokens=False):
        return [ord(c) for c in text]


def test_a_sample_hides_each_passkey_and_asks_for_all_of_them():
    hay = np.full(4000, ord("."), np.int32)
    for sample in itertools.islice(passkeys(Letters(), hay, length=900, keys=3, words=2, seed=4), 3):
        assert sample.tokens.shape == sample.asked.shape == (900,)
        text = "".join(map(chr, sample.tokens))
        behind = "".join(map(chr, sample.tokens[sample.asked]))
        assert sample.asked.tolist() == sorted(sample.asked.tolist())
        for name in ("first", "second", "third"):
            key = behind.split(f"The {name} passkey is: ")[1].split(".")[0]
            assert len(key.split()) == 2
            assert text.count(f"The {name} passkey is: {key}.") == 2
        order = [text.index(f"The {name} passkey is") for name in ("first", "second", "third")]
        assert order == sorted(order)
        assert behind.startswith("\n\nWhat is the first passkey?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 300}, "take"),
        ({"keys": 11}, "from 1 to 10"),
        ({"words": 0}, "at least 1"),
        ({"length": 9000}, "longer"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    hay = np.full(4000, 46, np.int32)
    with pytest.raises(ConfigError, match=words):
        next(passkeys(Letters(), hay, **{"length": 900, "keys": 5, "words": 4} | options))


@pytest.mark.parametrize(
    ("options", "words"), [({"steps": 0}, "steps is 0"), ({"learning_rate": 0.0}, "must be positive")]
)
def test_impossible_training_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Training(**options)
