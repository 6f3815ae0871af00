"""linear_scan: chunks equal the recurrence and the dense product, in values, gradients, pieces and packs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from pallas_kernels import linear_scan as op

linear_scan = jax.jit(op.linear_scan, static_argnames=("scale", "chunk", "backend"))
BATCH, HEADS, KV_HEADS, DIM, WIDTH = 2, 4, 2, 8, 6
DECAYS = ("none", "head", "token")


@pytest.fixture
def f64():
    with jax.enable_x64(True):
        yield


def inputs(length, decay="none", dtype=jnp.float64, seed=0):
    """q, k, v, log_decay, initial state; decays between 0.3 and 1."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, k, v = draw(BATCH, length, HEADS, DIM), draw(BATCH, length, KV_HEADS, DIM), draw(BATCH, length, KV_HEADS, WIDTH)
    shape = {"none": None, "head": (HEADS,), "token": (BATCH, length, HEADS)}[decay]
    log_decay = None if shape is None else jnp.asarray(-rng.uniform(0, 1.2, size=shape), dtype)
    return q, k, v, log_decay, draw(BATCH, HEADS, DIM, WIDTH)


def dense(q, k, v, log_decay, s0, segments=None, initial_segment=None, scale=1.0):
    """o and S_T from the whole T×T matrix in NumPy, decays multiplied out one by one."""
    q, k, v, s0 = (np.asarray(x, np.float64) for x in (q, k, v, s0))
    batch, length, heads, _ = q.shape
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    g = np.zeros((batch, length, heads)) if log_decay is None else np.asarray(log_decay, np.float64)
    g = np.broadcast_to(g, (batch, length, heads))
    seg = np.ones((batch, length), int) if segments is None else np.asarray(segments)
    o, last = np.zeros((batch, length, heads, v.shape[-1])), s0.copy()
    for b in range(batch):
        live = [t for t in range(length) if seg[b, t] != 0]
        owner = seg[b, live[0]] if live and initial_segment is None else initial_segment[b] if live else None
        for end, t in enumerate([*live, None]):  # None: the final state, seen from behind the last token
            here = owner if t is None and not live else seg[b, live[-1]] if t is None else seg[b, t]
            state, back = np.zeros_like(s0[b]), np.ones(heads)
            for s in reversed(live[: end + 1]):
                if seg[b, s] != here:
                    break
                state += back[:, None, None] * k[b, s, :, :, None] * v[b, s, :, None, :]
                back = back * np.exp(g[b, s])
            else:
                if owner == here:
                    state += back[:, None, None] * s0[b]
            if t is None:
                last[b] = state
            else:
                o[b, t] = scale * np.einsum("hd,hdv->hv", q[b, t], state)
    return o, last


