"""TransNormerLLM: LRPE, decay, joint norm and gate; the whole block against NumPy; prefill, steps and scans."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import doctest
import inspect
import math
import optparse
import pdb
import tarfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms.transnormer import MECHANISM as TNL
from jaxattn.mechanisms.transnormer import Spec, finish, initial_theta, log_decay
from jaxattn.models.transnormer import tnl
from jaxattn.nn import Decoder, stack_layers, unstack_layers
from jaxattn.nn.attention import Attention, layer_state
from jaxattn.nn.stream import Stream
from tests.conformance.cases import arrays, close, inputs, normal
from tests.conformance.model import params_of
from tests.mechanisms.programs import apply, decode, run, start

TOKENS = np.random.default_rng(1).integers(0, 19, (2, 24)).astype(np.int32)


def model(text="transnormer", **fields):
    """A small TNL with parameters away from their small start, so that every one of them shows."""
    cfg = dataclasses.replace(tnl("tiny"), vocab_size=19, d_model=16, d_ff=24, num_heads=4, mixers=(text,), **fields)
    return cfg, params_of(cfg)


def state(spec, depth=(0, 2), *, batch=2, heads=4, key_dim=16, value_dim=16):
    return TNL.init_state(
        spec,
        batch=batch,
        capacity=1,
        heads=heads,
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=jnp.float32,
        depth=depth,
    )


# The mechanism


def test_lrpe_is_a_cosine_of_the_distance():
    """Card 2: shifting all positions by 1000 changes nothing, and the scores are those of the formula in f64."""
    q, k, _ = arrays(40, heads=4, kv_heads=4, dim=8)
    params = {"theta": initial_theta(4, 8)}
    at = lambda shift: self_visibility(2, 40, positions=default_positions(2, 40) + shift)
    scores = lambda shift: np.asarray(run(TNL, "weights", Spec(), q, k, at(shift), params=params).scores)
    t = np.arange(40)
    silu = lambda x: np.asarray(x, np.float64) / (1 + np.exp(-np.asarray(x, np.float64)))
    angle = np.asarray(params["theta"], np.float64)[:, None, None] * (t[:, None] - t)[..., None]  # [H, T, S, D]
    expected = np.einsum("bthd,bshd,htsd->bhts", silu(q), silu(k), np.cos(angle))
    close(scores(0), expected, rtol=1e-5)
    np.testing.assert_allclose(scores(1000), scores(0), atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(run(TNL, "weights", Spec(lrpe="none"), q, k, at(0)).scores, expected, atol=0.1)


def test_theta_starts_at_the_paper_s_values():
    theta = np.asarray(TNL.init_params(jax.random.key(0), Spec(), heads=4, kv_heads=4, key_dim=8, value_dim=8)["theta"])
    assert theta.shape == (4, 8)
    np.testing.assert_allclose(theta[0, :2], [1.0, 10_000 ** (-2 / 32)], rtol=1e-6)
    assert theta[2, 3] == pytest.approx(10_000 ** (-2 * 19 / 32), rel=1e-5)
    assert TNL.init_params(jax.random.key(0), Spec(lrpe="none"), heads=4, kv_heads=4, key_dim=8, value_dim=8) == {}


def test_a_row_by_hand():
    """One head of one channel, θ = π/2, layer 0 of the paper's slopes (head 0 keeps all): cos 0, 0, -1."""
    x = np.full((1, 3, 1, 1), 2, np.float32)
    a = 2 / (1 + np.exp(-2.0))
    params = {"theta": np.full((1, 1), np.pi / 2, np.float32)}
    rows = lambda spec, **call: np.asarray(run(TNL, "weights", spec, x, x, self_visibility(1, 3), **call).values)
    w = rows(Spec(slopes="paper"), params=params)
    expected = a * a * np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 1]])
    np.testing.assert_allclose(w[0, 0], expected, atol=1e-5)
    w = rows(Spec(lrpe="none"), depth=(0, 3))  # s = 2^-8 · 1.00001
    fade = np.exp(-(2.0**-8) * 1.00001)
    np.testing.assert_allclose(w[0, 0, 2], a * a * np.array([fade**2, fade, 1]), rtol=1e-5)


