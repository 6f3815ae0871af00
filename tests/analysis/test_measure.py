"""`evals.measure` against NumPy in f64 on dense rows: shares, raw weights, odd rows, kinds of queries, parts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import measure
from evals.definitions import MEASURED, NAMES, NEARLY_EMPTY, SHARE_EPS, definitions
from evals.measure import BigramTask, attention_maps, make_measure, summarise
from evals.sinks import slot_kinds
from jaxattn.analysis import look, proxy_weights
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.runs.config import RunConfig

TRIGGERS = (3, 4)


def model(*mixers: str, **fields):
    shape = {"vocab_size": 13, "num_layers": len(mixers), "d_model": 16, "num_heads": 2}
    cfg = ModelConfig(**shape, mixers=mixers, **fields)
    tokens = np.random.default_rng(1).integers(0, 13, (5, 24)).astype(np.int32)
    params = jax.jit(Decoder(cfg).init)(jax.random.key(0), jnp.asarray(tokens))["params"]
    return cfg, params, tokens


@dataclasses.dataclass
class Dense:
    """What the measurement says of one layer, by its definition, in f64; A [B, H, T, T], scores alike."""

    a: np.ndarray
    scores: np.ndarray
    window: int

    def chosen(self, queries: np.ndarray) -> list[tuple[int, int]]:
        return [(b, i) for b, i in zip(*np.nonzero(queries), strict=True) if i < self.window]

    def weight(self, queries: np.ndarray, raw: bool) -> np.ndarray:
        a = self.a if raw else abs(self.a) / (abs(self.a).sum(-1, keepdims=True) + 1e-8)
        return np.mean([a[b, :, i, 0] for b, i in self.chosen(queries)], axis=0)

    def logit(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for b, i in self.chosen(queries):
            seen = [j for j in range(1, i) if i - j < self.window]
            found += [self.scores[b, :, i, 0] - self.scores[b, :, i, seen].mean(0)] if seen else []
        return np.mean(found, axis=0), np.std(found, axis=0)


def seen(cfg, params, tokens):
    """Logits, and of every layer the rows of its weights."""
    run = jax.jit(lambda params, tokens: _seen(look(cfg, params, tokens)))
    return run(params, jnp.asarray(tokens))


def _seen(view):
    return view.logits, [layer.weights() for layer in view.attention]


def dense(rows, window: int = 10**6) -> Dense:
    return Dense(np.asarray(rows.values, np.float64), np.asarray(rows.scores, np.float64), window)


@pytest.mark.parametrize("at_once", [10**6, 24])
def test_every_number_is_its_definition_whatever_the_parts(monkeypatch, at_once):
    """Sequences one by one or together: means are over queries, not over parts with unequal numbers of them."""
    monkeypatch.setattr(measure, "TOKENS_AT_ONCE", at_once)
    cfg, params, tokens = model("sigmoid", "softmax(window=9)")
    task = BigramTask(TRIGGERS, np.log(np.full((13, 13), 1 / 13)))
    out = summarise(make_measure(cfg, task=task)(params, tokens), epsilon=0.3)
    trigger = np.isin(tokens, TRIGGERS)
    later = np.broadcast_to(np.arange(24) > 0, tokens.shape)
    assert len({int(row.sum()) for row in trigger}) > 1  # else parts could not differ
    logits, layers = seen(cfg, params, tokens)
    for i, window in enumerate((10**6, 9)):
        by_hand = dense(layers[i], window)
        kinds = {"": later | True, "_nontrigger": ~trigger & later, "_trigger": trigger & later}
        for kind, queries in kinds.items():
            for suffix in ("", "_raw"):
                expected = by_hand.weight(queries, raw=bool(suffix))
                found = out[f"first_token_weight{kind}{suffix}"][i]
                np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=kind + suffix)
        mean, spread = by_hand.logit(~trigger & later)
        np.testing.assert_allclose(out["sink_logit"][i], mean, atol=1e-5)
        np.testing.assert_allclose(out["sink_logit_std"][i], spread, atol=1e-5)
    np.testing.assert_allclose(out["rows_no_distribution"], [[100, 100], [0, 0]], atol=5)
    assert out["first_token_weight"][0] != out["first_token_weight_raw"][0]
    np.testing.assert_allclose(out["first_token_weight"][1], out["first_token_weight_raw"][1], atol=1e-6)
    logits = np.asarray(logits, np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.roll(tokens, -1, 1)[..., None], -1)[..., 0]
    for name, queries in (("risk_backcopy", trigger & later), ("risk_bigram", ~trigger & later)):
        assert out[name] == pytest.approx(losses[:, :-1][queries[:, :-1]].mean(), abs=1e-5)
    assert out["risk_bigram_excess"] == pytest.approx(out["risk_bigram"] - math.log(13), abs=2e-5)


def test_nearly_empty_rows_are_counted():
    """sigmoid(s - log n) with n = 1e9 has rows of 24e-9; with n = 1e3 none is nearly empty."""
    for length, expected in ((10**9, 100.0), (10**3, 0.0)):
        cfg, params, tokens = model(f"sigmoid(train_len={length})")
        out = summarise(make_measure(cfg)(params, tokens), epsilon=0.3)
        rows = np.asarray(seen(cfg, params, tokens)[1][0].values, np.float64).sum(-1)
        assert (rows < NEARLY_EMPTY).mean() * 100 == expected
        assert out["rows_nearly_empty"] == [[expected] * 2]
        assert out["rows_no_distribution"] == [[100.0] * 2]


@pytest.mark.parametrize("attn", ["softmax", "softmax_off_by_one", "k_bias", "sink_token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_makes_no_row_odd(attn, dtype):
    """Scores large enough that 1 - Σ of the other weights rounds to below zero; 64 keys in bf16."""
    cfg, params, tokens = model(attn, dtype=dtype)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    out = summarise(make_measure(cfg)(params, np.tile(tokens, 3)[:, :64]), epsilon=0.3)
    assert out["rows_no_distribution"] == [[0.0] * 2]


def test_kinds_of_slots():
    for attn, kinds in (
        ("softmax", []),
        ("softmax_off_by_one", ["constant"]),
        ("k_bias", ["learned"]),
        ("sink_token", ["learned"]),
    ):
        cfg, params, tokens = model(attn)
        assert slot_kinds(RunConfig(model=cfg), params, tokens) == kinds, attn
    cfg, params, tokens = model("kv_bias", "softmax_off_by_one")
    assert slot_kinds(RunConfig(model=cfg), params, tokens) == ["constant", "learned"]


def test_what_was_not_seen_is_null_not_zero():
    """No trigger in the text: no weight and no risk of triggers. No value but the first: no drain."""
    cfg, params, tokens = model("softmax")
    task = BigramTask((12,), np.log(np.full((13, 13), 1 / 13)))
    out = summarise(make_measure(cfg, task=task)(params, np.where(tokens == 12, 0, tokens)), epsilon=0.3)
    assert out["risk_backcopy"] is None
    assert out["first_token_weight_trigger"] == [[None, None]]
    assert out["risk_bigram"] > 0
    params["layer_0"]["attn"]["v"]["kernel"] *= 0
    assert summarise(make_measure(cfg)(params, tokens), epsilon=0.3)["value_drain"] == [[None, None]]


def test_each_name_has_one_definition_and_each_number_has_one():
    cfg, params, tokens = model("k_bias")
    task = BigramTask(TRIGGERS, np.log(np.full((13, 13), 1 / 13)))
    numbers = summarise(make_measure(cfg, task=task)(params, tokens), epsilon=0.3)
    training = {"loss", "val_loss", "val_accuracy", "val_exact"}
    assert set(numbers) | training == {d.key for d in MEASURED}
    assert len(NAMES) == len(MEASURED) == len({d.name for d in MEASURED})
    assert definitions(numbers).keys() == numbers.keys() | {"A'"}
    # The constants in the texts are those of the code.
    assert float(proxy_weights(jnp.array([1e-8]))[0]) == pytest.approx(1e-8 / (1e-8 + SHARE_EPS))
    assert (SHARE_EPS, NEARLY_EMPTY) == (1e-8, 1e-6)
    assert "1e-8" in definitions([])["A'"]
    assert "1e-6" in definitions(["rows_nearly_empty"])["rows_nearly_empty"]
    for key, name in NAMES.items():
        assert ("raw" in name) == key.endswith("_raw"), key


def test_maps_keep_tiny_and_huge_weights():
    for attn, dtype in (("softmax", np.float16), ("sigmoid(train_len=1000000000)", np.float32)):
        cfg, params, tokens = model(attn)
        maps, slots = attention_maps(cfg, params, tokens[:2])
        assert (maps.dtype, slots, maps.shape) == (dtype, 0, (2, 1, 2, 24, 24))
        assert (maps[..., -1, :] > 0).all()


def test_maps_count_sink_tokens_in_front_as_extra_columns():
    cfg, params, tokens = model("sink_token(tokens=3)")
    maps, extra = attention_maps(cfg, params, tokens[:2])
    assert (extra, maps.shape) == (3, (2, 1, 2, 24, 27))
