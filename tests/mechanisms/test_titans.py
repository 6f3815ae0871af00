"""Titans: the forms, causality at every level, constant-size decoding, what weights mean, and refusals."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call, resolve_mixer
from jaxattn.mechanisms._titans_forms import influence, prepare, rows, run
from jaxattn.mechanisms.titans import MECHANISM as TITANS
from jaxattn.mechanisms.titans import Spec
from jaxattn.models import ModelConfig
from jaxattn.rope import Rope
from tests.conformance import model as whole_model
from tests.conformance.cases import close, inputs, normal, packed
from tests.mechanisms import programs

FORMS = ("lmm", "mac", "mag", "mal")
every_form = pytest.mark.parametrize("form", FORMS)
SMALL = {"chunk": 4, "segment": 8, "attention_window": 6, "persistent": 2}


@partial(jax.jit, static_argnames=("spec", "backend", "rope"))
def forward(q, k, v, vis, **call):
    return TITANS.forward(q, k, v, vis, Call(**call))


@partial(jax.jit, static_argnames=("spec", "heads", "dim", "value_dim", "dtype"))
def params_of(spec, heads=2, dim=8, value_dim=6, dtype=jnp.float32):
    params = TITANS.init_params(jax.random.key(3), spec, heads=heads, kv_heads=heads, key_dim=dim, value_dim=value_dim)
    away = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(lambda x: away(x).astype(dtype), params)


def rates_of(batch, length, heads, dtype=np.float32):
    """Rates that differ from token to token, as a layer computes them."""
    raw = normal(5, (3, batch, length, heads)).astype(dtype)
    sized = zip(("eta", "theta", "alpha"), 1 / (1 + np.exp(-raw)), (1.0, 0.2, 0.2), strict=True)
    return {name: (x * most).astype(dtype) for name, x, most in sized}


def tokens(length=30, dtype=jnp.float32, **shape):
    return inputs(length, **({"heads": 2, "kv_heads": 2, "dim": 8, "value_dim": 6, "dtype": dtype} | shape))


# Rotation and windowed softmax are f32 whatever comes in.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "rope", "limit"),
    [("lmm", 0, 1e-10), ("mac", 0, 1e-10), ("mac", 100.0, 1e-5), ("mag", 100.0, 1e-5), ("mal", 100.0, 1e-5)],
)
def test_forward_equals_reference_in_f64_with_rates_and_rope(form, rope, limit):
    """Packed, padded, grouped keys, rotary positions; value and gradient in everything."""
    spec = Spec(form=form, **SMALL)
    with jax.enable_x64(True):
        q, k, v = tokens(kv_heads=1, dtype=jnp.float64)
        params, rates = params_of(spec, dtype=jnp.float64), rates_of(2, 30, 2, np.float64)
        positions, segments = packed([13, 1, 11], 30)
        vis = self_visibility(2, 30, positions=positions, segment_ids=segments)

        def scalar(backend, q, k, v, params, rates):
            call = {"params": params, "rates": rates, "rope": Rope(rope) if rope else None, "backend": backend}
            return jnp.sum(jnp.sin(forward(q, k, v, vis, spec=spec, **call)))

        results = [
            jax.jit(jax.value_and_grad(partial(scalar, backend), (0, 1, 2, 3, 4)))(q, k, v, params, rates)
            for backend in ("xla", "reference")
        ]
        error = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.maximum(1, jnp.max(jnp.abs(b))))
        assert max(jax.tree.leaves(jax.tree.map(error, *results))) < limit


@every_form
def test_mechanism_is_causal_to_the_bit(form):
    """Card 3: x_j changes, rates included; outputs before j keep every bit."""
    spec = Spec(form=form, **SMALL)
    x = [np.array(x) for x in tokens()]
    rates, params, vis = rates_of(2, 30, 2), params_of(spec), self_visibility(2, 30)
    run = lambda x, rates: np.asarray(forward(*x, vis, spec=spec, params=params, rates=rates))
    before = run(x, rates)
    for at in (3, 8, 13, 29):
        moved, faster = [y.copy() for y in x], {name: y.copy() for name, y in rates.items()}
        for y in moved:
            y[:, at] = 1 - y[:, at]
        for y in faster.values():
            y[:, at] *= 0.5
        after = run(moved, faster)
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert np.all(np.any(before[:, at] != after[:, at], axis=-1))


def model(form, **fields):
    options = ", ".join(f"{k}={v}" for k, v in SMALL.items())
    size = {"vocab_size": 17, "num_layers": 2, "d_model": 16, "num_heads": 2, "max_positions": 40}
    cfg = ModelConfig(**size, mixers=(f"titans(form={form!r}, {options})",), **fields)
    tokens = np.random.default_rng(1).integers(0, 17, (2, 26)).astype(np.int32)
    return cfg, whole_model.params_of(cfg), tokens


@every_form
def test_layers_are_causal_to_the_bit_and_prefill_in_two_calls_is_one(form):
    """Card 3 and 4 through convolution, rates, rotation, norm and gate of a two-layer model."""
    cfg, params, tokens = model(form)
    run = lambda t: np.asarray(programs.apply(cfg, params, t))
    before, at, moved = run(tokens), 11, tokens.copy()
    moved[:, at] = (moved[:, at] + 1) % 17
    after = run(moved)
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.allclose(before[:, at:], after[:, at:])
    # Two layers of norms, in f32; the memory alone meets 1e-5 in tests/kernels/test_neural_memory.py.
    np.testing.assert_allclose(programs.decode(cfg, params, tokens, [13, 13]), before, atol=1e-4)


def test_mac_as_written_leaks_inside_a_segment_and_mac_does_not():
    """Card 3's failing case: row i knows x_j, j > i, of its own segment, and of no later one."""
    q, k, v = tokens()
    written = Spec(form="mac_as_written", **SMALL)
    params, whole = params_of(written), self_visibility(2, 30, causal=False)
    run = lambda *x: np.asarray(forward(*x, whole, spec=written, params=params))
    before = run(q, k, v)
    in_segment = (np.arange(30) == 13)[None, :, None, None]  # of rows 8 to 15
    moved = [np.asarray(x) + np.float32(1) * in_segment for x in (q, k, v)]
    after = run(*moved)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.all(np.max(np.abs(before[:, 8:13] - after[:, 8:13]), axis=-1) > 1e-6)
    causal = dataclasses.replace(written, form="mac")
    run = lambda *x: np.asarray(forward(*x, self_visibility(2, 30), spec=causal, params=params))
    np.testing.assert_array_equal(run(q, k, v)[:, :13], run(*moved)[:, :13])


