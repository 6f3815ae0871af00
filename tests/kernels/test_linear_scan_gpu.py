"""The Hopper kernel of `linear_scan`, simulated: equal to the recurrence, forwards and in every gradient."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, interpreted
from pallas_kernels.linear_scan import gpu_backward, gpu_kernel, linear_scan
from pallas_kernels.linear_scan.gpu import linear_scan_gpu, unfit
from pallas_kernels.linear_scan.gpu_kernel import Plan, scan
from pallas_kernels.linear_scan.reference import linear_scan_reference
from pallas_kernels.shapes import ODD
from tests.kernels.late import delay
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

DECAYS = ("none", "head", "token")
RESULTS = ("o", "last", "dq", "dk", "dv", "d_start", "d_decay")


def inputs(length, decay="token", *, batch=1, heads=2, kv_heads=1, dim=60, width=40, strong=0.3):
    """q, k, v, the first state and log decays between -strong and 0; q and k short, so that rows grow slowly."""
    draw = np.random.default_rng(0)
    short = lambda *shape: jnp.asarray(draw.normal(size=shape) * shape[-1] ** -0.25, jnp.bfloat16)
    q, k = short(batch, length, heads, dim), short(batch, length, kv_heads, dim)
    v = jnp.asarray(draw.normal(size=(batch, length, kv_heads, width)), jnp.bfloat16)
    start = jnp.asarray(draw.normal(size=(batch, heads, dim, width)), jnp.float32)
    shape = {"none": None, "head": (heads,), "token": (batch, length, heads)}[decay]
    return q, k, v, start, None if shape is None else jnp.asarray(-draw.uniform(0, strong, shape), jnp.float32)


def both(run, arrays, segments, owner):
    """Outputs and gradients of a loss that weighs every entry of o and of the last state differently."""
    weigh = lambda name, x: jnp.sum(
        x.astype(jnp.float32) * jax.random.normal(jax.random.key(zlib.crc32(name.encode())), x.shape)
    )

    def loss(q, k, v, start, log_decay):
        o, last = run(
            q,
            k,
            v,
            log_decay=log_decay,
            segments=segments,
            initial_state=start,
            initial_segment=owner,
            scale=0.3,
            chunk=None,
        )
        return weigh("o", o) + weigh("last", last), (o, last)

    which = range(5 if arrays[4] is not None else 4)
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=tuple(which), has_aux=True))(*arrays)
    return dict(zip(RESULTS, (*out, *gradients), strict=False))


def close(ours, theirs, rtol):
    """Largest error below `rtol` of the largest value."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        a, b = np.asarray(ours[name], np.float64), np.asarray(expected, np.float64)
        assert a.shape == b.shape, name
        error, largest = np.abs(a - b).max(), np.abs(b).max()
        assert error <= rtol * largest, f"{name}: {error} of {largest}"


def check(arrays, segments=None, owner=None, *, mode="plain", rtol=1e-2):
    """The simulated kernel against the recurrence in f32 on the same numbers."""
    batch, length = arrays[0].shape[:2]
    segments = jnp.ones((batch, length), jnp.int32) if segments is None else segments
    owner = segments[:, 0] if owner is None else owner
    exact = tuple(None if x is None else x.astype(jnp.float32) for x in arrays)
    theirs = both(linear_scan_reference, exact, segments, owner)
    with interpreted(mode):
        ours = both(linear_scan_gpu, arrays, segments, owner)
    wide = arrays[2].dtype
    for name, like in zip(("o", "last", "dq", "dk", "dv"), (wide, jnp.float32, *[jnp.bfloat16] * 2, wide), strict=True):
        assert ours[name].dtype == like, name
    close(ours, theirs, rtol)
    return ours


@pytest.mark.parametrize(
    "shape", [pytest.param(x, marks=[pytest.mark.slow] * (x.length != 100)) for x in ODD], ids=lambda x: x.name
)
def test_odd_lengths_dims_and_groups(shape):
    arrays = inputs(shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, width=shape.value_dim)
    check(arrays)


def test_wide_heads_are_cut():
    """Features and columns in two parts each, none of whole widths."""
    check(inputs(70, heads=2, dim=136, width=160))


