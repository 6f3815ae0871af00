"""Fault row 43: beyond the cache, beyond the window, beyond the positions a model knows. Never silent garbage.

The policies: a step past the cache's room is refused where its length is known and gives NaN inside jit; a window
forgets the sink with everything else behind it, exactly as the mask of one pass does; a model whose config names its
longest context refuses to go on, and one without (rotary, no limit) goes on.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.stores import append, empty_cache

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 17, (1, 24)), jnp.int32)


@functools.cache
def build(mixer="softmax", **fields):
    cfg = ModelConfig(vocab_size=17, num_layers=2, d_model=16, num_heads=2, mixers=(mixer,), **fields)
    return cfg, jax.jit(Decoder(cfg).init)(jax.random.key(0), TOKENS[:, :8])["params"]


def step_by_step(cfg, params, tokens, room):
    """Logits [T, N] of tokens fed one at a time into a cache with this much room, inside jit."""
    apply = lambda method, *args: Decoder(cfg).apply({"params": params}, *args, method=method)
    step = jax.jit(lambda states, token, at: apply("step", states, token, at))
    states, found = jax.jit(lambda: apply("start", 1, room))(), []
    for t in range(tokens.shape[1]):
        logits, states = step(states, tokens[:, t : t + 1], jnp.full((1, 1), t))
        found.append(logits[0, 0])
    return np.stack(found)


@pytest.mark.parametrize("mixer", ["softmax", "sigmoid", "softplus"])
def test_a_full_cache_is_refused_outside_jit_and_poisons_inside(mixer):
    cfg, params = build(mixer)
    found = step_by_step(cfg, params, TOKENS[:, :10], room=8)
    assert np.isfinite(found[:8]).all()
    assert np.isnan(found[8:]).all()
    cache = empty_cache(batch=1, capacity=4, kv_heads=1, key_dim=2, value_dim=2, dtype=jnp.bfloat16)
    row = lambda n: (jnp.ones((1, n, 1, 2)), jnp.ones((1, n, 1, 2)), jnp.zeros((1, n), int), jnp.ones((1, n), int))
    cache = append(cache, *row(3))
    with pytest.raises(ConfigError, match="2 tokens do not fit behind 3 in a cache of capacity 4; raise the capacity"):
        append(cache, *row(2))
    assert append(cache, *row(1)).length.tolist() == [4]


def test_a_window_forgets_the_sink_as_the_mask_of_one_pass_does():
    cfg, params = build("softmax(window=5)")
    stepped = step_by_step(cfg, params, TOKENS, room=24)
    whole = jax.jit(Decoder(cfg).apply)({"params": params}, TOKENS)[0]
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    changed = TOKENS.at[0, 0].set((TOKENS[0, 0] + 1) % 17)  # two layers of 5 see back 8
    after = jax.jit(Decoder(cfg).apply)({"params": params}, changed)[0]
    np.testing.assert_array_equal(after[9:], whole[9:])
    assert not np.array_equal(after[8], whole[8])


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_model_that_names_its_longest_context_refuses_to_pass_it(position):
    cfg, params = build(max_positions=12, position=position)
    made = jaxattn.generate(cfg, params, TOKENS[:, :8], max_new_tokens=4)
    assert made.tokens.shape == (1, 4)
    with pytest.raises(ConfigError, match=r"8 prompt tokens and max_new_tokens 5 exceed the 12 positions .* at most 4"):
        jaxattn.generate(cfg, params, TOKENS[:, :8], max_new_tokens=5)


def test_a_model_without_a_limit_goes_on():
    cfg, params = build()
    made = jaxattn.generate(cfg, params, TOKENS, max_new_tokens=300).tokens
    assert made.shape == (1, 300)
    assert (made >= 0).all()
    assert (made < 17).all()
