"""The Hopper kernels of the neural memory, simulated, against the recurrence in f32: values, states, every gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, interpreted
from pallas_kernels.neural_memory import neural_memory
from pallas_kernels.neural_memory.gpu_plan import FINAL, FIRST, FLAGS, GROUP, LAST, SLOT, TILE, layout, visits
from pallas_kernels.shapes import ODD
from tests.kernels.late import delay
from tests.kernels.neural_memory_cases import RATES, SEGMENTS, inside, placed
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

SLOW = pytest.mark.slow
NAMES = ("y", "M", "S", "frozen", *(f"d_{n}" for n in ("q", "k", "v", *RATES, "start", "M", "S", "frozen")))


def rounded(length, **sizes):
    """`setting` with one matrix a head, its tokens in bfloat16."""
    x, rest = placed(length, **{"depth": 1, **sizes})
    return tuple(a.astype(jnp.bfloat16) for a in x), rest


def both(x, rest, state, backend, how="plain", **options):
    """Results and the gradients of a loss that weighs every entry differently, by name."""

    def loss(x, rest, weights):
        before = None if state is None else state.replace(**weights)
        y, after = neural_memory(*x, **rest, state=before, backend=backend, **options)
        parts = y, after.M[0], after.S[0], after.frozen[0]
        waves = lambda p: jnp.sum(jnp.sin(p.astype(jnp.float32)) * jnp.cos(jnp.arange(p.size)).reshape(p.shape))
        return sum(map(waves, parts)), (parts, (after.count, after.segment))

    weights = {} if state is None else {n: getattr(state, n) for n in ("M", "S", "frozen")}
    with interpreted(how if backend == "gpu" else "off"):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, (parts, counts)), (dx, d_rest, d_weights) = run(x, rest, weights)
    gradients = (*dx, *(d_rest[r] for r in RATES), *d_rest["start"], *(w[0] for w in d_weights.values()))
    return dict(zip(NAMES, (*parts, *gradients), strict=False)), counts


def close(ours, theirs, rtol):
    """Largest error below `rtol` of the largest value."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(expected, np.float64)
        assert a.shape == b.shape, name
        error, largest = np.abs(a - b).max(), np.abs(b).max()
        assert error <= rtol * largest, f"{name}: {error} of {largest}"


def check(x, rest, state=None, *, how="plain", rtol=1e-2, **options):
    """The simulated kernel against the recurrence on the same numbers; returns what the kernel says."""
    exact = tuple(a.astype(jnp.float32) for a in x)
    theirs, counts = both(exact, rest, state, "reference", **options)
    ours, counted = both(x, rest, state, "gpu", how, **options)
    jax.tree.map(np.testing.assert_array_equal, counted, counts)
    for name in ("y", "d_q", "d_k", "d_v"):
        assert ours[name].dtype == jnp.bfloat16, name
    assert all(ours[name].dtype == jnp.float32 for name in ours.keys() - {"y", "d_q", "d_k", "d_v"})
    close(ours, theirs, rtol)
    return ours


def test_a_document_in_chunks_of_a_tile():
    """Three visits, the last one to a tile that is not full."""
    check(*rounded(150, batch=1, heads=2), chunk=64)


def test_the_widest_heads_have_three_warpgroups_and_narrow_blocks_of_columns():
    """Two visits to the first tile; two blocks of 32 columns."""
    check(*rounded(70, batch=1, heads=1, dim=132, value_dim=40), chunk=30, read_after_write=False)


@SLOW
def test_wide_heads_have_two_warpgroups_and_two_blocks_of_columns():
    check(*rounded(70, batch=1, heads=1, dim=70, value_dim=70), chunk=35, read_after_write=False)


def test_packed_documents_behind_a_state():
    """Padding in front, between and behind; documents of 1, 2 and more tokens; a state in the middle of a chunk."""
    x, rest = rounded(43)
    ours = check(x, rest, inside(rest["start"], 2), segments=jnp.asarray(SEGMENTS), chunk=16)
    for name in ("y", "d_q", "d_k", "d_v", *(f"d_{r}" for r in RATES)):
        assert not np.asarray(ours[name], np.float32)[SEGMENTS == 0].any(), name


def test_a_chunk_of_several_tiles_is_entered_in_the_middle():
    """Gradients are taken at weights that were kept tiles ago, first at those of the state."""
    x, rest = rounded(170, batch=1, heads=1)
    check(x, rest, inside(rest["start"], 1), chunk=90)


@SLOW
@pytest.mark.parametrize(("chunk", "read_after_write"), [(5, False), (7, True), (20, True), (64, False)])
def test_packed_documents_at_other_chunks(chunk, read_after_write):
    """Parts that do not fill a tile; boundaries inside of parts."""
    x, rest = rounded(43)
    options = {"segments": jnp.asarray(SEGMENTS), "chunk": chunk, "read_after_write": read_after_write}
    check(x, rest, inside(rest["start"], 2), **options)


