"""The TPU kernel of `grouped_softmax`, simulated, against the reference; tiles and pages far smaller than the rows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import GLOBAL, PADDING, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call, landmark
from pallas_kernels import compiling_for, interpreted, shapes
from pallas_kernels.flash.tiles import Spans
from pallas_kernels.grouped_softmax import grouped_softmax, layout
from pallas_kernels.grouped_softmax.reference import NEVER, grouped_softmax_reference, roles
from pallas_kernels.grouped_softmax.tpu import LONGEST, grouped_softmax_tpu
from tests.conformance.cases import inputs, packed
from tests.kernels.odd import in_both_dtypes
from tests.kernels.simulators import without_races

SMALL = {"block_q": 32, "tile_k": 48}
kernel = jax.jit(grouped_softmax_tpu, static_argnames=("block", "scale", "tile_k"))
places, pages, page = (jax.jit(f, static_argnums=1) for f in (layout.places, layout.pages, layout.page))
tables = jax.jit(layout.tables, static_argnums=1)


def both(fn, arrays, vis, **options):
    """Outputs and all gradients of a loss that weighs every entry of both outputs differently."""
    weigh = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    def loss(q, k, v):
        o, log_z = fn(q, k, v, vis, **options)
        by_z = weigh(log_z) * jnp.where(log_z > NEVER / 2, jnp.sin(log_z), 0.0)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)) * weigh(o)) + jnp.sum(by_z), (o, log_z)

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, grads


def near(actual, expected, rtol):
    """Equal up to `rtol` of the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, atol=rtol * np.abs(expected).max(), rtol=0)


def check(arrays, vis, rtol=5e-6, mode="plain", block=8, scale=0.3, **sizes):
    """Both outputs and gradients equal the f32 reference's; returns the kernel's outputs."""
    with interpreted(mode):
        (o, log_z), ours = both(grouped_softmax_tpu, arrays, vis, block=block, scale=scale, **(sizes or SMALL))
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    (o_exact, z_exact), theirs = both(grouped_softmax_reference, exact, vis, block=block, scale=scale)
    assert o.dtype == arrays[2].dtype
    assert log_z.dtype == jnp.float32
    assert [x.dtype for x in ours] == [x.dtype for x in arrays]
    blind = np.asarray(z_exact) == NEVER
    np.testing.assert_array_equal(np.asarray(log_z) == NEVER, blind)
    assert not np.asarray(o, np.float32)[blind].any(), "rows that see nothing give zeros"
    near(o, o_exact, rtol)
    near(np.where(blind, 0, log_z), np.where(blind, 0, z_exact), rtol)
    for a, b in zip(ours, theirs, strict=True):
        near(a, b, rtol)
    return o, log_z


@in_both_dtypes
def test_odd_shapes_in_value_and_gradient(shape, dtype):
    """With the tiles of a device."""
    block = dict(zip(shapes.LENGTHS, (1, 8, 3, 51, 64), strict=True))[shape.length]
    arrays = inputs(
        shape.length,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        value_dim=shape.value_dim,
        dtype=dtype,
    )
    vis = self_visibility(shape.batch, shape.length)
    scale, rtol = shape.dim**-0.5, 1e-5 if dtype == jnp.float32 else 2e-2
    check(arrays, vis, rtol=rtol, block=block, scale=scale, block_q=None)


def between(lengths, total, seed=0):
    """Documents in the order of `lengths` with padding in front, between, behind and amid; ids fall, one is unused."""
    rng = np.random.default_rng(seed)
    positions, segments = np.full((2, total), 7, np.int32), np.zeros((2, total), np.int32)
    for b in range(2):
        at = 1 + np.sort(rng.permutation(total - 2)[: sum(lengths)])
        positions[b, at] = np.concatenate([np.arange(n) for n in lengths])
        segments[b, at] = np.repeat(2 * np.arange(len(lengths), 0, -1), lengths)
    return jnp.asarray(positions), jnp.asarray(segments)


LAYOUTS = {
    "packed, one empty, one of length 1": (packed([50, 0, 1, 37], 100), 8, None),
    "padding everywhere": (between([30, 1, 45], 100), 3, 8),
    "short documents": (packed([1, 2, 9, 1, 1, 3, 8, 7, 1, 9, 1, 1, 16, 1, 1, 1, 1, 1], 70), 8, 3),
    "nothing but padding": (packed([], 9), 8, None),
}


