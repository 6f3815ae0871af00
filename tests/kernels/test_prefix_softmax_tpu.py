"""The TPU kernel of `prefix_softmax`, simulated, against every row's own softmax; chunks are smaller than sequences."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms.aaren import MECHANISM as AAREN
from pallas_kernels import compiling_for, interpreted, recording
from pallas_kernels.prefix_softmax import empty, prefix_softmax, segment_runs
from pallas_kernels.prefix_softmax.tpu import WIDEST, prefix_softmax_tpu
from pallas_kernels.shapes import Shape
from tests.kernels.near import all_near
from tests.kernels.odd import in_both_dtypes
from tests.kernels.prefix_softmax_cases import SMALL, both, inputs, packs, recurrence
from tests.kernels.simulators import without_races


def kernel(chunk=None, mode="plain"):
    """`prefix_softmax` by the kernel with a chunk of any size; the public op insists on whole registers."""

    def run(s, v, *, segments, initial, initial_segment):
        with interpreted(mode):
            return prefix_softmax_tpu(s, v, *segment_runs(segments, initial_segment), initial, chunk=chunk)

    return run


def check(arrays, tolerance=2e-5, chunk=16, mode="plain", **options):
    ours = both(kernel(chunk, mode), arrays, **options)
    all_near(ours, both(recurrence, [x.astype(jnp.float32) for x in arrays], **options), tolerance)
    assert [x.dtype for x in ours[1]] == [x.dtype for x in arrays]
    assert ours[0][0].dtype == arrays[1].dtype
    return ours


@in_both_dtypes
def test_odd_shapes(shape, dtype):
    """Outputs in bfloat16 are rounded before the loss and the row terms see them: "xla" is off by 2e-2 as well."""
    check(inputs(shape, dtype), 4e-2 if dtype == jnp.bfloat16 else 2e-5, chunk=None)


@pytest.mark.parametrize("chunk", [8, 16, 128])
def test_packed_rows_and_whatever_padding_holds(chunk):
    s, v, *state = inputs(dataclasses.replace(SMALL, batch=3))
    segments, padding = packs(), np.asarray(packs()) == 0
    options = dict(segments=segments, initial_segment=jnp.array([1, 9, 2]))
    ours = check((s, v, *state), chunk=chunk, **options)
    bad = (jnp.where(padding[..., None], jnp.nan, s), jnp.where(padding[..., None, None], jnp.nan, v), *state)
    jax.tree.map(np.testing.assert_array_equal, both(kernel(chunk), bad, **options), ours)
    (o, last), (ds, dv, dm, du, dw) = ours
    for x in (o, ds, dv):
        assert not np.any(np.asarray(x)[padding])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), (last.m, last.u, last.w), tuple(state))
    assert np.any(dw[0])
    assert not any(np.any(x[1]) for x in (dm, du, dw)), "row 1 starts another document"


@pytest.mark.parametrize("level", [-300.0, 80.0, 1e4])
def test_scores_far_from_zero(level):
    """As exact as L, one f32 number, can be at this level."""
    s, v, m, u, w = inputs(spread=1.0)
    check((s + level, v, m + level, u, w), 1e-3 if level == 1e4 else 2e-4)


def test_scores_that_rise_and_fall_by_more_than_floats_hold():
    """Every token outweighs all before by e^40, then none does: what is carried underflows exactly where it may."""
    s, v, *state = inputs()
    for slope in (40.0, -40.0):
        ours = check((slope * jnp.arange(75.0)[None, :, None] + 0 * s, v, *state))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ours))


def test_without_a_state_before():
    s, v, *_ = inputs()
    nothing = jax.tree.leaves(empty((2, 3), 5))
    (_, grads) = check((s, v, *nothing))
    assert not np.any(grads[4]), "no mass, no gradient"


def test_two_calls_equal_one():
    s, v, *_ = inputs()
    segments = packs()[:2]
    run = jax.jit(lambda s, v, segments, state, owner: kernel(16)(
        s, v, segments=segments, initial=state, initial_segment=owner
    ))  # fmt: skip
    start, owner = empty((2, 3), 5), jnp.array([1, 5])
    whole = run(s, v, segments, start, owner)
    first, middle = run(s[:, :50], v[:, :50], segments[:, :50], start, owner)
    second, last = run(s[:, 50:], v[:, 50:], segments[:, 50:], middle, jnp.array([2, 5]))
    all_near((jnp.concatenate([first, second], 1), last), whole, 1e-5)


def test_no_races_and_nothing_uninitialised_is_read():
    shape = Shape("tiny", batch=1, length=30, heads=2, kv_heads=2, dim=1, value_dim=3)
    with without_races("tpu") as simulator:
        check(inputs(shape), 1e-4, chunk=8, mode=simulator, segments=packs(75)[:1, 10:40])


def test_the_mechanism_through_the_kernel():
    """Forward, gradients and steps after a prompt, against the mechanism's own T×T reference."""
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.normal(size=(2, 60, heads, 8)), jnp.float32) for heads in (4, 2))
    v = jnp.asarray(rng.normal(size=(2, 60, 2, 6)), jnp.float32)
    spec, vis = AAREN.spec(), self_visibility(2, 60, segment_ids=packs()[:2, :60])
    params = {"query": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)}
    loss = lambda f, **options: lambda k, v, params: jnp.sum(jnp.sin(f(q, k, v, vis, Call(spec, params, **options))))
    with interpreted():
        ours = jax.jit(jax.value_and_grad(loss(AAREN.forward, backend="tpu"), (0, 1, 2)))(k, v, params)
    all_near(ours, jax.jit(jax.value_and_grad(loss(AAREN.reference), (0, 1, 2)))(k, v, params), 1e-4)
    sizes = dict(batch=2, capacity=60, heads=4, kv_heads=2, key_dim=8, value_dim=6, dtype=jnp.float32)
    state, parts = AAREN.init_state(spec, **sizes), []
    step = jax.jit(lambda *x: AAREN.step(*x, Call(spec, params, backend="tpu")))
    with interpreted():
        for cut in (slice(0, 41), slice(41, 42), slice(42, 60)):
            part, state = step(state, *(x[:, cut] for x in (q, k, v, default_positions(2, 60), vis.q_segments)))
            parts.append(part)
    expected = AAREN.reference(q, k, v, vis, Call(spec, params))
    all_near(jnp.concatenate(parts, 1), expected, 1e-4)


