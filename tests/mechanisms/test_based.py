"""BASED: the Taylor feature maps, three equal forms, the state's size, memory, and the model's layer map."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call, get, resolve_mixer
from jaxattn.mechanisms.based import MECHANISM as BASED
from jaxattn.mechanisms.based import PIECE, Spec, feature_width, features, taylor
from jaxattn.models.based import based
from jaxattn.nn import Decoder
from jaxattn.nn.attention import layer_state
from tests.conformance.cases import arrays, close, inputs, normal, packed
from tests.mechanisms.programs import run

MAPS = pytest.mark.parametrize("map", ["symmetric", "full"])


@partial(jax.jit, static_argnames=("map", "scale"))
def phi(q, k, map, scale=None):
    places = jnp.zeros(q.shape[:2], jnp.int32)
    return features(q, k, places, places, Call(Spec(map=map), scale=scale))


def state(spec=Spec(), *, batch=2, heads=4, key_dim=16, value_dim=16):  # noqa: B008, a frozen value
    return BASED.init_state(
        spec,
        batch=batch,
        capacity=1,
        heads=heads,
        kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=jnp.float32,
    )


@MAPS
def test_the_product_of_features_is_the_polynomial(map):
    """Card 1, in f64, also under an explicit scale of either sign."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k = (jnp.asarray(rng.normal(size=(1, 200, 1, 16))) for _ in range(2))
        for scale in (None, 0.7, -0.3):
            fq, fk = phi(q, k, map, scale)
            assert fq.shape[-1] == feature_width(16, map) == {"full": 273, "symmetric": 153}[map]
            s = np.einsum("btd,bsd->bts", q[:, :, 0], k[:, :, 0]) * (0.25 if scale is None else scale)
            fq, fk = np.asarray(fq), np.asarray(fk)
            product = np.einsum("btf,bsf->bts", fq[:, :, 0], fk[:, :, 0])
            np.testing.assert_allclose(product, 1 + s + s**2 / 2, atol=1e-12 * np.abs(s).max() ** 2)
            assert s.min() < -1 < s.max()
            assert product.min() >= 0.5


def test_the_smallest_weight_is_a_half_at_minus_one():
    with jax.enable_x64(True):
        q, k = np.ones((1, 1, 1, 4)), np.linspace(-3, 3, 601)[None, :, None, None] * np.full(4, 0.5)
        for map in ("symmetric", "full"):  # s runs over the numbers of linspace: 4 · 0.5 / sqrt(4) = 1
            w = np.einsum("btf,bsf->bs", *(np.asarray(f)[:, :, 0] for f in phi(q, k, map)))[0]
            assert np.argmin(w) == 200  # s = -1
            assert float(w[200]) == pytest.approx(0.5, abs=1e-14)


def test_features_by_hand():
    """D = 2: x / 2^(1/4), then squares over √2·√2·... written out."""
    x = jnp.array([[3.0, -2.0]]) / 2**0.25
    a, b = 3 / 2**0.25, -2 / 2**0.25
    full = [1, a, b, 9 / 2, -6 / 2, -6 / 2, 4 / 2]  # x_i x_j / (√2 √2)
    np.testing.assert_allclose(taylor(x, "full")[0], full, rtol=1e-6)
    symmetric = [1, a, b, 9 / 2, -6 / 2**0.5, 4 / 2]  # squares / √(2·2), the mixed product / √2
    np.testing.assert_allclose(taylor(x, "symmetric")[0], symmetric, rtol=1e-6)


@MAPS
def test_quadratic_chunked_and_recurrent_forms_agree(map):
    """Card 2: T = 130 and beyond a piece of features, in f32; prefill of odd length, then single steps."""
    for length, pieces in ((130, [72] + [1] * 58), (2 * PIECE + 8, [PIECE + 4] * 2)):
        q, k, v = arrays(length, heads=2, kv_heads=1, value_dim=8)
        spec, vis = Spec(map=map), self_visibility(2, length)
        expected = run(BASED, "reference", spec, q, k, v, vis)
        close(run(BASED, "forward", spec, q, k, v, vis), expected, rtol=1e-5)
        now, at, out = state(spec, heads=2, value_dim=8), 0, []
        places = np.asarray(default_positions(2, length)), np.ones((2, length), np.int32)
        for n in pieces:
            o, now = run(BASED, "step", spec, now, *(x[:, at : at + n] for x in (q, k, v, *places)))
            out.append(np.asarray(o))
            at += n
        close(np.concatenate(out, axis=1), expected, rtol=1e-5)


