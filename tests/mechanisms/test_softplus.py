"""LSSA and LSSAR against the paper's two stages, written independently in NumPy, and the card's traps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms._protocol import check_call
from jaxattn.mechanisms.softplus import MECHANISM, Spec, options, unit
from jaxattn.rope import Alibi, RelativeBias, alibi_slopes
from pallas_kernels.softplus import softplus_attention
from pallas_kernels.softplus import xla as backend
from pallas_kernels.softplus.reference import dense_rows, softplus, softplus_reference
from pallas_kernels.softplus.xla import softplus_xla
from tests import decoding
from tests.conformance.cases import close, inputs, normal, packed, seen
from tests.mechanisms import programs

LSSA = Spec(reweight=False)


def qkv(length, *, batch=1, heads=2, dim=16, seed=0, dtype=np.float32):
    """NumPy, so that nothing is rounded before 64-bit mode is on."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, length, heads, dim)).astype(dtype) for _ in range(3)]


def two_stages(q, k, *, p=None, exempt=3):
    """Steps 1 to 5 of the definition for causal rows in f64, [B, H, T, T]; p None stops after LSSA."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    length = q.shape[1]
    n = np.arange(1, length + 1)[:, None]
    s = np.log(q.shape[-1]) * np.log(n) * np.einsum("bthd,bshd->bhts", q, k)
    phi = np.logaddexp(0, s) * np.tril(np.ones((length, length)))
    a = phi / phi.sum(-1, keepdims=True)
    if p is None:
        return a
    w = np.maximum(a * n - np.where(n <= exempt, 0, 1), 0) ** p
    return w / w.sum(-1, keepdims=True)


def rows(q, k, spec, **call):
    vis = seen(batch=q.shape[0], length=q.shape[1])
    return np.asarray(programs.run(MECHANISM, "weights", spec, q, k, vis, **call).values)


def forward(q, k, v, spec, vis=None):
    vis = seen(batch=q.shape[0], length=q.shape[1]) if vis is None else vis
    return np.asarray(programs.run(MECHANISM, "forward", spec, q, k, v, vis))


@pytest.mark.parametrize("p", [None, 1.0, 2.5, 3.0, 15.0])
def test_collapsed_form_is_the_two_stage_definition(p):
    spec = LSSA if p is None else Spec(p=p)
    q, k, v = qkv(96, dtype=np.float64)
    expected = two_stages(q, k, p=p)
    with jax.enable_x64(True):
        a = rows(q, k, spec)
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, expected, atol=1e-10)
        o = forward(q, k, v, spec)
        np.testing.assert_allclose(o, np.einsum("bhts,bshv->bthv", expected, v), atol=1e-10)


def test_hand_worked_row():
    """D = 4 and four keys: s = log(4)² cos, so that φ = log(1 + 4^(log 4 · cos)) for cos = 1, -1, 0, 0."""
    q = np.float32([3, 0, 0, 0]).reshape(1, 1, 1, 4).repeat(4, 1)
    k = np.float32([[2.0, 0, 0, 0], [-5, 0, 0, 0], [0, 1, 0, 0], [0, 0, 7, 0]])[None, :, None]
    phi = np.log1p(np.exp(np.log(4) ** 2 * np.array([1.0, -1, 0, 0])))
    np.testing.assert_allclose(rows(q, k, LSSA)[0, 0, 3], phi / phi.sum(), atol=1e-6)
    # the mean, 0.911, clips all but the first key; with exempt = 4 nothing is clipped
    np.testing.assert_allclose(rows(q, k, Spec())[0, 0, 3], [1, 0, 0, 0], atol=0)
    np.testing.assert_allclose(rows(q, k, Spec(p=3.0, exempt=4))[0, 0, 3], phi**3 / (phi**3).sum(), atol=1e-6)
    plain = np.log1p(np.exp(0.5 * np.log(4) * np.array([1.0, -1, 0, 0])))
    np.testing.assert_allclose(rows(q, k, LSSA, scale=0.5)[0, 0, 3], plain / plain.sum(), atol=1e-6)


def test_rows_sum_to_one_and_sub_mean_keys_are_exactly_zero():
    q, k, _ = qkv(64, batch=2, dim=64)
    lssa, tril = rows(q, k, LSSA), np.tril(np.ones((64, 64), bool))
    np.testing.assert_allclose(lssa.sum(-1), 1, atol=1e-5)
    assert np.all(lssa[..., ~tril] == 0)
    below = lssa * np.arange(1, 65)[:, None] < 1 - 1e-5
    for p in (1.0, 3.0, 15.0):
        a = rows(q, k, Spec(p=p))
        np.testing.assert_allclose(a.sum(-1), 1, atol=1e-5)
        assert np.all(a[:, :, 3:][below[:, :, 3:]] == 0)
    first = rows(q, k, Spec(p=1.0))
    np.testing.assert_allclose(first[:, :, :3], lssa[:, :, :3], atol=1e-6)
    assert not np.allclose(first[:, :, 3:], lssa[:, :, 3:], atol=1e-2)
    order = np.argsort(-lssa[0, 0, -1])[: np.sum(first[0, 0, -1] > 0)]
    assert np.all(np.diff(first[0, 0, -1][order]) <= 0), "p = 1 keeps the order of the LSSA weights"


def test_sharpness_of_random_rows():
    """The card's figures for T = D = 64."""
    q, k, _ = qkv(64, batch=16, heads=16, dim=64, seed=3)
    for p, expected in ((3.0, 0.53), (15.0, 0.89), (200.0, 0.99)):
        assert abs(rows(q, k, Spec(p=p))[:, :, 3:].max(-1).mean() - expected) < 0.02, p
    last = lambda spec: rows(q, k, spec)[:, :, -1]
    assert abs((last(Spec()) > 0).mean() - 0.39) < 0.03
    # For the last row the card gives one draw; ours are 256, and it must lie within their spread.
    for spec, drawn in ((LSSA, 0.076), (Spec(p=1.0), 0.15), (Spec(p=3.0), 0.355), (Spec(), 0.749)):
        largest = last(spec).max(-1)
        assert abs(largest.mean() - drawn) < largest.std(), spec


