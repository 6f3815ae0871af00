"""The neural memory: three ways to compute it agree, its degenerate cases are known models, and its state carries."""

from __future__ import annotations

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.neural_memory import MemoryState, empty_memory, memory_rows, mlp
from pallas_kernels.neural_memory import neural_memory as unchecked
from tests.kernels.neural_memory_cases import RATES, setting

neural_memory = jax.jit(unchecked, static_argnames=("chunk", "read_after_write", "tangents", "backend"))
# Three documents a row, padding in front, between and behind.
SEGMENTS = np.zeros((2, 45), np.int32)
SEGMENTS[0, 3:20], SEGMENTS[0, 20:22], SEGMENTS[0, 24:44] = 1, 2, 3
SEGMENTS[1, :30], SEGMENTS[1, 30], SEGMENTS[1, 33:] = 4, 5, 6


def worst(a, b):
    """Largest difference of two trees, relative to the larger of 1 and b."""
    error = lambda x, y: np.max(np.abs(np.subtract(x, y, dtype=np.float64))) / max(1, np.max(np.abs(y)))
    return max(jax.tree.leaves(jax.tree.map(error, a, b)))


@partial(jax.jit, static_argnames="chunk")
def materialised(q, k, v, state: MemoryState, *, eta, theta, alpha, start, chunk):
    """The card's chunk-parallel form: every token's gradient and weights in memory, two scans; one document."""
    del start
    outputs, M, S = [], state.M, state.S
    pair = lambda one, two: (one[0] * two[0], two[0] * one[1] + two[1])

    def scan(decay, added, first):
        """x_i = decay_i x_{i-1} + added_i over axis 1 of [B, T, H, i, o]."""
        decay = jnp.broadcast_to(decay[..., None, None], added.shape)
        product, total = jax.lax.associative_scan(pair, (decay, added), axis=1)
        return total + product * first[:, None]

    for at in range(0, q.shape[1], chunk):
        cut = lambda x, at=at: x[:, at : at + chunk]
        loss = lambda w, k, v: jnp.sum((mlp(w, k) - v) ** 2)
        every = lambda f, weights: jax.vmap(jax.vmap(jax.vmap(f, (0, 0, 0)), (weights, 0, 0)))  # rows, tokens, heads
        u = every(jax.grad(loss), None)(M, cut(k), cut(v))
        momenta = [scan(cut(eta), -cut(theta)[..., None, None] * g, s) for g, s in zip(u, S, strict=True)]
        weights = tuple(scan(1 - cut(alpha), s, m) for s, m in zip(momenta, M, strict=True))
        outputs.append(jax.vmap(jax.vmap(jax.vmap(mlp)))(weights, cut(q)))
        M, S = tuple(w[:, -1] for w in weights), tuple(s[:, -1] for s in momenta)
    return jnp.concatenate(outputs, axis=1), M, S


def entered(start, batch, seed=7):
    """A state in the middle of document 1, with weights of its own, at a chunk boundary."""
    rng = np.random.default_rng(seed)
    noise = lambda w: (0.3 * rng.standard_normal((batch, *w.shape))).astype(w.dtype)
    M, S = tuple(w + noise(w) for w in start), tuple(noise(w) for w in start)
    empty = jax.jit(lambda start: empty_memory(batch, start, start[0].dtype))(start)
    return empty.replace(M=M, S=S, frozen=M, segment=np.ones(batch, np.int32))


@pytest.mark.parametrize(("depth", "length", "chunk"), [(1, 23, 5), (2, 40, 64), (3, 23, 5), (4, 17, 16)])
def test_sequential_is_materialised_scan_is_closed_form_in_f64(depth, length, chunk):
    """Card 1, ragged T, a state in and out."""
    with jax.enable_x64(True):
        x, rest = setting(length, depth=depth, dtype=jnp.float64)
        state = entered(rest["start"], 2)
        y, M, S = materialised(*x, state, **rest, chunk=chunk)
        for backend in ("reference", "xla"):
            o, last = neural_memory(*x, **rest, state=state, chunk=chunk, backend=backend)
            assert o.dtype == jnp.float64
            assert worst((o, last.M, last.S), (y, M, S)) < 1e-12
            np.testing.assert_array_equal(last.count, [length, length])