def test_mac_as_written_is_mac_at_the_end_of_its_first_segment():
    """There all retrievals are in the past (the first segment has none) and M_i is the segment's last memory."""
    q, k, v = tokens()
    written = Spec(form="mac_as_written", **SMALL)
    params = params_of(written)
    run = lambda spec, vis: np.asarray(forward(q, k, v, vis, spec=spec, params=params))
    ours = run(written, self_visibility(2, 30, causal=False))
    mac = run(dataclasses.replace(written, form="mac"), self_visibility(2, 30))
    close(ours[:, 7], mac[:, 7])
    assert not np.allclose(ours[:, 6], mac[:, 6])


def test_mac_as_written_refuses_what_it_cannot_do():
    q, k, v = tokens(10)
    spec = Spec(form="mac_as_written", **SMALL)
    params, ones = params_of(spec), jnp.ones((2, 10), jnp.int32)
    dims = {"batch": 2, "capacity": 10, "heads": 2, "kv_heads": 2, "key_dim": 8, "value_dim": 6}
    state = TITANS.init_state(dataclasses.replace(spec, form="mac"), dtype=jnp.float32, **dims)
    assert not spec.causal
    for call in (
        lambda: TITANS.forward(q, k, v, self_visibility(2, 10), Call(spec, params)),
        lambda: TITANS.weights(q, k, self_visibility(2, 10), Call(spec, params, values=v)),
        lambda: TITANS.init_state(spec, dtype=jnp.float32, **dims),
        lambda: TITANS.step(state, q, k, v, default_positions(2, 10), ones, Call(spec, params)),
    ):
        with pytest.raises(NotImplementedError, match="'mac_as_written' does not support causal_self"):
            call()
    live = jnp.asarray(np.arange(10) < np.array([[10], [8]]), jnp.int32)
    padded = self_visibility(2, 10, causal=False, segment_ids=live)
    assert np.all(np.isnan(forward(q, k, v, padded, spec=spec, params=params)))
    from jaxattn.runs.config import RunConfig

    with pytest.raises(ConfigError, match="lets tokens see later ones"):
        RunConfig(attn="titans(form='mac_as_written')").resolved()


