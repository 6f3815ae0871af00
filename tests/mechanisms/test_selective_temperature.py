"""Selective temperature: identity start, constant factors, entropy, parameter share, decoding, the value's use."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call, get, resolve_mixer
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from tests.conformance.cases import arrays, close
from tests.conformance.model import params_of
from tests.mechanisms.programs import apply, decode, run

SSA = get("selective_temperature")
MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, qk_norm=True)


def model(attn: str, **fields) -> ModelConfig:
    return dataclasses.replace(MODEL, **fields).with_attention(attn)


TOKENS = np.random.default_rng(1).integers(0, 64, (2, 24)).astype(np.int32)


def test_added_to_a_trained_model_the_linear_form_changes_no_logit():
    plain, ours = model("softmax"), model("selective_temperature(form='linear')")
    old = params_of(plain)
    together, added = copy.deepcopy(old), 0
    init = lambda: Decoder(ours).init(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    for layer, attn in jax.jit(lambda: {f"layer_{i}": init()[f"layer_{i}"]["attn"] for i in range(2)})().items():
        own = attn["mechanism"]
        added += sum(x.size for x in jax.tree.leaves(own))
        together[layer]["attn"]["mechanism"] = own
    assert added == 2 * ((4 + 2) * 8 + 4 + 2)
    np.testing.assert_array_equal(apply(ours, together, TOKENS), apply(plain, old, TOKENS))


def test_constant_temperatures_are_a_scale_and_a_factor():
    q, k, v = arrays(40)
    spec, t = SSA.make_spec(position=False), 0.8
    flat = np.arctanh(t - 1.0)  # τ = 1 + tanh(f)
    x = 16 * np.asarray(jax.nn.gelu(np.float32(1)))
    params = {name: np.full((n, 16), flat / x, np.float32) for name, n in (("query_w", 4), ("value_w", 2))}
    raw, start = (np.ones_like(q), np.ones_like(v)), np.zeros((2, 40), np.int32)
    q_t, v_t = jax.jit(lambda *x: SSA.apply_gains(*x, Call(spec, params)))(raw, q, v, start)
    softmax = resolve_mixer("softmax").mechanism
    of_softmax = lambda q, v, **kw: np.asarray(
        run(softmax, "forward", softmax.spec(), q, k, v, self_visibility(2, 40), **kw)
    )
    close(of_softmax(q_t, v_t), t * of_softmax(q, v, scale=t / 4.0), rtol=1e-5)


def test_the_position_part_grows_with_log_n_and_restarts_with_the_document():
    spec = SSA.make_spec(token=False)
    params = {"query_slope": np.float32([0, 1]), "value_slope": np.float32([-20])}
    positions = np.int32([[0, 1, 9, 0, 1]])
    x = np.ones((1, 5, 2, 4), np.float32)
    gains = lambda spec, *x, **params: jax.device_get(jax.jit(partial(SSA.gains, spec=spec))(*x, positions, **params))
    q_gain, v_gain = gains(spec, x, x[:, :, :1], params=params)
    n = np.array([1, 2, 10, 1, 2])
    sigmoid = 1 / (1 + np.exp(-np.array([0.0, 1.0])))
    np.testing.assert_allclose(q_gain[0], 1 + sigmoid * np.log(n)[:, None], rtol=1e-6)
    np.testing.assert_allclose(v_gain, 1.0, atol=1e-6)
    released = SSA.make_spec(token=False, value=False, form="released")
    gain, none = gains(released, x, x, params={"query_slope": np.float32([1.5, 2])})
    assert none is None
    # The card's slopes of the released code: 0.0113 at beta = 1.5 and 6.2e-4 at 2.0.
    np.testing.assert_allclose((gain[0, 2] - 1) / np.log(10), [0.0113, 6.2e-4], rtol=5e-3)


def test_entropy_grows_like_log_n_without_a_slope_and_less_with_one():
    q, k, _ = arrays(512, batch=1, heads=1, kv_heads=1, dim=32)
    vis = self_visibility(1, 512)

    def entropy(slope: float):
        gain = 1 + slope * np.log(np.arange(512, dtype=np.float32) + 1)
        rows = run(SSA, "weights", SSA.spec(), q * gain[None, :, None, None], k, vis)
        a = np.asarray(rows.values, np.float64)[0, 0]
        return -np.sum(a * np.log(np.where(a > 0, a, 1.0)), axis=-1)

    flat, sharp = entropy(0.0), entropy(0.5)
    assert np.all(sharp[1:] < flat[1:])
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
    params = params_of(cfg)
    close(decode(cfg, params, TOKENS, [11] + [1] * 13), apply(cfg, params, TOKENS), rtol=1e-5)


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
