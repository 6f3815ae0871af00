"""The TPU kernels of the neural memory, simulated, against the recurrence: values, states and every gradient."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, interpreted
from pallas_kernels.neural_memory import IMPLEMENTATIONS, neural_memory
from pallas_kernels.neural_memory.tpu import neural_memory_tpu
from pallas_kernels.neural_memory.tpu_plan import layout
from pallas_kernels.neural_memory.tpu_tile import products
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, normal
from tests.kernels.neural_memory_cases import RATES, SEGMENTS, inside, placed
from tests.kernels.simulators import without_races


def both(x, rest, state, backend, how="plain", **options):
    """(y, state) and the gradients of a loss that weighs every entry differently, by q, k, v, rates, M_0 and state."""

    def loss(x, rest, weights):
        before = None if state is None else state.replace(**weights)
        y, after = neural_memory(*x, **rest, state=before, backend=backend, **options)
        parts = [p.astype(jnp.float32) for p in jax.tree.leaves((y, after.M, after.S, after.frozen))]
        return sum(jnp.sum(jnp.sin(p) * jnp.cos(jnp.arange(p.size)).reshape(p.shape)) for p in parts), (y, after)

    weights = {} if state is None else {n: getattr(state, n) for n in ("M", "S", "frozen")}
    with interpreted(how if backend == "tpu" else "off"):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, rest, weights)


def check(x, rest, state=None, rtol=2e-5, how="plain", **options):
    """Everything equals the reference; returns y."""
    (_, ours), d_ours = both(x, rest, state, "tpu", how, **options)
    (_, theirs), d_theirs = both(x, rest, state, "reference", **options)
    for actual, expected in zip(*(jax.tree.leaves(t) for t in ((ours, d_ours), (theirs, d_theirs))), strict=True):
        assert actual.dtype == expected.dtype
        close(actual, expected, rtol=rtol)
    return np.asarray(ours[0], np.float32)


@pytest.fixture
def small(monkeypatch):
    """Tiles of at most 8 tokens, a state kept every 16: several blocks and tiles within few tokens."""
    monkeypatch.setitem(IMPLEMENTATIONS, "tpu", partial(neural_memory_tpu, tile=8, block=16))


SLOW = pytest.mark.slow
BF16 = [pytest.param(s, jnp.bfloat16, id=f"{s.name}-bf16", marks=[] if s.length == 100 else SLOW) for s in ODD]


@pytest.mark.parametrize(("shape", "dtype"), [*(pytest.param(s, jnp.float32, id=s.name) for s in ODD), *BF16])
def test_odd_lengths_and_widths(shape, dtype):
    """One matrix a head; chunks below, at and above a tile's largest size."""
    length = min(shape.length, 300)  # more blocks only take longer: the reference keeps three matrices a token and head
    heads = 1 if shape.length == 1000 else shape.heads
    sizes = {"batch": shape.batch, "heads": heads, "dim": shape.dim, "value_dim": shape.value_dim}
    x, rest = placed(length, depth=1, **sizes)
    chunk = {1: 16, 63: 16, 100: 30, 257: 150, 1000: 64}[shape.length]
    y = check(tuple(a.astype(dtype) for a in x), rest, rtol=5e-5 if dtype == jnp.float32 else 2e-2, chunk=chunk)
    assert y.any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("depth", "chunk", "read_after_write"),
    [pytest.param(1, 5, False, marks=SLOW), (1, 20, True), (2, 7, True), (3, 20, False)],
)
def test_packed_documents_behind_a_state(depth, chunk, read_after_write):
    """A state in mid-chunk; documents that begin in one tile, boundaries inside tiles, chunks of several tiles."""
    x, rest = placed(43, depth=depth)
    state = inside(rest["start"], 2)
    segments = jnp.asarray(SEGMENTS)
    y = check(x, rest, state, segments=segments, chunk=chunk, read_after_write=read_after_write)
    assert not y[SEGMENTS == 0].any(), "padding gives zeros"


