"""The TPU kernel of `linear_scan`, simulated, against the recurrence; chunks are far smaller than the sequence."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms.based import MECHANISM as BASED
from jaxattn.mechanisms.lightning import MECHANISM as LIGHTNING
from pallas_kernels import compiling_for, interpreted, recording
from pallas_kernels.linear_scan import linear_scan
from pallas_kernels.linear_scan.features import feature_width, selections, taylor
from pallas_kernels.linear_scan.tpu import STATES, linear_scan_tpu
from pallas_kernels.shapes import ODD, Shape
from tests.kernels.near import all_near
from tests.kernels.odd import in_both_dtypes
from tests.kernels.simulators import without_races

DECAYS = ("none", "head", "token")
SMALL = Shape("small", batch=2, length=75, heads=4, kv_heads=2, dim=8, value_dim=6)


def inputs(shape=SMALL, decay="token", dtype=jnp.float32, width=None, seed=0):
    """q, k, v, the initial state, log decays between -1.2 and 0."""
    rng = np.random.default_rng(seed)
    batch, length, heads = shape.batch, shape.length, shape.heads
    draw = lambda *dims, by=1.0: jnp.asarray(by * rng.normal(size=dims), dtype)
    q = draw(batch, length, heads, shape.dim, by=shape.dim**-0.5)
    k = draw(batch, length, shape.kv_heads, shape.dim)
    v = draw(batch, length, shape.kv_heads, shape.value_dim)
    state = draw(batch, heads, width or shape.dim, shape.value_dim).astype(jnp.float32)
    dims = {"none": None, "head": (heads,), "token": (batch, length, heads)}[decay]
    rate = None if dims is None else jnp.asarray(-1.2 * rng.uniform(size=dims) ** 3, jnp.float32)
    return q, k, v, state, rate


def gradients(run, count=5, **options):
    """Of (arrays): outputs and all gradients of a loss that weighs every entry differently, of the final state too."""

    def loss(q, k, v, state, log_decay=None):
        o, last = run(q, k, v, log_decay=log_decay, initial_state=state, **options)
        weigh = lambda x, by: jnp.sum(x.astype(jnp.float32) * jnp.cos(by * jnp.arange(x.size)).reshape(x.shape))
        return weigh(o, 1.0) + weigh(last, 0.7), (o, last)

    return jax.jit(lambda *x: jax.grad(loss, tuple(range(count)), has_aux=True)(*x)[::-1])


def both(run, arrays, **options):
    arrays = [x for x in arrays if x is not None]
    return gradients(run, len(arrays), **options)(*arrays)


def kernel(chunk=None, mode="plain"):
    """`linear_scan` by the kernel with a chunk of any size; the public op insists on whole registers."""

    def run(q, k, v, *, segments=None, initial_segment=None, scale=1.0, **options):
        ones = jnp.ones(q.shape[:2], jnp.int32)
        segments = ones if segments is None else segments
        initial_segment = segments[:, 0] if initial_segment is None else initial_segment
        with interpreted(mode):
            return linear_scan_tpu(
                q, k, v, segments=segments, initial_segment=initial_segment, scale=scale, chunk=chunk, **options
            )

    return run


def recurrence(*arrays, **options):
    return linear_scan(*arrays, backend="reference", **options)


def check(arrays, tolerance=2e-5, chunk=16, mode="plain", **options):
    ours = both(kernel(chunk, mode), arrays, **options)
    exact = tuple(x if x is None else x.astype(jnp.float32) for x in arrays)
    all_near(ours, both(recurrence, exact, **options), tolerance)
    assert [x.dtype for x in ours[1]] == [x.dtype for x in arrays if x is not None]
    assert [x.dtype for x in ours[0]] == [arrays[2].dtype, jnp.float32]
    return ours


@in_both_dtypes
def test_odd_shapes(shape, dtype):
    decay = DECAYS[ODD.index(shape) % 3] if dtype == jnp.bfloat16 else "token"
    shape = dataclasses.replace(shape, length=min(shape.length, 300))  # more chunks of 128 only take longer
    check(inputs(shape, decay, dtype), 2e-2 if dtype == jnp.bfloat16 else 2e-5, chunk=None, scale=0.5)


def packs(length=75):
    """Padding in front, between and behind, a document of one token, one (3) without any, and a row of padding."""
    segments = np.zeros((3, length), np.int32)
    segments[0, 3:20], segments[0, 25:26], segments[0, 26:60], segments[0, 66:72] = 1, 1, 2, 4
    segments[1, 40:] = 5
    return jnp.asarray(segments)


CASES = [*((decay, None) for decay in DECAYS), ("none", "symmetric"), ("token", "full")]


@pytest.mark.parametrize(("decay", "taylor"), CASES)
def test_packed_rows_and_whatever_padding_holds(decay, taylor):
    shape = dataclasses.replace(SMALL, batch=3)
    arrays = inputs(shape, decay, width=None if taylor is None else feature_width(shape.dim, taylor))
    arrays = [x for x in arrays if x is not None]
    segments, owner = packs(), jnp.array([1, 9, 2])
    padding = np.asarray(segments) == 0
    spoil = lambda x: jnp.where(padding.reshape(3, 75, *[1] * (x.ndim - 2)), jnp.nan, x)
    bad = [spoil(x) if x.shape[:2] == (3, 75) else x for x in arrays]
    options = dict(segments=segments, initial_segment=owner, scale=0.5, taylor=taylor)
    run = gradients(kernel(16), len(arrays), **options)
    ours = run(*arrays)
    all_near(ours, both(recurrence, arrays, **options), 1e-4 if taylor else 2e-5)
    jax.tree.map(np.testing.assert_array_equal, run(*bad), ours)
    (o, last), (dq, dk, dv, d_state, *_) = ours
    for x in (o, dq, dk, dv):
        assert not np.any(np.asarray(x)[padding])
    np.testing.assert_array_equal(last[2], arrays[3][2])
    assert np.any(d_state[0])
    assert not np.any(d_state[1]), "row 1 starts another document"


@pytest.mark.parametrize("form", ["head", "token"])
def test_decays_without_end_forget_all_and_have_no_gradient(form):
    q, k, v, state, rate = inputs(decay=form)
    rate = rate.at[..., 1].set(-jnp.inf) if form == "head" else rate.at[:, 5::7].set(-jnp.inf)
    (o, last), grads = check((q, k, v, state, rate))
    assert all(np.all(np.isfinite(x)) for x in (o, last, *grads))
    assert not np.any(grads[4][np.isinf(rate)])


def test_strong_decay_stays_finite_where_global_factors_overflow():
    """exp(0.84 t) passes the largest f32 at t = 106."""
    q, k, v, state, _ = inputs(dataclasses.replace(SMALL, length=300))
    check((q, k, v, state, jnp.full(4, -0.84)), chunk=None)
    check((q, k, v, state, jnp.full((2, 300, 4), -0.84)), chunk=None)


def test_no_decay_is_decay_zero():
    q, k, v, state, _ = inputs()
    runs = [both(kernel(16), (q, k, v, state, g)) for g in (None, jnp.zeros(4), jnp.zeros((2, 75, 4)))]
    for out, grads in runs[1:]:
        all_near((out, grads[:4]), (runs[0][0], runs[0][1]), 1e-6)


def test_two_calls_equal_one():
    q, k, v, state, rate = inputs()
    segments, owner = packs()[:2], jnp.array([1, 1])

    @jax.jit
    def run(at, state, owner):
        options = dict(log_decay=rate[:, at], segments=segments[:, at], initial_state=state, initial_segment=owner)
        return kernel(16)(*(x[:, at] for x in (q, k, v)), **options)

    whole, (first, middle) = run(jnp.arange(75), state, owner), run(jnp.arange(50), state, owner)
    second, last = run(jnp.arange(50, 75), middle, jnp.array([2, 5]))
    all_near((jnp.concatenate([first, second], 1), last), whole, 1e-5)


@pytest.mark.parametrize(
    ("decay", "taylor"), [pytest.param("token", None, marks=pytest.mark.slow), ("none", "symmetric")]
)
def test_no_races_and_nothing_uninitialised_is_read(decay, taylor):
    shape = Shape("tiny", batch=1, length=30, heads=2, kv_heads=1, dim=4, value_dim=3)
    arrays = inputs(shape, decay, width=None if taylor is None else feature_width(4, taylor))
    with without_races("tpu") as simulator:
        check(arrays, 1e-4, chunk=8, mode=simulator, segments=packs(75)[:1, 10:40], taylor=taylor)


@pytest.mark.parametrize("map", ["symmetric", "full"])
def test_selections_make_the_features(map):
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    picks, weight = selections(5, map, 8)
    y = np.concatenate([x, np.ones((9, 1)), np.zeros((9, 2))], axis=1)
    first, second = np.moveaxis(np.einsum("tc,cnf->tnf", y, picks), 1, 0)
    np.testing.assert_allclose(first * second * weight, taylor(jnp.asarray(x), map), rtol=1e-6)


def test_every_backend_has_the_features():
    q, k, v, state, rate = inputs(width=feature_width(8, "symmetric"))
    options = dict(log_decay=rate, initial_state=state, scale=0.5)
    run = jax.jit(lambda *x, **how: linear_scan(*x, **options, **how), static_argnames=("taylor", "backend"))
    plain = run(*(taylor(x, "symmetric") for x in (q, k)), v, backend="reference")
    with interpreted():
        for backend in ("reference", "xla", "tpu"):
            all_near(run(q, k, v, taylor="symmetric", backend=backend), plain, 1e-5)


def test_bfloat16_features_and_values_of_another_type():
    """At BASED's width; values in f32 keep sums and outputs in f32."""
    shape = Shape("based", batch=1, length=300, heads=2, kv_heads=2, dim=16, value_dim=65)
    q, k, v, state, _ = inputs(shape, "none", jnp.bfloat16, width=153)
    check((q, k / 2, v, state), 2e-2, chunk=None, taylor="symmetric")
    check((q, k / 2, v.astype(jnp.float32), state), 2e-2, chunk=None, taylor="symmetric")