@pytest.mark.parametrize("spec", [LSSA, Spec(p=3.0), Spec()], ids=str)
@pytest.mark.parametrize("size", [1e-25, 1e-3, 7.0, 1e25])
def test_lengths_of_queries_and_keys_do_not_matter(spec, size):
    q, k, v = qkv(40)
    plain = forward(q, k, v, spec)
    np.testing.assert_allclose(forward(q * np.float32(size), k, v, spec), plain, atol=1e-5)
    np.testing.assert_allclose(forward(q, k * np.float32(size), v, spec), plain, atol=1e-5)
    with jax.enable_x64(True):  # the card's 1e-6: p = 15 multiplies the rounding of f32 by 15
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        np.testing.assert_allclose(forward(size * q, size * k, v, spec), forward(q, k, v, spec), atol=1e-6)


def test_exp_in_place_of_softplus_is_softmax_of_the_scores(monkeypatch):
    q, k, _ = qkv(50)
    monkeypatch.setattr("pallas_kernels.softplus.reference.softplus", jnp.exp)
    vis = self_visibility(1, 50)
    a, s = jax.jit(lambda q, k: dense_rows(unit(q), unit(k), vis, **options(Call(LSSA), 16)))(q, k)
    w = np.where(np.tri(50, dtype=bool), np.exp(s), 0)
    np.testing.assert_allclose(a, w / w.sum(-1, keepdims=True), atol=1e-6)


