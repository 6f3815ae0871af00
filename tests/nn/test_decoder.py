"""The decoder with every option: packing, decoding, scanning, positions, norms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import look
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, Edit, stack_layers, unstack_layers
from jaxattn.rope import RopeScaling
from tests.conformance import model
from tests.conformance.cases import close
from tests.conformance.model import BASE, QUESTIONS, apply, config

VARIANTS = {  # options that do not meet share a model; each of them makes a difference in it
    "plain": {},
    "post-learned": {"norm_position": "post", "norm": "layernorm", "position": "learned"},
    "hybrid": {"norm_position": "hybrid", "qk_norm": True},
    "widths-alibi": {"key_dim": 6, "value_dim": 10, "use_bias": True, "position": "alibi"},
    "tied-gelu-relative": {
        "tie_embeddings": True, "mlps": ("gelu", "relu"), "attention_bias": "qkvo", "position": "relative",
    },
    "no-mlp-raw_relative": {"mlps": ("none",), "mixers": ("softmax", "none"), "position": "raw_relative"},
    "conv": {"mixers": ("conv", "softmax", "conv(width=5)"), "num_layers": 3},
    "srmsnorm-sglu-sinusoid": {
        "norm": "srmsnorm", "mlps": ("sglu",), "scale_embeddings": True, "position": "sinusoid",
    },
    "hybrid-layers-nope": {
        "mixers": ("softmax(window=3)", "sigmoid(train_len=12)", "relu"), "num_layers": 3, "position": "nope",
    },
    "based-hybrid": {"mixers": ("conv", "based(feature_dim=6)", "softmax(window=5)"), "num_layers": 3},
    "slots-and-sinks": {"mixers": ("sink_token(tokens=2)", "kv_bias", "softmax(window=3)"), "num_layers": 3},
    "landmarks-for-all": {
        "mixers": ("landmark(block=3)", "k_bias", "lightning", "transnormer", "aaren", "titans(form=mag, depth=1)"),
        "num_layers": 6,
    },
    "alibi-and-sinks": {"position": "alibi", "mixers": ("sink_token", "softplus")},
}  # fmt: skip
TNL = {
    "mixers": ("transnormer",),
    "norm": "srmsnorm",
    "mlps": ("sglu",),
    "scale_embeddings": True,
    "position": "nope",
    "scan_layers": True,
}
CASES = [
    pytest.param(question, config(**fields), id=f"{name}-{question.__name__}", marks=pytest.mark.xdist_group(name))
    for name, fields in (VARIANTS | {"tnl-scanned": TNL}).items()
    for question in QUESTIONS
    if not ("scan_layers" in fields and question is model.scanned_layers_are_the_unrolled_ones)
]


@pytest.mark.parametrize(("question", "cfg"), CASES)
def test_every_kind_of_decoder(question, cfg):
    """What every mechanism is asked inside its layer, of the options that lie around it."""
    question(cfg)


@pytest.mark.parametrize("mixer", ["softmax", "landmark(block=3)", "titans(form=mag, depth=1)"])
def test_weights_of_some_rows_where_rotation_depends_on_the_longest_position(mixer):
    """Angles are those of the whole text, whichever rows are asked for."""
    scaling = RopeScaling("dynamic", factor=2.0, original_length=8)
    model.weights_rebuild_every_layer(config(mixers=(mixer,), rope_scaling=scaling))


@pytest.mark.parametrize("name", ["landmarks-for-all", "slots-and-sinks", "alibi-and-sinks"])
def test_weights_of_a_prefix_lm_rebuild_it(name):
    """Where a mechanism can look ahead into a prefix; sink tokens in front count before it."""
    cfg = config(**VARIANTS[name])
    prefix = np.array([4, 0, 0, 2, 0], np.int32)

    @jax.jit
    def call(params, *inputs):
        view = look(cfg, params, *inputs)
        return view.logits, [(layer.rebuild(), layer.heads_out, layer.weights()) for layer in view.attention]

    if name == "landmarks-for-all":
        with pytest.raises(NotImplementedError, match="landmark does not support prefix"):
            call(model.params_of(cfg), *model.batch(), prefix)
        return
    logits, layers = call(model.params_of(cfg), *model.batch(), prefix)
    for rebuilt, heads, rows in layers:
        close(rebuilt, heads)
        ahead = np.asarray(rows.values)[0, 0, cfg.prefix_tokens, cfg.prefix_tokens + rows.slots :]
        assert np.any(ahead[1:4])
        assert not np.any(ahead[4:])
    np.testing.assert_allclose(logits[1, :9], model.viewed(cfg)[0][1, :9], atol=2e-4)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("mixers", [("softmax",), ("sigmoid", "k_bias(shared=True)", "none")])
def test_scanned_layers_are_the_unrolled_ones(mixers, remat):
    cfg = config(num_layers=6, mixers=mixers, scan_layers=True, remat=remat)
    params, tokens = model.params_of(cfg), model.batch()[0]
    flat_cfg = dataclasses.replace(cfg, scan_layers=False, remat=False)
    flat = unstack_layers(params, cfg)
    loss = lambda c: lambda p: jnp.sum(jnp.sin(apply(c, p, tokens)))
    value, grad = jax.jit(jax.value_and_grad(loss(cfg)))(params)
    flat_value, flat_grad = jax.jit(jax.value_and_grad(loss(flat_cfg)))(flat)
    np.testing.assert_allclose(value, flat_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grad, stack_layers(flat_grad, cfg))
    jax.tree.map(np.testing.assert_array_equal, stack_layers(flat, cfg), params)
    with pytest.raises(ConfigError, match="scan_layers=False"):
        Decoder(cfg).apply({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(tokens), edits=(Edit(0, "attn"),))


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
