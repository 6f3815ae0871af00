"""The decoder with every option: packing, decoding, scanning, positions, norms."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import names
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, Edit, stack_layers, unstack_layers

BASE = {
    "vocab_size": 17,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 40,
}
VARIANTS = {
    "plain": {},
    "post": {"norm_position": "post", "norm": "layernorm"},
    "hybrid": {"norm_position": "hybrid", "qk_norm": True},
    "widths": {"key_dim": 6, "value_dim": 10, "use_bias": True},
    "tied-gelu": {"tie_embeddings": True, "mlps": ("gelu", "relu")},
    "no-mlp": {"mlps": ("none",), "mixers": ("softmax", "none")},
    "conv": {"mixers": ("conv", "softmax", "conv(width=5)"), "num_layers": 3},
    "srmsnorm-sglu": {"norm": "srmsnorm", "mlps": ("sglu",), "scale_embeddings": True},
    "hybrid-layers": {"mixers": ("softmax(window=3)", "sigmoid(train_len=12)", "relu"), "num_layers": 3},
    "tnl-scanned": {
        "mixers": ("transnormer",),
        "norm": "srmsnorm",
        "mlps": ("sglu",),
        "scale_embeddings": True,
        "position": "nope",
        "scan_layers": True,
    },
    "based-hybrid": {"mixers": ("conv", "based(feature_dim=6)", "softmax(window=5)"), "num_layers": 3},
    **{f"position-{p}": {"position": p} for p in ("nope", "alibi", "learned", "sinusoid", "relative", "raw_relative")},
    **{name: {"mixers": (name,)} for name in names()},
}


def build(**fields):
    return _build(tuple(fields.items()))


@functools.cache  # several tests ask for the same model
def _build(fields):
    cfg = ModelConfig(**(BASE | dict(fields)))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 17, (2, 12)), jnp.int32)
    params = jax.jit(Decoder(cfg).init)(jax.random.key(0), tokens)["params"]
    return cfg, jax.tree.map(nudged, params), tokens


def nudged(x):
    """Parameters that start at zero or one would hide mistakes."""
    return x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(cfg, params, *args, **kwargs):
    """Compiled: op by op these tests would take several times as long."""
    return Decoder(cfg).apply({"params": params}, *args, **kwargs)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_decoding_equals_the_forward_pass(fields):
    cfg, params, tokens = build(**fields)
    logits = apply(cfg, params, tokens)
    assert logits.shape == (2, 12, 17)
    assert logits.dtype == jnp.float32
    states = Decoder(cfg).apply({"params": params}, 2, 15, method="start")
    outputs, at = [], 0
    for n in (5, 4, 1, 1, 1):
        positions = jnp.arange(at, at + n)[None].repeat(2, 0)
        out, states = apply(cfg, params, states, tokens[:, at : at + n], positions, method="step")
        outputs.append(out)
        at += n
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), logits, atol=2e-4)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_packed_documents_equal_separate_ones(fields):
    """Also with sink tokens in front: one copy serves every document of the row."""
    cfg, params, tokens = build(**fields)
    cut = 5
    positions = jnp.concatenate([jnp.arange(cut), jnp.arange(12 - cut)])[None].repeat(2, 0)
    segments = jnp.array([1] * cut + [2] * (12 - cut))[None].repeat(2, 0)
    together = apply(cfg, params, tokens, positions, segments)
    np.testing.assert_allclose(together[:, :cut], apply(cfg, params, tokens[:, :cut]), atol=2e-4)
    np.testing.assert_allclose(together[:, cut:], apply(cfg, params, tokens[:, cut:]), atol=2e-4)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("mixers", [("softmax",), ("sigmoid", "k_bias(shared=True)", "none")])
def test_scanned_layers_are_the_unrolled_ones(mixers, remat):
    cfg, params, tokens = build(num_layers=6, mixers=mixers, scan_layers=True, remat=remat)
    flat_cfg = dataclasses.replace(cfg, scan_layers=False, remat=False)
    flat = unstack_layers(params, cfg)
    loss = lambda c: lambda p: jnp.sum(jnp.sin(apply(c, p, tokens)))
    value, grad = jax.jit(jax.value_and_grad(loss(cfg)))(params)
    flat_value, flat_grad = jax.jit(jax.value_and_grad(loss(flat_cfg)))(flat)
    np.testing.assert_allclose(value, flat_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grad, stack_layers(flat_grad, cfg))
    jax.tree.map(np.testing.assert_array_equal, stack_layers(flat, cfg), params)
    with pytest.raises(ConfigError, match="scan_layers=False"):
        Decoder(cfg).apply({"params": params}, tokens, edits=(Edit(0, "attn"),))


def test_rope_rotates_by_position_and_depends_on_distance_only():
    from jaxattn.rope import rotary_tables, rotate

    x = jax.random.normal(jax.random.key(0), (1, 8, 1, 6))
    at = lambda shift: rotate(x, rotary_tables(jnp.arange(8)[None] + shift, 6, 100.0))
    scores = lambda y: jnp.einsum("bthd,bshd->bts", y, y)
    np.testing.assert_allclose(scores(at(0)), scores(at(31)), atol=1e-4)
    np.testing.assert_allclose(at(0)[:, 0], x[:, 0], atol=1e-6)
    angle = 3 * 100.0 ** (-1 / 3)
    a, b = float(x[0, 3, 0, 1]), float(x[0, 3, 0, 4])
    assert float(at(0)[0, 3, 0, 1]) == pytest.approx(a * np.cos(angle) - b * np.sin(angle), abs=1e-5)
    half = rotate(x, rotary_tables(jnp.arange(8)[None], 6, 100.0, fraction=0.5))
    np.testing.assert_array_equal(half[..., 2:], x[..., 2:])


def test_alibi_slopes_and_relative_buckets():
    from jaxattn.rope import alibi_slopes, relative_bucket

    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    assert len(set(np.asarray(alibi_slopes(6)).tolist())) == 6
    buckets = np.asarray(relative_bucket(jnp.array([-3, 0, 1, 15, 16, 64, 127, 5000])))
    np.testing.assert_array_equal(buckets[:5], [0, 0, 1, 15, 16])
    assert buckets[5] == 16 + int(np.log(64 / 16) / np.log(128 / 16) * 16)
    assert buckets[-1] == 31


def test_sink_study_initialisation():
    cfg = ModelConfig(vocab_size=512, num_layers=4, d_model=128, num_heads=2, d_ff=256, init="sink")
    params = Decoder(cfg).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    std = lambda x: float(jnp.std(x))
    assert std(params["embed"]) == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.02)
    assert std(params["layer_0"]["attn"]["q"]["kernel"]) == pytest.approx((2 / (5 * 128)) ** 0.5, rel=0.03)
    assert std(params["layer_3"]["mlp"]["down"]["kernel"]) == pytest.approx(1 / (256**0.5 * 4), rel=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "d_model 16 is not divisible by model.num_heads 5|does not divide"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide model.num_heads 4; use one of 1, 2, 4"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"mixers": ("sofmax",)}, "did you mean 'softmax'"),
        ({"scan_layers": True, "num_layers": 3, "mixers": ("softmax", "relu")}, "not a multiple"),
        ({"rope_fraction": 0.0}, "rope_fraction is 0.0"),
    ],
)
def test_impossible_models_are_refused_by_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**(BASE | fields))