def test_vmap_and_remat_change_nothing():
    s, v, *_ = inputs(dataclasses.replace(SMALL, batch=3, length=40))
    call = lambda s, v: kernel(16)(
        s,
        v,
        segments=jnp.ones(s.shape[:2], jnp.int32),
        initial=empty((len(s), 3), 5),
        initial_segment=None,
    )[0]
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1)))
    one = lambda *x: call(*(y[None] for y in x))[0]
    with interpreted():
        plain = loss(call)(s, v)
        other = jax.vmap(jax.checkpoint(one))
        all_near(loss(other)(s, v), plain, 1e-6)


def test_a_named_backend_says_why_it_cannot_run():
    s, v, *_ = inputs()
    call = lambda s, v, **options: prefix_softmax(s, v, backend="tpu", **options)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call(s, v)
    with interpreted():
        with pytest.raises(NotImplementedError, match=r"v is float16: cast it"):
            call(s, v.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match=r"s is float16: cast it"):
            call(s.astype(jnp.float16), v)
        with pytest.raises(NotImplementedError, match=r"whole 128 tokens but chunk is 64"):
            call(s, v, chunk=64)
        with pytest.raises(NotImplementedError, match=rf"room for {WIDEST} numbers .* v has {WIDEST + 1}"):
            jax.eval_shape(call, s, jax.ShapeDtypeStruct((2, 75, 3, WIDEST + 1), jnp.float32))
        all_near(call(s, v, chunk=128), prefix_softmax(s, v, backend="reference"), 1e-5)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    s, v, *_ = inputs()
    text = lambda s, v, **options: str(jax.make_jaxpr(lambda *x: prefix_softmax(*x, **options))(s, v))
    assert "pallas_call" not in text(s, v)
    with compiling_for("tpu"):
        assert "pallas_call" in text(s, v)
        assert "pallas_call" in text(s.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
        assert "pallas_call" not in text(s, v, chunk=64)
        assert "pallas_call" not in text(s, v.astype(jnp.float16))
        with recording() as choices:
            assert "pallas_call" not in text(s[:, :1], v[:, :1])
        assert choices == {"prefix_softmax": {"xla": "1 tokens are too few to fill a chunk"}}
    with interpreted():
        assert "pallas_call" not in text(s, v), "a simulator is for who names the backend"


def test_cost_estimates_count_the_products_of_every_chunk():
    s, v = (jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((1, 512, 2), (1, 512, 2, 128)))
    loss = lambda *x: jnp.sum(prefix_softmax(*x)[0])
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(s, v))
    assert f"flops={2 * 2 * 512 * (256 + 1) * 128}" in text, "forward"
    assert f"flops={2 * 2 * 512 * (2 * 256 + 3) * 128}" in text, "backward"
    assert text.count(f"transcendentals={2 * 512 * 258}") == 2