@SLOW
@pytest.mark.parametrize("shape", ODD[:4], ids=lambda s: s.name)
def test_two_layers_at_odd_lengths_and_widths(shape):
    sizes = {"batch": 1, "heads": shape.kv_heads, "dim": shape.dim, "value_dim": shape.value_dim}
    x, rest = placed(shape.length, depth=2, width=2 * shape.dim, **sizes)
    check(x, rest, inside(rest["start"], 1), rtol=5e-5, chunk=16)


@pytest.mark.usefixtures("small")
def test_rates_of_exactly_zero_and_one():
    """All eight corners in turn, in both directions of the loss."""
    x, rest = placed(24, depth=1)
    corner = jnp.arange(24)[None, :, None] + jnp.arange(2)[:, None, None] * 3 + jnp.arange(2)
    rates = {r: (corner // 2**i % 2).astype(jnp.float32) * (0.05 if r == "theta" else 1) for i, r in enumerate(RATES)}
    check(x, {**rest, **rates}, inside(rest["start"], 2), chunk=12)


@pytest.mark.usefixtures("small")
def test_nan_in_padding_reaches_nobody():
    x, rest = placed(43, depth=2)
    segments = jnp.asarray(SEGMENTS)
    spoil = lambda a: jnp.where((segments == 0).reshape(2, 43, *[1] * (a.ndim - 2)), jnp.nan, a)
    bad = {**rest, **{r: spoil(rest[r]) for r in RATES}}
    options = {"segments": segments, "chunk": 7}
    state = inside(rest["start"], 2)
    one, other = both(x, rest, state, "tpu", **options), both(tuple(map(spoil, x)), bad, state, "tpu", **options)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.usefixtures("small")
def test_pieces_with_a_carried_state_equal_one_call():
    x, rest = placed(43, depth=1)
    rates = {r: rest[r] for r in RATES}
    call = partial(neural_memory, start=rest["start"], chunk=7, backend="tpu")
    segments = jnp.asarray(SEGMENTS)
    with interpreted():
        whole, last = call(*x, **rates, segments=segments)
        state, outputs, at = None, [], 0
        for n in (20, 4, 19):
            cut = lambda y, at=at, n=n: y[:, at : at + n]
            o, state = call(*map(cut, x), **jax.tree.map(cut, rates), segments=cut(segments), state=state)
            outputs.append(o)
            at += n
    close(jnp.concatenate(outputs, axis=1), whole)
    jax.tree.map(close, state, last)
    np.testing.assert_array_equal(state.count, [19, 13])


@pytest.mark.usefixtures("small")
def test_no_races_and_nothing_uninitialised_is_read():
    x, rest = placed(20, batch=1, heads=2, depth=2)
    segments = jnp.asarray(np.repeat([[0, 1, 2, 0]], [1, 13, 4, 2], axis=1))
    with without_races("tpu") as simulator:
        check(x, rest, inside(rest["start"], 1), how=simulator, segments=segments, chunk=8)


def test_products_of_neighbours_and_their_gradient():
    """Against loops in numpy, in which nothing is divided; two rates are exactly 0."""
    rate = np.array([0.5, 0.0, 0.9, 1.0, 0.7, 0.0, 0.3, 0.8])
    weight = normal(0, (8, 8)).astype(np.float64)
    expected, gradient = np.zeros((8, 8)), np.zeros(8)
    for i, j in np.ndindex(8, 8):
        if i >= j:
            expected[i, j] = np.prod(rate[j + 1 : i + 1])
            for s in range(j + 1, i + 1):
                gradient[s] += weight[i, j] * np.prod(rate[j + 1 : s]) * np.prod(rate[s + 1 : i + 1])
    p, pull = jax.vjp(products, jnp.asarray(rate, jnp.float32)[:, None])
    close(p, expected)
    close(pull(jnp.asarray(weight, jnp.float32))[0][:, 0], gradient)


@pytest.mark.usefixtures("small")
def test_vmap_and_remat_change_nothing():
    x, rest = placed(16, batch=3, heads=1, depth=1)
    call = lambda *x: neural_memory(*x, **rates_of(x), start=rest["start"], chunk=8, backend="tpu")[0]
    rates_of = lambda x: {r: jnp.full(x[0].shape[:3], f) for r, f in zip(RATES, (0.6, 0.05, 0.1), strict=True)}
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))
    with interpreted():
        plain = loss(call)(*x)
        one = lambda *x: call(*(a[None] for a in x))[0]
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(partial(close, rtol=1e-6), loss(other)(*x), plain)


