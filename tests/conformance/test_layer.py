"""Every mechanism inside its layer, with what it keeps around itself: causality, padding, gradients.

Decoding and packing at this level are in tests/nn/test_decoder.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.measure import make_measure
from jaxattn.analysis import look
from jaxattn.mechanisms import names
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from tests.conformance.cases import normal

SHORT = {"landmark": "landmark(block=4)"}  # a default block is longer than these sequences
MIXERS = [*(SHORT.get(name, name) for name in names()), "conv"]


def config(mixer):
    return ModelConfig(vocab_size=17, num_layers=2, d_model=16, num_heads=2, mixers=(mixer,))


@functools.cache
def build(mixer):
    cfg = config(mixer)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 17, (2, 14)), jnp.int32)
    params = jax.jit(Decoder(cfg).init)(jax.random.key(0), tokens)["params"]
    # Parameters that start at zero or one would hide mistakes.
    params = jax.tree.map(lambda x: x + 0.1 * normal(x.size, x.shape), params)
    return params, tokens, jax.jit(lambda p, *args: Decoder(cfg).apply({"params": p}, *args))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_later_token_does_not_reach_the_past(mixer):
    params, tokens, apply = build(mixer)
    before, after = apply(params, tokens), apply(params, tokens.at[:, 9].set((tokens[:, 9] + 5) % 17))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert not np.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_on_either_side_changes_nothing_and_every_parameter_has_a_gradient(mixer):
    params, tokens, apply = build(mixer)
    segments = jnp.zeros((2, 14), jnp.int32).at[:, 3:12].set(1)
    positions = jnp.clip(jnp.arange(14) - 3, 0)[None].repeat(2, 0)
    alone = apply(params, tokens[:, 3:12])
    np.testing.assert_allclose(apply(params, tokens, positions, segments)[:, 3:12], alone, atol=2e-4)

    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, tokens)))))(params)
    idle = {
        "aaren": "['q']",  # its query is learned; the layer's W_q stays unused
        "transnormer": "['layer_1']['attn']['mechanism']['theta']",  # LRPE acts in layer 0 alone
    }.get(mixer)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        if not (idle and idle in name):
            assert np.any(leaf), f"{name} has no gradient"


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "conv"])
def test_weights_are_read_row_by_row_and_the_sink_study_can_measure_them(mixer):
    """What training does every few steps: a mechanism that refuses a slice of rows cannot be trained."""
    params, tokens, _ = build(mixer)
    cfg = config(mixer)
    for layer in look(cfg, params, tokens).attention:
        whole = layer.weights()
        part = layer.weights(5, 3)
        assert np.any(whole.values[:, :, 5:8])
        np.testing.assert_allclose(part.values, whole.values[:, :, 5:8], atol=1e-5)
        assert part.slots == whole.slots
        assert not np.any(np.triu(whole.values[0, 0, :, whole.slots :], 1)), "no weight on later tokens"
    found = make_measure(cfg)(params, np.asarray(tokens))
    assert all(np.all(np.isfinite(x)) for x in found.values())