@SLOW
@pytest.mark.parametrize("shape", ODD, ids=lambda shape: shape.name)
def test_odd_lengths_and_widths(shape):
    sizes = {"batch": shape.batch, "heads": shape.heads, "dim": shape.dim, "value_dim": shape.value_dim}
    check(*rounded(shape.length, **sizes), chunk={1: 16, 63: 16, 100: 30, 257: 150, 1000: 500}[shape.length])


@SLOW
def test_errors_do_not_grow_with_the_length():
    check(*rounded(1000, batch=1, heads=1, dim=16, value_dim=16), chunk=64)


@SLOW
def test_rates_of_exactly_zero_and_one():
    """All eight corners in turn, in both directions of the loss."""
    x, rest = rounded(24)
    corner = jnp.arange(24)[None, :, None] + jnp.arange(2)[:, None, None] * 3 + jnp.arange(2)
    rates = {r: (corner // 2**i % 2).astype(jnp.float32) * (0.05 if r == "theta" else 1) for i, r in enumerate(RATES)}
    check(x, {**rest, **rates}, inside(rest["start"], 2), chunk=12)


@SLOW
def test_nan_in_padding_reaches_nobody():
    x, rest = rounded(43)
    segments = jnp.asarray(SEGMENTS)
    spoil = lambda a: jnp.where((segments == 0).reshape(2, 43, *[1] * (a.ndim - 2)), jnp.nan, a)
    bad = {**rest, **{r: spoil(rest[r]) for r in RATES}}
    call = lambda x, rest: both(x, rest, inside(rest["start"], 2), "gpu", segments=segments, chunk=16)
    jax.tree.map(np.testing.assert_array_equal, call(x, rest), call(tuple(map(spoil, x)), bad))


def test_pieces_with_a_carried_state_equal_one_call():
    x, rest = rounded(43, heads=1)
    rates = {r: rest[r] for r in RATES}
    call = partial(neural_memory, start=rest["start"], chunk=7, backend="gpu")
    segments = jnp.asarray(SEGMENTS)
    with interpreted():
        whole, last = call(*x, **rates, segments=segments)
        state, outputs, at = None, [], 0
        for n in (20, 23):
            cut = lambda y, at=at, n=n: y[:, at : at + n]
            o, state = call(*map(cut, x), **jax.tree.map(cut, rates), segments=cut(segments), state=state)
            outputs.append(o)
            at += n
    pieces = {"y": jnp.concatenate(outputs, axis=1), "M": state.M[0], "S": state.S[0], "frozen": state.frozen[0]}
    close(pieces, {"y": whole, "M": last.M[0], "S": last.S[0], "frozen": last.frozen[0]}, 1e-2)
    np.testing.assert_array_equal(state.count, [19, 13])


def test_no_races_and_nothing_uninitialised_is_read():
    """More tiles than buffers; one is padding only."""
    x, rest = rounded(64 * 4, batch=1, heads=1)
    segments = jnp.asarray(np.repeat([[0, 3, 5]], [70, 80, 106], axis=1))
    with without_races("gpu") as simulator:
        check(x, rest, inside(rest["start"], 1), how=simulator, segments=segments, chunk=64)


@pytest.mark.parametrize(
    ("dim", "late", "only"),
    [
        pytest.param(70, "fetch", None, id="copies", marks=SLOW),
        pytest.param(70, "product", 0, id="products of the first of two"),
        pytest.param(70, "product", 1, id="products of the second of two"),
        *[pytest.param(132, "product", n, id=f"products of {n} of three", marks=SLOW) for n in range(3)],
    ],
)
def test_nobody_relies_on_others_being_quick(dim, late, only, monkeypatch):
    simulator = delay(monkeypatch, late, only)
    check(*rounded(130, batch=1, heads=1, dim=dim), how=simulator, chunk=64)


@SLOW
def test_vmap_changes_nothing():
    """Rematerialisation is tested where kernels are compiled: JAX cannot do it to the simulator."""
    x, rest = rounded(30, batch=2, heads=1)
    rates = lambda x: {r: jnp.full(x[0].shape[:3], f) for r, f in zip(RATES, (0.6, 0.05, 0.1), strict=True)}
    call = lambda *x: neural_memory(*x, **rates(x), start=rest["start"], chunk=16, backend="gpu")[0]
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32))), argnums=(0, 1, 2)))
    with interpreted():
        plain, each = loss(call)(*x), loss(jax.vmap(lambda *x: call(*(a[None] for a in x))[0]))(*x)
    close(dict(enumerate(each)), dict(enumerate(plain)), 1e-6)


