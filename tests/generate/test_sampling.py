"""Filters keep what their definitions keep, draws follow the filtered distribution, and no number breaks either."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.sampling import Sampling, filtered, filtered_rows, likeliest, sample, sample_rows

LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.2, 0.5]]))
HOWS = [Sampling(*o) for o in itertools.product((0.3, 1.0, 20.0), (0, 1, 7, 999), (0.02, 0.6, 1.0), (0.0, 0.3))]
draw = jax.jit(sample, static_argnums=2)
filter_rows = jax.jit(lambda logits, knobs: filtered_rows(logits, **knobs))
draw_rows = jax.jit(lambda logits, keys, knobs: sample_rows(logits, keys, **knobs))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def together(hows):
    """The knobs of several rows."""
    knobs = [how.knobs() for how in hows]
    return {name: np.stack([k[name] for k in knobs]) for name in knobs[0]}


def drawn(logits, hows, seed=0):
    """Tokens of `sample_rows` for rows of logits with options of their own."""
    return np.asarray(draw_rows(jnp.asarray(logits), keys(len(hows), seed), together(hows)))


def kept(logits, how):
    """The definitions in f64, by sorting: which tokens of one row stay."""
    scaled = logits.astype(np.float64) / how.temperature
    stays = np.ones(len(scaled), bool)
    if 0 < how.top_k < len(scaled):
        stays = scaled >= np.sort(scaled)[-how.top_k]
    p = np.where(stays, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if how.top_p < 1:
        order = np.argsort(-p, kind="stable")
        count = int(np.searchsorted(np.cumsum(p[order]), how.top_p)) + 1
        stays &= p >= p[order[min(count, len(p)) - 1]]
    if how.min_p:
        stays &= np.exp(scaled - scaled.max()) >= how.min_p
    return stays


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_k": 2}, [1, 1, 0, 0, 0]),
        ({"top_k": 99}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.6}, [1, 1, 0, 0, 0]),
        ({"top_p": 0.49}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_p": 1e-40}, [1, 0, 0, 0, 0]),
        ({"top_p": 5e-324}, [1, 0, 0, 0, 0]),
        ({"top_p": 1 - 1e-16}, [1, 1, 1, 1, 1]),
        ({"min_p": 0.25}, [1, 1, 1, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"min_p": 5e-324}, [1, 1, 1, 1, 1]),
        ({"top_k": 3, "min_p": 0.35}, [1, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.7}, [1, 0, 0, 0, 0]),  # 0.5 of 0.7
    ],
)
def test_filters_keep_what_they_should_in_any_order_of_tokens(how, expected):
    out = filtered(LOGITS, Sampling(temperature=1.0, **how))
    np.testing.assert_array_equal(np.isfinite(out), [expected, expected[::-1]])
    np.testing.assert_allclose(out[np.isfinite(out)], (LOGITS - LOGITS.max())[np.isfinite(out)], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 41, 300])
def test_filters_keep_what_sorting_in_f64_keeps(size):
    rng = np.random.default_rng(size)
    for logits in (rng.normal(0, 3, size).astype(np.float32), rng.integers(-3, 4, size).astype(np.float32)):
        stays = np.isfinite(filter_rows(jnp.broadcast_to(logits, (len(HOWS), size)), together(HOWS)))
        np.testing.assert_array_equal(stays, [kept(logits, how) for how in HOWS])


def test_temperature_comes_before_the_filters():
    """At temperature 0.5 the probabilities square: the first has 0.77 of the mass."""
    assert np.isfinite(filtered(LOGITS, Sampling(temperature=0.5, top_p=0.75))).sum() == 2
    assert np.isfinite(filtered(LOGITS, Sampling(temperature=1.0, top_p=0.75))).sum() == 6


@pytest.mark.optimised
def test_samples_follow_the_distribution():
    """20,000 draws of each way over 400 tokens, in several groups: chi-squared against f64."""
    hows = [Sampling(1.0), Sampling(0.7, top_k=30), Sampling(1.3, top_p=0.8), Sampling(1.0, 100, 0.9, 0.02)]
    logits = np.random.default_rng(1).normal(0, 1.5, 400).astype(np.float32)
    count, size = 20_000, len(logits)
    rows = hows * 1000
    tokens = [drawn(np.broadcast_to(logits, (len(rows), size)), rows, seed) for seed in range(count // 1000)]
    for i, how in enumerate(hows):
        stays = kept(logits, how)
        p = np.where(stays, np.exp(logits.astype(np.float64) / how.temperature), 0)
        seen = np.bincount(np.concatenate([t[i :: len(hows)] for t in tokens]), minlength=size)
        assert not seen[~stays].any()
        expected = count * p[stays] / p.sum()
        common = expected >= 5
        chi = np.sum((seen[stays] - expected)[common] ** 2 / expected[common])
        freedom = common.sum() - 1
        assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom), (how, chi, freedom)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cold_draws_are_greedy(dtype):
    base = (5 * jax.random.permutation(jax.random.key(0), jnp.arange(300) / 10)).astype(dtype)
    cold = (0.0, 5e-324, 1e-46, 1e-40, 1e-38, 2e-38, 1e-30, 1e-3)
    more = ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_p": 1e-40}, {"min_p": 0.1}, {"min_p": 1.0})
    hows = [Sampling(t, **m) for t in cold for m in more]
    assert [how.greedy for how in hows] == [how.temperature < 1.1e-38 for how in hows]
    for logits in (base, base[::-1], (1e30 * base.astype(jnp.float32)).astype(dtype), -base):
        best = np.argmax(np.asarray(logits, np.float64))
        np.testing.assert_array_equal(drawn(jnp.broadcast_to(logits, (len(hows), 300)), hows), best)


def test_hot_draws_are_uniform_over_what_may_come():
    logits = jnp.where(jnp.arange(200) % 2 == 0, jax.random.normal(jax.random.key(0), 200), -jnp.inf)
    for temperature in (1e30, 3e38, 1e308):
        tokens = np.asarray(draw(jnp.broadcast_to(logits, (3000, 200)), keys(3000), Sampling(temperature)))
        assert not (tokens % 2).any()
        assert len(set(tokens.tolist())) == 100


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("logits", "allowed"),
    [
        ([-INF, 2.0, -INF], {1}),
        ([1.0, INF, 3.0], {1}),
        ([NAN, 2.0, -INF], {1}),
        ([NAN, NAN, -INF], {0, 1, 2}),
        ([NAN, NAN, NAN], {0, 1, 2}),
        ([-INF, -INF, -INF], {0, 1, 2}),
        ([0.0, -0.0, 0.0], {0, 1, 2}),
        ([-3e38, 3e38, -3e38], {1}),
        ([7.0, 7.0, 7.0], {0, 1, 2}),
    ],
)
def test_odd_logits_give_a_token_that_may_come(logits, allowed):
    hows = [Sampling(), Sampling(1.0), Sampling(1.0, 2, 0.9, 0.1), Sampling(1e-30)]
    tokens = drawn(np.broadcast_to(np.float32(logits), (256, 3)), hows * 64)
    assert set(tokens[::4].tolist()) == {min(allowed)}  # greedy: the first of the likeliest
    for i in (1, 2, 3):
        assert set(tokens[i::4].tolist()) == allowed, hows[i]


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000])
def test_the_likeliest_is_the_first_of_the_largest(size):
    logits = np.random.default_rng(size).integers(-3, 4, (50, size)).astype(np.float32)
    np.testing.assert_array_equal(likeliest(jnp.asarray(logits)), np.argmax(logits, -1))


def test_a_row_is_drawn_alike_alone_beside_others_and_with_options_of_its_own():
    hows = [HOWS[i] for i in (1, 20, 45, 70)] + [Sampling()]
    logits, seeds = 3 * jax.random.normal(jax.random.key(0), (len(hows), 150)), keys(len(hows))
    beside = drawn(logits, hows)
    assert beside.tolist() == [int(draw(logits[i : i + 1], seeds[i : i + 1], how)[0]) for i, how in enumerate(hows)]
    mixed = drawn(logits, [how if i % 2 else Sampling() for i, how in enumerate(hows)])
    np.testing.assert_array_equal(mixed[1::2], beside[1::2])
    np.testing.assert_array_equal(mixed[::2], jnp.argmax(logits, -1)[::2])


def test_nothing_is_sorted():
    knobs = together([Sampling(1.0, 5, 0.9, 0.1)] * 2)
    assert "stablehlo.sort" not in draw_rows.lower(LOGITS, keys(2), knobs).as_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"temperature": INF}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1 << 31}, "top_k is 2147483648"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": NAN}, "min_p is nan"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**options)