@pytest.mark.parametrize("mechanism", [BASED, LIGHTNING], ids=lambda m: m.name)
def test_mechanisms_through_the_kernel(mechanism):
    """Forward, gradients and steps after a prompt, against the mechanism's own T×T reference."""
    q, k, v, _, _ = inputs(dataclasses.replace(SMALL, length=60))
    vis = self_visibility(2, 60, segment_ids=packs()[:2, :60])
    spec, depth = mechanism.spec(), ({"depth": (1, 4)} if mechanism.capabilities.depth else {})
    mechanism_of = lambda f, **options: lambda *x: f(*x, vis, Call(spec, **depth, **options))
    loss = lambda f, **options: lambda *x: jnp.sum(jnp.sin(mechanism_of(f, **options)(*x)))
    with interpreted():
        ours = jax.jit(jax.value_and_grad(loss(mechanism.forward, backend="tpu"), (0, 1, 2)))(q, k, v)
    all_near(ours, jax.jit(jax.value_and_grad(loss(mechanism.reference), (0, 1, 2)))(q, k, v), 1e-4)
    sizes = dict(batch=2, capacity=60, heads=4, kv_heads=2, key_dim=8, value_dim=6, dtype=jnp.float32)
    state, parts = mechanism.init_state(spec, **sizes, **depth), []
    step = jax.jit(lambda *x: mechanism.step(*x, Call(spec, backend="tpu", **depth)))
    with interpreted():
        for cut in (slice(0, 41), slice(41, 42), slice(42, 60)):
            part, state = step(state, *(x[:, cut] for x in (q, k, v, default_positions(2, 60), vis.q_segments)))
            parts.append(part)
    all_near(jnp.concatenate(parts, 1), jax.jit(mechanism_of(mechanism.reference))(q, k, v), 1e-4)