def test_taylor_features_are_read_in_two_parts():
    """As BASED calls it: 136 features in bfloat16, f32 values with a column of ones."""
    q, k, v, _, _ = inputs(70, "none", dim=15, width=9)
    arrays = q, k / 2, v.astype(jnp.float32).at[..., -1].set(1.0)

    def run(backend, *arrays):
        def loss(*x):
            o, last = linear_scan(*x, taylor="symmetric", scale=0.5, backend=backend)
            return jnp.sum(jnp.sin(o / 8)) + jnp.sum(jnp.cos(last)), (o, last)

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return dict(zip(("o", "last", "dq", "dk", "dv"), (*out, *gradients), strict=True))

    with interpreted():
        ours = run("gpu", *arrays)
    assert ours["o"].dtype == jnp.float32
    close(ours, run("reference", *(x.astype(jnp.float32) for x in arrays)), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
def test_every_kind_of_decay(decay):
    check(inputs(130, decay), rtol=3e-2 if decay == "head" else 1e-2)  # a head's is a sum that nearly cancels


@pytest.mark.parametrize(
    ("length", "mark"), [(290, 2), pytest.param(1100, gpu_kernel.MARK, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_long_sequences_start_again_from_saved_states(length, mark, monkeypatch):
    """More than two stretches between saved states, the last one short."""
    for module in (gpu_kernel, gpu_backward):
        monkeypatch.setattr(module, "MARK", mark)
    check(inputs(length, "token", heads=1, dim=8, width=8, strong=0.05))


def test_values_in_float32_have_outputs_in_float32():
    """Sums that are divided by afterwards; products are bfloat16 all the same."""
    q, k, v, *rest = inputs(100, "none")
    ours = check((q, k, v.astype(jnp.float32), *rest))
    assert (np.asarray(ours["o"]) != np.asarray(ours["o"].astype(jnp.bfloat16), np.float32)).any()


def test_tokens_that_forget_all():
    q, k, v, start, decay = inputs(100)
    decay = decay.at[:, 30].set(-jnp.inf).at[:, 70:72].set(-jnp.inf)
    ours = check((q, k, v, start, decay))
    assert not np.asarray(ours["d_decay"])[:, 30].any(), "no gradient below the floor"


def packs(length):
    """Padding in front, in between and behind, documents of length 1 and of whole chunks; segment 3 is empty."""
    segments = np.zeros((2, length), np.int32)
    segments[0, 3:20], segments[0, 25:26], segments[0, 26:128], segments[0, 133:190] = 1, 1, 2, 7
    segments[1, 64:65], segments[1, 65:140] = 4, 5
    return jnp.asarray(segments)


@pytest.mark.parametrize("decay", ["head", "token", pytest.param("none", marks=pytest.mark.slow)])
def test_packed_documents_and_padding(decay):
    """The first row's state before token 0 belongs to its first document, the second row's to nobody."""
    q, k, v, start, log_decay = inputs(200, decay, batch=2, dim=16, width=16)
    segments = packs(200)
    rtol = 3e-2 if decay == "head" else 1e-2
    ours = check((q, k, v, start, log_decay), segments, jnp.array([1, 9]), rtol=rtol)
    dead = np.asarray(segments == 0)
    for name in ("o", "dq", "dk", "dv"):
        assert not np.asarray(ours[name], np.float32)[dead].any(), name


def test_padding_may_hold_nan():
    q, k, v, start, decay = inputs(100, "head", dim=16, width=16)
    segments = jnp.ones((1, 100), jnp.int32).at[0, 20:70].set(0)
    spoil = lambda x: x.at[:, 20:70].set(jnp.nan)
    ours, clean = (
        check_values(arrays, segments)
        for arrays in ((spoil(q), spoil(k), spoil(v), start, decay), (q, k, v, start, decay))
    )
    close(ours, clean, 0.0)


def check_values(arrays, segments):
    with interpreted():
        return both(linear_scan_gpu, arrays, segments, segments[:, 0])


def test_no_races_and_nothing_uninitialised_is_read(monkeypatch):
    """More chunks than buffers, so that buffers are filled again; what the simulator sees are loads and stores."""
    monkeypatch.setattr(gpu_kernel, "DEPTH", 2)
    with without_races("gpu") as simulator:
        check(inputs(64 * 4, heads=1, dim=16, width=16), mode=simulator)


@pytest.mark.parametrize(
    ("late", "only"),
    [("fetch", None), ("products", 0), ("products", 1), ("add_products", 0), ("add_products", 1)],
    ids=["copies", "first products of 0", "first products of 1", "second products of 0", "second products of 1"],
)
def test_nobody_relies_on_others_being_quick(late, only, monkeypatch):
    seconds = 0.03 if only is None else 0.5  # long enough for the other to do a step
    simulator = delay(monkeypatch, late, only, seconds=seconds)
    monkeypatch.setattr(gpu_kernel, "DEPTH", 2)
    arrays, segments = inputs(64 * 4 - 3, heads=1, dim=16, width=16), jnp.ones((1, 64 * 4 - 3), jnp.int32)
    if only is None:
        check(arrays, mode=simulator)
    else:  # each of the four calls of the kernel waits alike
        exact = tuple(x.astype(jnp.float32) for x in arrays)
        with interpreted(simulator):
            ours = forward(linear_scan_gpu, arrays, segments)
        close(ours, forward(linear_scan_reference, exact, segments), 1e-2)


def forward(run, arrays, segments):
    """Outputs alone, in f32."""
    q, k, v, start, decay = arrays
    options = dict(segments=segments, initial_state=start, initial_segment=segments[:, 0], scale=0.3, chunk=None)
    out = jax.jit(lambda q, k, v: run(q, k, v, log_decay=decay, **options))(q, k, v)
    return {name: x.astype(jnp.float32) for name, x in zip(RESULTS[:2], out, strict=True)}


def test_a_simulator_with_too_few_threads_is_refused_instead_of_waited_for(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(NotImplementedError, match="3 warpgroups takes more threads than the 2"):
        check_values(inputs(8), jnp.ones((1, 8), jnp.int32))


@pytest.mark.slow
def test_vmap_changes_nothing():
    """Rematerialisation is tested where kernels are compiled: JAX cannot do it to the simulator."""
    arrays = inputs(70, batch=2, heads=1, dim=8, width=8)
    call = lambda q, k, v, start, decay: linear_scan_gpu(
        q,
        k,
        v,
        log_decay=decay,
        segments=jnp.ones(q.shape[:2], jnp.int32),
        initial_state=start,
        initial_segment=jnp.ones(q.shape[:1], jnp.int32),
        scale=0.3,
    )
    one = lambda *x: jax.tree.map(lambda y: y[0], call(*(y[None] for y in x)))
    loss = lambda f: lambda *x: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in f(*x))
    with interpreted():
        expected = jax.jit(jax.grad(loss(call), argnums=(0, 1, 2, 3, 4)))(*arrays)
        got = jax.jit(jax.grad(loss(jax.vmap(one)), argnums=(0, 1, 2, 3, 4)))(*arrays)
    close(dict(enumerate(got)), dict(enumerate(expected)), 1e-6)


def test_what_it_cannot_do_it_says():
    q, k, v, start, decay = inputs(8)
    call = lambda q, k, v: linear_scan_gpu(
        q,
        k,
        v,
        log_decay=decay,
        segments=jnp.ones((1, 8), jnp.int32),
        initial_state=start,
        initial_segment=jnp.ones((1,), jnp.int32),
        scale=1.0,
    )
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call(q, k, v)
    with interpreted(), pytest.raises(NotImplementedError, match="q is float32: cast it, allow it with"):
        call(q.astype(jnp.float32), k, v)
    assert "v is float16: cast it, or use 'xla'" in unfit(q, k, v.astype(jnp.float16))


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v, _, decay = inputs(64)
    text = lambda *x, **options: str(jax.make_jaxpr(lambda *x: linear_scan(*x, log_decay=decay, **options))(*x))
    kernel = "linear_scan_forward"
    assert kernel not in text(q, k, v)
    with compiling_for("gpu"):
        assert kernel in text(q, k, v)
        assert kernel in text(q, k, v, backend="gpu")
        assert kernel in text(q, k, v.astype(jnp.float32))
        assert kernel not in text(q, k, v.astype(jnp.float16))
        assert kernel not in text(q, k.astype(jnp.float32), v)
        assert kernel in text(q[..., :8], k[..., :8], v, taylor="symmetric")
    with interpreted():
        assert kernel not in text(q, k, v), "a simulator is for who names the backend"


@needs_costs
@pytest.mark.parametrize(("decay", "powers"), [(True, 2 * 2 * 256 * 64), (False, 0)])
def test_the_cost_estimate_counts_scores_once(decay, powers):
    struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    plan = Plan(scale=1.0, decay=decay, out=jnp.bfloat16, staged=False, interpret=False)
    arrays = (
        struct(2, 256, 2, 64),
        struct(2, 256, 1, 64),
        struct(2, 256, 1, 128),
        struct(2, 2, 64, 128, dtype=jnp.float32),
        struct(2, 2, 6, 256, dtype=jnp.float32),
        struct(2, 2, 4, dtype=jnp.float32),
    )
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(lambda *x: scan(plan, *x, name="linear_scan_forward"))(*arrays))
    flops = 2 * 2 * 2 * 256 * (64 * (64 + 128) + 2 * 64 * 128)
    assert f"flops={flops}" in text
    assert f"transcendentals={powers}" in text