@pytest.mark.parametrize("chunk", [5, 16, 64, 100])
def test_every_token_has_a_visit_and_every_tile_one(chunk):
    """In order, each tile between its first and its final visit; states are kept in places of their own."""
    plan = layout(43, 64, chunk=chunk, whole=False, read_after_write=True, staged=False, interpret=False)
    run = jax.jit(visits, static_argnums=(3, 4))
    at, *_ = run(jnp.asarray(SEGMENTS), jnp.array([1, 1]), jnp.array([3, 4]), plan, chunk)
    for row in range(2):
        table = np.asarray(at.table[row, : at.count[row]])
        tile, group = np.divmod(table[:, GROUP], plan.groups)
        assert (np.diff(table[:, GROUP]) > 0).all()
        assert set(tile) == set(range(plan.tiles))
        flags = table[:, FLAGS]
        np.testing.assert_array_equal(flags & FIRST > 0, np.diff(tile, prepend=-1) > 0)
        np.testing.assert_array_equal(flags & FINAL > 0, np.diff(tile, append=plan.tiles) > 0)
        renews = group % 3 > 0
        assert np.flatnonzero(flags & LAST).tolist() == np.flatnonzero(renews)[-1:].tolist()
        assert bool(at.renewed[row]) == renews.any()
        kept = table[group % 3 < 2, SLOT]
        assert len(set(kept)) == len(kept)
        assert (kept < plan.slots - 2).all()
        own = np.asarray(at.marks[row, :, 1]).reshape(-1)
        used = plan.size * plan.parts
        live = np.zeros((plan.tiles, TILE), bool)
        live[:, :used] = np.pad(SEGMENTS[row] > 0, (0, plan.tiles * used - 43)).reshape(-1, used)
        np.testing.assert_array_equal(own >= 0, live.reshape(-1))


def test_a_named_backend_says_why_it_cannot_run():
    (q, k, v), rest = rounded(8)
    call = lambda q=q, k=k, v=v, **more: neural_memory(q, k, v, **{**rest, **more}, backend="gpu")
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match="has no forward-mode derivatives but tangents is True: use"):
            call(tangents=True)
        with pytest.raises(NotImplementedError, match="memories of one matrix but start has 2: use 'xla'"):
            call(start=(jnp.zeros((2, 4, 6)), jnp.zeros((2, 6, 3))))
        with pytest.raises(NotImplementedError, match="v is float32: cast it, allow it with"):
            call(v=v.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="eta is float16: cast it or use 'xla'"):
            call(eta=rest["eta"].astype(jnp.float16))
        wide = jnp.zeros((2, 8, 2, 200), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="key dims up to 192 but q has 200: use 'xla'"):
            call(wide, wide, start=(jnp.zeros((2, 200, 3)),))


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    (q, k, v), rest = rounded(8, dim=192, value_dim=192)
    text = lambda q=q, **more: str(jax.make_jaxpr(lambda q: neural_memory(q, k, v, **{**rest, **more}))(q))
    kernel = "neural_memory_forward"
    assert kernel not in text()
    with compiling_for("gpu"):
        assert kernel in text()
        assert kernel not in text(tangents=True)
        assert kernel not in text(q.astype(jnp.float32))
        assert kernel not in text(start=(jnp.zeros((2, 192, 6)), jnp.zeros((2, 6, 192))))
    with interpreted():
        assert kernel not in text(), "a simulator is for who names the backend"


@needs_costs
@pytest.mark.parametrize(("dim", "blocks"), [(128, 2), (192, 6)])
def test_the_cost_estimate_counts_the_products_that_are_done(dim, blocks):
    """One matrix in one head, 4 visits: by hand."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    token, rate = shape(1, 256, 1, dim, dtype=jnp.bfloat16), shape(1, 256, 1)
    call = lambda q, e, w: neural_memory(q, q, q, eta=e, theta=e, alpha=e, start=(w,), chunk=64, backend="gpu")
    loss = lambda *x: jnp.sum(call(*x)[0].astype(jnp.float32))
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(jax.grad(loss))(token, rate, shape(1, dim, dim)))
    width = dim // blocks
    # Errors, reads and writes of M and S; scores; what the tile itself wrote.
    forward = 64 * ((1 + 2 + 2) * dim * width + dim * 64 + 64 * width)
    # Errors, dU, dq, dk, and dM, dS and dF; scores, dq and dk; dU and dA.
    backward = 64 * ((1 + 2 + 2 + 3 + 3) * dim * width + (1 + 1 + 1) * dim * 64 + (1 + 1) * 64 * width)
    assert f"flops={4 * blocks * 2 * forward}" in text
    assert f"flops={4 * blocks * 2 * backward}" in text
