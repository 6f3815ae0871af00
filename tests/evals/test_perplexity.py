"""Perplexity: every token once, with the context the windows promise, by forward passes and by the decode state."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.perplexity import losses, windows
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from tests.generate.helpers import byte_run

MODEL = ModelConfig(vocab_size=17, num_layers=2, d_model=16, num_heads=2)
IDS = np.random.default_rng(0).integers(0, 17, 61)


def params_of(model):
    params = jax.jit(Decoder(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(lambda x: x + 0.3 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), params)


@pytest.mark.parametrize("count", [2, 3, 16, 17, 18, 61])
@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 8), (16, 1), (16, 5), (100, 100)])
def test_windows_score_every_token_but_the_first_once(count, context, stride):
    ids = np.arange(1, count + 1)
    scored = []
    for w in windows(ids, context, stride):
        assert w.tokens.shape == (context + 1,)
        assert 0 <= w.first < w.length - 1
        scored += w.tokens[w.first + 1 : w.length].tolist()
    assert scored == ids[1:].tolist()


@pytest.mark.parametrize("stride", [16, 5])
def test_losses_are_those_of_each_token_behind_its_window(stride):
    params = params_of(MODEL)
    found = losses(MODEL, params, IDS, context=16, stride=stride)
    apply = jax.jit(Decoder(MODEL).apply)
    at = 0
    for w in windows(IDS, 16, stride):
        logits = np.asarray(apply({"params": params}, jnp.asarray(w.tokens[None, : w.length - 1])))[0]
        logp = np.asarray(jax.nn.log_softmax(logits))
        for t in range(w.first, w.length - 1):
            assert found[at] == pytest.approx(-logp[t, w.tokens[t + 1]], abs=1e-4)
            at += 1
    assert at == len(found) == 60


@pytest.mark.parametrize("attn", ["softmax", "softmax(window=5)", "lightning", "softplus"])
def test_token_by_token_gives_the_same_losses(attn):
    model = MODEL.with_attention(attn)
    params = params_of(model)
    whole = losses(model, params, IDS, context=16, stride=16)
    np.testing.assert_allclose(losses(model, params, IDS, context=16, stride=16, by_steps=True), whole, atol=3e-4)


def test_retrieving_attention_reads_through_its_cache():
    """One forward pass would show attention to everything; the decode state fetches a block."""
    model = MODEL.with_attention("landmark(block=3, retrieve=1, context=16)")
    params = params_of(model)
    whole = losses(model, params, IDS, context=32, stride=32)
    plain = losses(MODEL.with_attention("landmark(block=3)"), params, IDS, context=32, stride=32)
    assert np.all(np.isfinite(whole))
    assert not np.allclose(whole, plain, atol=1e-3)


def test_more_context_is_what_a_smaller_stride_gives():
    """A token is scored with at least context - stride tokens before it."""
    for w in list(windows(IDS, 16, 4))[1:]:
        assert w.first >= 16 - 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"context": 1}, "--context is 1"),
        ({"context": 40}, "--context is 40 but must be from 2 to 32"),
        ({"stride": 0}, "--stride is 0"),
        ({"stride": 17}, "--stride is 17"),
        ({"stride": 4, "by_steps": True}, "--token-by-token reads separate pieces"),
    ],
)
def test_impossible_windows_are_refused(call, message):
    model = ModelConfig(vocab_size=17, num_layers=1, d_model=16, num_heads=2, max_positions=32)
    with pytest.raises(ConfigError, match=message):
        losses(model, {}, IDS, **({"context": 16, "stride": 16} | call))


def test_the_command_prints_and_writes_the_numbers(tmp_path):
    run = byte_run(tmp_path)
    text = tmp_path / "held.txt"
    text.write_text("words that were not seen before")
    call = [
        sys.executable,
        "-m",
        "evals.perplexity",
        str(run),
        "--text",
        str(text),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["tokens"] == 30
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] / np.log(2), rel=1e-6)
    done = subprocess.run([*call[:4], "--text", str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be read as UTF-8" in done.stderr
