"""The TPU kernel of `flash`, simulated, against the reference; its tiles are far smaller than the sequence."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility, visible
from jaxattn.rope import Alibi, RawRelativeBias, RelativeBias
from pallas_kernels import Score, compiling_for, flash, interpreted
from pallas_kernels.flash.reference import flash_reference
from pallas_kernels.flash.tiles import Spans, certain, reachable, spans
from pallas_kernels.flash.tpu import flash_tpu
from tests.conformance.cases import close, inputs, packed
from tests.kernels.scores import SCORES, SOFTMAX, ids
from tests.kernels.simulators import without_races


def both(fn, arrays, vis, score, **options):
    """Outputs and all gradients of a loss that weighs every entry differently."""

    def loss(q, k, v, bias=None):
        o = fn(q, k, v, vis, score, scale=0.3, bias=bias, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def check(arrays, vis, score=SOFTMAX, rtol=2e-5, block_q=32, block_k=48, mode="plain"):
    """Forward and gradients equal the reference; returns the kernel's output."""
    with interpreted(mode):
        (_, o), ours = both(flash_tpu, arrays, vis, score, block_q=block_q, block_k=block_k)
    (_, expected), theirs = both(flash_reference, arrays, vis, score)
    assert o.dtype == expected.dtype
    close(o, expected, rtol=rtol)
    jax.tree.map(lambda a, b: close(a, b, rtol=rtol), ours, theirs)
    return np.asarray(o, np.float32)


@pytest.mark.parametrize("score", SCORES, ids=ids)
def test_every_member_on_packed_documents(score):
    """Documents across tiles, one of length 1, padding rows; segment 2 is empty."""
    positions, segments = packed([70, 0, 1, 40], 131)
    vis = self_visibility(2, 131, positions=positions, segment_ids=segments)
    o = check(inputs(131, heads=4, kv_heads=2, dim=5, value_dim=12), vis, score, rtol=1e-4)
    assert not o[:, 111:].any(), "padding rows give zeros"