@every_form
def test_steps_over_packed_documents_equal_forward_with_a_constant_state(form):
    spec = Spec(form=form, **SMALL)
    q, k, v = map(np.asarray, tokens(40))
    rates, params = rates_of(2, 40, 2), params_of(spec)
    segments, positions = np.zeros((2, 40), np.int32), np.asarray(default_positions(2, 40))
    segments[0, 5:16], segments[0, 16:] = 1, 2
    segments[1, :19], segments[1, 21:39] = 2, 3
    vis = self_visibility(2, 40, positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments))
    rope = Rope(100.0)
    expected = forward(q, k, v, vis, spec=spec, params=params, rates=rates, rope=rope)
    call = jax.jit(lambda s, x, r: TITANS.step(s, *x, Call(spec, params, rates=r, rope=rope)))
    dims = {"batch": 2, "heads": 2, "kv_heads": 2, "key_dim": 8, "value_dim": 6, "dtype": jnp.float32}
    new = lambda capacity: TITANS.init_state(spec, capacity=capacity, **dims)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    empty = jax.jit(lambda: new(3))()
    for pieces in ([13, 14, 13], [14] + [1] * 26):
        state, outputs, at = empty, [], 0
        for n in pieces:
            cut = lambda x, at=at, n=n: x[:, at : at + n]
            o, state = call(state, [cut(x) for x in (q, k, v, positions, segments)], jax.tree.map(cut, rates))
            outputs.append(np.asarray(o))
            at += n
        close(np.concatenate(outputs, axis=1), expected)
        assert shapes(state) == shapes(empty) == shapes(jax.eval_shape(lambda: new(10**6)))


def test_the_state_has_the_size_the_card_says():
    """M, S and the frozen weights of an MLP of 4d: each 8 d² numbers a head; bf16 keeps f32."""
    dims = {"batch": 1, "capacity": 9, "heads": 3, "kv_heads": 3, "key_dim": 16, "value_dim": 16}
    state = TITANS.init_state(Spec(width=4), dtype=jnp.bfloat16, **dims)
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 * 3 * 8 * 16**2 + 2
    assert {x.dtype for x in jax.tree.leaves((state.memory.M, state.memory.S))} == {jnp.dtype("float32")}


def test_lmm_reads_unit_queries_and_keys():
    q, k, v = tokens()
    spec, vis = Spec(**SMALL), self_visibility(2, 30)
    run = lambda q, k, v: forward(q, k, v, vis, spec=spec, params=params_of(spec))
    close(run(9 * q, 0.1 * k, v), run(q, k, v))
    assert not np.allclose(run(q, k, 2 * v), run(q, k, v), atol=1e-3)


def test_switches_and_read_order_change_what_they_say():
    """Without momentum and decay eta and alpha do nothing; read first: row 0 is M_0(q_0)."""
    q, k, v = tokens()
    vis, some = self_visibility(2, 30), rates_of(2, 30, 2)
    x = normal(3, (2, 30, 16))
    dims = {"d_model": 16, "heads": 2, "kv_heads": 2, "key_dim": 8, "value_dim": 6}
    params = jax.jit(lambda key: TITANS.surround.init_params(key, Spec(), **dims))(jax.random.key(0))
    rates = lambda **switches: jax.jit(partial(TITANS.surround.rates, spec=Spec(**switches)))(x, params=params)
    full = rates(max_lr=0.3)
    np.testing.assert_allclose(full["theta"], 0.3 / (1 + np.e), rtol=1e-6)
    np.testing.assert_allclose(full["eta"], 0.5)
    off = rates(momentum=False, decay=False)
    assert not np.any(off["eta"])
    assert not np.any(off["alpha"])
    own = params_of(Spec())
    np.testing.assert_allclose(  # a layer at its start computes what the bare function takes for granted
        forward(q, k, v, vis, spec=Spec(), params=own),
        forward(q, k, v, vis, spec=Spec(), params=own, rates=rates()),
        atol=1e-6,
    )
    linear, ones = Spec(depth=1, read_after_write=False), {"memory_0": np.ones((2, 8, 6), np.float32)}
    first = np.asarray(forward(q, k, v, vis, spec=linear, params=own | ones, rates=some))
    unit = np.asarray(q)[:, 0] / np.linalg.norm(np.asarray(q)[:, 0], axis=-1, keepdims=True)
    np.testing.assert_allclose(first[:, 0], unit.sum(-1, keepdims=True).repeat(6, -1), atol=1e-5)


