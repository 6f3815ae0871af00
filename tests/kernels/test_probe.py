"""`probe`: every backend against the reference, and the reference against what the methods' papers define."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, self_visibility
from pallas_kernels import compiling_for, interpreted
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.probe import NAMES, probe
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, inputs, normal, packed
from tests.kernels.odd import in_both_dtypes
from tests.kernels.probe_cases import draw_bias, slots_of_each_head
from tests.kernels.simulators import without_races

FAST = ("xla", "tpu")
FIELDS = ("lse", "top_index", "top_weight", "columns", "diagonals", "blocks", "block_max")


@pytest.fixture(autouse=True)
def tiles_far_smaller_than_the_sequence(monkeypatch):
    """On a TPU 128 keys, or what the blocks need; in XLA 64."""
    monkeypatch.setattr("pallas_kernels.probe.tpu.BLOCK", 128)
    monkeypatch.setattr("pallas_kernels.probe.xla.CHUNK", 64)


def check(q, k, vis, backend, *, block=16, want=NAMES, rtol=2e-5, scale=0.3, mode="plain", key_bias=None):
    """Every statistic equals the reference's; returns the reference's."""
    call = partial(probe, scale=scale, want=want, block=block, key_bias=key_bias)
    run = lambda backend: jax.jit(partial(call, backend=backend))(q, k, vis)
    with interpreted(mode):
        ours = run(backend)
    expected = run("reference")
    for name in FIELDS:
        a, b = getattr(ours, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if name == "top_index" and a is not None:
            assert a.dtype == jnp.int32
            np.testing.assert_array_equal(a, b)
        elif a is not None:
            assert a.dtype == jnp.float32
            close(a, b, rtol=rtol)
    return expected


@pytest.mark.parametrize("backend", FAST)
@in_both_dtypes
def test_odd_lengths_head_dims_and_groups(shape, dtype, backend):
    """The last queries of a prompt, up to 70 of them."""
    heads = dict(heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim)
    q, k, _ = inputs(shape.length, batch=1, dtype=dtype, **heads)
    count = min(shape.length, 70)
    vis = self_visibility(1, shape.length).rows(shape.length - count, count)
    want = NAMES if dtype == jnp.float32 else [name for name in NAMES if name != "top"]  # ties in bf16
    heads = (shape.kv_heads, 1, shape.heads)[ODD.index(shape) % 3]
    bias = draw_bias(1, heads, shape.length) if shape.length > 2 else jnp.full((1, heads, shape.length), 0.5)
    check(q[:, -count:], k, vis, backend, want=want, block=32, scale=shape.dim**-0.5, key_bias=bias)


RULES = {
    "window": (dict(window=70), 0),
    "window and global keys": (dict(window=70), 3),
    "both sides": (dict(causal=False), 0),
    "prefix, window and global keys": (dict(prefix_len=jnp.array([3, 60]), window=50), 2),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("rules", "sinks"), RULES.values(), ids=list(RULES))
def test_every_rule_of_visibility(rules, sinks, backend):
    """Queries from the middle of 300 tokens; tiles of 128 keys, of which some are seen by nobody."""
    q, k, _ = inputs(20, heads=2, kv_heads=1, dim=8, keys=300 + sinks)
    vis = self_visibility(2, 300, **rules).prepend_global(sinks).rows(140, 20)
    check(q, k, vis, backend, key_bias=draw_bias(2, 2, 300 + sinks) if sinks else None)


@pytest.mark.parametrize("backend", FAST)
def test_packed_documents(backend):
    """Documents of 1 and more tokens, an empty one, padding in front, between and behind; another order per row."""
    positions, segments = packed([30, 0, 1, 40], 90)
    behind = lambda x: np.concatenate([np.zeros((2, 9), x.dtype), x[:, :30], x[:, :5] * 0, x[:, 30:]], axis=1)
    positions, segments = (behind(np.asarray(x)) for x in (positions, segments))
    positions, segments = (jnp.asarray(np.stack([x[0], np.roll(x[1], 17)])) for x in (positions, segments))
    q, k, _ = inputs(104, heads=4, kv_heads=2, dim=8)
    vis = self_visibility(2, 104, positions=positions, segment_ids=segments)
    expected = check(q, k, vis, backend, key_bias=jnp.asarray(normal(5, (1, 2, 104))))
    dead = np.asarray(segments) == 0
    assert not np.asarray(expected.top_weight)[dead].any()
    assert (np.asarray(expected.top_index)[dead] == -1).all()
    assert (np.asarray(expected.lse)[dead] == -1e30).all()
    rows = np.sum(~dead, axis=1)
    np.testing.assert_allclose(np.sum(expected.columns, axis=2), rows[:, None] * np.ones(4), rtol=1e-5)
    np.testing.assert_allclose(np.sum(expected.diagonals, axis=2), rows[:, None] * np.ones(4), rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_queries_in_any_order_and_keys_behind_a_cache(backend):
    """Sampled queries, not sorted; keys at positions from 1000 on; cells not yet written."""
    q, k, _ = inputs(7, batch=1, heads=2, kv_heads=1, dim=8, keys=270)
    places = jnp.array([[1200, 1003, 1255, 1100, 1000, 1254, 2000]])
    written = (jnp.arange(270) < 256)[None].astype(jnp.int32)
    vis = Visibility(places, 1000 + jnp.arange(270)[None], jnp.ones((1, 7), jnp.int32), written)
    expected = check(q, k, vis, backend)
    outside = 1 - np.sum(expected.diagonals, axis=2) / 7  # of the query at 2000, too far away for any diagonal
    np.testing.assert_allclose(outside, 1 / 7, atol=1e-6)


def test_key_positions_in_any_order():
    """Exact in XLA; the kernel, which adds runs of keys to diagonals, answers NaN for these, and for nothing else."""
    q, k, _ = inputs(12, heads=2, kv_heads=1, dim=8, keys=60)
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(60), jnp.int32)
    vis = dataclasses.replace(
        self_visibility(2, 60).rows(48, 12), k_positions=jnp.stack([shuffled, jnp.arange(60, dtype=jnp.int32)])
    )
    check(q, k, vis, "xla")
    check(q, k, vis, "tpu", want=[name for name in NAMES if name != "diagonals"])
    with interpreted():
        stats = jax.jit(partial(probe, scale=0.3, want=["diagonals", "columns"], backend="tpu"))(q, k, vis)
    assert np.isnan(stats.diagonals).all()
    assert np.isfinite(stats.columns).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_vertical_and_slash_scores_of_minference(backend):
    """The skew trick of arXiv 2407.02490 on the matrix of weights: flip, pad, reshape, sum rows."""
    length, count = 200, 64
    q, k, _ = inputs(length, batch=1, heads=2, kv_heads=2, dim=16)
    q, k = map(np.asarray, (q, k))
    s = np.einsum("phd,shd->hps", q[0, -count:], k[0]) / 4
    s = np.where(np.arange(length) <= np.arange(length - count, length)[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    skew = np.pad(p[:, ::-1], ((0, 0), (0, 0), (0, count))).reshape(2, -1)[:, : count * (length + count - 1)]
    slash = skew.reshape(2, count, -1).sum(1)[:, :length]  # at i the diagonal of offset length - 1 - i
    vis = self_visibility(1, length).rows(length - count, count)
    with interpreted():
        stats = jax.jit(partial(probe, scale=0.25, want=("columns", "diagonals"), backend=backend))(
            q[:, -count:], k, vis
        )
    stats = jax.device_get(stats)
    close(stats.columns[0], p.sum(1), rtol=1e-5)
    close(stats.diagonals[0], slash[:, ::-1], rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_the_first_of_equal_keys_is_the_top_one(backend):
    """In one tile and across tiles; scores far from zero."""
    q, k = np.ones((1, 3, 1, 8), np.float32), -np.ones((1, 700, 1, 8), np.float32)
    k[:, [130, 131, 600]] = 50.0
    vis = self_visibility(1, 700).rows(650, 3)
    with interpreted():
        stats = jax.jit(partial(probe, scale=1.0, want="top", backend=backend))(q, k, vis)
    np.testing.assert_array_equal(stats.top_index, 130)
    close(stats.top_weight, np.full((1, 3, 1), 1 / 3), rtol=1e-6)
    check(q, k, vis, backend, scale=30.0, want=("lse", "columns"))


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_hidden_keys_are_as_if_they_were_not_there(backend):
    """What H2O asks for: sums of weights by column of every query head over the slots its key head uses."""
    q, k, vis, empty = slots_of_each_head()
    weights = np.zeros((4, 5, 60))
    for h, p in np.ndindex(4, 5):
        left = np.flatnonzero(~empty[h // 2] & (np.arange(60) <= int(vis.q_positions[0, p])))
        w = np.exp(0.3 * np.asarray(k[0, left, h // 2], np.float64) @ np.asarray(q[0, p, h], np.float64))
        weights[h, p, left] = w / max(w.sum(), 1e-300)
    call = jax.jit(lambda bias: probe(q, k, vis, scale=0.3, want=NAMES, block=16, key_bias=bias, backend=backend))
    for nothing in (-jnp.inf, NEVER):
        with interpreted():
            stats = jax.device_get(call(np.where(empty, np.float32(nothing), np.float32(0.7))[None]))  # 0.7 cancels
        close(stats.columns[0], weights.sum(1))
        assert not np.asarray(stats.columns)[0][np.repeat(empty, 2, axis=0)].any(), "exactly 0"
        close(stats.top_weight[0].swapaxes(0, 1), weights.max(2))
        found = weights.max(2) > 0
        assert not found[2:, 2].any(), "no slot of key head 1 is as early as position 30"
        np.testing.assert_array_equal(stats.top_index[0].T, np.where(found, weights.argmax(2), -1))
        np.testing.assert_array_equal((stats.lse[0].T == NEVER), ~found)
        sums = np.zeros((4, 60))
        for p in range(5):
            o = int(vis.q_positions[0, p]) - np.arange(60)
            sums[:, o[o >= 0]] += weights[:, p, o >= 0]
        close(stats.diagonals[0], sums)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for(name):
    q, k, _ = inputs(9, heads=2, kv_heads=1, dim=8)
    for backend in FAST if name in ("top", "blocks") else ("xla",):
        check(q, k, self_visibility(2, 9), backend, want=name)


def test_no_races_and_nothing_uninitialised_is_read():
    q, k, _ = inputs(300, batch=1, heads=2, kv_heads=1, dim=8)
    vis = self_visibility(1, 300, window=90).rows(250, 5)
    with without_races("tpu") as simulator:
        check(q[:, 250:255], k, vis, "tpu", mode=simulator, key_bias=draw_bias(1, 2, 300))


@pytest.mark.parametrize("backend", FAST)
def test_vmap_changes_nothing_and_gradients_are_zero(backend):
    q, k, _ = inputs(40, batch=3, heads=2, kv_heads=1, dim=8)
    call = lambda q, k: probe(q, k, self_visibility(len(q), 40), scale=0.3, want=NAMES, block=16, backend=backend)
    with interpreted():
        plain = jax.jit(call)(q, k)
        mapped = jax.jit(jax.vmap(lambda q, k: jax.tree.map(lambda x: x[0], call(q[None], k[None]))))(q, k)
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), mapped, plain)
        slope = jax.jit(jax.grad(lambda q: jnp.sum(call(q, k).columns ** 2)))(q)
    assert not np.any(slope)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, _ = inputs(8, heads=2, kv_heads=1)
    vis = lambda q: Visibility(*(jnp.ones((2, n), jnp.int32) for n in (q.shape[1], 8, q.shape[1], 8)))
    call = lambda q=q, backend="tpu", **more: probe(q, k, vis(q), scale=1.0, backend=backend, **more)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match="q is float16"):
            call(q.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match=r"holds 128 probe queries but q has 129.*several calls"):
            call(jnp.ones((2, 129, 2, 16)))
        with pytest.raises(NotImplementedError, match=r"blocks of 8, .* but block is 12"):
            call(want="blocks", block=12)
        jax.eval_shape(lambda q: call(q, want="columns", block=12), q)
    with pytest.raises(NotImplementedError, match=r"backend 'gpu' (needs JAX|computes bfloat16)"):
        call(backend="gpu")
    with pytest.raises(ConfigError, match=r"key_bias has shape \(2, 3, 8\) but must be .* heads 1, 1 or 2, and keys 8"):
        call(backend="xla", key_bias=jnp.zeros((2, 3, 8)))
    with pytest.raises(ConfigError, match=r"want is \['rows'\] but must name some of lse, top"):
        call(want=["rows"])
    with pytest.raises(ConfigError, match=r"want is \[\]"):
        call(want=[])
    with pytest.raises(ConfigError, match="block is 0"):
        call(block=0)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, _ = inputs(8, heads=2, kv_heads=1)
    vis = self_visibility(2, 8)
    text = lambda q, **more: str(jax.make_jaxpr(lambda q: probe(q, k, vis, scale=1.0, **more).columns)(q))
    assert "pallas_call" not in text(q)
    with compiling_for("tpu"):
        assert "pallas_call" in text(q)
        assert "pallas_call" not in text(q.astype(jnp.float16))
        assert "pallas_call" not in text(q, want=("columns", "blocks"), block=12)
    with interpreted():
        assert "pallas_call" not in text(q), "a simulator is for who names the backend"


def test_the_cost_estimate_counts_both_passes():
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 64), jnp.float32) for n in (64, 2048))
    vis = self_visibility(1, 2048).rows(1984, 64)
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(lambda q, k: probe(q, k, vis, scale=1.0).columns)(q, k))
    scores = 2 * 64 * 2048
    assert f"flops={2 * scores * 64}" in text
    assert f"flops={2 * scores * 64 + scores}" in text
    assert text.count(f"transcendentals={scores}") == 2


@pytest.mark.optimised
def test_on_a_cpu_no_array_has_a_weight_per_query_and_key(monkeypatch):
    """64 queries of 8 heads over 32k keys would be 64 MB, a chunk is 2 MB; keys lie heads first, as in caches."""
    monkeypatch.setattr("pallas_kernels.probe.xla.CHUNK", 1024)
    q, k = jax.ShapeDtypeStruct((1, 64, 8, 64), jnp.float32), jax.ShapeDtypeStruct((1, 2, 32768, 64), jnp.float32)
    vis = self_visibility(1, 32768).rows(32704, 64)
    bias = jax.ShapeDtypeStruct((1, 2, 32768), jnp.float32)
    call = lambda q, k, b: probe(q, jnp.swapaxes(k, 1, 2), vis, scale=1.0, want=NAMES, key_bias=b, backend="xla")
    assert jax.jit(call).lower(q, k, bias).compile().memory_analysis().temp_size_in_bytes < 12 * 2**20
