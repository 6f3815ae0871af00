"""The TPU kernels of `block_sparse`, simulated, against the reference; blocks of 128, the smallest they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility
from pallas_kernels import Score, compiling_for, interpreted
from pallas_kernels.block_sparse import block_sparse, steps
from pallas_kernels.block_sparse.lists import Lists
from pallas_kernels.block_sparse.plan import unfit
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, inputs, normal, packed
from tests.kernels import block_sparse_cases as plain
from tests.kernels.block_sparse_cases import draw_bias, draw_lists
from tests.kernels.odd import in_both_dtypes
from tests.kernels.scores import SCORES, SOFTMAX, ids
from tests.kernels.simulators import without_races

SLOW = (
    "exp-sum",
    "exp-sum_plus_one",
    "sigmoid-none",
    "elu1-sum",
    "relu-sum_plus_one",
)  # their formulas are those of others here
MEMBERS = [pytest.param(s, marks=pytest.mark.slow if ids(s) in SLOW else ()) for s in SCORES]


def check(arrays, vis, score=SOFTMAX, rtol=2e-5, mode="plain", **options):
    with interpreted(mode):
        return plain.check("tpu", arrays, vis, score, rtol, **options)


@in_both_dtypes
def test_odd_lengths_and_head_dims(shape, dtype):
    """Lists for all heads, per key head and per query head in turn."""
    arrays = inputs(
        shape.length,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        value_dim=shape.value_dim,
        dtype=dtype,
    )
    lists = (1, shape.heads, shape.kv_heads)[ODD.index(shape) % 3]
    blocks = draw_lists(1, lists, shape.length, shape.length, 128, 128, width=6)
    vis = self_visibility(1, shape.length)
    biases = (shape.heads, shape.kv_heads, 1)[ODD.index(shape) % 3]
    arrays = *arrays, draw_bias(1, biases, shape.length)
    check(arrays, vis, rtol=3e-5 if dtype == jnp.float32 else 2e-2, blocks=blocks, block_q=128, block_k=128)


@pytest.mark.parametrize("score", MEMBERS, ids=lambda s: ids(s) if isinstance(s, Score) else None)
def test_every_member_on_packed_documents(score):
    """Documents across tiles, one of length 1, padding in front, between and behind; segment 2 is empty."""
    positions, segments = packed([20, 150, 0, 1, 120], 300, batch=1)
    segments = jnp.where(segments == 1, 0, segments).at[:, 180:200].set(0)
    vis = self_visibility(1, 300, positions=positions, segment_ids=segments)
    blocks = jnp.array([[[[0, -1], [1, 0], [1, -1]]]], jnp.int32)
    arrays = inputs(300, batch=1, heads=2, kv_heads=1, dim=5, value_dim=12)
    arrays = *arrays, jnp.asarray(normal(5, (1, 2, 300)))
    o, _ = check(arrays, vis, score, rtol=1e-4, blocks=blocks, block_q=128, block_k=256)
    assert not o[:, 291:].any(), "padding rows give zeros"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "lists", "biases"),
    [(12, 2, 2, 2), (4, 2, 1, 4)]  # what is there for all heads, test_odd_lengths_and_head_dims has in turn
    + [pytest.param(*x, marks=pytest.mark.slow) for x in ((12, 2, 1, 0), (4, 2, 4, 4), (4, 2, 4, 1))],
)
def test_lists_and_biases_for_all_heads_per_key_head_and_per_query_head(heads, kv_heads, lists, biases):
    """Six heads of a group are two chunks of three: 512 rows are worked on at a time."""
    arrays = inputs(300, heads=heads, kv_heads=kv_heads, dim=8, value_dim=8)
    if biases:
        arrays = *arrays, draw_bias(2, biases, 300)
    blocks = draw_lists(2, lists, 300, 300, 128, 128, width=3)
    check(arrays, self_visibility(2, 300), blocks=blocks, block_q=128, block_k=128)


def test_queries_that_continue_a_cache_behind_global_keys():
    """Blocks of other sizes, other lengths of queries and keys, and every rule of visibility."""
    q, k, v = inputs(150, heads=2, kv_heads=1, dim=8, value_dim=8, keys=602)
    vis = Visibility(
        q_positions=jnp.array([[340], [420]]) + jnp.arange(150),
        k_positions=jnp.tile(jnp.arange(600), (2, 1)),
        q_segments=jnp.ones((2, 150), jnp.int32),
        k_segments=(jnp.arange(600) < jnp.array([[490], [570]])).astype(jnp.int32),
        prefix_len=jnp.array([3, 260]),
        window=100,
    ).prepend_global(2)
    blocks = jnp.array([[[[0, 1, -1], [1, 2, 0]]], [[[2, -1, -1], [2, 1, 0]]]], jnp.int32)
    check((q, k, v), vis, blocks=blocks, block_q=128, block_k=256)


@pytest.mark.parametrize(
    ("score", "lists"),
    [pytest.param(SOFTMAX, 1, marks=pytest.mark.slow), (Score("sigmoid", "p_norm", p=2.0), 2)],
    ids=["exp", "sig"],
)
def test_no_races_and_nothing_uninitialised_is_read(score, lists):
    """With a row that lists nothing and a key block that nobody lists."""
    blocks = jnp.array([[[[0, -1], [-1, -1], [0, 2]]]], jnp.int32)
    arrays = *inputs(260, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8), jnp.asarray(normal(5, (1, lists, 260)))
    blocks = jnp.tile(blocks, (1, lists, 1, 1)).at[:, lists - 1, 0, 1].set(0)
    with without_races("tpu") as simulator:
        check(arrays, self_visibility(1, 260), score, mode=simulator, blocks=blocks, block_q=128, block_k=128)


def test_unlisted_blocks_are_not_read():
    """NaN in their keys and values would reach the output as 0 · NaN, and the gradients."""
    q, k, v = inputs(384, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = jnp.array([[[[0, 2], [0, 2], [0, 2]]]], jnp.int32)
    spoil = lambda x, at: x.at[:, at : at + 128].set(jnp.nan)
    call = lambda *x: block_sparse(
        *x, self_visibility(1, 384), blocks=blocks, block_q=128, block_k=128, scale=1.0, backend="tpu"
    )
    run = jax.jit(jax.value_and_grad(lambda *x: (jnp.sum((o := call(*x))[:, :256]), o), (0, 1, 2), has_aux=True))
    with interpreted():
        (_, o), grads = run(q, spoil(k, 128), spoil(v, 128))
        late = run(q, spoil(k, 256), spoil(v, 256))[0][1]
    assert np.isfinite(o).all()
    assert all(np.isfinite(x).all() for x in grads)
    assert np.isfinite(late[:, :256]).all(), "listed but above the diagonal"
    assert np.isnan(late[:, 256:]).all()


def test_more_lists_than_scalar_memory_holds_are_worked_on_in_turns(monkeypatch):
    arrays = inputs(300, batch=2, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = draw_lists(2, 2, 300, 300, 128, 128, width=3)
    call = lambda causal: unfit(*arrays, self_visibility(2, 300, causal=causal), blocks, 128, 128)
    assert call(causal=False) is None
    monkeypatch.setattr(steps, "WORDS", 34)
    assert call(causal=True) is None, "half the tiles"
    assert "34 words of scalar memory but blocks of shape (2, 2, 3, 3) need 35" in call(causal=False)
    monkeypatch.setattr(steps, "WORDS", 50)
    assert [steps.per_call(*x) for x in ((4, 20), (2, 30))] == [2, 1], "two of four lists, and one of two turned ones"
    biased = *arrays, draw_bias(1, 1, 300)
    check(biased, self_visibility(2, 300), blocks=blocks, block_q=128, block_k=128)


def lists_of(rows):
    """Usable lists [1, L, I, N] from nested Python lists."""
    width = max(len(row) for heads in rows for row in heads)
    block = np.array([[row + [0] * (width - len(row)) for row in heads] for heads in rows], np.int32)
    count = np.array([[len(row) for row in heads] for heads in rows], np.int32)
    return Lists(*(jnp.asarray(x)[None] for x in (block, block % 2 == 1, count)))


def visits(table, size, slots):
    """Per unit: (row, other, masked) of every tile; first and last steps of rows; blocks each slot loads."""
    words = np.asarray(table.words).reshape(-1, size, slots + 1)
    for unit, count in zip(words, np.asarray(table.steps), strict=True):
        head, entry = unit[:, 0], unit[:, 1:]
        row = head >> 2
        tiles = [(row[s], e >> 2, e >> 1 & 1) for s in range(size) for e in entry[s] if e & 1]
        flags = {name: list(row[(head >> bit & 1) == 1]) for name, bit in (("first", 1), ("last", 0))}
        assert not (entry[count:] & 1).any(), "nothing behind the last step"
        assert not (head[count:] & 3).any()
        loads = sum(1 + int((np.diff(entry[:, m] >> 2) != 0).sum()) for m in range(slots))
        yield tiles, flags, int(count), loads


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_steps_visit_every_tile_once_and_every_row(slots):
    rows = [[[0, 1, 2, 3, 4], [], [2], [], [0, 3, 4]], [[], [1], [1, 2], [], []]]
    size = steps.bound(5, 25, slots)
    table = jax.jit(lambda lists: steps.table(steps.of_queries(lists), slots, size))(lists_of(rows))
    for heads, (tiles, flags, count, loads) in zip(rows, visits(table, size, slots), strict=True):
        assert tiles == [(i, j, j % 2) for i, row in enumerate(heads) for j in row]
        assert flags["first"] == flags["last"] == list(range(5)), "rows without tiles too: they are zeros"
        assert count == sum(max(1, -(-len(row) // slots)) for row in heads)
        assert loads <= sum(map(len, heads)) + slots, "empty slots load nothing, apart from the start"


@pytest.mark.parametrize("units", [1, 2])
def test_lists_turned_round(units):
    rows = [[[0, 3], [], [3]], [[1, 3], [0], [0, 1, 3]]]
    size = steps.bound(4, 18 // units, 2)
    table = jax.jit(lambda lists: steps.table(steps.of_keys(lists, units, 4), 2, size))(lists_of(rows))
    shared = [rows[0] + rows[1]] if units == 1 else rows
    for heads, (tiles, flags, _, _) in zip(shared, visits(table, size, 2), strict=True):
        assert tiles == [(j, i, j % 2) for j in range(4) for i, row in enumerate(heads) if j in row]
        assert flags["first"] == flags["last"] == [0, 1, 2, 3]


def test_vmap_and_remat_change_nothing():
    q, k, v = inputs(300, batch=2, heads=2, kv_heads=1, dim=8, value_dim=8)
    blocks = draw_lists(2, 1, 300, 300, 256, 256, width=2)
    call = lambda q, k, v, blocks: block_sparse(
        q, k, v, self_visibility(len(q), 300), blocks=blocks, block_q=256, block_k=256, scale=0.3, backend="tpu"
    )
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))
    with interpreted():
        expected = loss(call)(q, k, v, blocks)
        one = lambda *args: call(*(x[None] for x in args))[0]
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), loss(other)(q, k, v, blocks), expected)


def call_with(q=None, dtype=jnp.float32, block=128, backend="tpu", dim=16):
    q, k, v = inputs(8, heads=2, kv_heads=1, dim=dim, dtype=dtype)
    vis, blocks = self_visibility(2, 8), jnp.zeros((2, 1, 1, 1), jnp.int32)
    return block_sparse(q, k, v, vis, blocks=blocks, block_q=128, block_k=block, scale=1.0, backend=backend)


def test_a_named_backend_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call_with()
    with interpreted():
        with pytest.raises(NotImplementedError, match="q is float16: cast it or use 'xla'"):
            call_with(dtype=jnp.float16)
        with pytest.raises(NotImplementedError, match="block_k is 64: choose a multiple of 128 up to 512"):
            call_with(block=64)
        with pytest.raises(NotImplementedError, match=r"at most 256 .* block_k is 512"):
            call_with(block=512, dim=320)
    with pytest.raises(NotImplementedError, match=r"backend 'gpu' (needs JAX 0.11|computes bfloat16 but q is float32)"):
        call_with(backend="gpu")


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    text = lambda **kw: str(jax.make_jaxpr(lambda: call_with(backend="auto", **kw))())
    assert "pallas_call" not in text()
    with compiling_for("tpu"):
        assert "pallas_call" in text()
        assert "pallas_call" not in text(block=64)
        assert "pallas_call" not in text(dtype=jnp.float16)
    with interpreted():
        assert "pallas_call" not in text(), "a simulator is for who names the backend"


def test_the_cost_estimate_counts_lists_up_to_the_diagonal():
    q, k, v = (jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32) for _ in range(3))
    blocks = jax.ShapeDtypeStruct((1, 1, 8, 3), jnp.int32)
    call = lambda vis: (
        lambda q, k, v, blocks: block_sparse(
            q, k, v, vis, blocks=blocks, block_q=128, block_k=128, scale=1.0, backend="tpu"
        )
    )
    with compiling_for("tpu"):
        text = lambda vis: str(jax.make_jaxpr(call(vis))(q, k, v, blocks))
        causal, full = text(self_visibility(1, 1024)), text(self_visibility(1, 1024, causal=False))
    tile = 4 * 128 * 128 * 64
    assert f"flops={2 * (1 + 2 + 3 * 6) * tile}" in causal
    assert f"flops={2 * 24 * tile}" in full