def test_pieces_carry_documents_and_gradients_across():
    """Documents that end before, at and after the borders of pieces, with padding at one of them, in f64."""
    length = 2 * PIECE + 40
    lengths = [PIECE - 7, 7, 100, PIECE - 80]
    positions, segments = packed(lengths, length)
    segments = np.array(segments)
    segments[1, PIECE - 20 : PIECE + 30] = 0
    with jax.enable_x64(True):
        q, k, v = inputs(length, heads=1, kv_heads=1, dim=3, value_dim=2, dtype=jnp.float64)
        vis = self_visibility(2, length, positions=positions, segment_ids=jnp.asarray(segments))
        weigh = normal(9, v.shape).astype(np.float64)

        def both(function):
            loss = lambda q, k, v: jnp.sum(weigh * function(q, k, v, vis, Call(Spec())))
            return jax.jit(lambda *x: (function(*x, vis, Call(Spec())), jax.grad(loss, (0, 1, 2))(*x)))(q, k, v)

        error = lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b))
        errors = jax.tree.map(error, both(BASED.forward), both(BASED.reference))
        assert max(jax.tree.leaves(errors)) < 1e-11


def test_small_scores_give_softmax_attention():
    """Card 3: |s| <= 0.1 leaves the third-order term, s³/6."""
    q, k, v = arrays(100, heads=2, kv_heads=2)
    q *= 0.1 / (np.abs(np.einsum("bthd,bshd->bhts", q, k)).max() / 4)
    vis, softmax = self_visibility(2, 100), get("softmax")
    exact = np.asarray(run(softmax, "forward", softmax.spec(), q, k, v, vis))
    gap = lambda q: np.abs(np.asarray(run(BASED, "forward", Spec(), q, k, v, vis)) - exact).max()
    assert gap(q) / np.abs(exact).max() < 1e-4
    assert gap(20 * q) > 1e-2, "at larger scores the two part"


@MAPS
def test_the_state_is_as_large_as_the_paper_s_formula(map):
    """H · D' · (dv + 1): 283,920 numbers a layer at 360M and 493,584 at 1.3B with all 273 features."""
    for size, full in (("360m", 283_920), ("1.3b", 493_584)):
        cfg = based(size)
        cfg = dataclasses.replace(cfg, mixers=tuple(m.replace("based", f"based(map='{map}')") for m in cfg.mixers))
        layer = cfg.mixers.index(f"based(map='{map}')")
        held = jax.eval_shape(lambda cfg=cfg, layer=layer: layer_state(cfg, layer, 1, 2048))
        assert held.S.dtype == jnp.float32
        assert math.prod(held.S.shape) == (full if map == "full" else full // 273 * 153)
    assert state(Spec(map=map)).S.shape == (2, 4, feature_width(16, map), 17)


@MAPS
def test_the_state_holds_sums_of_features(map):
    q, k, v = arrays(20, heads=2, kv_heads=2, value_dim=5)
    new, ones = state(Spec(map=map), heads=2, value_dim=5), np.ones((2, 20), np.int32)
    held = run(BASED, "step", Spec(map=map), new, q, k, v, default_positions(2, 20), ones)[1]
    fk, held = np.asarray(phi(q, k, map)[1]), np.asarray(held.S)
    close(held[..., :5], np.einsum("bthf,bthv->bhfv", fk, v))
    close(held[..., 5], fk.sum(1))


@pytest.mark.optimised
def test_memory_is_linear_in_the_length_without_the_features_of_all_tokens():
    """The compiled core and its gradient at the paper's head width: temporaries, and the largest array of all."""

    def compiled(length, gradient):
        shape = lambda d: jax.ShapeDtypeStruct((1, length, 4, d), jnp.float32)
        forward = lambda q, k, v: BASED.forward(q, k, v, self_visibility(1, length), Call(Spec()))
        f = jax.grad(lambda *x: jnp.sum(forward(*x) ** 2), (0, 1, 2)) if gradient else forward
        program = jax.jit(f).lower(shape(16), shape(16), shape(64)).compile()
        arrays = re.findall(r"f32\[([\d,]+)\]", program.as_text())
        largest = max(math.prod(map(int, dims.split(","))) for dims in arrays)
        return program.memory_analysis().temp_size_in_bytes, largest

    for gradient in (False, True):
        (small, _), (large, largest) = compiled(2048, gradient), compiled(8192, gradient)
        assert large <= 4.4 * small
        assert 8192 * 4 * 64 <= largest <= 8192 * 4 * 65, "values with their column of ones, not 153 features"


def test_the_layer_s_heads_have_the_feature_dim_and_no_rotation():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, 9)), jnp.int32)

    def logits(mixer):
        """Of one layer under positions 0, 1, 2, ... and 0, 3, 6, ..., and its parameters' shapes."""
        model = Decoder(dataclasses.replace(based("tiny"), mixers=(mixer,), num_layers=1, mlps=("none",)))
        params = jax.jit(lambda: jax.tree.map(lambda x: 5 * x, model.init(jax.random.key(0), tokens)["params"]))()
        at = jax.jit(lambda params, positions: model.apply({"params": params}, tokens, positions))
        shapes = jax.tree.map(jnp.shape, params["layer_0"]["attn"])
        return *(at(params, n * np.arange(9, dtype=np.int32)[None]) for n in (1, 3)), shapes

    near, far, shapes = logits("based(feature_dim=24)")
    np.testing.assert_array_equal(near, far)
    assert (shapes["q"]["kernel"], shapes["k"]["kernel"]) == ((64, 96), (64, 96))
    assert (shapes["v"]["kernel"], shapes["o"]["kernel"]) == ((64, 64), (64, 64))
    near, far, _ = logits("softmax(window=16)")
    assert not np.allclose(near, far, atol=1e-6), "RoPE turns the window layer's heads"