def near(actual, expected, tolerance):
    """Largest error below `tolerance` of the largest value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 257])
def test_chunks_and_recurrence_equal_the_dense_product(length, decay, f64):
    q, k, v, log_decay, s0 = inputs(length, decay)
    o, last = dense(q, k, v, log_decay, s0, scale=0.5)
    for backend in ("xla", "reference"):
        ours = linear_scan(q, k, v, log_decay=log_decay, initial_state=s0, scale=0.5, backend=backend)
        near(ours[0], o, 1e-12)
        near(ours[1], last, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_f32_is_within_the_rounding_of_f32(decay):
    q, k, v, log_decay, s0 = inputs(200, decay, jnp.float32)
    o, last = dense(q, k, v, log_decay, s0)
    ours = linear_scan(q, k, v, log_decay=log_decay, initial_state=s0)
    assert ours[0].dtype == ours[1].dtype == jnp.float32
    near(ours[0], o, 1e-5)
    near(ours[1], last, 1e-5)


def packs(length):
    """Documents, padding on both sides and in between, a row of nothing but padding at the start of a chunk."""
    segments = np.zeros((BATCH, length), np.int32)
    segments[0, 3:20], segments[0, 25:26], segments[0, 26:90], segments[0, 95:] = 1, 1, 2, 7
    segments[1, 70:100] = 4
    return jnp.asarray(segments)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_equal_those_of_the_recurrence(decay, f64):
    """Packed and padded, grouped heads, a cotangent on the final state."""
    q, k, v, log_decay, s0 = inputs(131, decay)
    segments, owner = packs(131), jnp.array([1, 9])
    weigh = lambda x, seed: jnp.sum(jnp.sin(x) * np.random.default_rng(seed).standard_normal(x.shape))

    def loss(backend, q, k, v, s0, log_decay):
        o, last = linear_scan(
            q, k, v, log_decay=log_decay, segments=segments, initial_state=s0, initial_segment=owner, backend=backend
        )
        return weigh(o, 1) + weigh(last, 2)

    which = (1, 2, 3, 4) if log_decay is None else (1, 2, 3, 4, 5)
    gradient = jax.jit(jax.grad(loss, which), static_argnums=0)
    grads = [jax.device_get(gradient(backend, q, k, v, s0, log_decay)) for backend in ("xla", "reference")]
    for ours, theirs in zip(*grads, strict=True):
        near(ours, theirs, 1e-12)
        assert np.any(np.asarray(theirs))
    assert np.any(grads[0][3][0]), "row 0 continues the initial state"
    assert not np.any(grads[0][3][1]), "row 1 starts another document"
    assert not np.any(grads[0][1][1, :70]), "padding keys have no gradient"


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_and_padded_rows_equal_the_dense_product(decay, f64):
    q, k, v, log_decay, s0 = inputs(131, decay)
    segments = packs(131)
    bad = lambda x: np.where((np.asarray(segments) == 0)[:, :, None, None], np.nan, x)  # padding may hold anything
    for owner in (None, np.array([1, 9])):
        o, last = dense(q, k, v, log_decay, s0, segments, owner)
        for backend in ("xla", "reference"):
            ours = linear_scan(
                *(map(bad, (q, k, v)) if backend == "xla" else (q, k, v)),
                log_decay=log_decay,
                segments=segments,
                initial_state=s0,
                initial_segment=None if owner is None else jnp.asarray(owner),
                backend=backend,
            )
            near(ours[0], o, 1e-12)
            near(ours[1], last, 1e-12)
            assert not np.any(np.asarray(ours[0])[np.asarray(segments) == 0])


def test_a_row_of_padding_passes_the_state_through(f64):
    q, k, v, log_decay, s0 = inputs(70, "head")
    for backend in ("xla", "reference"):
        o, last = linear_scan(
            q, k, v, log_decay=log_decay, segments=jnp.zeros((BATCH, 70), jnp.int32), initial_state=s0, backend=backend
        )
        assert not np.any(o)
        np.testing.assert_array_equal(last, s0)


@pytest.mark.parametrize("at", [1, 50, 64, 100])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_two_calls_equal_one(at, decay, f64):
    q, k, v, log_decay, s0 = inputs(131, decay)
    segments = packs(131).at[1, 40:].set(4)
    o, last = linear_scan(q, k, v, log_decay=log_decay, segments=segments, initial_state=s0)
    state, owner, parts = s0, None, []
    for cut in (slice(0, at), slice(at, None)):
        g = log_decay if decay == "head" else log_decay[:, cut]
        part, state = linear_scan(
            *(x[:, cut] for x in (q, k, v)),
            log_decay=g,
            segments=segments[:, cut],
            initial_state=state,
            initial_segment=owner,
        )
        seen = np.asarray(segments)[:, :at]
        # A row without a live token yet still holds the state of the document that comes first.
        first = [row[np.flatnonzero(row)[0]] for row in np.asarray(segments)]
        owner = jnp.array([row[row > 0][-1] if row.any() else f for row, f in zip(seen, first, strict=True)])
        parts.append(part)
    near(jnp.concatenate(parts, axis=1), o, 1e-12)
    near(state, last, 1e-12)


def test_limits_of_the_decay(f64):
    q, k, v = map(np.asarray, inputs(100)[:3])
    wide = lambda x: x.repeat(HEADS // KV_HEADS, axis=2)
    none = linear_scan(q, k, v)[0]
    plain = np.einsum("bthd,bthe->bthde", wide(k), wide(v)).cumsum(1)
    near(none, np.einsum("bthd,bthde->bthe", q, plain), 1e-12)  # λ = 1 is plain linear attention
    near(linear_scan(q, k, v, log_decay=np.zeros(HEADS))[0], none, 1e-12)
    near(linear_scan(q, k, v, log_decay=np.zeros((BATCH, 100, HEADS)))[0], none, 1e-12)
    own = np.sum(q * wide(k), axis=-1, keepdims=True) * wide(v)  # λ -> 0: a token sees itself
    for gone in (-1e4, -np.inf):
        for backend in ("xla", "reference"):
            g = np.full(HEADS, gone)
            near(linear_scan(q, k, v, log_decay=g, backend=backend)[0], own, 1e-12)
            g = np.full((BATCH, 100, HEADS), gone)
            near(linear_scan(q, k, v, log_decay=g, backend=backend)[0], own, 1e-12)


def test_a_single_token_does_not_feel_the_decay():
    q, k, v, _, _ = inputs(1, dtype=jnp.float32)
    first = linear_scan(q, k, v)[0]
    for rate in (-0.1, -3.0):
        np.testing.assert_array_equal(linear_scan(q, k, v, log_decay=jnp.full(HEADS, rate))[0], first)


def test_strong_decay_stays_finite_where_global_factors_overflow():
    """exp(0.84 t) passes the largest f32 at t = 106."""
    q, k, v, _, _ = inputs(1000, dtype=jnp.float32)
    g = jnp.full(HEADS, -0.84)
    run = lambda q, k, v, g: linear_scan(q, k, v, log_decay=g)
    o, _ = run(q, k, v, g)
    near(o, linear_scan(q, k, v, log_decay=g, backend="reference")[0], 1e-5)
    grads = jax.jit(jax.grad(lambda *x: sum(jnp.sum(y) for y in run(*x)), argnums=(0, 1, 2, 3)))(q, k, v, g)
    assert all(np.all(np.isfinite(x)) for x in grads)


def test_bf16_in_f32_inside():
    q, k, v, g, s0 = inputs(200, "token", jnp.bfloat16)
    o, last = linear_scan(q, k, v, log_decay=g, initial_state=s0.astype(jnp.float32))
    assert (o.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    exact, exact_last = dense(*(np.asarray(x, np.float64) for x in (q, k, v, g, s0)))
    near(o, exact, 4e-3)  # half a unit in the last place of the output alone
    near(last, exact_last, 1e-5)


@pytest.mark.optimised
@pytest.mark.parametrize("batch", [1, 3])
def test_the_forward_pass_copies_no_array_of_a_single_sequence(batch):
    """A long one's copies would be fresh memory in every call; a batch is put in order chunk by chunk, once."""
    x = jax.ShapeDtypeStruct((batch, 16384, 2, 32), jnp.float32)
    run = jax.jit(lambda q, k, v: linear_scan(q, k, v, log_decay=jnp.full(2, -0.1))[0])
    used = run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * x.size * (0.5 if batch == 1 else 4.5)