def view(spec, length=24, dtype=jnp.float64, values=None):
    q, k, v = tokens(length, dtype)
    rates = rates_of(2, length, 2, dtype)
    places = (default_positions(2, length), jnp.ones((2, length), jnp.int32))
    rates = jax.tree.map(jnp.asarray, rates)
    call = Call(spec, params_of(spec, dtype=dtype), rates=rates, rope=Rope(100.0))
    return (q, k, v), prepare(q, k, v, *places, call)


@pytest.mark.parametrize("form", ["mag", "mal", "mac"])
def test_rows_of_attending_forms_are_their_softmax(form):
    """Rows sum to one over slots and tokens; nothing outside the window or the segment has weight."""
    spec = Spec(form=form, **SMALL)
    a, s, slots = jax.device_get(jax.jit(lambda: rows(view(spec, dtype=jnp.float32)[1]))())
    assert slots == 2
    assert a.shape == s.shape == (2, 2, 24, 26)
    np.testing.assert_allclose(a.sum(-1), 1.0, atol=1e-5)
    i, j = np.indices((24, 24))
    seen = (j <= i) & (i // 8 == j // 8 if form == "mac" else i - j < 6)
    assert np.all((a[..., 2:] > 0) == seen)
    assert np.all(a[..., :2] > 0)


def test_mag_rows_times_values_are_its_attention():
    """Slots and tokens; the branch is laid bare by a memory whose gate is a constant."""
    spec = Spec(form="mag", **SMALL)
    q, k, v = map(np.asarray, tokens(24))
    params, call = params_of(spec), {"rates": rates_of(2, 24, 2), "rope": Rope(100.0)}
    vis, scale = self_visibility(2, 24), np.asarray(params["attention_scale"])
    found = jax.jit(lambda q, k, v: TITANS.weights(q, k, vis, Call(spec, params, values=v, **call)))(q, k, v)
    weights = np.asarray(found.values)
    slot = np.moveaxis(np.broadcast_to(params["slot_v"], (2, 2, 2, 6)), 1, 2)  # [B, H, P, V]
    a = np.einsum("bhtp,bhpv->bthv", weights, np.concatenate([slot, np.moveaxis(v, 2, 1)], axis=2))
    normed = lambda a: a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-6) * scale
    run = lambda **other: np.asarray(forward(q, k, v, vis, spec=spec, params=params | other, **call))
    ratio = run() / normed(a)  # silu of the memory branch, whatever the attention holds
    close(run(attention_scale=2 * scale), 2 * ratio * normed(a))
    moved = a + weights[..., :2].sum(-1).swapaxes(1, 2)[..., None]  # every slot's value raised by one
    close(run(slot_v=params["slot_v"] + 1), normed(moved) * ratio, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "depth"), [("lmm", 2), ("mag", 2), ("mal", 1), ("mac", 2)])