@pytest.mark.parametrize(
    ("depth", "chunk", "read_after_write"), [(1, 5, False), (2, 5, True), (2, 1, False), (3, 64, True)]
)
def test_packed_values_and_gradients_equal_the_reference_in_f64(depth, chunk, read_after_write):
    """Also through the final state; the gradient passes through the inner gradient steps."""
    with jax.enable_x64(True):
        x, rest = setting(depth=depth, dtype=jnp.float64)
        state = entered(rest["start"], 2)

        def run(backend, x, rest, state):
            return neural_memory(
                *x,
                **rest,
                state=state,
                segments=jnp.asarray(SEGMENTS),
                chunk=chunk,
                read_after_write=read_after_write,
                backend=backend,
            )

        def gradients(backend):
            def scalar(x, rest, weights):
                o, last = run(backend, x, rest, state.replace(**weights))
                parts = jax.tree.leaves((o, last.M, last.S, last.frozen))
                return sum(jnp.sum(jnp.sin(p + i)) for i, p in enumerate(parts)), (o, last)

            weights = {"M": state.M, "S": state.S, "frozen": state.frozen}
            return jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(x, rest, weights)

        (gradient, ours), (expected, theirs) = gradients("xla"), gradients("reference")
        assert worst(ours[0], theirs[0]) < 1e-12
        assert worst(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1])) < 1e-12
        assert not np.any(np.asarray(ours[0])[SEGMENTS == 0])
        assert worst(gradient, expected) < 1e-11


def test_second_order_gradients_are_finite_differences():
    """∂ loss / ∂ M_0 along a direction, which no first-order treatment of the inner steps gets right."""
    with jax.enable_x64(True):
        x, rest = setting(20, dtype=jnp.float64)
        rest["theta"] = 3 * rest["theta"]
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda w: rng.standard_normal(w.shape), rest["start"])

        @partial(jax.jit, static_argnames="tangents")
        def loss(t, tangents=False):
            start = jax.tree.map(lambda w, d: w + t * d, rest["start"], direction)
            options = {**rest, "start": start, "chunk": 4, "tangents": tangents}
            return jnp.sum(jnp.sin(neural_memory(*x, **options)[0]))

        h = 1e-5
        numeric = float(loss(h) - loss(-h)) / (2 * h)
        assert abs(float(jax.jit(jax.grad(loss))(0.0)) - numeric) < 1e-8 * max(1.0, abs(numeric))
        slope = jax.jit(lambda t: jax.jvp(partial(loss, tangents=True), (t,), (1.0,))[1])(0.0)
        assert abs(float(slope) - numeric) < 1e-8 * max(1.0, abs(numeric))


def test_without_momentum_and_decay_it_is_deltanet():
    """Card 2: b = 1, beta = 2 theta (the loss is not halved): S += beta (v - S k) k in numpy."""
    (q, k, v), rest = setting(40, depth=1, value_dim=5)
    zero = np.zeros_like(rest["eta"])
    o, last = neural_memory(q, k, v, eta=zero, theta=rest["theta"], alpha=zero, start=rest["start"], chunk=1)
    o, last = jax.device_get((o, last))
    for b, h in np.ndindex(2, 2):
        S = np.asarray(rest["start"][0][h], np.float64).T
        for t in range(40):
            key, value = np.asarray(k[b, t, h], np.float64), np.asarray(v[b, t, h], np.float64)
            S = S + 2 * float(rest["theta"][b, t, h]) * np.outer(value - S @ key, key)
            np.testing.assert_allclose(o[b, t, h], S @ np.asarray(q[b, t, h]), atol=1e-6)
        np.testing.assert_allclose(last.M[0][b, h], S.T, atol=1e-6)