def test_lrpe_acts_in_the_layers_it_is_asked_for():
    q, k, v = inputs(12)
    params, vis = {"theta": initial_theta(4, 16)}, self_visibility(2, 12)
    of = lambda lrpe, layer: run(TNL, "forward", Spec(lrpe=lrpe), q, k, v, vis, params=params, depth=(layer, 3))
    np.testing.assert_array_equal(of("first", 0), of("all", 0))
    np.testing.assert_array_equal(of("first", 2), of("none", 2))
    for layer in (0, 2):
        assert not np.allclose(of("all", layer), of("none", layer), atol=1e-2)
    width = lambda lrpe, layer: state(Spec(lrpe=lrpe), (layer, 3)).S.shape[2]
    assert [width("first", layer) for layer in (0, 1, 2, None)] == [32, 16, 16, 32]
    assert [width("all", layer) for layer in (0, 2, None)] == [32] * 3
    assert [width("none", layer) for layer in (0, 2, None)] == [16] * 3


@pytest.mark.parametrize("lrpe", ["first", "all"])
def test_a_traced_layer_gives_the_static_layer_s_answer(lrpe):
    q, k, v = inputs(12)
    params, vis, spec = {"theta": initial_theta(4, 16)}, self_visibility(2, 12), Spec(lrpe=lrpe)

    def loss(params, layer):
        o = TNL.forward(q, k, v, vis, Call(spec, params, depth=(layer, 3)))
        return jnp.sum(jnp.sin(o)), o

    gradient = jax.grad(loss, has_aux=True)
    traced, static = jax.jit(gradient), jax.jit(gradient, static_argnums=1)
    for layer in (0, 2):
        (grad, o), (expected_grad, expected) = traced(params, layer), static(params, layer)
        close(o, expected, rtol=1e-6)
        close(grad["theta"], expected_grad["theta"], rtol=1e-4)
        assert np.any(grad["theta"]) == (lrpe == "all" or layer == 0)


def test_values_are_activated_only_where_asked():
    q, k, v = inputs(12)
    vis, off = self_visibility(2, 12), Spec(lrpe="none")
    on = dataclasses.replace(off, v_act="silu")
    for which in ("forward", "reference"):
        active = run(TNL, which, on, q, k, v, vis)
        close(active, run(TNL, which, off, q, k, jax.nn.silu(v), vis))
        assert not np.allclose(active, run(TNL, which, off, q, k, v, vis), atol=0.1)


