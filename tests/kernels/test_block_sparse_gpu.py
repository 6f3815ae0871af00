"""The Hopper kernels of `block_sparse` in JAX's simulator of GPUs, against the reference; bfloat16 throughout.

What is simulated hands weights to the second product through shared memory; the form with registers is compiled in
`tests/aot/test_block_sparse_gpu.py`. The kernels are `flash`'s: see also `test_flash_gpu`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility, visible
from pallas_kernels import Score, compiling_for, interpreted
from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.block_sparse.gpu_lists import Plan, by_key, by_query
from pallas_kernels.block_sparse.lists import in_blocks
from pallas_kernels.block_sparse.reference import listed
from pallas_kernels.flash.reference import NEVER
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, inputs, normal, packed
from tests.kernels.block_sparse_cases import draw_bias, draw_lists
from tests.kernels.late import delay
from tests.kernels.near import near
from tests.kernels.scores import SOFTMAX, ids
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

SIGMOID = Score("sigmoid", "none", logit_bias=-2.0)
SIZES = dict(block_q=128, block_k=128)


def both(backend, arrays, vis, score, **options):
    """Output, statistic and all gradients of a loss that weighs every entry of both differently.

    Args:
      arrays: q, k, v and maybe a key bias.
    """

    def loss(q, k, v, key_bias=None):
        bias = {} if key_bias is None else {"key_bias": key_bias}
        o, stat = block_sparse(q, k, v, vis, score, scale=0.2, stats=True, backend=backend, **SIZES | bias | options)
        waves = lambda x: jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(jnp.arange(x.size)).reshape(x.shape))
        return waves(o) + waves(jnp.where(stat > NEVER, stat, 0.0)), (o, stat)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def check(arrays, vis, score=SOFTMAX, rtol=2e-2, mode="plain", **options):
    """Output, statistic and gradients equal the reference's on the same rounded inputs; returns the outputs."""
    with interpreted(mode):
        (_, (o, stat)), ours = both("gpu", arrays, vis, score, **options)
    (_, (o_expected, stat_expected)), theirs = both("reference", arrays, vis, score, **options)
    near(o, o_expected, rtol)
    seen = np.asarray(stat_expected) > NEVER
    np.testing.assert_array_equal(np.asarray(stat)[~seen], np.float32(NEVER))
    near(stat[seen], stat_expected[seen], rtol)
    jax.tree.map(lambda a, b: near(a, b, rtol), ours, theirs)
    return np.asarray(o, np.float32), np.asarray(stat)


def numbers(length, **shape):
    return inputs(
        length, **{"batch": 1, "heads": 2, "kv_heads": 1, "dim": 60, "value_dim": 64, **shape}, dtype=jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("lists", "biases", "batch", "length"),
    [
        (1, 2, 1, 300),
        (2, 0, 2, 150),
        (4, 4, 1, 300),
        pytest.param(1, 4, 1, 300, marks=pytest.mark.slow),
        pytest.param(2, 4, 2, 150, marks=pytest.mark.slow),
        pytest.param(4, 1, 1, 300, marks=pytest.mark.slow),
    ],
)
def test_lists_and_biases_for_all_heads_per_key_head_and_per_query_head(lists, biases, batch, length):
    """Odd lengths, and value heads of another width."""
    arrays = numbers(length, batch=batch, heads=4, kv_heads=2, value_dim=96)
    if biases:
        arrays = *arrays, draw_bias(batch, biases, length)
    blocks = draw_lists(batch, lists, length, length, 128, 128, width=3)
    check(arrays, self_visibility(batch, length), blocks=blocks)


def test_packed_documents_with_padding_in_front_between_and_behind():
    """One document of length 1, one that is empty (4); a query block that lists nothing of what it may see."""
    positions, segments = packed([9, 150, 1, 30, 60], 400, batch=1)
    segments = jnp.where(segments == 1, 0, jnp.where(segments == 4, 0, segments))
    vis = self_visibility(1, 400, positions=positions, segment_ids=segments)
    blocks = jnp.array([[[[0, 3], [1, 0], [0, -1], [-1, -1]]]], jnp.int32)
    o, _ = check(numbers(400), vis, Score("exp", "sum_plus_one"), blocks=blocks)
    assert not o[np.asarray(segments) == 0].any(), "padding rows give zeros"
    assert not o[:, 256:].any(), "rows that list nothing they may see give zeros"