def test_layer_map_and_size_of_the_models():
    for size, linear in (("360m", (1, 6, 11, 16, 21)), ("1.3b", (1, 6, 11, 16, 21, 27, 33))):
        cfg = based(size)
        assert len(cfg.mixers) == cfg.num_layers
        for layer, text in enumerate(cfg.mixers):
            choice = resolve_mixer(text)
            if layer in linear:
                assert (choice.mechanism, choice.spec) == (BASED, Spec())
            elif layer - 1 in linear:
                assert choice.mechanism is not None
                assert (choice.mechanism.name, choice.window) == ("softmax", 129)
            else:
                assert choice.conv == 3
    counts = []
    for size in ("360m", "1.3b"):
        model = Decoder(based(size))
        init = lambda model=model: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        shapes = jax.eval_shape(init)
        counts.append(sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)))
    e, f, mlps = 1024, 2048, 27 * 3 * 1024 * 2048
    conv = e * 4 * e + 4 * e + 3 * 2 * e + 2 * e * e + e
    linear = 2 * e * 16 * 16 + 2 * e * e
    norms = (2 * 27 + 1) * e
    assert counts[0] == 50_257 * e + mlps + 17 * conv + 5 * linear + 5 * 4 * e * e + norms == 362_613_760
    assert f == based("360m").d_ff
    assert 1.3e9 < counts[1] < 1.36e9
    with pytest.raises(ConfigError, match=r"size of BASED '350m' is not known: did you mean '360m'"):
        based("350m")


def test_window_layer_shows_the_released_number_of_keys():
    """Card 5: w = 256 // 2 keys before the query's own, and not one more."""
    choice = resolve_mixer(based("360m").mixers[2])
    mechanism = choice.mechanism
    assert mechanism is not None
    q, k, v = arrays(200, heads=1, kv_heads=1, dim=8, value_dim=8)
    vis, w, i = self_visibility(2, 200, window=choice.window), 128, 170

    def row(moved):
        keys = k.copy()
        keys[:, i - moved] += 9.0
        return np.asarray(run(mechanism, "forward", choice.spec, q, keys, v, vis))[:, i]

    before = row(w + 9)  # a key that nobody behind it sees any more
    np.testing.assert_array_equal(row(w + 1), before)
    assert not np.allclose(row(w), before)


def test_bad_options_name_the_field_and_the_remedy():
    with pytest.raises(ConfigError, match=r"based.feature_dim is 0 but must be a whole number of at least 1"):
        Spec(feature_dim=0)
    with pytest.raises(ConfigError, match=r"based.map is 'half' but must be one of symmetric, full"):
        Spec(map="half")
    with pytest.raises(ConfigError, match=r"based.eps is 0.0 but must lie between 0 and 0.5"):
        BASED.make_spec(eps=0.0)


def test_flops_count_the_features():
    count = lambda map, n: BASED.flops(Spec(map=map), batch=1, queries=n, keys=n, heads=2, key_dim=16, value_dim=64)
    assert count("full", 4096) == 2 * count("full", 2048)
    assert count("full", 2048) == 2 * 2 * 2048 * (64 * (273 + 65) + 2 * 273 * 65)
    assert 0.55 < count("symmetric", 2048) / count("full", 2048) < 0.65
