"""Generation: greedy decoding is the forward pass read token by token, for every mechanism; rows do not mix."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import _generate
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, layerwise
from jaxattn.nn.decoding import decoding_variables
from jaxattn.sampling import Sampling
from jaxattn.serving.engine import Engine
from tests.conformance.cases import FULL
from tests.conformance.model import params_of
from tests.serve.engines import Inbox

MIXERS = {  # the others decode as one of these does, which conformance asks of all
    **{case.mechanism.name: (case.mechanism.name,) for case in FULL},
    "landmark": ("landmark(block=4)",),
    "window": ("softmax(window=5)",),
    "hybrid": ("conv", "based(feature_dim=6)", "softmax(window=5)"),
}


@functools.cache
def build(mixers, **fields):
    cfg = ModelConfig(vocab_size=17, num_layers=2, d_model=16, num_heads=2, mixers=mixers, **fields)
    return cfg, jax.tree.map(jnp.asarray, params_of(cfg))


PROMPTS = np.random.default_rng(0).integers(0, 17, (3, 9)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens, segments):
    return Decoder(cfg).apply({"params": params}, tokens, None, segments)


def greedy_by_forward(cfg, params, prompt, count):
    """One forward pass over everything so far for every token; padded on the right to one shape."""
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, len(prompt) + count), np.int32)
        row[0, : len(ids)] = ids
        live = (np.arange(row.shape[1]) < len(ids)).astype(np.int32)[None]
        ids.append(int(np.argmax(forward(cfg, params, jnp.asarray(row), jnp.asarray(live))[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_greedy_tokens_are_those_of_the_forward_pass(mixers, monkeypatch):
    """Rows of different lengths together, read in pieces with padding between them, each as if alone."""
    monkeypatch.setattr(_generate, "CHUNK", 4)
    cfg, params = build(mixers)
    lengths = [9, 4, 1]
    made = jaxattn.generate(cfg, params, PROMPTS, lengths=lengths, max_new_tokens=6)
    assert made.tokens.shape == (3, 6)
    np.testing.assert_array_equal(made.lengths, [6, 6, 6])
    for row, prompt, n in zip(made.tokens, PROMPTS, lengths, strict=True):
        assert row.tolist() == greedy_by_forward(cfg, params, prompt[:n], 6)


def test_prompts_longer_than_a_chunk_are_read_in_pieces(monkeypatch):
    cfg, params = build(("softmax",))
    whole = jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=20).tokens
    monkeypatch.setattr(_generate, "CHUNK", 4)
    np.testing.assert_array_equal(jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=20).tokens, whole)


def test_retrieving_attention_reads_prompts_of_any_length():
    """In `generate` and in the server, as `Decoder.step` reads pieces of 75 tokens, the most for this context."""
    cfg, params = build(("landmark(block=15)",))
    cfg = cfg.with_attention("landmark(block=15, retrieve=2, context=128)")
    prompts = np.random.default_rng(2).integers(0, 17, (2, 200)).astype(np.int32)
    step = jax.jit(functools.partial(Decoder(cfg).apply, method="step"))
    start = jax.jit(lambda: Decoder(cfg).apply({"params": params}, 1, 256, method="start"))

    def greedy(prompt, count):
        states, made = start(), []
        for at in range(0, len(prompt), 75):
            part = prompt[None, at : at + 75]
            logits, states = step({"params": params}, states, part, at + np.arange(part.shape[1])[None])
        for at in range(len(prompt), len(prompt) + count):
            made.append(int(np.argmax(logits[0, -1])))
            logits, states = step({"params": params}, states, np.array([[made[-1]]]), np.array([[at]]))
        return made

    lengths = [200, 163]
    expected = [greedy(prompt[:n], 6) for prompt, n in zip(prompts, lengths, strict=True)]
    assert jaxattn.generate(cfg, params, prompts, lengths=lengths, max_new_tokens=6).tokens.tolist() == expected
    engine, inbox = Engine(cfg, params, slots=1, context=256, queue=1), Inbox()
    engine.start()
    engine.submit(prompts[1, :163].tolist(), 6, Sampling(), 0, (), inbox)
    assert inbox.wait() == expected[1]
    engine.close()


def test_a_second_prompt_compiles_nothing():
    cfg, params = build(("softmax",))
    jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=5)
    before = layerwise._layer._cache_size(), _generate.decode_block._cache_size()
    other = np.concatenate([PROMPTS[:, ::-1], PROMPTS[:, :2]], 1)
    jaxattn.generate(cfg, params, other, lengths=[11, 3, 7], max_new_tokens=7)
    assert (layerwise._layer._cache_size(), _generate.decode_block._cache_size()) == before


@pytest.mark.smoke
def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    cfg, params = build(("softmax",))
    free = jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=20).tokens
    stop = int(free[1, 3])
    made = jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=20, stop_tokens=[stop], pad_id=16)
    for row, length, plain in zip(made.tokens, made.lengths, free, strict=True):
        at = np.flatnonzero(plain == stop)
        assert length == (at[0] + 1 if at.size else 20)
        np.testing.assert_array_equal(row[:length], plain[:length])
        assert np.all(row[length:] == 16)
    assert made.lengths.min() < 20


def test_a_row_does_not_depend_on_its_neighbours_or_their_number():
    cfg, params = build(("softmax",))
    call = {"max_new_tokens": 12, "key": jax.random.key(3), "temperature": 1.0}
    together = jaxattn.generate(cfg, params, PROMPTS, **call).tokens
    changed = PROMPTS.copy()
    changed[1:] = 5
    np.testing.assert_array_equal(jaxattn.generate(cfg, params, changed, **call).tokens[0], together[0])
    np.testing.assert_array_equal(jaxattn.generate(cfg, params, PROMPTS, **call).tokens, together)
    other = jaxattn.generate(cfg, params, PROMPTS, **{**call, "key": jax.random.key(4)}).tokens
    assert not np.array_equal(other, together)


@pytest.mark.smoke
def test_bf16_decodes_in_bf16():
    cfg, params = build(("softmax",), dtype="bfloat16")
    assert jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=3).tokens.shape == (3, 3)
    cast = decoding_variables(dataclasses.replace(cfg, backend="xla"), params)["params"]
    assert cast["layer_0"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    assert cast["layer_0"]["attn_norm"]["scale"].dtype == jnp.float32


@pytest.mark.smoke
def test_scanned_layers_generate_the_same():
    from jaxattn.nn import stack_layers

    cfg, params = build(("softmax",))
    scanned, _ = build(("softmax",), scan_layers=True)
    made = jaxattn.generate(scanned, stack_layers(params, scanned), PROMPTS, max_new_tokens=8).tokens
    np.testing.assert_array_equal(made, jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=8).tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.5}, "no PRNG key"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"lengths": [1, 2, 10]}, "lengths are"),
        ({"lengths": [0, 2, 9]}, "lengths are"),
        ({"tokens": PROMPTS[0]}, "must be integers"),
        ({"tokens": PROMPTS * 1.0}, "must be integers"),
        ({"tokens": PROMPTS + 17}, r"is not in 0\.\.16"),
        ({"tokens": PROMPTS - 17}, r"is not in 0\.\.16"),
    ],
)
def test_impossible_calls_are_refused(call, message):
    cfg, params = build(("softmax",))
    call = {"tokens": PROMPTS, "max_new_tokens": 4} | call
    with pytest.raises(ConfigError, match=message):
        jaxattn.generate(cfg, params, call.pop("tokens"), **call)


def test_positions_beyond_the_trained_ones_are_refused():
    cfg, params = build(("softmax",), max_positions=12)
    assert jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=3).tokens.shape == (3, 3)
    with pytest.raises(ConfigError, match=r"exceed the 12 positions .* at most 3 new ones"):
        jaxattn.generate(cfg, params, PROMPTS, max_new_tokens=4)