def test_based_s_features_never_leave_the_chip():
    """Neither of a chunk nor of a piece: the only arrays with 153 features are states and the constants."""
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    vis = self_visibility(1, 1024)
    loss = lambda *x: jnp.sum(BASED.forward(*x, vis, Call(BASED.spec())).astype(jnp.float32))
    args = (shape(1, 1024, 2, 16), shape(1, 1024, 2, 16), shape(1, 1024, 2, 64))
    with compiling_for("tpu"), recording() as choices:
        program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*args)
    assert choices["linear_scan"] == {"tpu": "this is a tpu"}
    found = set(shapes_outside_kernels(program.jaxpr))
    assert (1, 2, 153, 65) in found, "the state"
    assert (1, 2, 1024, 128) in found, "rows of values"
    rows = [dims for dims in found if dims and math.prod(dims) >= 1024 * 2 * 129 and dims[-2:] != (256, 128)]
    assert not rows, f"rows of features: {rows}"


def shapes_outside_kernels(jaxpr):
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in equation.params.values():
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_outside_kernels(inner)


def test_vmap_and_remat_change_nothing():
    q, k, v, _, rate = inputs(dataclasses.replace(SMALL, batch=3, length=40))

    def call(q, k, v, rate):
        state = jnp.zeros((len(q), 4, 8, 6), jnp.float32)
        return kernel(16)(q, k, v, log_decay=rate, initial_state=state)[0]

    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2, 3)))
    one = lambda *x: call(*(y[None] for y in x))[0]
    with interpreted():
        plain = loss(call)(q, k, v, rate)
        other = jax.vmap(jax.checkpoint(one))
        all_near(loss(other)(q, k, v, rate), plain, 1e-6)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v, _, _ = inputs()
    call = lambda *x, **options: linear_scan(*x, backend="tpu", **options)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call(q, k, v)
    with interpreted():
        with pytest.raises(NotImplementedError, match=r"k is float16: cast it"):
            call(q, k.astype(jnp.float16), v)
        with pytest.raises(NotImplementedError, match=r"whole 128 tokens but chunk is 64"):
            call(q, k, v, chunk=64)
        wide = lambda heads: jax.ShapeDtypeStruct((1, 128, heads, 512), jnp.float32)
        with pytest.raises(NotImplementedError, match=rf"2 \+ 6 states of 512 x 512 .* there is room for {STATES}"):
            jax.eval_shape(call, wide(2), wide(1), wide(1))
        all_near(call(q, k, v, chunk=128), linear_scan(q, k, v, backend="reference"), 1e-5)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v, _, _ = inputs()
    text = lambda q, k, v, **options: str(jax.make_jaxpr(lambda *x: linear_scan(*x, **options))(q, k, v))
    assert "pallas_call" not in text(q, k, v)
    with compiling_for("tpu"):
        assert "pallas_call" in text(q, k, v)
        assert "pallas_call" in text(q, k, v, taylor="full")
        assert "pallas_call" not in text(q, k, v, chunk=64)
        assert "pallas_call" not in text(*(x.astype(jnp.float16) for x in (q, k, v)))
        with recording() as choices:
            assert "pallas_call" not in text(*(x[:, :1] for x in (q, k, v)))
        assert choices == {"linear_scan": {"xla": "1 tokens are too few to fill a chunk"}}
    with interpreted():
        assert "pallas_call" not in text(q, k, v), "a simulator is for who names the backend"