@pytest.mark.parametrize(("documents", "block", "page"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_documents_anywhere_in_the_row(documents, block, page):
    """In one page, and in as many as there are. Grouped heads, value heads of another width."""
    positions, segments = documents
    vis = self_visibility(2, positions.shape[1], positions=positions, segment_ids=segments)
    arrays = inputs(positions.shape[1], heads=4, kv_heads=2, dim=5, value_dim=12)
    check(arrays, vis, block=block, page=page, **SMALL)


def cut_keys():
    """Queries apart from their keys: a block without its first tokens, one with a hole, one without a landmark."""
    segments = jnp.ones((2, 40), jnp.int32).at[:, :3].set(PADDING).at[:, 11].set(GLOBAL).at[1, 23].set(PADDING)
    return Visibility(
        q_positions=default_positions(2, 9) + jnp.array([[25], [31]]),
        k_positions=default_positions(2, 40),
        q_segments=jnp.ones((2, 9), jnp.int32).at[0, 0].set(0).at[1, 0].set(2),
        k_segments=segments,
    )


def test_queries_apart_from_keys_that_are_not_whole_blocks():
    q, k, v = inputs(9, keys=40)
    vis = cut_keys()
    o, log_z = check((q, k, v), vis)
    assert not np.any(o[:, 0])
    assert np.all(log_z[:, 0] == NEVER)
    hidden = lambda x: x.at[:, 11].add(9.0)
    with interpreted():
        (other, _), _ = both(grouped_softmax_tpu, (q, hidden(k), hidden(v)), vis, block=8, scale=0.3, **SMALL)
    np.testing.assert_array_equal(o, other, "global keys are seen by nobody")


def test_blocks_that_score_far_apart():
    """A maximum shared between blocks would leave nothing of the lower one."""
    q, k, v = inputs(64, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    q = q.at[..., 0].set(8.0)
    lower = (jnp.arange(64) // 8 % 2 == 0)[:, None]
    k = k.at[..., 0].set(jnp.where((jnp.arange(64) % 8 == 7)[:, None], 0.0, jnp.where(lower, -8.0, 8.0)))
    check((q, k, v), self_visibility(1, 64), scale=1.0, rtol=2e-5)


def test_operands_of_two_types():
    q, k, v = inputs(40, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    check((q, k.astype(jnp.bfloat16), v), self_visibility(1, 40), rtol=5e-3)
    check((q, k, v.astype(jnp.bfloat16)), self_visibility(1, 40), rtol=1e-2)


def test_bfloat16_keeps_sums_in_float32():
    """600 own tokens of equal weight; a mass in bf16 would stop growing at 256."""
    ones = tuple(jnp.ones_like(x) for x in inputs(600, batch=1, heads=1, kv_heads=1, dtype=jnp.bfloat16))
    with interpreted():
        o, log_z = kernel(*ones, self_visibility(1, 600), block=700, scale=1 / 16)
        many = kernel(*ones, self_visibility(1, 600), block=2, scale=1 / 16, tile_k=16)[1]
    np.testing.assert_allclose(np.asarray(o, np.float32), 1.0, rtol=2**-8)  # weights 1/n round alike
    np.testing.assert_allclose(np.exp(log_z[0, :, 0] - 1), np.arange(600) + 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(many[0, :, 0] - 1), np.arange(600) // 2 + 1, rtol=1e-5)


def test_no_races_and_nothing_uninitialised_is_read():
    positions, segments = packed([12, 7], 21, batch=1)
    vis = self_visibility(1, 21, positions=positions, segment_ids=segments)
    arrays = inputs(21, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    with without_races("tpu") as simulator:
        check(arrays, vis, block=4, block_q=8, tile_k=16, page=4, mode=simulator)


def test_tiles_nobody_sees_are_not_computed():
    """NaN in their keys and values would reach the output as 0 · NaN."""
    q, k, v = inputs(96, batch=1, heads=1, kv_heads=1, dim=8, value_dim=8)
    positions, segments = packed([32, 64], 96, batch=1)
    vis = self_visibility(1, 96, positions=positions, segment_ids=segments)
    spoil = lambda x, where: x.at[:, where].set(jnp.nan)
    call = jax.jit(lambda k, v: grouped_softmax_tpu(q, k, v, vis, block=8, scale=1.0, block_q=16, tile_k=16)[0])
    with interpreted():
        after, before, needed = (
            call(spoil(k, where), spoil(v, where)) for where in (slice(64, 96), slice(0, 16), slice(48, 49))
        )
    assert np.isfinite(after[:, :64]).all(), "after the query"
    assert np.isfinite(before[:, 32:]).all(), "of another document"
    assert np.isnan(needed[:, 48:64]).all()


def plan(block, slots, tiles, block_q=4):
    return layout.Plan(block, -(-block // 8) * 8, slots, tiles, block_q, 1, 1.0, None, True)


def own_and_past(vis, block):
    """Who sees whom by the layout's numbers alone, all pages together: own tokens, tokens before, landmarks."""
    the = plan(block, 4, 100)
    where = places(vis, the)
    assert pages(where, the) == 1
    slot, row = np.divmod(np.asarray(where.of_key), the.slot)
    first, own, seen = (np.asarray(where.of_query)[:, n, :, None] for n in range(3))
    slot, row, mark = slot[:, None], row[:, None], row[:, None] == the.slot - 1
    past = (slot >= first) & (slot < own)
    return (slot == own) & (row < seen), past & ~mark, past & mark


@pytest.mark.parametrize("block", [1, 2, 5, 8])
def test_the_layout_says_what_every_key_is_to_every_query(block):
    """On segments in any order and in pieces, with padding and global keys among them, queries of their own."""
    draw = np.random.default_rng(block)

    def one(n):
        segments = draw.integers(GLOBAL, 5, (2, n))
        positions = draw.integers(0, 3, (2, n))  # of padding: anything
        for b in range(2):
            for s in range(1, 5):
                at = segments[b] == s
                positions[b, at] = np.sort(draw.permutation(30)[: at.sum()])
        return jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)

    for _ in range(20):
        (q_pos, q_seg), (k_pos, k_seg) = one(20), one(33)
        q_seg = jnp.where(q_seg == GLOBAL, PADDING, q_seg)
        vis = Visibility(q_pos, k_pos, q_seg, k_seg)
        see = roles(q_pos[..., None], q_seg[..., None], k_pos[:, None], k_seg[:, None], block)
        for a, b in zip(own_and_past(vis, block), see, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lengths", [[96], [40, 1, 55], [3, 3, 3, 3]], ids=str)
def test_pages_hold_every_key_once_and_visits_are_those_needed(lengths):
    positions, segments = packed(lengths, 96, batch=1)
    vis = self_visibility(1, 96, positions=positions, segment_ids=segments)
    the = plan(8, 2, 2, block_q=8)
    where, found = places(vis, the), []
    see = roles(positions[..., None], segments[..., None], positions[:, None], segments[:, None], 8)
    see = np.asarray(see.own | see.inside | see.landmark)[0].reshape(12, 8, 96).any(1)
    for n in range(int(pages(where, the))):
        here = page(where, the, jnp.int32(n))
        held = np.asarray(here.source)[0].reshape(the.tiles, -1)
        found += held[held < 96].tolist()
        table = np.asarray(tables(here, the)[0]).reshape(12, Spans.SIZE)
        visited = [[Spans(t, 0).holds(j) for j in range(the.tiles)] for t in table]
        for j, keys in enumerate(held):
            np.testing.assert_array_equal([v[j] for v in visited], see[:, keys[keys < 96]].any(1))
    np.testing.assert_array_equal(sorted(found), np.flatnonzero(segments[0]))


@pytest.mark.parametrize(("lengths", "count"), [([1020], 1), ([103] * 9, 1), ([500, 7, 513], 1), ([1] * 1020, 32)])
def test_long_documents_need_one_page(lengths, count):
    """The promise is two blocks a document on average; a page of 32 is what the wrapper makes for 1020 keys."""
    positions, segments = packed(lengths, 1020, batch=1)
    vis = self_visibility(1, 1020, positions=positions, segment_ids=segments)
    q, size = jax.ShapeDtypeStruct((1, 1020, 1, 64), jnp.float32), 56 * 32
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(lambda q: grouped_softmax_tpu(q, q, q, vis, block=51, scale=1.0))(q))
    assert f"f32[1,1,{size},64]" in text, "keys in their slots"
    the = plan(51, 8, 4)
    assert pages(places(vis, the), the) == count


def test_vmap_and_remat_change_nothing():
    q, k, v = inputs(40, batch=3, heads=2, kv_heads=1, dim=8, value_dim=8)
    call = lambda q, k, v: grouped_softmax_tpu(
        q, k, v, self_visibility(len(q), 40), block=8, scale=0.3, block_q=16, tile_k=16
    )
    total = lambda o, z: jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(z))
    loss = lambda f: jax.jit(jax.grad(lambda *x: total(*f(*x)), argnums=(0, 1, 2)))
    with interpreted():
        plain = loss(call)(q, k, v)
        one = lambda q, k, v: jax.tree.map(lambda x: x[0], call(q[None], k[None], v[None]))
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(lambda a, b: near(a, b, 1e-6), loss(other)(q, k, v), plain)


def test_landmark_attention_runs_on_it():
    q, k, v = inputs(45, heads=2, kv_heads=1, dim=8, value_dim=8)
    spec, vis = landmark.Spec(block=7), self_visibility(2, 45)
    with interpreted():
        ours = jax.jit(partial(landmark.forward, call=Call(spec, backend="tpu")))(q, k, v, vis)
    near(ours, jax.jit(partial(landmark.reference, call=Call(spec)))(q, k, v, vis), 5e-6)


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v = inputs(8, heads=2, kv_heads=1)
    vis = self_visibility(2, 8)
    call = lambda q=q, block=3, backend="tpu": jax.jit(
        lambda q: grouped_softmax(q, k, v, vis, block=block, scale=1.0, backend=backend)
    )(q)
    with pytest.raises(NotImplementedError, match=r"grouped_softmax: .*computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match=r"computes float32 and bfloat16 but q is float16: cast it"):
            call(q.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match=r"at most 2048 tokens .* but block is 2049: use 'xla'"):
            call(block=LONGEST + 1)
        jax.tree.map(lambda a, b: near(a, b, 5e-6), call(), call(backend="reference"))
    with pytest.raises(NotImplementedError, match=r"backend 'gpu' (needs JAX|computes bfloat16)"):
        call(backend="gpu")


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v = inputs(8, heads=2, kv_heads=1)
    text = lambda q, block=3: str(
        jax.make_jaxpr(lambda q: grouped_softmax(q, k, v, self_visibility(2, 8), block=block, scale=1.0))(q)
    )
    assert "pallas_call" not in text(q)
    with compiling_for("tpu"):
        assert "pallas_call" in text(q)
        assert "pallas_call" not in text(q, LONGEST + 1)
        assert "pallas_call" not in text(q.astype(jnp.float16))
        one = lambda q: grouped_softmax(q, k, v, vis, block=3, scale=1.0)
        q, k, v = inputs(1, heads=2, kv_heads=1, keys=70)
        vis = self_visibility(2, 70).rows(69, 1)
        assert "pallas_call" not in str(jax.make_jaxpr(one)(q)), "a decode step leaves its cache where it lies"
    q, k, v = inputs(8, heads=2, kv_heads=1)
    with interpreted():
        assert "pallas_call" not in text(q), "a simulator is for who names the backend"


def test_the_cost_estimate_counts_tiles_up_to_the_diagonal():
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.float32) for _ in range(3))
    apart = Visibility(*(default_positions(1, 2048),) * 2, *(jnp.ones((1, 2048), jnp.int32),) * 2)
    with compiling_for("tpu"):
        text = lambda vis: str(
            jax.make_jaxpr(lambda *x: grouped_softmax_tpu(*x, vis, block=64, scale=1.0, page=32))(q, k, v)
        )
        half, whole = text(self_visibility(1, 2048)), text(apart)
    tile = 4 * 512 * 512 * 64
    assert f"flops={10 * tile}" in half
    assert f"flops={16 * tile}" in whole
    assert f"transcendentals={16 * 512 * 512}" in whole


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("block", [51, 128, 600])
def test_longer_packed_rows_with_the_tiles_of_a_device(block, dtype):
    positions, segments = packed([700, 90, 1, 1000, 3], 1900, batch=1)
    vis = self_visibility(1, 1900, positions=positions, segment_ids=segments)
    arrays = inputs(1900, batch=1, heads=2, kv_heads=1, dim=64, value_dim=64, dtype=dtype)
    check(arrays, vis, rtol=1e-5 if dtype == jnp.float32 else 2e-2, block=block, scale=0.125, block_q=None)
