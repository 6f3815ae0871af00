"""Selective temperature: identity start, constant factors, entropy, parameter share, decoding, the value's use."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call, get, resolve_mixer
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from tests.conformance.cases import close, inputs

SSA = get("selective_temperature")
MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, qk_norm=True)


def model(attn: str, **fields) -> ModelConfig:
    return dataclasses.replace(MODEL, **fields).with_attention(attn)


def tokens(length: int = 24):
    return jax.random.randint(jax.random.key(1), (2, length), 0, 64)


def test_added_to_a_trained_model_the_linear_form_changes_no_logit():
    plain, ours = model("softmax"), model("selective_temperature(form='linear')")
    old = Decoder(plain).init(jax.random.key(0), tokens())["params"]
    new = Decoder(ours).init(jax.random.key(0), tokens())["params"]
    added = 0
    for i in range(2):
        own = new[f"layer_{i}"]["attn"].pop("mechanism")
        added += sum(x.size for x in jax.tree.leaves(own))
        old[f"layer_{i}"]["attn"]["mechanism"] = own
    assert added == 2 * ((4 + 2) * 8 + 4 + 2)
    got = Decoder(ours).apply({"params": old}, tokens())
    for i in range(2):
        del old[f"layer_{i}"]["attn"]["mechanism"]
    np.testing.assert_array_equal(got, Decoder(plain).apply({"params": old}, tokens()))


def test_constant_temperatures_are_a_scale_and_a_factor():
    q, k, v = inputs(40)
    spec, t = SSA.make_spec(position=False), 0.8
    flat = jnp.arctanh(t - 1.0)  # τ = 1 + tanh(f)
    x = jax.nn.gelu(jnp.ones(16)).sum()
    params = {"query_w": jnp.full((4, 16), flat / x), "value_w": jnp.full((2, 16), flat / x)}
    raw, start = (jnp.ones_like(q), jnp.ones_like(v)), jnp.zeros((2, 40), jnp.int32)
    q_t, v_t = SSA.apply_gains(raw, q, v, start, Call(spec, params))
    softmax = resolve_mixer("softmax").mechanism
    vis = self_visibility(2, 40)
    run = lambda q, v, **kw: softmax.forward(q, k, v, vis, Call(softmax.spec(), **kw))
    close(run(q_t, v_t), t * run(q, v, scale=t / 4.0), rtol=1e-5)


def test_the_position_part_grows_with_log_n_and_restarts_with_the_document():
    spec = SSA.make_spec(token=False)
    params = {"query_slope": jnp.array([0.0, 1.0]), "value_slope": jnp.array([-20.0])}
    positions = jnp.array([[0, 1, 9, 0, 1]])
    x = jnp.ones((1, 5, 2, 4))
    q_gain, v_gain = SSA.gains(x, x[:, :, :1], positions, spec=spec, params=params)
    n = np.array([1, 2, 10, 1, 2])
    sigmoid = 1 / (1 + np.exp(-np.array([0.0, 1.0])))
    np.testing.assert_allclose(q_gain[0], 1 + sigmoid * np.log(n)[:, None], rtol=1e-6)
    np.testing.assert_allclose(v_gain, 1.0, atol=1e-6)
    released = SSA.make_spec(token=False, value=False, form="released")
    gain, none = SSA.gains(x, x, positions, spec=released, params={"query_slope": jnp.array([1.5, 2.0])})
    assert none is None
    # The card's slopes of the released code: 0.0113 at beta = 1.5 and 6.2e-4 at 2.0.
    np.testing.assert_allclose((gain[0, 2] - 1) / np.log(10), [0.0113, 6.2e-4], rtol=5e-3)


def test_entropy_grows_like_log_n_without_a_slope_and_less_with_one():
    q, k, _ = inputs(512, batch=1, heads=1, kv_heads=1, dim=32)
    vis = self_visibility(1, 512)

    def entropy(slope: float):
        gain = 1 + slope * jnp.log(jnp.arange(512) + 1.0)
        a = SSA.weights(q * gain[None, :, None, None], k, vis, Call(SSA.spec())).values[0, 0]
        return -jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0)), 0.0), axis=-1)

    flat, sharp = entropy(0.0), entropy(0.5)
    assert jnp.all(sharp[1:] < flat[1:])
    growth = (flat[256:].mean() - flat[16:32].mean()) / np.log(384 / 24)
    assert 0.9 < growth < 1.1


def test_new_parameters_are_less_than_half_a_percent_of_gpt2():
    shape = jax.eval_shape(
        lambda: SSA.init_params(jax.random.key(0), SSA.spec(), heads=12, kv_heads=12, key_dim=64, value_dim=64)
    )
    assert 12 * sum(x.size for x in jax.tree.leaves(shape)) == 12 * 2 * 12 * 65
    assert 12 * 2 * 12 * 65 < 0.005 * 124e6


@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"scan_layers": True}], ids=str)
def test_decoding_equals_the_forward_pass_with_rotation_and_norms(fields):
    cfg = model("selective_temperature", **fields)
    params = Decoder(cfg).init(jax.random.key(0), tokens())["params"]
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(5), x.shape), params)
    decoder, ids = Decoder(cfg), tokens()
    states = decoder.apply({"params": params}, 2, 24, method="start")
    outputs = []
    for a, b in ((0, 11), *((i, i + 1) for i in range(11, 24))):
        positions = jnp.arange(a, b)[None].repeat(2, 0)
        out, states = decoder.apply({"params": params}, states, ids[:, a:b], positions, method="step")
        outputs.append(out)
    close(jnp.concatenate(outputs, 1), decoder.apply({"params": params}, ids), rtol=1e-5)


def test_only_a_value_temperature_can_silence_tokens():
    """The denoising task: keep the tokens with max_j x_ij >= 1/2, drop the noise. Values that are one linear
    map of the token cannot; with τ_v the error is at least five times smaller."""
    dim = 8

    def batch(key):
        kind, which, noise = jax.random.split(key, 3)
        signal = jax.random.bernoulli(kind, 0.25, (64, 16, 1))
        hot = jax.nn.one_hot(jax.random.randint(which, (64, 16), 0, dim), dim)
        x = jnp.where(signal, hot, 0.25 * jax.random.uniform(noise, (64, 16, dim), minval=-1.0))
        return x, jnp.where(signal, x, 0.0)

    def error(value: bool) -> float:
        spec = SSA.make_spec(position=False, value=value)
        own = SSA.init_params(jax.random.key(0), spec, heads=1, kv_heads=1, key_dim=dim, value_dim=dim)
        params = {"v": jnp.eye(dim), "raw": jnp.eye(dim), "raw_bias": jnp.ones(dim), "own": own}

        def loss(p, key):
            x, y = batch(key)
            v, raw = (x @ p["v"])[:, :, None], (x @ p["raw"] + p["raw_bias"])[:, :, None]
            _, v = SSA.apply_gains((v, raw), v, v, jnp.zeros((64, 16), jnp.int32), Call(spec, p["own"]))
            return jnp.mean((v[:, :, 0] - y) ** 2)

        optimizer = optax.adam(3e-2)

        @jax.jit
        def train(p):
            def step(carry, key):
                p, s = carry
                updates, s = optimizer.update(jax.grad(loss)(p, key), s)
                return (optax.apply_updates(p, updates), s), None

            (p, _), _ = jax.lax.scan(step, (p, optimizer.init(p)), jax.random.split(jax.random.key(2), 600))
            return loss(p, jax.random.key(99))

        return float(train(params))

    assert error(True) * 5 < error(False)