@pytest.mark.parametrize("layer", [0, 7])
def test_the_state_of_16k_tokens_is_finite_and_that_of_the_f64_recurrence(layer):
    """Card 3: 32 heads; the fastest forgets within a few tokens, the slowest of the last layer hardly at all."""
    length, heads, spec = 16_384, 32, Spec(lrpe="none")
    q, k, v = arrays(length, batch=1, heads=heads, kv_heads=heads, dim=4, value_dim=4)
    q, k = np.abs(q), np.abs(k)  # sums that grow, the hard case for rounding
    places = default_positions(1, length), jnp.ones((1, length), jnp.int32)
    new = state(spec, batch=1, heads=heads, key_dim=4, value_dim=4)
    o, held = run(TNL, "step", spec, new, q, k, v, *places, depth=(layer, 8))
    rates = np.asarray(log_decay(spec, heads, (layer, 8)), np.float64)
    k64, v64 = np.asarray(k, np.float64)[0], np.asarray(v, np.float64)[0]
    outer = (k64 / (1 + np.exp(-k64)))[..., :, None] * v64[..., None, :]
    expected, fade = np.zeros((heads, 4, 4)), np.exp(rates)[:, None, None]
    for added in outer:
        expected = fade * expected + added
    assert np.all(np.isfinite(o))
    assert np.abs(np.asarray(held.S)[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_naive_factors_overflow_where_the_recurrence_does_not():
    """λ^-t of the fastest of 32 heads leaves f32 after 105 tokens; the outputs behind it are right."""
    q, k, v = inputs(200, batch=1, heads=32, kv_heads=32, dim=4, value_dim=4)
    spec = Spec(lrpe="none")
    rate = np.float32(-log_decay(spec, 32, (0, 8))[0])
    with np.errstate(over="ignore"):
        factors = np.exp(rate * np.arange(200, dtype=np.float32))
    assert (np.isfinite(factors[105]), np.isfinite(factors[106])) == (True, False)
    ours, theirs = (
        run(TNL, which, spec, q, k, v, self_visibility(1, 200), depth=(0, 8)) for which in ("forward", "reference")
    )
    close(ours, theirs, rtol=1e-5)


# Norm and gate


def surround(spec, *, d_model=12, heads=3, value_dim=4):
    dims = dict(heads=heads, kv_heads=heads, key_dim=4, value_dim=value_dim)
    assert TNL.surround is not None
    return TNL.surround.init_params(jax.random.key(0), spec, d_model=d_model, **dims)


def test_the_norm_is_over_all_heads_together():
    o = normal(2, (2, 5, 3, 4)) * np.float32([1, 10, 100])[:, None]
    x = normal(3, (2, 5, 12))
    flat = np.asarray(o, np.float64).reshape(2, 5, 12)
    expected = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
    spec = Spec(gate="none")
    assert surround(spec) == {}
    close(jax.jit(partial(finish, spec=spec, params={}))(o, x), expected.reshape(o.shape))
    per_head = o / np.sqrt((o**2).mean(-1, keepdims=True))
    assert np.abs(per_head - expected.reshape(o.shape)).max() > 1


def test_shapes_and_start_of_the_gates():
    shapes = lambda **fields: jax.tree.map(jnp.shape, surround(Spec(**fields)))
    assert shapes() == {"gate": (12, 12)}
    assert shapes(gate="sigmoid", norm="rmsnorm") == {"gate": (12, 12), "norm_scale": (12,)}
    low = {"gate_a": (12, 4), "gate_b": (4, 12), "norm_scale": (12,), "norm_bias": (12,)}
    assert shapes(gate="low_rank", norm="layernorm") == low
    gate = surround(Spec(), d_model=300, heads=16, value_dim=16)["gate"]
    assert 0.0195 < np.std(gate) < 0.0205


# The whole decoder in NumPy, f64


def numpy_logits(cfg, params, spec):
    """An independent decoder: a Python loop over layers, heads, queries and keys, from the card's equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    heads, width = cfg.num_heads, cfg.d_model // cfg.num_heads
    silu = lambda x: x / (1 + np.exp(-x))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    srms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def joint_norm(o, own):
        if spec.norm == "layernorm":
            centred = o - o.mean(-1, keepdims=True)
            spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            return centred / spread * own["norm_scale"] + own["norm_bias"]
        return srms(o) * own.get("norm_scale", 1.0)

    def gate(y, own):
        match spec.gate:
            case "linear":
                return y @ own["gate"]
            case "sigmoid":
                return sigmoid(y @ own["gate"])
            case _:
                return sigmoid(y @ own["gate_a"] @ own["gate_b"])

    x = p["embed"][np.asarray(TOKENS)] * math.sqrt(cfg.d_model)
    batch, length = TOKENS.shape
    for layer in range(cfg.num_layers):
        own = p[f"layer_{layer}"]
        y = srms(x)
        project = lambda name, y=y, own=own: (y @ own["attn"][name]["kernel"]).reshape(batch, length, heads, width)
        q, k, v = silu(project("q")), silu(project("k")), project("v")
        v = silu(v) if spec.v_act == "silu" else v
        o = np.zeros_like(v)
        for h in range(heads):
            last = cfg.num_layers - 1
            factor = 1 - layer / (last + 1e-5) + 1e-5 if spec.slopes == "minimax" else 1 - layer / last + 1e-5
            slope = 2.0 ** (-8 * (h + 1) / heads) * factor
            for t in range(length):
                for j in range(t + 1):
                    w = q[:, t, h] * k[:, j, h]
                    if layer == 0 and spec.lrpe == "first":
                        w = w * np.cos(own["attn"]["mechanism"]["theta"][h] * (t - j))
                    o[:, t, h] += np.exp(-slope * (t - j)) * w.sum(-1, keepdims=True) * v[:, j, h]
        around = own["attn"]["surround"]
        o = joint_norm(o.reshape(batch, length, -1), around) * gate(y, around)
        x = x + o @ own["attn"]["o"]["kernel"]
        y, mlp = srms(x), own["mlp"]
        x = x + ((y @ mlp["gate"]["kernel"]) * (y @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
    return srms(x) @ p["embed"].T


BLOCKS = {
    "tnl": Spec(),
    "tnl3": Spec(v_act="silu", gate="low_rank", norm="layernorm"),
    "minimax": Spec(slopes="minimax", lrpe="none", v_act="silu", gate="sigmoid", norm="rmsnorm"),
}


def text_of(spec):
    changed = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return f"transnormer({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


@pytest.mark.parametrize("spec", BLOCKS.values(), ids=BLOCKS)
def test_the_decoder_is_its_numpy_copy(spec):
    """Card 4, to 1e-5 of the largest logit."""
    cfg, params = model(text_of(spec))
    close(apply(cfg, params, TOKENS), numpy_logits(cfg, params, spec), rtol=1e-5)


# Prefill, decoding, scanning


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits_of_prefill_and_steps_equal_the_forward_pass(scan):
    """Card 1, through layer 0 with LRPE; a wrong t shows at once."""
    cfg, params = model(scan_layers=scan)
    expected = np.asarray(apply(cfg, params, TOKENS))
    np.testing.assert_allclose(decode(cfg, params, TOKENS, [12] + [1] * 12), expected, atol=1e-4)
    wrong = decode(cfg, params, TOKENS, [12, 12], shift=3)
    np.testing.assert_allclose(wrong[:, :12], expected[:, :12], atol=1e-4)
    assert np.abs(wrong[:, 12:] - expected[:, 12:]).max() > 1e-2


def test_the_scanned_model_is_the_unrolled_one():
    """LRPE in layer 0 alone although no layer knows its number; wide states there, narrow ones unrolled."""
    cfg, params = model(scan_layers=True, num_layers=3)
    flat_cfg, flat = dataclasses.replace(cfg, scan_layers=False), unstack_layers(params, cfg)
    loss = lambda c: lambda p: jnp.sum(jnp.sin(apply(c, p, TOKENS)))
    value, grad = jax.jit(jax.value_and_grad(loss(cfg)))(params)
    flat_value, flat_grad = jax.jit(jax.value_and_grad(loss(flat_cfg)))(flat)
    np.testing.assert_allclose(value, flat_value, rtol=1e-5)
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4), grad, stack_layers(flat_grad, cfg))
    theta = np.asarray(grad["layers"]["layer_0"]["attn"]["mechanism"]["theta"])
    assert [bool(np.any(layer)) for layer in theta] == [True, False, False]
    shapes = lambda c, p: jax.eval_shape(lambda p: start(c, p, 2, 9), p)
    widths = lambda c: [s.S.shape[-2:] for s in shapes(c, flat if c is flat_cfg else params)]
    assert widths(flat_cfg) == [(8, 4), (4, 4), (4, 4)]
    assert widths(cfg) == [(8, 4)]


# Ablation


def held_out_loss(text, seed, steps=300, length=128):
    """Nats per character of a two-layer model on standard library sources it was not trained on."""
    sources = "".join(inspect.getsource(module) for module in (argparse, difflib, doctest, optparse, pdb, tarfile))
    data = np.frombuffer(sources.encode("ascii", "replace"), np.uint8).astype(np.int32)
    cut = len(data) * 9 // 10

    def draw(rng, low, high, count):
        starts = rng.integers(low, high - length - 1, count)
        return jnp.asarray(np.stack([data[i : i + length + 1] for i in starts]))

    decoder = Decoder(dataclasses.replace(tnl("tiny"), vocab_size=128, mixers=(text,)))
    params = jax.jit(decoder.init)(jax.random.key(seed), jnp.zeros((1, length), jnp.int32))["params"]
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 3e-3, 20, steps))

    def loss(params, batch):
        out = decoder.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(out, batch[:, 1:]).mean()

    @jax.jit
    def step(params, slots, batch):
        updates, slots = optimizer.update(jax.grad(loss)(params, batch), slots, params)
        return optax.apply_updates(params, updates), slots

    rng, slots = np.random.default_rng(seed), optimizer.init(params)
    for _ in range(steps):
        params, slots = step(params, slots, draw(rng, 0, cut, 16))
    return float(jax.jit(loss)(params, draw(np.random.default_rng(9), cut, len(data), 128)))


@pytest.mark.slow
def test_decay_and_gate_help_a_small_character_model():
    """Card 5, the directions: no decay costs more than 0.02 nats, no gate costs too (means of two seeds)."""
    mean = lambda text: float(np.mean([held_out_loss(text, seed) for seed in (0, 1)]))
    whole, without_decay, without_gate = (
        mean(text) for text in ("transnormer", "transnormer(slopes='none')", "transnormer(gate='none')")
    )
    assert without_decay > whole + 0.02
    assert without_gate > whole


@pytest.mark.parametrize("layer", [1, 3])
def test_the_sigmoid_gated_layer_equals_minimax_in_transformers(layer):
    """Card 4, second half: projections, heads, norm, gate and W_O of transformers' torch layer, random weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed: the MiniMax layer is torch code")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax", reason="transformers is needed")
    torch.manual_seed(0)
    heads, dim, length = 6, 8, 37
    width = heads * dim
    sizes = dict(hidden_size=width, num_attention_heads=heads, num_hidden_layers=4)
    theirs = minimax.MiniMaxLightningAttention(minimax.MiniMaxConfig(**sizes, head_dim=dim, block_size=16), layer)
    with torch.no_grad():
        theirs.norm.weight.uniform_(0.5, 1.5)  # not the ones it starts with
        x = torch.randn(2, length, width)
        expected, state = theirs.eval()(x, None, None)
    array = lambda weight: weight.detach().numpy()
    qkv = array(theirs.qkv_proj.weight).T.reshape(width, heads, 3, dim)
    kernel = lambda w: {"kernel": w.reshape(width, width)}
    params = {name: kernel(qkv[:, :, i]) for i, name in enumerate("qkv")} | {
        "o": kernel(array(theirs.out_proj.weight).T),
        "surround": {"gate": array(theirs.output_gate.weight).T, "norm_scale": array(theirs.norm.weight)},
    }
    text = "transnormer(slopes='minimax', lrpe='none', v_act='silu', gate='sigmoid', norm='rmsnorm')"
    cfg = dataclasses.replace(tnl("tiny"), d_model=width, num_heads=heads, num_layers=4, mixers=(text,))
    layer_module = Attention(cfg, layer)
    step = jax.jit(lambda x, at, before: layer_module.apply({"params": params}, x, Stream(at, at * 0 + 1), before))
    params = jax.tree.map(jnp.asarray, params)
    x, at = x.numpy(), np.asarray(default_positions(2, length))
    close(step(x, at, None)[0], expected.numpy(), rtol=1e-5)
    first, _, half = step(x[:, :20], at[:, :20], layer_state(cfg, layer, 2, 1))
    second, _, end = step(x[:, 20:], at[:, 20:], half)
    close(np.concatenate([first, second], axis=1), expected.numpy(), rtol=1e-5)
    close(end.S, state.numpy(), rtol=1e-5)


# Sizes


def count(size):
    cfg = tnl(size)
    init = lambda: Decoder(cfg).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes = jax.eval_shape(init)
    total = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    return cfg, total(shapes), total({k: v for k, v in shapes.items() if k != "embed"})


def test_the_385m_model_has_the_paper_s_size():
    """Blocks of 5 E² + 3 E F and θ; with a tied vocabulary of 50 thousand they are the paper's 385M."""
    cfg, total, body = count("385m")
    e, f = 1024, 2816
    assert body == 24 * (5 * e * e + 3 * e * f + e)
    assert total == body + 64_000 * e == 399_007_744
    assert round((body + 50_257 * e) / 1e6) == 385
    assert (cfg.num_heads, cfg.num_layers, cfg.d_ff) == (8, 24, f)


@pytest.mark.parametrize(("size", "billions"), [("1b", 1.02), ("7b", 6.93), ("15b", 15.1)])
def test_larger_models_have_the_size_of_their_name(size, billions):
    assert count(size)[1] == pytest.approx(billions * 1e9, rel=1e-2)


def test_bad_options_name_the_field_and_the_remedy():
    with pytest.raises(ConfigError, match=r"transnormer.slopes is 'alibi' but must be one of official, paper, minimax"):
        Spec(slopes="alibi")
    with pytest.raises(ConfigError, match=r"transnormer.lrpe is 'last' but must be one of first, all, none"):
        TNL.make_spec(lrpe="last")
    for field in ("gate", "norm", "v_act"):
        with pytest.raises(ConfigError, match=rf"transnormer.{field} is 'x' but must be one of"):
            TNL.make_spec(**{field: "x"})
    with pytest.raises(ConfigError, match=r"transnormer.norm_eps is 0.0 but must be positive"):
        Spec(norm_eps=0.0)
    with pytest.raises(ConfigError, match=r"size of TransNormerLLM '1B' is not known: did you mean '1b'"):
        tnl("1B")
