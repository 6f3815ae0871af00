"""The Hopper kernels of `probe` in JAX's simulator of GPUs, against the reference; bfloat16 throughout."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility
from pallas_kernels import compiling_for, interpreted
from pallas_kernels.probe import NAMES, probe
from pallas_kernels.shapes import ODD
from tests.conformance.cases import inputs, normal, packed
from tests.kernels.late import delay
from tests.kernels.probe_cases import draw_bias, slots_of_each_head
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

FIELDS = ("lse", "top_index", "top_weight", "columns", "diagonals", "blocks", "block_max")
UNTIED = [name for name in NAMES if name != "top"]  # products of bfloat16 are often equal


def numbers(queries, keys=None, *, batch=1, heads=2, kv_heads=1, dim=60):
    shape = dict(batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, dtype=jnp.bfloat16)
    return inputs(queries, keys=keys or queries, **shape)[:2]


def check(q, k, vis, *, block=16, want=NAMES, rtol=1e-5, scale=0.2, mode="plain", key_bias=None):
    """Every statistic equals the reference's of the same rounded inputs; returns the reference's."""
    call = partial(probe, scale=scale, want=want, block=block, key_bias=key_bias)
    run = lambda backend: jax.jit(partial(call, backend=backend))(q, k, vis)
    with interpreted(mode):
        ours = run("gpu")
    theirs = run("reference")
    for name in FIELDS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            a, b = np.asarray(a), np.asarray(b)
            seen = b[b > -1e29] if name == "lse" else b
            limit = 0 if name == "top_index" else rtol * np.abs(seen).max(initial=1e-3)
            np.testing.assert_allclose(a, b, atol=limit, rtol=1e-6 if name == "lse" else 0, err_msg=name)
    return theirs


@pytest.mark.parametrize("dim", [60, 192, pytest.param(250, marks=pytest.mark.slow)])
def test_the_last_queries_of_grouped_heads(dim):
    """20 of 300: three tiles of keys, or five of wide heads, each gone through by another block of threads."""
    q, k = numbers(300, heads=4, kv_heads=2, dim=dim)
    bias = draw_bias(1, 4 if dim == 60 else 2, 300)
    check(q[:, -20:], k, self_visibility(1, 300).rows(280, 20), want=UNTIED, key_bias=bias)


def documents():
    """Of 1 and more tokens, an empty one, padding in front, between and behind; another order in the second row."""
    positions, segments = packed([30, 0, 1, 40], 90)
    behind = lambda x: jnp.concatenate([jnp.zeros((2, 9), x.dtype), x[:, :30], x[:, :5] * 0, x[:, 30:]], axis=1)
    positions, segments = behind(positions), behind(segments)
    positions, segments = (jnp.stack([x[0], jnp.roll(x[1], 17)]) for x in (positions, segments))
    return segments, self_visibility(2, 104, positions=positions, segment_ids=segments)


def test_packed_documents():
    segments, vis = documents()
    q, k = numbers(104, batch=2, heads=1)
    bias = jnp.asarray(normal(5, (1, 1, 104)))
    stats = check(q, k, vis, want=("lse", "columns", "diagonals"), key_bias=bias)
    dead = np.asarray(segments) == 0
    assert (np.asarray(stats.lse)[dead] == -1e30).all()
    np.testing.assert_allclose(np.sum(stats.columns, axis=2)[:, 0], np.sum(~dead, axis=1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("block", [8, 32, 64, 128, 256])
@pytest.mark.parametrize("dim", [60, 192])
def test_every_size_of_blocks(dim, block):
    check(*numbers(104, batch=2, dim=dim), documents()[1], want=("blocks", "block_max"), block=block)
    q, k = numbers(9, 600, dim=dim)
    check(q, k, self_visibility(1, 600).rows(300, 9), want="blocks", block=block)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
def test_odd_lengths_head_dims_and_groups(shape):
    q, k = numbers(shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim)
    count = min(shape.length, 70)
    vis = self_visibility(1, shape.length).rows(shape.length - count, count)
    check(q[:, -count:], k, vis, want=UNTIED, block=32, scale=shape.dim**-0.5)


RULES = {
    "all queries": (dict(), 0, slice(0, 300)),
    "window": (dict(window=70), 0, slice(140, 160)),
    "window and keys that everyone sees": (dict(window=70), 3, slice(140, 160)),
    "both sides": (dict(causal=False), 0, slice(140, 160)),
    "prefix, window and keys that everyone sees": (dict(prefix_len=jnp.array([3, 60]), window=50), 2, slice(140, 160)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "sinks", "rows"), RULES.values(), ids=list(RULES))
def test_every_rule_of_visibility(rules, sinks, rows):
    q, k = numbers(300, 300 + sinks, batch=2)
    vis = self_visibility(2, 300, **rules).prepend_global(sinks).rows(rows.start, rows.stop - rows.start)
    check(q[:, rows], k, vis, want=UNTIED)


def test_queries_in_any_order_and_keys_behind_a_cache(monkeypatch):
    """Sampled queries, not sorted; keys at positions from 1000 on; cells not yet written, a tile of them."""
    monkeypatch.setattr("pallas_kernels.probe.gpu_rows.BUSY", 1)  # so that one block goes through all tiles
    q, k = numbers(7, 270, heads=1)
    k = k.at[:, 130:].multiply(2)  # the largest scores come late
    places = jnp.array([[1200, 1003, 1255, 1100, 1000, 1254, 2000]])
    written = (jnp.arange(270) < 256)[None].astype(jnp.int32)
    vis = Visibility(places, 1000 + jnp.arange(270)[None], jnp.ones((1, 7), jnp.int32), written)
    stats = check(q, k, vis, want=("diagonals", "columns", "blocks"))
    np.testing.assert_allclose(1 - np.sum(stats.diagonals, axis=2) / 7, 1 / 7, atol=1e-6)  # the query at 2000


@pytest.mark.slow
def test_key_positions_in_any_order():
    """Diagonals are NaN, which says so; the rest is right."""
    q, k = numbers(12, 60)
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(60), jnp.int32)[None]
    vis = dataclasses.replace(self_visibility(1, 60).rows(48, 12), k_positions=shuffled)
    check(q, k, vis, want=("columns", "blocks"))
    with interpreted():
        stats = jax.jit(partial(probe, scale=0.3, want=["diagonals"], backend="gpu"))(q, k, vis)
    assert np.isnan(stats.diagonals).all()


@pytest.mark.parametrize(("busy", "dim"), [(1, 8), (264, 192)], ids=["one block of threads", "many, of wide heads"])
def test_the_first_of_equal_keys_is_the_top_one(busy, dim, monkeypatch):
    """In one tile and across tiles, of which the first needs a mask and comes last, or has none; also scaled by -1."""
    monkeypatch.setattr("pallas_kernels.probe.gpu_rows.BUSY", busy)
    q, k = jnp.ones((1, 64, 2, dim), jnp.bfloat16), -jnp.ones((1, 500, 2, dim), jnp.bfloat16)
    for head, equal in enumerate([[1, 5, 130, 131, 300], [200, 201, 300, 400]]):
        k = k.at[:, jnp.array(equal), head].set(50.0)
    vis = self_visibility(1, 500, segment_ids=jnp.where(jnp.arange(500) < 3, 0, 1)[None]).rows(430, 64)
    with interpreted():
        run = lambda q, scale: jax.jit(partial(probe, scale=scale, want="top", backend="gpu"))(q, k, vis)
        stats, negative = run(q, 1.0), run(-q, -1.0)
    for x in (stats, negative):
        np.testing.assert_array_equal(x.top_index, np.broadcast_to([5, 200], (1, 64, 2)))
        np.testing.assert_allclose(x.top_weight, 1 / 4, rtol=1e-6)


@pytest.mark.slow
def test_top_keys_of_queries_that_have_one():
    """Exact where the largest score stands out, also in packed documents."""
    q, k = numbers(104, batch=2, dim=64)
    check(q, 3 * k, documents()[1], want="top", scale=1.0)
    check(q, 3 * k, documents()[1], want="top", scale=1.0, key_bias=draw_bias(2, 2, 104))


@pytest.mark.slow
def test_hidden_keys_are_as_if_they_were_not_there():
    """Also of a query that finds none of its head's keys; another set of keys for each key head."""
    q, k, vis, empty = slots_of_each_head()
    q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    stats = check(q, k, vis, want=UNTIED, key_bias=jnp.where(empty, -jnp.inf, 0.7)[None])
    assert (np.asarray(stats.lse)[0, 2, 2:] == -1e30).all(), "no slot of key head 1 is as early as this query"