def decoded(q, k, v, spec, pieces):
    state = decoding.init_state(MECHANISM, spec, q, k, v, 70)
    step = jax.jit(lambda state, *x: decoding.step(MECHANISM, spec, state, *x))
    outputs, at, positions = [], 0, np.asarray(default_positions(1, q.shape[1]))
    for n in pieces:
        cut = [x[:, at : at + n] for x in (q, k, v, positions)]
        o, state = step(state, *cut, np.ones((1, n), np.int32))
        outputs.append(np.asarray(o))
        at += n
    np.testing.assert_allclose(np.linalg.norm(state.keys[:, :at], axis=-1), 1, atol=1e-6)
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("spec", [LSSA, Spec(p=3.0), Spec()], ids=str)
def test_decoding_with_a_cache_is_the_forward(spec, monkeypatch):
    q, k, v = qkv(64)
    pieces = [31, 1, 1, 31]
    full = forward(q, k, v, spec)
    np.testing.assert_allclose(decoded(q, k, v, spec, pieces), full, atol=1e-5)
    # The planted bug: N counted from the start of the piece that is decoded.
    local = lambda vis, *_: jnp.arange(1, vis.q_positions.shape[1] + 1)[None, None, None]
    monkeypatch.setattr(backend, "_count", local)
    backend._block.clear_cache()
    try:
        planted = decoded(q, k, v, spec, pieces)
    finally:
        backend._block.clear_cache()
    np.testing.assert_allclose(planted[:, :31], full[:, :31], atol=1e-5)
    assert np.abs(planted[:, 31:] - full[:, 31:]).max() > 1e-2


def test_row_length_restarts_per_document_and_skips_padding():
    q, k, _ = qkv(40)
    positions, segments = packed([17, 12], 40, batch=1)
    vis = self_visibility(1, 40, positions=positions, segment_ids=segments)
    a = np.asarray(programs.run(MECHANISM, "weights", Spec(), q, k, vis).values)
    np.testing.assert_allclose(a[..., :17, :17], two_stages(q[:, :17], k[:, :17], p=15), atol=2e-5)
    np.testing.assert_allclose(a[..., 17:29, 17:29], two_stages(q[:, 17:29], k[:, 17:29], p=15), atol=2e-5)
    assert not np.any(a[..., 29:, :])
    assert not np.any(a[..., 29:])


@pytest.mark.parametrize("run", [softplus_reference, softplus_xla])
def test_uniform_rows_keep_their_lssa_weights(run, monkeypatch):
    """One token repeated without positions: every φ is its row's mean."""
    monkeypatch.setattr(backend, "MAX_GROUPS", 1)
    length = 1500  # across key chunks, where sums round
    one = normal(0, (1, 1, 1, 8))
    q = k = np.broadcast_to(one, (1, length, 1, 8))
    v = normal(1, (1, length, 1, 2))
    vis, call = seen(batch=1, length=length), options(Call(Spec()), 8)

    def loss(q, k, v):
        o = run(unit(q), unit(k), v, vis, **call)
        return jnp.sum(jnp.sin(o)), o

    (_, o), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(o, np.cumsum(v, 1) / np.arange(1, length + 1)[:, None, None], atol=1e-4)
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert np.any(grads[2])