def test_influence_is_the_jacobian_of_the_reference_along_the_value(form, depth):
    """Zeros above the diagonal; a value of zero has no influence."""
    spec = Spec(form=form, depth=depth, **SMALL)
    with jax.enable_x64(True):
        (q, k, _), x = view(spec, 12)
        x = dataclasses.replace(x, v=x.v.at[:, 5].set(0))
        a = jax.jit(lambda v: influence(dataclasses.replace(x, v=v)))(x.v)
        outputs = lambda v: TITANS.reference(q, k, v, self_visibility(2, 12), x.call)
        jacobian = jax.jit(jax.jacfwd(lambda v: outputs(v).sum(0)))(x.v)  # rows of a batch do not mix
        moved = jnp.einsum("thvbshw,bshw->bhtsv", jacobian, x.v)
        size = jnp.moveaxis(jnp.linalg.norm(x.v, axis=-1), 1, 2)[:, :, None]
        np.testing.assert_allclose(a, jnp.linalg.norm(moved, axis=-1) / jnp.where(size > 0, size, 1), atol=1e-5)
        assert not np.any(np.triu(a, 1))
        assert not np.any(a[..., 5])
        assert np.all(np.any(a > 1e-4, axis=2)[..., [0, 3, 9]])


def test_influence_in_a_linear_memory_is_the_weight_of_the_value():
    """y is affine in the values with a number A_ij per pair: run it on unit vectors and take the size."""
    spec = Spec(depth=1, **SMALL)
    with jax.enable_x64(True):
        hot = np.broadcast_to(np.eye(24)[None, :, None], (2, 24, 2, 24))

        def both():
            _, x = view(spec)
            call = dataclasses.replace(x.call, backend="reference")
            empty = dataclasses.replace(x, v=jnp.asarray(hot), start=(jnp.zeros((2, 8, 24)),), call=call)
            return influence(x), run(empty, None)[0]

        found, a = jax.jit(both)()
        np.testing.assert_allclose(found, np.abs(np.moveaxis(a, 1, 2)), atol=1e-12)


@every_form
def test_some_rows_are_those_rows(form):
    spec = Spec(form=form, **SMALL)
    q, k, v = tokens(24)
    positions, segments = packed([9, 13], 24)
    vis = self_visibility(2, 24, positions=positions, segment_ids=segments)
    call = Call(spec, params_of(spec), rates=jax.tree.map(jnp.asarray, rates_of(2, 24, 2)), values=v)
    part, there = q[:, 7:16], vis.rows(7, 9)
    every, some = jax.jit(
        lambda: (
            TITANS.weights(q, k, vis, call),
            TITANS.weights(part, k, there, dataclasses.replace(call, queries=q)),
        )
    )()
    every = jax.device_get(every)
    np.testing.assert_array_equal(some.values, every.values[:, :, 7:16])
    np.testing.assert_array_equal(some.scores, every.scores[:, :, 7:16])
    assert some.slots == every.slots == (0 if form == "lmm" else 2)
    assert not np.any(every.values[:, :, 22:])
    with pytest.raises(NotImplementedError, match="pass `queries`"):
        TITANS.weights(part, k, there, call)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("depth=7", "titans.depth is 7 but must be a whole number from 1 to 4; the nearest is 4"),
        ("depth=0", "nearest is 1"),
        ("chunk=0", "titans.chunk is 0 .* nearest is 1"),
        ("segment=-3", "titans.segment is -3 .* nearest is 1"),
        ("form='mac', segment=40", "titans.segment is 40 but must be a multiple of titans.chunk 16; the nearest is 32"),
        ("form='mac', segment=4", "the nearest is 16"),
        ("attention_window=0", "titans.attention_window is 0 .* nearest is 1"),
        ("persistent=-1", "titans.persistent is -1 .* nearest is 0"),
        ("width=0", "titans.width is 0 .* nearest is 1"),
        ("conv=-2", "titans.conv is -2 .* nearest is 0"),
        ("max_lr=0.0", "titans.max_lr is 0.0 but must be positive"),
        ("form='lm'", "titans.form is 'lm' but must be one of lmm, mac"),
    ],
)
def test_impossible_options_are_refused_with_the_nearest_possible_one(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve_mixer(f"titans({text})")


def test_a_segment_only_matters_to_mac():
    assert Spec(chunk=48).segment == 32
    with pytest.raises(NotImplementedError, match=r"titans does not support window: .* attention_window"):
        TITANS.forward(*tokens(5), self_visibility(2, 5, window=3), Call(Spec(), params_of(Spec())))
