"""One query a head on a CPU against the reference: masks, groups, types, gradients, vmap; and when it is chosen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, Visibility
from jaxattn.rope import Alibi
from pallas_kernels import Score, _cpu, flash
from pallas_kernels.flash.decode import TARGET, fits
from tests.conformance.cases import close, inputs

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


def run(backend, vis):
    return lambda q, k, v: flash(q, k, v, vis, Score(), scale=SCALE, backend=backend)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"keys": 1},
        {"keys": 100, "heads": 4, "kv_heads": 1, "dim": 60, "value_dim": 64},
        {"keys": 257, "heads": 3, "kv_heads": 3, "window": 7},
        {"keys": 63, "heads": 4, "kv_heads": 2},
    ],
    ids=str,
)
def test_value_and_gradients_equal_the_reference(shape, dtype, rows):
    *qkv, vis = case(dtype=dtype, rows=rows, **shape)
    assert fits(*qkv, vis, Score(), None)
    out, expected = (jax.jit(run(backend, vis))(*qkv) for backend in ("auto", "reference"))
    assert out.dtype == dtype
    close(out, expected, rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    loss = lambda backend: lambda *x: jnp.sum(jnp.sin(run(backend, vis)(*x).astype(jnp.float32)))
    for a, b in zip(*(jax.grad(loss(backend), (0, 1, 2))(*qkv) for backend in ("auto", "reference")), strict=True):
        close(a, b, rtol=2e-5 if dtype == jnp.float32 else 2e-2)


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


def test_it_is_chosen_by_auto_alone_and_for_nothing_else():
    q, k, v, vis = case()
    text = lambda backend: jax.jit(run(backend, vis)).lower(q, k, v).as_text()
    assert TARGET in text("auto")
    assert TARGET not in text("xla")
    assert not fits(q, k, v, vis, Score("sigmoid", "none"), None)
    assert not fits(q, k, v, vis, Score(), Alibi(jnp.ones(6)))
    assert not fits(q, k, v, dataclasses.replace(vis, causal=False), Score(), None)
    assert not fits(q, k, v, dataclasses.replace(vis, prefix_len=jnp.ones(2, jnp.int32)), Score(), None)
    assert not fits(jnp.concatenate([q, q], 1), k, v, vis, Score(), None)
    assert not fits(q, k.astype(jnp.float16), v.astype(jnp.float16), vis, Score(), None)
