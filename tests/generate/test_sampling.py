"""Filters keep what their definitions keep; samples have the filtered distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import Sampling, filtered, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.2, 0.5]]))


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_k": 2}, [1, 1, 0, 0, 0]),
        ({"top_k": 99}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.6}, [1, 1, 0, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.25}, [1, 1, 1, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "min_p": 0.35}, [1, 1, 0, 0, 0]),
    ],
)
def test_filters_keep_what_they_should_in_any_order_of_tokens(how, kept):
    out = filtered(LOGITS, Sampling(temperature=1.0, **how))
    np.testing.assert_array_equal(np.isfinite(out), [kept, kept[::-1]])
    np.testing.assert_allclose(out[np.isfinite(out)], LOGITS[np.isfinite(out)], rtol=1e-6)


def test_temperature_comes_before_the_filters():
    """At temperature 0.5 the probabilities square: the first has 0.77 of the mass."""
    assert np.isfinite(filtered(LOGITS, Sampling(temperature=0.5, top_p=0.75))).sum() == 2
    assert np.isfinite(filtered(LOGITS, Sampling(temperature=1.0, top_p=0.75))).sum() == 6


def test_samples_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = sample(jnp.broadcast_to(LOGITS[:1], (4000, 5)), keys, Sampling(temperature=1.0, top_k=3))
    shares = np.bincount(tokens, minlength=5) / 4000
    np.testing.assert_allclose(shares, np.array([0.5, 0.2, 0.15, 0, 0]) / 0.85, atol=0.03)


def test_greedy_takes_the_likeliest():
    np.testing.assert_array_equal(sample(LOGITS, jax.random.split(jax.random.key(0), 2), Sampling()), [0, 4])
