"""`block_sparse`: lists, the XLA backend against the reference, and what both promise."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, self_visibility, visible
from pallas_kernels import Score
from pallas_kernels.block_sparse import block_lists, block_sparse, density
from pallas_kernels.block_sparse.lists import in_blocks, usable
from pallas_kernels.block_sparse.reference import listed
from pallas_kernels.flash.reference import NEVER, flash_reference
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, inputs, normal, packed
from tests.kernels.block_sparse_cases import both, check, draw_bias, draw_lists
from tests.kernels.odd import in_both_dtypes
from tests.kernels.scores import SCORES, SOFTMAX, ids


@functools.partial(jax.jit, static_argnums=(2, 3))
def share_listed(blocks, vis, block_q, block_k):
    return density(blocks, vis, block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("score", SCORES, ids=ids)
def test_every_member_on_packed_documents(score):
    """Documents across tiles, one of length 1, padding in front, between and behind; segment 2 is empty."""
    positions, segments = packed([9, 30, 0, 1, 40], 91)
    segments = jnp.where(segments == 1, 0, segments).at[:, 50:55].set(0)
    vis = self_visibility(2, 91, positions=positions, segment_ids=segments)
    blocks = draw_lists(2, 2, 91, 91, 16, 12, width=6)
    arrays = inputs(91, heads=4, kv_heads=2, dim=5, value_dim=12)
    if score.activation == "exp":
        arrays = *arrays, draw_bias(2, 4, 91)
    else:
        arrays = *arrays, jnp.asarray(normal(5, (1, 2, 91)))
    o, _ = check("xla", arrays, vis, score, rtol=1e-4, blocks=blocks, block_q=16, block_k=12)
    assert not o[:, 80:].any(), "padding rows give zeros"


@in_both_dtypes
def test_odd_lengths_and_head_dims(shape, dtype):
    arrays = inputs(
        shape.length,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        value_dim=shape.value_dim,
        dtype=dtype,
    )
    blocks = draw_lists(shape.batch, shape.kv_heads, shape.length, shape.length, 64, 48)
    vis = self_visibility(shape.batch, shape.length)
    heads = (shape.heads, 1, shape.kv_heads)[ODD.index(shape) % 3]
    check(
        "xla",
        (*arrays, draw_bias(1, heads, shape.length)),
        vis,
        rtol=2e-5 if dtype == jnp.float32 else 2e-2,
        blocks=blocks,
        block_q=64,
        block_k=48,
    )


@pytest.mark.parametrize(("lists", "biases"), [(1, 0), (1, 6), (3, 6), (3, 3), (6, 1), (6, 3), (6, 6)])
def test_lists_and_biases_for_all_heads_per_key_head_and_per_query_head(lists, biases):
    arrays = inputs(70, heads=6, kv_heads=3, dim=8, value_dim=8)
    if biases:
        arrays = *arrays, draw_bias(2, biases, 70)
    blocks = draw_lists(2, lists, 70, 70, 16, 8)
    check("xla", arrays, self_visibility(2, 70, window=40), blocks=blocks, block_q=16, block_k=8)


def test_queries_that_continue_a_cache_behind_global_keys():
    """Other lengths of queries and keys; keys that everyone sees must be listed like any other."""
    q, k, v = inputs(21, heads=2, kv_heads=1, dim=8, value_dim=8, keys=72)
    vis = Visibility(
        q_positions=jnp.array([[35], [49]]) + jnp.arange(21),
        k_positions=jnp.tile(jnp.arange(70), (2, 1)),
        q_segments=jnp.ones((2, 21), jnp.int32),
        k_segments=(jnp.arange(70) < jnp.array([[56], [70]])).astype(jnp.int32),
        prefix_len=jnp.array([3, 60]),
        window=30,
    ).prepend_global(2)
    blocks = draw_lists(2, 1, 21, 72, 8, 16)
    check("xla", (q, k, v), vis, blocks=blocks, block_q=8, block_k=16)


def test_all_blocks_listed_is_dense_attention():
    q, k, v = inputs(50, heads=4, kv_heads=2)
    vis = self_visibility(2, 50)
    blocks = block_lists(jnp.ones((2, 1, 4, 7), bool), 7)
    o = jax.jit(lambda *x: block_sparse(*x, vis, blocks=blocks, block_q=16, block_k=8, scale=0.3))(q, k, v)
    close(o, jax.jit(lambda *x: flash_reference(*x, vis, SOFTMAX, scale=0.3))(q, k, v))
    np.testing.assert_array_equal(share_listed(blocks, vis, 16, 8), 1.0)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_order_repetitions_and_unused_entries_change_nothing(backend):
    q, k, v = inputs(40, batch=1, heads=2, kv_heads=1)
    sizes = dict(block_q=20, block_k=10, scale=0.3, backend=backend)
    run = jax.jit(lambda blocks: block_sparse(q, k, v, self_visibility(1, 40), blocks=blocks, **sizes))
    call = lambda rows: run(jnp.array([[rows]], jnp.int32))
    plain = call([[0, 1, -1, -1, -1], [0, 2, 3, -1, -1]])
    for rows in ([[1, 0, 1, 1, 0], [3, 2, -1, 0, 3]], [[-1, 4, 99, 1, 0], [-7, 3, 0, 2, 2]]):
        close(call(rows), plain, rtol=1e-6)


def test_a_query_without_listed_keys_gives_zeros_and_no_gradient():
    q, k, v = inputs(40, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = jnp.array([[[[-1, -1], [0, 1], [4, -1], [-1, 2]]]], jnp.int32)  # row 2 lists keys above the diagonal only
    args = dict(blocks=blocks, block_q=10, block_k=8)
    o, stat = check("xla", (q, k, v), self_visibility(1, 40), **args)
    for rows in (slice(0, 10), slice(20, 30)):
        assert not o[:, rows].any()
        np.testing.assert_array_equal(stat[:, rows], np.float32(NEVER))
    dq = both("xla", (q, k, v), self_visibility(1, 40), **args)[1][0]
    assert not np.any(dq[:, :10])
    assert np.any(dq[:, 10:20])


def without_hidden_keys(q, k, v, hidden, scale, shift=0.0):
    """Causal softmax attention of every head without its hidden keys, and log Z, by NumPy in f64; NaN sees nothing."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    o, log_z = np.full((*q.shape[:3], v.shape[3]), np.nan), np.full(q.shape[:3], np.nan)
    for b, t, h in np.ndindex(q.shape[:3]):
        left = np.flatnonzero(~hidden[h // group] & (np.arange(length) <= t))
        if len(left):
            w = np.exp(scale * k[b, left, h // group] @ q[b, t, h] + shift)
            o[b, t, h], log_z[b, t, h] = w @ v[b, left, h // group] / w.sum(), np.log(w.sum())
    return o, log_z


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_hidden_keys_are_as_if_they_were_not_there(backend):
    """Of each key head others; a query of which every listed key is hidden gives zeros."""
    q, k, v = inputs(40, batch=1, heads=4, kv_heads=2, dim=8, value_dim=8)
    hidden = np.zeros((2, 40), bool)
    hidden[0, 3::2], hidden[1, 1::3], hidden[1, 0] = True, True, True
    sizes = dict(blocks=jnp.zeros((1, 1, 1, 1), jnp.int32), block_q=40, block_k=40, scale=0.3)
    run = jax.jit(
        lambda bias: block_sparse(q, k, v, self_visibility(1, 40), **sizes, key_bias=bias, backend=backend, stats=True)
    )
    expected, log_z = without_hidden_keys(q, k, v, hidden, 0.3, shift=0.7)
    for nothing in (-np.inf, NEVER):
        o, stat = run(jnp.where(hidden, nothing, 0.7)[None])
        close(o, np.nan_to_num(expected))
        close(stat, np.where(np.isnan(log_z), NEVER, log_z))
        assert np.isnan(log_z[:, :2, 2:]).all(), "keys 0 and 1 are hidden"
        close(jnp.where(stat > NEVER, stat, 0), np.nan_to_num(log_z))


@pytest.mark.parametrize("score", [SOFTMAX, Score("sigmoid", "none"), Score("exp", "p_norm", p=2.0)], ids=ids)
def test_outputs_over_disjoint_lists_merge_by_their_statistics(score):
    q, k, v = inputs(48, batch=1, heads=2, kv_heads=2)
    vis, sizes = self_visibility(1, 48, causal=False), dict(block_q=24, block_k=8, scale=0.3)
    run = jax.jit(lambda blocks: block_sparse(q, k, v, vis, score, blocks=blocks, stats=True, **sizes))
    call = lambda rows: run(jnp.array([[rows]], jnp.int32))
    (a, top_a), (b, top_b), (whole, top) = (
        call(rows)
        for rows in (
            [[0, 3, 9, 9, 9], [5, 9, 9, 9, 9]],
            [[1, 2, 4, 9, 9], [0, 1, 9, 9, 9]],
            [[0, 3, 1, 2, 4], [5, 0, 1, 9, 9]],
        )
    )
    if score.activation == "exp":
        p = score.power
        close(jnp.logaddexp(p * top_a, p * top_b) / p, top)
        share = lambda part: jnp.exp(part - top)[..., None]
    else:
        share = lambda part: 1.0
    close(share(top_a) * a + share(top_b) * b, whole)


def test_unlisted_and_unseen_blocks_are_not_read():
    """NaN in their keys and values would reach the output as 0 · NaN, and the gradients."""
    q, k, v = inputs(64, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = jnp.array([[[[0, 3], [0, 3], [0, 2], [0, 3]]]], jnp.int32)
    spoil = lambda x: x.at[:, 16:32].set(jnp.nan)  # block 1: listed by nobody
    sizes = dict(block_q=16, block_k=16, scale=1.0, backend="xla")
    call = lambda q, k, v: block_sparse(q, k, v, self_visibility(1, 64), blocks=blocks, **sizes)
    run = jax.jit(jax.value_and_grad(lambda *x: (jnp.sum((o := call(*x))[:, :48]), o), (0, 1, 2), has_aux=True))
    (value, _), grads = run(q, spoil(k), spoil(v))
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in grads)
    late = lambda x: x.at[:, 48:].set(jnp.nan)  # block 3: rows 0 and 1 list it but see none of it
    (_, o), _ = run(q, late(k), late(v))
    assert np.isfinite(o[:, :48]).all()
    assert np.isnan(o[:, 48:]).all()


def test_lists_of_a_mask():
    mask = jnp.array([[[[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]]], bool)
    np.testing.assert_array_equal(block_lists(mask, 3)[0, 0], [[3, 2, 0], [-1, -1, -1], [1, -1, -1]])
    np.testing.assert_array_equal(block_lists(mask, 5)[0, 0, 0], [3, 2, 0, -1, -1])
    np.testing.assert_array_equal(block_lists(mask, 2)[0, 0, 0], [3, 2], err_msg="too long: the highest are kept")
    with pytest.raises(ConfigError, match=r"width is 0 but .* at least 1"):
        block_lists(mask, 0)


def test_density_counts_tiles_that_somebody_sees():
    blocks = jnp.array([[[[0], [1], [0], [3]], [[-1], [1], [3], [3]]]], jnp.int32)
    vis = self_visibility(1, 30)  # 4 blocks of 8 and the rest: 10 tiles up to the diagonal
    np.testing.assert_allclose(share_listed(blocks, vis, 8, 8)[0], [0.4, 0.2])
    full = self_visibility(1, 30, causal=False)
    np.testing.assert_allclose(share_listed(blocks, full, 8, 8)[0], [4 / 16, 3 / 16])


@pytest.mark.parametrize("window", [None, 20])
def test_visited_tiles_hold_all_listed_pairs_and_only_unmasked_ones_are_whole(window):
    positions, segments = packed([40, 0, 1, 50], 96)
    vis = self_visibility(2, 96, positions=positions, segment_ids=segments, window=window)
    blocks = draw_lists(2, 2, 96, 96, 16, 8, width=7)
    lists = jax.jit(lambda blocks: usable(blocks, in_blocks(vis, 2, 16, 8), 16, 8))(blocks)
    pairs = jax.jit(lambda blocks: visible(vis)[:, None] & listed(blocks, 96, 96, 16, 8))(blocks)
    lists, pairs = jax.tree.map(np.asarray, lists), np.asarray(pairs).reshape(2, 2, 6, 16, 12, 8)
    some, every = pairs.any((3, 5)), pairs.all((3, 5))
    for b, h, i in np.ndindex(2, 2, 6):
        used = lists.block[b, h, i, : lists.count[b, h, i]]
        assert list(used) == sorted(set(used)), "each once, ascending"
        assert set(np.flatnonzero(some[b, h, i])) <= set(used)
        assert set(used) <= set(np.asarray(blocks[b, h, i]))
        whole = used[~lists.masked[b, h, i, : len(used)]]
        assert set(whole) <= set(np.flatnonzero(every[b, h, i]))


@pytest.mark.optimised
def test_temporary_memory_is_linear_in_length():
    """Forward and backward at 8 times the length need about 8 times the memory, not 64 times."""

    def bytes_at(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32) for _ in range(3))
        blocks = jax.ShapeDtypeStruct((1, 1, length // 64, 4), jnp.int32)
        loss = lambda q, k, v, blocks: jnp.sum(
            block_sparse(
                q, k, v, self_visibility(1, length), blocks=blocks, block_q=64, block_k=64, scale=1.0, backend="xla"
            )
        )
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, blocks).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large = bytes_at(4096), bytes_at(32768)
    assert large < 10 * small, (small, large)
    assert large < 40 * 32768 * 16 * 4, "a few copies of the arguments"


def test_vmap_and_remat_change_nothing():
    q, k, v = inputs(40, batch=3, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = draw_lists(3, 2, 40, 40, 16, 8)
    call = lambda q, k, v, blocks: block_sparse(
        q, k, v, self_visibility(len(q), 40), blocks=blocks, block_q=16, block_k=8, scale=0.3
    )
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))
    plain = loss(call)(q, k, v, blocks)
    one = lambda *args: call(*(x[None] for x in args))[0]
    other = jax.vmap(jax.checkpoint(one))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5), loss(other)(q, k, v, blocks), plain)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((2, 3, 2, 1), {}, r"blocks has 3 list heads: .* \(1\), one per key head \(2\) or one per query head \(4\)"),
        ((2, 1, 3, 1), {}, r"blocks has 3 rows but 20 queries in blocks of 16 make 2"),
        ((2, 1, 2, 1), dict(block_k=0), r"block_k is 0 but must be at least 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(shape, sizes, message):
    q, k, v = inputs(20, heads=4, kv_heads=2)
    sizes = dict(block_q=16, block_k=8) | sizes
    with pytest.raises(ConfigError, match=message):
        block_sparse(q, k, v, self_visibility(2, 20), blocks=jnp.zeros(shape, jnp.int32), scale=1.0, **sizes)


@pytest.mark.parametrize("backend", ["auto", "reference", "xla", "tpu", "gpu"])
@pytest.mark.parametrize("shape", [(2, 3, 20), (3, 1, 20), (2, 1, 21), (20,)], ids=str)
def test_a_key_bias_that_does_not_fit_is_refused(shape, backend):
    q, k, v = inputs(20, heads=4, kv_heads=2)
    sizes = dict(blocks=jnp.zeros((2, 1, 1, 1), jnp.int32), block_q=32, block_k=8, scale=1.0)
    message = rf"key_bias has shape {re.escape(str(shape))} but must be \[batch, heads, keys\] with batch 1 or 2"
    with pytest.raises(ConfigError, match=message):
        block_sparse(q, k, v, self_visibility(2, 20), **sizes, key_bias=jnp.zeros(shape), backend=backend)