def test_zero_vectors_have_finite_gradients():
    q, k, v = qkv(12)
    q[:, 5], k[:, 7], vis = 0, 0, self_visibility(1, 12)
    loss = lambda *x: jnp.sum(jnp.sin(MECHANISM.forward(*x, vis, Call(Spec()))))
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_fifteenth_powers_of_long_rows_do_not_overflow(monkeypatch):
    """One key along every query and all others against it: A·N is near N = 2048, and 2048^15 is no f32."""
    monkeypatch.setattr(backend, "MAX_GROUPS", 2)  # compiles in a quarter of the time
    length, dim = 2048, 4
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, length, 1, dim)).astype(np.float32) * 0.1 + np.float32([1, 0, 0, 0])
    k, v = -q[:, ::-1].copy(), rng.standard_normal((1, length, 1, 2)).astype(np.float32)
    k[:, 0] = [[1, 0, 0, 0]]
    vis = self_visibility(1, length)
    run = lambda *x: jnp.sum(MECHANISM.forward(*x, vis, Call(Spec())) * v)
    value, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.all(np.isfinite(x)) for x in (value, *grads))
    last = jax.jit(lambda: vis.rows(length - 1, 1))()
    a = np.asarray(programs.run(MECHANISM, "weights", LSSA, q[:, -1:], k, last).values)[0, 0, 0]
    with np.errstate(over="ignore"):
        assert np.isinf(np.maximum(a * np.float32(length) - 1, 0) ** np.float32(15)).any(), "the literal form overflows"
    np.testing.assert_allclose(forward(q[:, -1:], k, v, Spec(), last)[0, 0], v[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "aligned"), [(LSSA, True), (Spec(p=2.5), True), (Spec(), True), (Spec(), False)], ids=str
)
def test_many_blocks_and_chunks_equal_the_reference(spec, aligned, monkeypatch):
    monkeypatch.setattr(backend, "MAX_GROUPS", 2)  # 24 blocks in two programs
    q, k, v = inputs(301, batch=1, heads=2, kv_heads=1, dim=8, value_dim=5)
    positions, segments = packed([200, 1, 90], 301, batch=1)
    vis = self_visibility(1, 301, positions=positions, segment_ids=segments)
    vis = vis if aligned else dataclasses.replace(vis, aligned=None)
    table = normal(4, (32, 2))

    def run(fn, **blocks):
        def loss(q, k, v, table):
            call = options(Call(spec, bias=RelativeBias(table)), 8)
            o = fn(unit(q), unit(k), v, vis, **call, **blocks)
            return jnp.sum(jnp.sin(o))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, table)

    ours, theirs = run(softplus_xla, block_q=13, chunk_k=60), run(softplus_reference)
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4), ours, theirs)


def test_gradient_is_the_slope():
    """f64 central differences of the forward, the mean's own gradient included."""
    q, k, v = qkv(20, dim=4, dtype=np.float64)
    with jax.enable_x64(True):
        call, vis = Call(Spec(p=3.0), bias=Alibi(alibi_slopes(2))), self_visibility(1, 20)
        scalar = lambda *x: jnp.sum(jnp.sin(MECHANISM.forward(*x, vis, call)))
        loss, x = jax.jit(scalar), (q, k, v)
        grads = jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(*x)
        rng = np.random.default_rng(1)
        for _ in range(3):
            turn = [rng.standard_normal(a.shape) for a in x]
            at = lambda h, turn=turn: float(loss(*(a + h * t for a, t in zip(x, turn, strict=True))))
            slope = (at(1e-6) - at(-1e-6)) / 2e-6
            along = sum(float(np.sum(np.asarray(g) * t)) for g, t in zip(grads, turn, strict=True))
            assert abs(slope - along) < 1e-6 * max(1.0, abs(slope))


@pytest.mark.optimised
def test_temporary_memory_is_not_quadratic():
    def bytes_at(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32) for _ in range(3))
        loss = lambda *x: jnp.sum(MECHANISM.forward(*x, self_visibility(1, length), Call(Spec())))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_at(1024), bytes_at(4096)
    assert large < 6 * small, (small, large)
    assert large < 2 * 4096 * 4096 * 4 / 4, "no T x T array"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"p": 0.0}, "p is 0.0 but must be positive"),
        ({"p": float("inf")}, "p is inf"),
        ({"exempt": -1}, "exempt is -1"),
        ({"reweight": 1}, "must be True or False"),
        ({"power": 3}, "no option 'power'"),
    ],
)
def test_impossible_options_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        MECHANISM.make_spec(**fields)


def test_a_named_backend_never_falls_back():
    q, k, v = inputs(8)
    check_call(MECHANISM, q, k, v, causal_self=True)
    with pytest.raises(NotImplementedError, match=r"backend 'gpu' (needs JAX|computes bfloat16)"):
        softplus_attention(q, k, v, self_visibility(2, 8), scale=1.0, p=15.0, backend="gpu")


def test_the_slope_of_softplus_is_the_sigmoid_at_zero_too():
    """Scores are exactly 0 where a projection starts at zero; JAX's maximum and abs disagree about the side there."""
    s = np.float32([-50, -1e-6, 0, 1e-6, 50])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(softplus)))(s), 1 / (1 + np.exp(-s)), rtol=1e-6)
