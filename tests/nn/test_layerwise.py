"""One layer after the other: what the whole model computes, by few programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, layerwise
from jaxattn.nn.decoding import decoding_variables
from tests.conformance.model import params_of

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 6)), jnp.int32)
LIVE = jnp.asarray([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], jnp.int32)
POSITIONS = jnp.maximum(LIVE.cumsum(1) - 1, 0)
MODELS = {  # fields, programs of layers
    "alike": ({"mixers": ("softmax",), "num_layers": 4}, 1),
    "a pattern": ({"mixers": ("softmax", "softmax(window=3)", "conv"), "num_layers": 6}, 3),
    "another MLP": ({"mixers": ("softmax",), "mlps": ("swiglu", "gelu"), "num_layers": 4}, 2),
    "depth counts": ({"mixers": ("lightning", "softmax"), "num_layers": 4}, 3),
    "landmarks": ({"mixers": ("landmark(block=3)", "softmax"), "num_layers": 4}, 2),
    "sink tokens": ({"mixers": ("sink_token",), "num_layers": 2}, 1),
    "nothing in a layer": ({"mixers": ("softmax", "none"), "mlps": ("swiglu", "none"), "num_layers": 4}, 2),
    "scanned": ({"mixers": ("softmax",), "num_layers": 4, "scan_layers": True}, 0),
}


def build(fields):
    model = ModelConfig(**({"vocab_size": 17, "d_model": 16, "num_heads": 2} | fields))
    return model, decoding_variables(model, jax.tree.map(jnp.asarray, params_of(model)))


def start(model, variables):
    return jax.jit(lambda v: Decoder(model).apply(v, 2, 16, method="start"))(variables)


@pytest.mark.parametrize(("fields", "programs"), MODELS.values(), ids=MODELS)
def test_it_is_the_whole_model_in_few_programs(fields, programs):
    model, variables = build(fields)
    before = layerwise._layer._cache_size()
    hidden, states = layerwise.advance(model, variables, start(model, variables), TOKENS, POSITIONS, LIVE, last=False)
    logits, after = layerwise.advance(model, variables, states, TOKENS, POSITIONS + 6, LIVE, last=True)
    assert layerwise._layer._cache_size() - before == programs

    @jax.jit
    def whole(variables, states):
        run = lambda at, states: Decoder(model).apply(variables, states, TOKENS, POSITIONS + at, LIVE, method="advance")
        first, states = run(0, states)
        second, states = run(6, states)
        return first, Decoder(model).apply(variables, second[:, -1:], method="logits")[:, 0], states

    expected = whole(variables, start(model, variables))
    live = np.asarray(LIVE, bool)
    np.testing.assert_allclose(np.asarray(hidden)[live], np.asarray(expected[0])[live], atol=2e-5)
    np.testing.assert_allclose(logits, expected[1], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after, expected[2])


def test_the_layer_whose_parameters_do_not_fit_is_named():
    model, variables = build({"mixers": ("k_bias",), "num_layers": 3})
    variables["params"]["layer_2"]["attn"]["mechanism"] = {}
    with pytest.raises(ConfigError, match=r"^layer 2: .*k_bias") as found:
        layerwise.advance(model, variables, start(model, variables), TOKENS, POSITIONS, LIVE, last=True)
    assert "layer 0" not in str(found.value)


@pytest.mark.parametrize("what", ["embed", "layer_0", "layer_1"])
def test_parameters_of_another_model_are_one_sentence(what):
    model, variables = build(MODELS["alike"][0])
    states = start(model, variables)
    for collection, tree in variables.items():
        variables[collection] = {name: x for name, x in tree.items() if name != what}
    with pytest.raises(ConfigError, match="the params are not those of this model"):
        layerwise.advance(model, variables, states, TOKENS, POSITIONS, LIVE, last=True)
