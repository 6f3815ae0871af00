"""The sink metric and the probes, on matrices and models whose answer is known."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.definitions import SHARE_EPS
from evals.measure import BigramTask, make_measure, summarise
from jaxattn.analysis import alpha_of, column_means, look, probes, proxy_weights, sink_rate
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, Edit

CAUSAL = jnp.tril(jnp.ones((1, 64, 64), bool))


def model(**fields):
    """A small decoder and its parameters (non-zero everywhere)."""
    cfg = ModelConfig(**({"vocab_size": 13, "num_layers": 2, "d_model": 16, "num_heads": 2} | fields))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 13, (3, 40)), jnp.int32)
    params = jax.jit(Decoder(cfg).init)(jax.random.key(0), tokens)["params"]
    return cfg, params, tokens


@functools.partial(jax.jit, static_argnums=0)
def seen(cfg, params, tokens, queries):
    """Of every layer: the rows of its weights, and what the probes say of these queries [B, T]."""
    return [
        (layer.weights(), probes.sink_logit(layer, queries), probes.first_token_weight(layer, queries))
        for layer in look(cfg, params, tokens).attention
    ]


def test_uniform_rows_give_the_harmonic_number_and_no_sink():
    a = np.tril(np.ones((64, 64))) / np.arange(1, 65)[:, None]
    alpha = column_means(jnp.asarray(a[None, None], jnp.float32), CAUSAL)
    assert alpha[0, 0, 0] == pytest.approx(sum(1 / i for i in range(1, 65)) / 64, abs=1e-6)
    assert alpha[0, 0, 0] == pytest.approx(0.0741, abs=1e-4)
    assert sink_rate(alpha[None]) == 0.0


def test_one_hot_first_column_is_a_full_sink():
    a = np.zeros((64, 64))
    a[:, 0] = 1
    alpha = column_means(jnp.asarray(a[None, None], jnp.float32), CAUSAL)
    assert alpha[0, 0, 0] == 1
    assert sink_rate(alpha[None]) == 100.0
    assert sink_rate(alpha[None], column=1) == 0.0


def test_threshold_counts_the_self_weight_of_token_one():
    a = np.zeros((64, 64))
    a[:, 0], a[0, 0] = 0.31, 1.0
    alpha = column_means(jnp.asarray(a[None, None], jnp.float32), CAUSAL)
    assert alpha[0, 0, 0] == pytest.approx((1 + 63 * 0.31) / 64)
    assert sink_rate(alpha[None]) == 100.0


def test_indicator_is_taken_before_the_mean():
    """Half of the heads at 0.5 and half at 0: 50 %, although the mean 0.25 is below the threshold."""
    alpha = jnp.zeros((10, 1, 2, 4)).at[:, :, 0, 0].set(0.5)
    assert sink_rate(alpha) == 50.0


def test_last_column_divides_by_one_query():
    a = np.eye(64)
    np.testing.assert_allclose(
        column_means(jnp.asarray(a[None, None], jnp.float32), CAUSAL)[0, 0],
        1 / (64 - np.arange(64)),
        rtol=1e-6,
    )


def test_proxy_rows_are_absolute_shares():
    a = jnp.array([[1.0, -3.0], [0.0, 0.0], [0.2, 0.6]])
    np.testing.assert_allclose(proxy_weights(a), [[0.25, 0.75], [0, 0], [0.25, 0.75]], atol=1e-6)


@pytest.mark.parametrize("attn", ["softmax", "sigmoid", "k_bias", "sink_token", "softmax_off_by_one", "relu"])
def test_blockwise_alpha_equals_the_dense_definition(attn):
    cfg, params, tokens = model(mixers=(attn,))

    @jax.jit
    def found(params, tokens):
        layers = look(cfg, params, tokens).attention
        return [(layer.weights(), alpha_of(layer, block=10_000), alpha_of(layer, block=7)) for layer in layers]

    for rows, whole, blockwise in found(params, tokens):
        dense = np.asarray(rows.values, np.float64)
        dense = np.abs(dense) / (np.abs(dense).sum(-1, keepdims=True) + SHARE_EPS)
        queries, columns = dense.shape[2:]
        lower = np.tril(np.ones((queries, columns)), rows.slots).astype(bool)
        expected = dense.sum(2) / lower.sum(0)
        np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(blockwise, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.optimised
def test_alpha_at_long_lengths_needs_no_square_array():
    cfg, params, _ = model(num_layers=1)
    length = 8192

    def first(params, tokens):
        return alpha_of(look(cfg, params, tokens).attention[0])[..., :16]

    shapes = jax.eval_shape(lambda: params)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    memory = jax.jit(first).lower(shapes, tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length * 4 / 4


def test_repeated_tokens_without_positions_attend_uniformly():
    cfg, params, tokens = model(position="nope")
    same = jnp.full_like(tokens, 5)
    live = jnp.ones(same.shape, bool)
    for rows, (mean, spread), first in seen(cfg, params, same, live):
        a = np.asarray(rows.values)
        expected = np.tril(np.ones((40, 40))) / np.arange(1, 41)[:, None]
        np.testing.assert_allclose(a, np.broadcast_to(expected, a.shape), atol=1e-5)
        np.testing.assert_allclose(mean, 0, atol=1e-4)
        np.testing.assert_allclose(spread, 0, atol=2e-2)
        expected_weight = np.mean(1 / np.arange(2, 41))
        np.testing.assert_allclose(first, expected_weight, rtol=1e-4)


def test_probes_select_queries_and_leave_the_first_out():
    cfg, params, tokens = model()
    chosen = np.broadcast_to(np.isin(np.arange(40), (0, 7, 20)), tokens.shape)
    rows, (mean, _), first = seen(cfg, params, tokens, chosen)[1]
    a = np.asarray(rows.values)
    expected = a[:, :, [7, 20], 0].mean((0, 2))
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    s = np.asarray(rows.scores)
    delta = np.stack([s[:, :, i, 0] - s[:, :, i, 1:i].mean(-1) for i in (7, 20)])
    np.testing.assert_allclose(mean, delta.mean((0, 1)), atol=1e-5)


def test_values_are_read_through_the_output_projection():
    cfg, params, tokens = model(num_kv_heads=1)

    @jax.jit
    def found(params, tokens):
        layer = look(cfg, params, tokens).attention[0]
        return layer.values, layer.value_norms(), probes.value_norms(layer, jnp.ones(tokens.shape, bool))

    values, norms, (first, rest) = jax.device_get(found(params, tokens))
    kernel = np.asarray(params["layer_0"]["attn"]["o"]["kernel"]).reshape(2, 8, 16)
    v = values[:, :, 0]
    for head in range(2):
        expected = np.linalg.norm(v @ kernel[head], axis=-1)
        np.testing.assert_allclose(norms[:, head], expected, rtol=1e-5)
        assert first[head] == pytest.approx(expected[:, 0].mean(), rel=1e-5)
        assert rest[head] == pytest.approx(expected[:, 1:].mean(), rel=1e-5)


def test_looking_does_not_change_the_logits():
    for fields in ({}, {"scan_layers": True, "remat": True}, {"mixers": ("sink_token",)}):
        cfg, params, tokens = model(**fields)
        np.testing.assert_allclose(
            jax.jit(lambda p, x, cfg=cfg: look(cfg, p, x).logits)(params, tokens),
            jax.jit(Decoder(cfg).apply)({"params": params}, tokens),
            atol=1e-5,
        )


def test_replacing_a_component_by_itself_changes_no_bit():
    cfg, params, tokens = model()
    run = lambda *edits: np.asarray(Decoder(cfg).apply({"params": params}, tokens, edits=edits))
    view = look(cfg, params, tokens)
    plain = run()
    for layer in range(2):
        parts = view.components[layer]
        own = {
            "attn": Edit(layer, "attn", value=parts["attn_out"]),
            "mlp": Edit(layer, "mlp", value=parts["mlp_out"]),
            "block": Edit(layer, "block", value=parts["block_out"]),
            "head": Edit(layer, "head", head=1, value=view.attention[layer].heads_out[:, :, 1]),
        }
        for label, edit in own.items():
            np.testing.assert_array_equal(run(edit), plain, err_msg=label)
            zero = dataclasses.replace(edit, value=None)
            assert not np.allclose(run(zero), plain), f"zeroing {label} must change the logits"


def test_zeroed_block_passes_the_stream_through():
    cfg, params, tokens = model()
    edited = Decoder(cfg).apply({"params": params}, tokens, edits=(Edit(0, "block"), Edit(1, "block")))
    embedded = params["embed"][tokens]
    norm = embedded / np.sqrt((np.asarray(embedded) ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(edited, norm @ params["unembed"], atol=1e-4)


def test_measure_agrees_with_the_parts_and_splits_by_trigger():
    cfg, params, tokens = model(mixers=("sigmoid",))
    log_p = np.log(np.full((13, 13), 1 / 13))
    task = BigramTask(trigger_ids=(3, 4), log_p=log_p)
    raw = make_measure(cfg, task=task)(params, np.asarray(tokens))
    out = summarise(raw, epsilon=0.3)
    trigger = jnp.asarray(np.isin(tokens, (3, 4)))

    @jax.jit
    def parts(params, tokens):
        view = look(cfg, params, tokens)
        weight = probes.first_token_weight
        rows = [(weight(x, trigger), weight(x, trigger, proxy=True), alpha_of(x)) for x in view.attention]
        return -jax.nn.log_softmax(view.logits[:, :-1]), rows

    losses, rows = parts(params, tokens)
    for i, (raw_weight, shares, alpha) in enumerate(rows):
        np.testing.assert_allclose(out["first_token_weight_trigger_raw"][i], raw_weight, atol=1e-5)
        np.testing.assert_allclose(out["first_token_weight_trigger"][i], shares, atol=1e-5)
        np.testing.assert_allclose(out["first_token_weight"][i], np.asarray(alpha)[..., 0].mean(0), atol=1e-5)
    picked = np.take_along_axis(np.asarray(losses), np.asarray(tokens)[:, 1:, None], -1)[..., 0][:, 1:]
    copy = np.asarray(trigger)[:, 1:-1]
    assert out["risk_backcopy"] == pytest.approx(picked[copy].mean(), rel=1e-4)
    assert out["risk_bigram_excess"] == pytest.approx(picked[~copy].mean() - np.log(13), abs=1e-4)


def test_sink_on_the_slot_is_reported_apart_from_token_one():
    cfg, params, tokens = model(mixers=("k_bias",))
    for layer in range(2):
        params[f"layer_{layer}"]["attn"]["mechanism"]["k"] = jnp.zeros((2, 8))
        for name in ("q", "k"):
            params[f"layer_{layer}"]["attn"][name]["kernel"] *= 0
    out = summarise(make_measure(cfg)(params, np.asarray(tokens)), epsilon=0.05)
    expected = np.mean(1 / np.arange(2, 42))
    np.testing.assert_allclose(out["first_token_weight_slot"], expected, rtol=1e-4)
    assert out["sink_rate_slot"] == 100.0