@pytest.mark.parametrize(("length", "dim", "value_dim", "kv_heads"), [(1, 3, 3, 1), (63, 7, 70, 3), (257, 72, 9, 6)])
def test_odd_lengths_odd_head_dims_and_groups(length, dim, value_dim, kv_heads):
    arrays = inputs(length, batch=1, heads=6, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    check(arrays, self_visibility(1, length), block_q=64, block_k=64, rtol=5e-5)


RULES = {
    "window": (dict(window=20), 0),
    "window and global keys": (dict(window=20), 2),
    "both sides and global keys": (dict(causal=False), 2),
    "window on both sides": (dict(causal=False, window=9), 0),
    "prefix": (dict(prefix_len=jnp.array([50, 0])), 0),
    "prefix, window and global keys": (dict(prefix_len=jnp.array([3, 60]), window=15), 2),
}


@pytest.mark.parametrize(("rules", "sinks"), RULES.values(), ids=list(RULES))
def test_every_rule_of_visibility(rules, sinks):
    segments = np.array(packed([80, 21], 110)[1])
    segments[1] = np.arange(110) >= 4  # row 1: padding in front
    vis = self_visibility(2, 110, segment_ids=jnp.asarray(segments), **rules).prepend_global(sinks)
    check(inputs(110, heads=2, kv_heads=1, dim=8, value_dim=8, keys=110 + sinks), vis, block_q=16, block_k=24)


def test_queries_that_continue_a_cache():
    """Other lengths of queries and keys, positions that start late, cells not yet written."""
    q, k, v = inputs(5, heads=2, kv_heads=1, dim=8, value_dim=8, keys=70)
    written = np.arange(70) < np.array([[40], [66]])
    whole = lambda x: jnp.asarray(x, jnp.int32)
    vis = Visibility(
        q_positions=whole(np.array([[35], [61]]) + np.arange(5)),
        k_positions=whole(np.tile(np.arange(70), (2, 1))),
        q_segments=whole(np.ones((2, 5))),
        k_segments=whole(written),
        window=30,
    )
    check((q, k, v), vis, block_q=4, block_k=16)


@pytest.mark.parametrize("bias", [Alibi(jnp.array([0.1, 0.03])), RawRelativeBias(8)], ids=["alibi", "raw"])
@pytest.mark.parametrize("score", [SOFTMAX, Score("sigmoid", "none")], ids=ids)
def test_biases_that_are_arithmetic_on_distances(score, bias):
    """With the gradient of ALiBi's slopes, which keys that everyone sees do not enter."""
    q, k, v = inputs(60, heads=2, kv_heads=1, dim=8, value_dim=8, keys=62)
    vis = self_visibility(2, 60).prepend_global(2)
    with interpreted():
        (_, o), ours = both(flash_tpu, (q, k, v, bias), vis, score, block_q=16, block_k=24)
    (_, expected), theirs = both(flash_reference, (q, k, v, bias), vis, score)
    close(o, expected)
    jax.tree.map(close, ours, theirs)


def test_bfloat16_keeps_sums_in_float32():
    arrays = inputs(200, batch=1, heads=2, kv_heads=1, dim=32, value_dim=32, dtype=jnp.bfloat16)
    check(arrays, self_visibility(1, 200), rtol=2e-2)
    ones, vis = [np.ones(x.shape, x.dtype) for x in arrays], self_visibility(1, 200, causal=False)
    with interpreted():  # 200 equal weights: a running mass in bf16 would stop at 256 · 2^-8 steps
        o = jax.jit(lambda *x: flash_tpu(*x, vis, Score("relu", "none"), scale=1 / 32, block_k=16))(*ones)
    np.testing.assert_array_equal(np.asarray(o, np.float32), 200.0)


@pytest.mark.parametrize(
    "score",  # test_flash_extras.py has softmax
    [pytest.param(SOFTMAX, marks=pytest.mark.slow), Score("sigmoid", "p_norm", p=2.0)],
    ids=ids,
)
def test_no_races_and_nothing_uninitialised_is_read(score):
    positions, segments = packed([20, 7], 30, batch=1)
    vis = self_visibility(1, 30, positions=positions, segment_ids=segments)
    arrays = inputs(30, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    with without_races("tpu") as simulator:
        check(arrays, vis, score, block_q=8, block_k=8, mode=simulator)


def test_tiles_nobody_sees_are_not_computed():
    """NaN in their keys and values would reach the output as 0 · NaN."""
    q, k, v = inputs(96, batch=1, heads=1, kv_heads=1, dim=8, value_dim=8)
    vis = self_visibility(1, 96, window=20)

    def spoil(x, where):
        x = np.array(x)
        x[:, where] = np.nan
        return x

    with interpreted():
        call = jax.jit(lambda k, v: flash_tpu(q, k, v, vis, SOFTMAX, scale=1.0, block_q=16, block_k=16))
        run = lambda where: np.asarray(call(spoil(k, where), spoil(v, where)))
        after, before, needed = run(slice(64, 96)), run(slice(0, 16)), run(slice(48, 49))
    assert np.isfinite(after[:, :64]).all(), "above the diagonal"
    assert np.isfinite(before[:, 48:]).all(), "out of the window"
    assert np.isnan(needed[:, 48:64]).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def tiles_of(vis, block_q, block_k):
    tiles = reachable(vis, block_q, block_k)
    return tiles, spans(tiles, certain(vis, block_q, block_k)), visible(vis)


def tables(vis, block_q, block_k):
    """Tiles [B, I, J]: with a visible pair, with no other pair; those the kernel visits, those it does not mask."""
    tiles, flat, see = jax.device_get(tiles_of(vis, block_q, block_k))
    entries = Spans(np.moveaxis(flat.reshape(*tiles.shape[:2], Spans.SIZE), -1, 0)[..., None], 0)
    j = np.arange(tiles.shape[2])
    cut = see.reshape(see.shape[0], see.shape[1] // block_q, block_q, -1, block_k)
    return (cut.any((2, 4)), cut.all((2, 4))), (entries.holds(j), entries.whole(j))


@pytest.mark.parametrize("window", [None, 1, 10])
@pytest.mark.parametrize("causal", [True, False])
def test_visited_tiles_hold_all_that_is_visible(causal, window):
    """On segments in any order, unsorted positions and keys that everyone sees."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        pos, seg = (jnp.asarray(draw.integers(low, 6 + 20 * (low == 0), (2, 48)), jnp.int32) for low in (0, -1))
        vis = Visibility(pos, pos, seg, seg, causal=causal, window=window)
        for blocks in ((8, 4), (2, 1)):
            (some, every), (visited, unmasked) = tables(vis, *blocks)
            assert not (some & ~visited).any()
            assert not (unmasked & ~every).any()


@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (16, 0), (16, 8)], ids=["causal", "window", "window and global keys"]
)
def test_visited_tiles_are_only_those_needed(window, sinks):
    positions, segments = packed([64, 1, 31], 104, batch=1)
    for vis in (self_visibility(1, 104, window=window), self_visibility(1, 104, positions=positions, window=window)):
        vis = dataclasses.replace(vis, q_segments=segments, k_segments=segments)
        vis = jax.jit(lambda vis: vis.prepend_global(sinks))(vis)
        (some, every), (visited, unmasked) = tables(vis, 8, 8)
        np.testing.assert_array_equal(visited, some)
        np.testing.assert_array_equal(unmasked[..., sinks // 8 :], every[..., sinks // 8 :])


def test_vmap_and_remat_change_nothing():
    q, k, v = inputs(40, batch=3, heads=2, kv_heads=1, dim=8, value_dim=8)
    call = lambda q, k, v: flash_tpu(q, k, v, self_visibility(len(q), 40), Score(), scale=0.3, block_q=16, block_k=16)
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))
    with interpreted():
        plain = loss(call)(q, k, v)
        one = lambda q, k, v: call(q[None], k[None], v[None])[0]
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), loss(other)(q, k, v), plain)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v = inputs(8, heads=2, kv_heads=1)
    call = lambda q=q, bias=None, backend="tpu": flash(
        q, k, v, self_visibility(2, 8), Score(), scale=1.0, bias=bias, backend=backend
    )
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match=r"position bias Partial: it has Alibi, .*use 'xla'"):
            call(bias=lambda q_at, k_at: jnp.zeros((2, 1, 8, 8)))
        with pytest.raises(NotImplementedError, match=r"2 to 64 buckets but RelativeBias has 65: use 'xla'"):
            call(bias=RelativeBias(jnp.zeros((65, 2))))
        with pytest.raises(NotImplementedError, match="q is float16"):
            call(q.astype(jnp.float16))
        close(jax.jit(call)(q), jax.jit(lambda q: call(q, backend="reference"))(q))


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v = inputs(8, heads=2, kv_heads=1)
    text = lambda q, bias=None: str(
        jax.make_jaxpr(lambda q: flash(q, k, v, self_visibility(2, 8), Score(), scale=1.0, bias=bias))(q)
    )
    assert "pallas_call" not in text(q)
    with compiling_for("tpu"):
        assert "pallas_call" in text(q)
        assert "pallas_call" in text(q, RelativeBias(jnp.zeros((32, 2))))
        assert "pallas_call" not in text(q, RelativeBias(jnp.zeros((65, 2))))
        assert "pallas_call" not in text(q.astype(jnp.float16))
    with interpreted():
        assert "pallas_call" not in text(q), "a simulator is for who names the backend"


def test_compiled_functions_do_not_leave_their_context():
    q, k, v = inputs(8, heads=2, kv_heads=1)
    call = jax.jit(lambda q: flash(q, k, v, self_visibility(2, 8), Score(), scale=1.0, backend="tpu"))
    with interpreted():
        expected, pull = jax.vjp(call, q)
    with pytest.raises(NotImplementedError, match="computes on 'cpu'"):
        call(q)
    with interpreted("plain"):
        close(call(q), expected)
    assert np.isfinite(pull(expected)[0]).all(), "the backward pass runs where the forward pass ran"


def test_the_cost_estimate_counts_tiles_up_to_the_diagonal():
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32) for _ in range(3))
    with compiling_for("tpu"):
        text = lambda vis: str(jax.make_jaxpr(lambda *x: flash_tpu(*x, vis, Score(), scale=1.0, block_k=512))(q, k, v))
        half, whole = text(self_visibility(1, 2048)), text(self_visibility(1, 2048, causal=False))
    tile = 4 * 512 * 512 * 64
    assert f"flops={10 * tile}" in half
    assert f"flops={16 * tile}" in whole