def test_sigmoid_in_blocks_of_other_sizes_behind_global_keys():
    """Every rule of visibility, other lengths of queries and keys; entries that repeat a block or name none.

    One of them times the four tiles of a block is 2^32, so that it must not become block 0.
    """
    vis = Visibility(
        q_positions=340 + jnp.arange(150)[None],
        k_positions=jnp.arange(600)[None],
        q_segments=jnp.ones((1, 150), jnp.int32),
        k_segments=(jnp.arange(600) < 490)[None].astype(jnp.int32),
        prefix_len=jnp.array([3]),
        window=100,
    ).prepend_global(2)
    blocks = jnp.array([[[[1, 0, 1, 9], [-7, 2**30, 1, 2]]]], jnp.int32)
    arrays = *numbers(150, keys=602), jnp.asarray(normal(5, (1, 1, 602)))
    check(arrays, vis, SIGMOID, blocks=blocks, block_q=128, block_k=256)


@pytest.mark.parametrize("dims", [(192, 192), pytest.param((256, 200), marks=pytest.mark.slow)], ids=str)
def test_wide_heads_walk_over_the_parts_of_blocks(dims):
    blocks = draw_lists(1, 2, 300, 300, 128, 128, width=2)
    check(numbers(300, dim=dims[0], value_dim=dims[1]), self_visibility(1, 300), blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
@pytest.mark.parametrize("score", [SOFTMAX, SIGMOID], ids=ids)
def test_odd_shapes(shape, score):
    """Lists for all heads, per key head and per query head in turn."""
    q, k, v = numbers(
        shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, value_dim=shape.value_dim
    )
    lists = (1, shape.heads, shape.kv_heads)[ODD.index(shape) % 3]
    blocks = draw_lists(1, lists, shape.length, shape.length, 128, 128, width=4)
    arrays = q, k, 0.05 * v  # outputs whose rounding no loss amplifies
    check(arrays, self_visibility(1, shape.length), score, blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [
        Score("exp", "sum", row_sum=3.0, logit_bias=0.5),
        Score("sigmoid", "sum"),
        Score("elu1", "sum", row_sum=2.0),
        Score("elu1", "clipped_sum"),
        Score("relu", "sum_plus_one"),
        Score("relu", "none"),
        Score("identity", "clipped_sum"),
    ],
    ids=ids,
)
def test_every_member_on_packed_documents(score):
    positions, segments = packed([70, 0, 1, 140], 270)
    vis = self_visibility(2, 270, positions=positions, segment_ids=segments)
    q, k, v = numbers(270, batch=2)
    blocks = draw_lists(2, 2, 270, 270, 128, 128, width=2)
    check((0.3 * q, k, 0.05 * v), vis, score, blocks=blocks)  # outputs below 1, whose rounding no loss amplifies


@pytest.mark.slow
@pytest.mark.parametrize("rules", [dict(causal=False), dict(window=150), dict(causal=False, window=50)], ids=str)
@pytest.mark.parametrize("sizes", [(128, 384), (256, 128), (512, 256)], ids=str)
def test_blocks_of_several_tiles_and_rules_of_visibility(sizes, rules):
    blocks = draw_lists(1, 2, 390, 390, *sizes, width=2)
    check(numbers(390), self_visibility(1, 390, **rules), blocks=blocks, block_q=sizes[0], block_k=sizes[1])


def test_unlisted_and_unseen_tiles_are_not_read():
    """NaN in their keys and values would reach the output as 0 · NaN, and the gradients."""
    q, k, v = numbers(384, heads=1)
    blocks = jnp.array([[[[0, 2], [0, 2], [0, 2]]]], jnp.int32)
    spoil = lambda x, at: x.at[:, at : at + 128].set(jnp.nan)
    call = lambda *x: block_sparse(*x, self_visibility(1, 384), blocks=blocks, **SIZES, scale=0.3, backend="gpu")
    loss = lambda q, k, v: (jnp.sum((o := call(q, k, v).astype(jnp.float32))[:, :256]), o)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    with interpreted():
        (_, clean), clean_grads = run(q, k, v)
        (_, o), grads = run(q, spoil(k, 128), spoil(v, 128))
        late = run(q, spoil(k, 256), spoil(v, 256))[0][1]
        lost = run(spoil(q, 128), k, v)[1]
    np.testing.assert_array_equal(o, clean, err_msg="key block 1 is listed by nobody")
    jax.tree.map(np.testing.assert_array_equal, grads, clean_grads)
    assert np.isfinite(late[:, :256]).all(), "listed but above the diagonal"
    assert np.isnan(late[:, 256:]).all()
    for x in lost[1:]:
        assert np.isnan(np.asarray(x, np.float32)[:, :128]).any(), "query block 1 lists key block 0"
        assert not np.asarray(x, np.float32)[:, 128:].any(), "and no other; the loss looks at no later query"


def test_no_races_and_nothing_uninitialised_is_read():
    """With a query block that lists nothing and a key block that nobody lists."""
    blocks = jnp.array([[[[0, -1], [-1, -1], [0, 2]]]], jnp.int32)
    arrays = *numbers(260, heads=1), draw_bias(1, 1, 260)
    with without_races("gpu") as simulator:
        check(arrays, self_visibility(1, 260), mode=simulator, blocks=blocks)


@pytest.mark.parametrize(
    "late", ["fetch", pytest.param("add_product", marks=pytest.mark.slow)], ids=["copies", "second products"]
)
def test_nobody_relies_on_others_being_quick(late, monkeypatch):
    simulator = delay(monkeypatch, late)
    blocks = jnp.array([[[[0, -1, -1], [0, 1, -1], [1, 0, 2]]]], jnp.int32)
    check(numbers(300, heads=1), self_visibility(1, 300), mode=simulator, blocks=blocks)


def plan(q, k, blocks, sizes, vis, tile_q):
    return Plan(
        score=SOFTMAX,
        scale=1.0,
        group=q // k,
        causal=vis.causal,
        window=vis.window,
        has_prefix=vis.prefix_len is not None,
        aligned=vis.aligned,
        stats=False,
        staged=True,
        interpret=False,
        kv_heads=k,
        lists=blocks.shape[1],
        width=blocks.shape[3],
        block_q=sizes[0],
        block_k=sizes[1],
        query_tiles=vis.q_positions.shape[1] // tile_q,
    )


def walked(plan, table, heads, blocks, batch=2):
    """(row of the batch, head, block, entries, how many without a mask) of every block of threads."""
    table = np.asarray(table)
    for b, h, i in np.ndindex(batch, heads, blocks):
        visit = plan.visit(table, (b, h, i), (heads, blocks))
        yield b, h, i, [int(visit.tile(n)) for n in range(visit.count)], int(visit.whole)


@pytest.mark.parametrize("window", [None, 40], ids=["causal", "window"])
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_every_listed_tile_is_visited_once_and_masked_where_it_must_be(lists, window):
    """Blocks of 16 queries and 16 keys in tiles of 8 x 8, by query and turned round; 96 queries, 104 keys."""
    positions, segments = packed([64, 1, 26], 93)
    segments = segments.at[1].set(1)
    vis = self_visibility(2, 93, positions=positions.at[1].set(jnp.arange(93)), segment_ids=segments, window=window)
    vis = in_blocks(vis.prepend_global(5), 2, 8, 8)
    keys, queries = vis.k_positions.shape[1], vis.q_positions.shape[1]
    blocks = draw_lists(2, lists, queries, keys, 16, 16, width=5)
    how = plan(4, 2, blocks, (16, 16), vis, 8)
    tables = jax.jit(lambda blocks: [f(how, blocks, vis, 8, 8) for f in (by_query, by_key)])(blocks)
    pairs = visible(vis)[:, None] & listed(jnp.repeat(blocks, 4 // lists, axis=1), queries, keys, 16, 16)
    pairs = np.asarray(pairs).reshape(2, 4, queries // 8, 8, keys // 8, 8)
    some, every, unmasked = pairs.any((3, 5)), pairs.all((3, 5)), 0
    named = np.asarray(listed(jnp.repeat(blocks, 4 // lists, axis=1), queries, keys, 16, 16))[:, :, ::8, ::8]
    for b, h, i, tiles, whole in walked(how, tables[0], 4, queries // 8):
        assert len(set(tiles)) == len(tiles)
        assert set(np.flatnonzero(some[b, h, i])) <= set(tiles) <= set(np.flatnonzero(named[b, h, i]))
        assert every[b, h, i][tiles[:whole]].all()
        unmasked += whole
    for b, h, j, entries, whole in walked(how, tables[1], 2, keys // 8):
        first, tiles = np.asarray([how.query_tile(e) for e in entries], int).reshape(-1, 2).T
        both = [(2 * h + first + turn, tiles) for turn in range(how.turns)]
        heads, tiles = (np.concatenate(x) for x in zip(*both, strict=True))
        visited = np.zeros((4, queries // 8), int)
        np.add.at(visited, (heads, tiles), 1)
        assert visited.max(initial=0) <= 1
        assert (visited >= some[b, :, :, j] * (np.arange(4) // 2 == h)[:, None]).all()
        assert (visited <= named[b, :, :, j]).all()
        whole_ones = np.arange(len(heads)).reshape(how.turns, -1)[:, :whole].reshape(-1)
        assert every[b, heads[whole_ones], tiles[whole_ones], j].all()
        unmasked -= whole * how.turns
    assert unmasked == 0, "as many by key as by query"


def call_with(dtype=jnp.bfloat16, block_q=128, block_k=128, backend="gpu", dim=16, score=SOFTMAX, heads=2, **more):
    q, k, v = inputs(8, heads=heads, kv_heads=1, dim=dim, dtype=dtype)
    vis, blocks, sizes = (
        self_visibility(2, 8),
        jnp.zeros((2, 1, 1, 1), jnp.int32),
        dict(block_q=block_q, block_k=block_k),
    )
    return block_sparse(q, k, v, vis, score, blocks=blocks, **sizes, scale=1.0, backend=backend, **more)


def test_a_named_backend_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call_with()
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match="block_sparse: backend 'gpu' computes bfloat16 but q is float32"):
            call_with(dtype=jnp.float32)
        with pytest.raises(NotImplementedError, match="head dims up to 256 but q has 264"):
            call_with(dim=264)
        with pytest.raises(NotImplementedError, match=r"a key_bias per query head for up to 16 .* are 17: use 'xla'"):
            call_with(heads=17, key_bias=jnp.zeros((1, 17, 8)))
        with pytest.raises(NotImplementedError, match="does not count the keys of lists"):
            call_with(score=Score("relu", "count"))
        with pytest.raises(NotImplementedError, match=r"normalisers .* but this is 'p_norm'"):
            call_with(score=Score("exp", "p_norm", p=2.0))
        with pytest.raises(NotImplementedError, match="but block_q is 64: choose a multiple of 128 or use 'xla'"):
            call_with(block_q=64)
        with pytest.raises(NotImplementedError, match="but block_k is 192: choose a multiple of 128 or use 'xla'"):
            call_with(block_k=192)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    text = lambda **kw: str(jax.make_jaxpr(lambda: call_with(backend="auto", **kw))())
    assert "block_sparse_forward" not in text()
    with compiling_for("gpu"):
        assert "block_sparse_forward" in text()
        assert "block_sparse_forward" not in text(block_k=64)
        assert "block_sparse_forward" not in text(dtype=jnp.float32)
    with interpreted():
        assert "block_sparse_forward" not in text(), "a simulator is for who names the backend"


@pytest.mark.slow
def test_vmap_changes_nothing():
    q, k, v = numbers(140, batch=2)
    blocks = draw_lists(2, 2, 140, 140, 128, 128, width=2)
    call = lambda q, k, v, blocks: block_sparse(
        q, k, v, self_visibility(len(q), 140), blocks=blocks, **SIZES, scale=0.3, backend="gpu"
    )
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32))), argnums=(0, 1, 2)))
    one = lambda *args: call(*(x[None] for x in args))[0]
    with interpreted():
        jax.tree.map(
            lambda a, b: close(a, b, rtol=1e-2), loss(jax.vmap(one))(q, k, v, blocks), loss(call)(q, k, v, blocks)
        )


@needs_costs
def test_the_cost_estimate_counts_lists_up_to_the_diagonal():
    q, k, v = (jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16) for _ in range(3))
    blocks = jax.ShapeDtypeStruct((1, 1, 8, 3), jnp.int32)

    def text(vis):
        call = lambda q, k, v, blocks: block_sparse(q, k, v, vis, blocks=blocks, **SIZES, scale=1.0, backend="gpu")
        loss = lambda *x: jnp.sum(call(*x).astype(jnp.float32))
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v, blocks))

    with compiling_for("gpu"):
        causal, full = text(self_visibility(1, 1024)), text(self_visibility(1, 1024, causal=False))
    tile = 4 * 128 * 128 * 64
    assert f"flops={2 * (1 + 2 + 3 * 6) * tile}" in causal
    assert f"flops={2 * 24 * tile}" in full
    assert f"flops={2 * 24 * tile * 3 // 2}" in full, "dq: three products"
    assert f"flops={2 * 24 * tile * 2}" in full, "dk and dv: four"