def test_a_named_backend_says_why_it_cannot_run():
    (q, k, v), rest = placed(8, depth=1)
    call = lambda q=q, **more: neural_memory(q, k, v, **{**rest, **more}, backend="tpu")
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match="has no forward-mode derivatives but tangents is True: use"):
            call(tangents=True)
        with pytest.raises(NotImplementedError, match="q is float16: cast it"):
            call(q.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match=r"start\[0\] is float16: cast it"):
            call(start=(rest["start"][0].astype(jnp.float16),))
        with pytest.raises(NotImplementedError, match=r"VMEM but start has layers \[\(4, 3000\), \(3000, 3\)\].*xla"):
            call(start=(jnp.zeros((2, 4, 3000)), jnp.zeros((2, 3000, 3))))
        with jax.enable_x64(True):
            state = jax.tree.map(lambda a: a.astype(jnp.float64), inside(rest["start"], 2).M)
            with pytest.raises(NotImplementedError, match=r"state.M\[0\] is float64"):
                call(state=inside(rest["start"], 2).replace(M=state))
            with pytest.raises(NotImplementedError, match="q is float64"):
                call(q.astype(jnp.float64))


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    (q, k, v), rest = placed(8, depth=2)
    text = lambda q=q, **more: str(jax.make_jaxpr(lambda q: neural_memory(q, k, v, **{**rest, **more}))(q))
    assert "pallas_call" not in text()
    with compiling_for("tpu"):
        assert "pallas_call" in text()
        assert "pallas_call" not in text(tangents=True)
        assert "pallas_call" not in text(q.astype(jnp.float16))
        assert "pallas_call" not in text(start=(jnp.zeros((2, 4, 3000)), jnp.zeros((2, 3000, 3))))
    with interpreted():
        assert "pallas_call" not in text(), "a simulator is for who names the backend"


def test_the_cost_estimate_counts_the_products_that_are_done():
    """One matrix of 64 · 64, 4 tiles of 64 tokens in one head: by hand."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    token, rate = shape(1, 256, 1, 64), shape(1, 256, 1)
    call = lambda q, e, w: neural_memory(q, q, q, eta=e, theta=e, alpha=e, start=(w,), chunk=64, backend="tpu")
    loss = lambda *x: jnp.sum(call(*x)[0])
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(jax.grad(loss))(token, rate, shape(1, 64, 64)))
    cube = 2 * 64**3
    write = 1 + 1 + 2  # A E; the errors; M and S
    read = 2 + 2  # of M and S; of what the tile wrote
    assert f"flops={4 * (write + read) * cube}" in text
    assert f"flops={4 * (3 * (write + read) + 2) * cube + 2 * write * cube}" in text, "2 tiles a block: 2 are rewritten"


def test_tiles_divide_chunks_and_blocks_shrink_until_they_fit():
    memory = lambda *widths: tuple(jnp.zeros((1, *w)) for w in pairwise(widths))
    size = lambda chunk, length=4096: layout(memory(64, 64), length, chunk=chunk).size
    assert [size(c) for c in (1, 16, 100, 128, 192, 200, 509, 512)] == [1, 16, 100, 128, 96, 100, 128, 128]
    assert size(16, length=5) == 5
    tiles = lambda *widths: layout(memory(*widths), 4096, chunk=16).tiles
    assert tiles(64, 128, 64) == 8
    assert 4 <= tiles(128, 256, 128) < 8
    assert 1 <= tiles(192, 384, 192) < 8