def test_no_races_and_nothing_uninitialised_is_read():
    """As long as no buffer is used twice: the detector takes a load before a copy for a race, whatever is between."""
    q, k = numbers(40, heads=1)
    with without_races("gpu") as simulator:
        check(q, k, self_visibility(1, 40), want=UNTIED, mode=simulator, key_bias=draw_bias(1, 1, 40))


@pytest.mark.slow
@pytest.mark.parametrize("late", ["fetch", "product"])
def test_nobody_relies_on_others_being_quick(late, monkeypatch):
    """Blocks of threads are one warpgroup; a delay of its copies or products changes nothing."""
    simulator = delay(monkeypatch, late)
    monkeypatch.setattr("pallas_kernels.probe.gpu_rows.BUSY", 1)  # so that one block goes through all tiles
    check(*numbers(200, 500, heads=1), self_visibility(1, 500).rows(300, 200), want=UNTIED, mode=simulator)


def test_gradients_are_zero():
    q, k = numbers(20, heads=1)
    with interpreted():
        call = lambda q: jnp.sum(probe(q, k, self_visibility(1, 20), scale=0.3, backend="gpu").columns ** 2)
        assert not jax.jit(jax.grad(call))(q).any()


def test_a_named_backend_says_why_it_cannot_run():
    q, k = numbers(8)
    call = lambda q=q, k=k, **more: probe(q, k, self_visibility(1, 8), scale=1.0, backend="gpu", **more)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match="'gpu' computes bfloat16 but k is float32: cast it"):
            call(k=k.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="head dims up to 256 but q has 257"):
            call(*(jnp.zeros((1, 8, n, 257), jnp.bfloat16) for n in (2, 1)))
        with pytest.raises(NotImplementedError, match="or a multiple of 128 keys but block is 48"):
            call(want="blocks", block=48)
        many = jax.ShapeDtypeStruct((1, 2**24 + 1, 1, 60), jnp.bfloat16)
        vis = Visibility(*(jnp.ones((1, n), jnp.int32) for n in (8, 1, 8, 1)))
        with pytest.raises(NotImplementedError, match="counts 16777216 keys but there are 16777217"):
            jax.eval_shape(lambda q, k: probe(q, k, vis, scale=1.0, backend="gpu"), q, many)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k = numbers(8)
    call = lambda q, **more: probe(q, k, self_visibility(1, 8), scale=1.0, **more)
    text = lambda q, **more: str(jax.make_jaxpr(lambda q: call(q, **more))(q))
    wide = numbers(8, dim=192)
    assert "probe_rows" not in text(q)
    with compiling_for("gpu"):
        assert "probe_columns" in text(q)
        assert "probe_columns" not in text(q, want="top")
        assert "probe_rows" in text(q, want="top")
        assert "probe_columns" in str(jax.make_jaxpr(lambda q, k: probe(q, k, self_visibility(1, 8), scale=1.0))(*wide))
        assert "probe_rows" not in text(q.astype(jnp.float32))
        assert "probe_rows" not in text(q, want=("columns", "blocks"), block=12)


@needs_costs
def test_the_cost_estimate_counts_both_passes():
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.bfloat16) for n in (64, 2048))
    vis = self_visibility(1, 2048).rows(1984, 64)
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(lambda q, k: probe(q, k, vis, scale=1.0).columns)(q, k))
    scores = 2 * 64 * 2048
    assert f"flops={2 * scores * 64}" in text
    assert f"flops={2 * scores * 64 + scores}" in text
    assert text.count(f"transcendentals={scores}") == 2
