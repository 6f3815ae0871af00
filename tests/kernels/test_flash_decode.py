"""One query a head on a CPU against the reference: masks, key biases, statistics, gradients, vmap; when it is used."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, Visibility
from jaxattn.rope import Alibi
from pallas_kernels import Score, _cpu, flash
from pallas_kernels.flash import merge
from pallas_kernels.flash.decode import TARGET, fits
from tests.conformance.cases import close, inputs, normal

pytestmark = pytest.mark.skipif(bool(_cpu.missing()), reason=f"numba's kernels: {_cpu.missing()}")
SCALE = 0.3


def case(keys=37, *, heads=6, kv_heads=3, dim=8, value_dim=6, dtype=jnp.float32, window=None, rows=2):
    """A cache of one or two rows with global slots, an older document and places not yet filled."""
    q, k, v = inputs(keys, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, dtype=dtype)
    segments = np.full((2, keys), 3)
    segments[:, -keys // 4 :] = 0
    segments[0, :2], segments[1, : keys // 3] = GLOBAL, 2
    positions = jnp.broadcast_to(jnp.arange(keys), (2, keys))
    vis = Visibility(
        q_positions=jnp.array([[keys // 2], [keys - 1]]),
        k_positions=positions,
        q_segments=jnp.full((2, 1), 3),
        k_segments=jnp.asarray(segments),
        window=window,
    )
    return *(x[:rows] for x in (q[:, :1], k, v)), jax.tree.map(lambda x: x[:rows], vis)


def biased(keys, heads, rows=2):
    """Key biases of a few units for `heads` heads, about a third of which hide."""
    bias = 2 * normal(5, (rows, heads, keys))
    return jnp.asarray(np.where(normal(6, bias.shape) > 0.5, -np.inf, bias), jnp.float32)


def run(backend, vis, **options):
    """The call; a fourth argument is the key bias."""
    bias = lambda rest: {"key_bias": rest[0]} if rest else {}
    return lambda q, k, v, *rest: flash(q, k, v, vis, Score(), scale=SCALE, backend=backend, **bias(rest), **options)


SHAPES = [
    ({}, None),
    ({}, 1),
    ({}, 3),
    ({"keys": 1}, None),
    ({"keys": 1}, 3),
    ({"keys": 100, "heads": 4, "kv_heads": 1, "dim": 60, "value_dim": 64}, 4),
    ({"keys": 257, "heads": 3, "kv_heads": 3, "window": 7}, None),
    ({"keys": 257, "heads": 3, "kv_heads": 3, "window": 40}, 3),
    ({"keys": 63, "heads": 4, "kv_heads": 2}, 4),
]


def arrays(shape, bias_heads, **options):
    *qkv, vis = case(**shape, **options)
    return [*qkv] if bias_heads is None else [*qkv, biased(qkv[1].shape[1], bias_heads, len(qkv[0]))], vis


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "bias_heads"), SHAPES, ids=str)
def test_values_and_statistics_equal_the_reference(shape, bias_heads, dtype, rows):
    args, vis = arrays(shape, bias_heads, dtype=dtype, rows=rows)
    assert fits(*args[:3], vis, Score(), None)
    (out, stat), expected = (jax.jit(run(backend, vis, stats=True))(*args) for backend in ("auto", "reference"))
    assert out.dtype == dtype
    assert stat.dtype == jnp.float32
    close(out, expected[0], rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_allclose(stat, expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run("auto", vis)(*args), out)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "bias_heads"), [SHAPES[n] for n in (0, 2, 4, 6, 8)], ids=str)
def test_gradients_equal_the_references(shape, bias_heads, dtype):
    """Of all arrays, also the key bias, and also through the statistic."""
    args, vis = arrays(shape, bias_heads, dtype=dtype)

    def loss(backend, *args):
        out, stat = run(backend, vis, stats=True)(*args)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.cos(jnp.maximum(stat, -9.0)))

    rtol = 2e-5 if dtype == jnp.float32 else 2e-2
    ours, theirs = (
        jax.jit(jax.grad(partial(loss, backend), tuple(range(len(args)))))(*args) for backend in ("auto", "reference")
    )
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=rtol)


def test_the_gradient_without_statistics():
    *qkv, vis = case()
    loss = lambda backend: lambda *x: jnp.sum(jnp.sin(run(backend, vis)(*x)))
    ours, theirs = (jax.jit(jax.grad(loss(backend), (0, 1, 2)))(*qkv) for backend in ("auto", "reference"))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=2e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("which", [1, 2], ids=["keys", "values"])
def test_what_is_no_number_stays_none(rows, which):
    *qkv, vis = case(rows=rows)
    good = run("auto", vis)(*qkv)
    qkv[which] = qkv[which].at[0, 1, 0, 0].set(jnp.nan)  # a global key: the first row's queries see it
    out = np.asarray(run("auto", vis)(*qkv))
    assert np.isnan(out[0, 0, :2]).any(-1).all()  # the heads of that key's group
    np.testing.assert_array_equal(out[0, 0, 2:], good[0, 0, 2:])
    np.testing.assert_array_equal(out[1:], good[1:])


def test_every_place_that_may_not_be_seen_is_not_read():
    """Poisoned keys and values behind the mask change nothing; a row that sees nothing gives zeros."""
    q, k, v, vis = case(window=5)
    from jaxattn.masks import visible

    hidden = ~np.asarray(visible(vis))[:, 0, :, None, None]
    poison = lambda x: jnp.where(hidden, jnp.nan, x)
    np.testing.assert_array_equal(run("auto", vis)(q, poison(k), poison(v)), run("auto", vis)(q, k, v))
    dead = dataclasses.replace(vis, q_segments=jnp.array([[0], [9]]))
    np.testing.assert_array_equal(run("auto", dead)(q, k, v)[0], 0.0)
    np.testing.assert_array_equal(run("auto", dead)(q, k, v)[1], 0.0)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias_heads", [1, 3, 6])
def test_a_key_that_a_bias_hides_is_not_read(bias_heads, rows):
    """Poisoned for the heads that may not see it, it changes nothing; where it hides all, a row sees nothing."""
    (q, k, v, bias), vis = arrays({}, bias_heads, rows=rows)
    bias = bias.at[:, 0, 5].set(-1e29)  # the largest that hides; the first row's queries would see it
    call = run("auto", vis, stats=True)
    o, stat = call(q, k, v, bias)
    per_head = jnp.repeat(bias, 6 // bias_heads, axis=1) <= -1e29  # [B, H, S]
    of_group = per_head.reshape(rows, 3, 2, -1).all(2)
    assert of_group.any()
    poison = lambda x: jnp.where(jnp.swapaxes(of_group, 1, 2)[..., None], jnp.nan, x)
    for a, b in zip(call(q, poison(k), poison(v), bias), (o, stat), strict=True):
        np.testing.assert_array_equal(a, b)
    o, stat = call(q, k * jnp.nan, v * jnp.nan, jnp.full_like(bias, -jnp.inf))
    np.testing.assert_array_equal(o, 0.0)
    np.testing.assert_array_equal(stat, np.float32(-1e30))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_key_hidden_to_one_head_of_its_group_is_none_of_that_heads(rows):
    q, k, v, vis = case(rows=rows)
    bias = jnp.zeros((rows, 6, k.shape[1])).at[0, 0, 0].set(-jnp.inf)  # key 0 is global: all of row 0 see it
    call = run("auto", vis, stats=True)
    good, bad = call(q, k, v, bias), call(q, k.at[0, 0, 0].set(jnp.nan), v.at[0, 0, 0].set(jnp.nan), bias)
    for a, b in zip(bad, good, strict=True):
        assert np.isnan(a[0, 0, 1]).all()
        np.testing.assert_array_equal(np.delete(a, 1, axis=2)[0], np.delete(b, 1, axis=2)[0])
        np.testing.assert_array_equal(a[1:], b[1:])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_that_is_no_number_stays_none(rows):
    (q, k, v, bias), vis = arrays({}, 6, rows=rows)
    o, stat = run("auto", vis, stats=True)(q, k, v, bias.at[0, 3, 0].set(jnp.nan))
    for x in (o, stat):
        np.testing.assert_array_equal(np.isnan(x[0, 0]).reshape(6, -1).all(1), np.arange(6) == 3)
        assert np.isfinite(x[1:]).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_merge_to_the_whole(rows):
    """Sinks and a window apart, a part hidden by its bias, and one that holds nothing."""
    (q, k, v, bias), vis = arrays({}, 3, rows=rows)
    whole = run("auto", vis, stats=True)(q, k, v, bias)
    cut = lambda start, stop, bias: run("auto", vis.columns(start, stop - start), stats=True)(
        q, k[:, start:stop], v[:, start:stop], bias[..., start:stop]
    )
    even = jnp.arange(37) % 2 == 0
    parts = [cut(0, 4, bias)]
    parts += [cut(4, 37, jnp.where(hidden, -jnp.inf, bias)) for hidden in (even, ~even)]
    parts += [cut(30, 37, jnp.full_like(bias, -jnp.inf))]
    for a, b in zip(merge(parts), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_large_scores_stay_finite():
    q, k, v, vis = case()
    out = run("auto", vis)(1e4 * q, k, v)
    close(out, run("reference", vis)(1e4 * q, k, v))
    assert np.isfinite(out).all()


def test_states_under_vmap_are_rows_of_their_own():
    """As the server holds them: batch 1 behind a mapped axis, places included; and a query alone mapped."""
    q, k, v, vis = case()
    places = (vis.q_positions, vis.k_positions, vis.q_segments, vis.k_segments)

    def one(q, k, v, *places):
        return run("auto", Visibility(*(x[None] for x in places)))(q[None], k[None], v[None])[0]

    together = run("auto", vis)(q, k, v)
    np.testing.assert_array_equal(jax.vmap(one)(q, k, v, *places), together)
    mapped = jax.vmap(run("auto", vis), in_axes=(0, None, None))(jnp.stack([q, -q]), k, v)
    np.testing.assert_array_equal(mapped[0], together)


@pytest.mark.parametrize("bias_heads", [1, 3, 6])
def test_key_biases_under_vmap_belong_to_their_rows(bias_heads):
    (q, k, v, bias), vis = arrays({}, bias_heads)
    call = run("auto", vis, stats=True)
    for axes, arguments in (
        ((None, None, None, 0), (q, k, v, jnp.stack([0 * bias, bias]))),
        ((0, None, None, None), (jnp.stack([-q, q]), k, v, bias)),
    ):
        mapped = jax.vmap(call, in_axes=axes)(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), mapped, call(q, k, v, bias))


def test_it_is_chosen_by_auto_alone_and_for_nothing_else():
    q, k, v, vis = case()
    text = lambda backend, *rest, **more: jax.jit(run(backend, vis, **more)).lower(q, k, v, *rest).as_text()
    assert TARGET in text("auto")
    assert TARGET in text("auto", jnp.zeros((1, 3, 37)))
    assert TARGET in text("auto", stats=True)
    assert TARGET not in text("xla")
    assert not fits(q, k, v, vis, Score("sigmoid", "none"), None)
    assert not fits(q, k, v, vis, Score(), Alibi(jnp.ones(6)))
    assert not fits(q, k, v, dataclasses.replace(vis, causal=False), Score(), None)
    assert not fits(q, k, v, dataclasses.replace(vis, prefix_len=jnp.ones(2, jnp.int32)), Score(), None)
    assert not fits(jnp.concatenate([q, q], 1), k, v, vis, Score(), None)
    assert not fits(q, k.astype(jnp.float16), v.astype(jnp.float16), vis, Score(), None)