def test_one_chunk_from_zero_is_gated_linear_attention():
    """Card 2: b = T, M_0 = 0, eta = 0 gives values 2 theta v under the decay 1 - alpha."""
    (q, k, v), rest = setting(40, depth=1, value_dim=5)
    zero = np.zeros_like(rest["eta"])
    rates = {"eta": zero, "theta": rest["theta"], "alpha": rest["alpha"]}
    o, last = neural_memory(q, k, v, **rates, start=(np.zeros_like(rest["start"][0]),), chunk=40)
    values, decay = 2 * rest["theta"][..., None] * v, np.log1p(-rest["alpha"])
    theirs, S = jax.jit(lambda *x: linear_scan(*x[:3], log_decay=x[3]))(q, k, values, decay)
    np.testing.assert_allclose(o, theirs, atol=1e-6)
    np.testing.assert_allclose(last.M[0], S, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_rates_of_exactly_zero_and_one(backend):
    """Card 2: alpha = 1, eta = 0 leaves M_t = -theta_t u_t; theta = alpha = 0 leaves y = M_0(q)."""
    (q, k, v), rest = setting(20, depth=2)
    zero, start = np.zeros_like(rest["eta"]), rest["start"]
    call = partial(neural_memory, q, k, v, start=start, backend=backend)
    o, last = call(eta=rest["eta"], theta=zero, alpha=zero, chunk=5)
    still = jax.jit(lambda start, q: mlp(start, q))(start, np.moveaxis(q, 2, 1))
    np.testing.assert_allclose(o, np.moveaxis(still, 1, 2), atol=1e-6)
    for m, w in zip(last.M, start, strict=True):
        np.testing.assert_array_equal(m, np.broadcast_to(w, m.shape))
    o, last = call(eta=zero, theta=rest["theta"], alpha=zero + 1, chunk=20)
    loss = lambda w, k, v: jnp.sum((mlp(w, k) - v) ** 2)
    u = jax.jit(jax.vmap(jax.vmap(jax.grad(loss)), (None, 0, 0)))(start, k[:, -1], v[:, -1])
    for m, g in zip(last.M, u, strict=True):
        np.testing.assert_allclose(m, -rest["theta"][:, -1, :, None, None] * np.asarray(g), rtol=1e-5, atol=1e-7)
    value = jax.jit(
        jax.value_and_grad(lambda alpha: jnp.sum(jnp.sin(call(eta=zero, theta=rest["theta"], alpha=alpha, chunk=5)[0])))
    )
    h, step = 1e-2, zero.copy()
    step[0, 3, 1] = h
    (here, slope), (there, _) = value(zero + 1), value(zero + 1 - step)
    np.testing.assert_allclose(np.asarray(slope)[0, 3, 1], (here - there) / h, rtol=5e-2)


def test_hand_worked_tokens():
    """One number in, one out: M_0 = 1, k = q = 1, v = 3, theta = 1/4: u = -4, then S, M by hand."""
    one = np.ones((1, 3, 1, 1), np.float32)
    rate = lambda x: np.full((1, 3, 1), x, np.float32)
    rates = {"eta": rate(0.5), "theta": rate(0.25), "alpha": rate(0.5)}
    start = (np.ones((1, 1, 1), np.float32),)
    # chunk 1: u_t = 2 (M - 3). M: 1 -> S=1, M=1.5 -> u=-3, S=1.25, M=2 -> u=-2, S=1.125, M=2.125
    o, last = neural_memory(one, one, 3 * one, **rates, start=start, chunk=1)
    np.testing.assert_allclose(np.asarray(o)[0, :, 0, 0], [1.5, 2.0, 2.125], atol=1e-6)
    np.testing.assert_allclose(np.asarray(last.S[0])[0, 0], [[1.125]], atol=1e-6)
    # chunk 2: u_2 = u_1 = -4: S=1.5, M=2.25; then u_3 = -1.5: S=1.125, M=2.25
    o, _ = neural_memory(one, one, 3 * one, **rates, start=start, chunk=2)
    np.testing.assert_allclose(np.asarray(o)[0, :, 0, 0], [1.5, 2.25, 2.25], atol=1e-6)
    before, _ = neural_memory(one, one, 3 * one, **rates, start=start, chunk=2, read_after_write=False)
    np.testing.assert_allclose(np.asarray(before)[0, :, 0, 0], [1.0, 1.5, 2.25], atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("pieces", [[13, 32], [1] * 13 + [32], [13, 19, 13]])
def test_pieces_with_a_carried_state_equal_one_call(backend, pieces):
    """Card 4, over packed documents and padding, at any split, the tile of a piece shorter than the chunk."""
    x, rest = setting()
    rates = {name: rest[name] for name in RATES}
    segments = SEGMENTS
    call = partial(neural_memory, start=rest["start"], chunk=7, backend=backend)
    whole, last = call(*x, **rates, segments=segments)
    state, outputs, at = None, [], 0
    for n in pieces:
        cut = lambda y, at=at, n=n: y[:, at : at + n]
        o, state = call(*map(cut, x), **{r: cut(y) for r, y in rates.items()}, segments=cut(segments), state=state)
        outputs.append(np.asarray(o))
        at += n
    assert worst(np.concatenate(outputs, axis=1), whole) < 1e-5
    assert worst(jax.tree.leaves(state), jax.tree.leaves(last)) < 1e-5
    np.testing.assert_array_equal(state.segment, [3, 6])
    np.testing.assert_array_equal(state.count, [20, 12])


@pytest.mark.parametrize("depth", [1, 3])
def test_the_future_changes_no_bit_of_the_past(depth):
    """Card 3; nan in padding reaches nobody."""
    x, rest = setting(depth=depth)
    run = lambda x, rest: np.asarray(neural_memory(*x, **rest, segments=SEGMENTS, chunk=16)[0])
    o = run(x, rest)
    for at in (5, 27, 40):
        later, rates = [y.copy() for y in x], {r: rest[r].copy() for r in RATES}
        for y in later:
            y[:, at:] = np.roll(y[:, at:], 1, axis=-1) + 1
        for y in rates.values():
            y[:, at:] *= 0.5
        changed = run(later, rates | {"start": rest["start"]})
        np.testing.assert_array_equal(changed[:, :at], o[:, :at])
        assert not np.allclose(changed[:, at:], o[:, at:])
    bad = [np.where((SEGMENTS == 0)[..., None, None], np.float32(np.nan), y) for y in x]
    np.testing.assert_array_equal(run(bad, rest), o)


def test_large_chunks_are_another_model():
    x, rest = setting()
    small, large = (np.asarray(neural_memory(*x, **rest, chunk=chunk)[0]) for chunk in (4, 45))
    np.testing.assert_allclose(small[:, :4], large[:, :4], atol=1e-6)
    assert np.max(np.abs(small - large)) > 1e-2


@pytest.mark.parametrize("depth", [1, 3])
def test_rows_are_the_weights_of_the_prediction_errors(depth):
    """y_i = β_i h_i M_0^last + Σ A_ij (v_j - v̂_j), every right-hand term from a loop over tokens."""
    with jax.enable_x64(True):
        (q, k, v), rest = setting(23, depth=depth, dtype=jnp.float64)
        rates, start = {r: rest[r] for r in RATES}, rest["start"]
        rows = partial(memory_rows, chunk=5, read_after_write=True)
        a = np.asarray(jax.jit(rows)(q, k, v, *rates.values(), start, np.ones((2, 23), np.int32)))
        assert not np.any(np.triu(a, 1))
        y, _ = neural_memory(q, k, v, **rest, chunk=5)

        @jax.jit
        def token(state, q, k, v, rates):
            """Of one more token: the state behind it, v̂ and the activations below the last matrix."""
            _, state = neural_memory(q, k, v, **rates, start=start, state=state, chunk=5)
            top = jax.vmap(jax.vmap(mlp))(state.M[:-1], q[:, 0])
            return state, jax.vmap(jax.vmap(mlp))(state.frozen, k[:, 0]), jax.nn.gelu(top) if depth > 1 else q[:, 0]

        state, guesses, tops = jax.jit(lambda start: empty_memory(2, start, jnp.float64))(start), [], []
        for t in range(23):
            state, guess, top = token(state, *jax.tree.map(lambda x, t=t: x[:, t : t + 1], (q, k, v, rates)))
            guesses.append(guess)
            tops.append(top)
        errors = v - np.stack(guesses, axis=1)
        beta = np.cumprod(1 - rates["alpha"], axis=1)
        read = beta[..., None] * np.einsum("bthi,hio->btho", np.stack(tops, axis=1), start[-1])
        assert worst(read + np.einsum("bhij,bjhv->bihv", a, errors), y) < 1e-12


def test_bf16_inputs_keep_an_f32_state():
    x, rest = setting()
    o, last = neural_memory(*(y.astype(jnp.bfloat16) for y in x), **rest)
    assert o.dtype == jnp.bfloat16
    assert all(w.dtype == jnp.float32 for w in (*last.M, *last.S, *last.frozen))


def test_bad_calls_are_refused():
    (q, k, v), rest = jax.tree.map(jnp.asarray, setting(10))
    plain = inspect.unwrap(unchecked)  # as users call it, without the tests' shape checker
    with pytest.raises(ConfigError, match="chunk 0"):
        plain(q, k, v, **rest, chunk=0)
    with pytest.raises(ConfigError, match="must agree"):
        plain(q, k[..., :2], v, **rest)
    with pytest.raises(ConfigError, match="make them 2 matrices a layer, from 4 inputs to 3 outputs"):
        plain(q, k, v, **{**rest, "start": rest["start"][:1]})
    with pytest.raises(NotImplementedError, match="backend 'gpu'"):
        plain(q, k, v, **rest, backend="gpu")