# One scan for all decays; that of a token has the largest arrays.
@pytest.mark.parametrize("decay", [pytest.param(d, marks=() if d == "token" else pytest.mark.slow) for d in DECAYS])
@pytest.mark.optimised
def test_memory_of_forward_and_backward_is_linear_in_the_length(decay):
    """Temporaries of the compiled gradient: four times the tokens, about four times the bytes."""

    def bytes_at(length):
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        g = {"none": None, "head": shape(2), "token": shape(1, length, 2)}[decay]

        def loss(q, k, v, g):
            o, last = linear_scan(q, k, v, log_decay=g)
            return jnp.sum(o**2) + jnp.sum(last**2)

        args = (*(shape(1, length, 2, 32) for _ in range(3)), g)
        which = (0, 1, 2) if g is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(loss, which)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_at(1024), bytes_at(4096)
    assert large <= 4.4 * small
    assert large < 4096 * 4096 * 2 * 4 / 4, "far below one T×T matrix"
    assert large < 4096 * 32 * 32 * 2 * 4 / 4, "far below one state per token"


def test_refusals():
    q, k, v, _, _ = inputs(5, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"computes bfloat16|needs JAX"):
        linear_scan(q, k, v, backend="gpu")
    with pytest.raises(ConfigError, match="'fast' is not known"):
        linear_scan(q, k, v, backend="fast")
    with pytest.raises(ConfigError, match="chunk is 0"):
        linear_scan(q, k, v, chunk=0)
    for bad in ({"log_decay": jnp.zeros(3)}, {"initial_state": jnp.zeros((BATCH, KV_HEADS, DIM, WIDTH))}):
        with pytest.raises((ConfigError, TypeError)):  # TypeError: the tests' own shape checker comes first
            linear_scan(q, k, v, **bad)