def test_cost_estimates_count_the_products_of_every_chunk():
    def estimates(taylor, dim, v_dim, decay=None):
        shape = lambda heads, dim: jax.ShapeDtypeStruct((1, 512, heads, dim), jnp.float32)
        loss = lambda *x: jnp.sum(linear_scan(*x, log_decay=decay, taylor=taylor)[0])
        with compiling_for("tpu"):
            text = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape(2, dim), shape(1, dim), shape(1, v_dim)))
        return [
            tuple(map(int, x)) for x in re.findall(r"flops=(\d+), transcendentals=(\d+), bytes_accessed=(\d+)", text)
        ]

    row, chunk, state, tokens = 512 * 128 * 4, 256, 128 * 128, 2 * 512
    forward, states, backward = estimates(None, 128, 128, jnp.zeros(2))
    assert [x[0] for x in (forward, states, backward)] == [
        2 * tokens * (2 * chunk * 128 + 2 * state),
        2 * tokens * state,
        2 * tokens * (5 * chunk * 128 + 4 * state),
    ]
    assert [x[1] for x in (forward, states, backward)] == [tokens * (chunk + 2), tokens * 2, tokens * (chunk + 2)]
    # Rows of q, k, v, o and their gradients, keys and values once a query head but in the last kernel; states held.
    for (_, _, moved), rows, held in ((forward, 8, 4), (states, 4, 2 + 4), (backward, 2 * 3 + 4, 4 + 4)):
        least = rows * row + held * state * 4
        assert least <= moved < 1.02 * least
    plain, wide = (estimates(x, 16, 64) for x in (None, "symmetric"))
    assert wide[0][0] - plain[0][0] == 2 * tokens * (2 * (256 - 64) * 64 + 4 * 64 * 256)
