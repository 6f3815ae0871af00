"""`paged_decode`: every backend against the reference, and the reference against `flash`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility
from jaxattn.rope import Rope
from pallas_kernels import Score, compiling_for, flash, interpreted
from pallas_kernels.flash.merge import merge
from pallas_kernels.paged_decode import paged_decode, pages_of
from pallas_kernels.paged_decode.units import units
from tests.conformance.cases import close
from tests.kernels.odd import in_both_dtypes
from tests.kernels.paged_decode_cases import CASES, Case, check, normal
from tests.kernels.simulators import without_races

FAST = ("xla", "tpu")


@pytest.mark.parametrize("backend", FAST)
@in_both_dtypes
def test_odd_lengths_head_dims_and_groups(shape, dtype, backend):
    """Lists of T slots, most of which end inside a page; pages of 16 fit the tiles of both types."""
    listed = -(-shape.length // 16)
    case = Case(
        1,
        1,
        shape.heads,
        shape.kv_heads,
        shape.dim,
        shape.value_dim,
        pages=listed + 3,
        listed=listed,
        dtype=jnp.dtype(dtype).name,
    )
    (q, k, v, tables, _), more = case.arguments()
    tables = jnp.asarray(np.abs(tables))
    check((q, k, v, tables, np.int32([shape.length])), more, backend, rtol=2e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_option(case, backend):
    check(*case.arguments(), backend, rtol=2e-2 if "bfloat16" in (case.dtype, case.value_dtype) else 2e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_whole_cache_listed_is_flash(backend):
    """A plain cache [B, K, S, D] whose pages are listed in order, with queries at its end that see each other."""
    keys = 96
    q = normal(0, (2, 3, 4, 16))
    k, v = (normal(n, (2, 2, keys, 16)) for n in (1, 2))
    ends = np.int32([50, 96])[:, None] - np.int32([2, 1, 0])  # live tokens as each query sees them
    spread = lambda x: np.broadcast_to(np.int32(x), (2, keys))
    vis = Visibility(
        q_positions=ends - 1,
        k_positions=spread(np.arange(keys)),
        q_segments=np.ones((2, 3), np.int32),
        k_segments=spread(1),
    )
    turn = lambda x: jnp.swapaxes(x, 1, 2)
    expected = jax.jit(lambda q, k, v, vis: flash(q, turn(k), turn(v), vis, Score(), scale=0.3, backend="reference"))(
        q, k, v, vis
    )
    tables = np.broadcast_to(np.arange(keys // 8, dtype=np.int32), (2, 1, keys // 8))
    with interpreted():
        o, _ = jax.jit(
            lambda q, k, v, *rest: paged_decode(q, pages_of(k, 8), pages_of(v, 8), *rest, scale=0.3, backend=backend)
        )(q, k, v, tables, ends[:, None])
    close(o, expected, rtol=2e-5)


@pytest.mark.parametrize("backend", FAST)
def test_disjoint_lists_merge(backend):
    """Sinks and window as two lists, one of them empty for one sequence."""
    (q, k, v, _, _), more = Case(pages=8).arguments()
    first, second = np.int32([[[0, 3]], [[-1, -1]]]), np.int32([[[5, 1, 7]], [[2, 2, 6]]])
    with interpreted():
        call = jax.jit(partial(paged_decode, **more, backend=backend))
        parts = [call(q, k, v, tables) for tables in (first, second)]
    together = np.concatenate([first, second], axis=2)
    expected = jax.jit(partial(paged_decode, **more, backend="reference"))(q, k, v, together)
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-5), jax.jit(merge)(parts), expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_ranks_as_positions_are_keys_turned_by_hand(backend):
    """Tokens picked one by one and numbered afresh, as TokenSelect does."""
    rope, picked = Rope(1e4), np.int32([[[3, 9, 10, 40]]])
    q, k, v = normal(0, (1, 1, 4, 16)), normal(1, (1, 2, 48, 16)), normal(2, (1, 2, 48, 16))
    ranks, last, ones = np.arange(4, dtype=np.int32)[None, None], np.int32([[3]]), np.ones((1, 4), np.int32)

    def paged(q, k, v, picked, last, ranks):
        options = {"scale": 0.25, "rope": rope, "backend": backend, "key_positions": ranks}
        return paged_decode(rope(q, last), pages_of(k, 1), pages_of(v, 1), picked, **options)[0]

    def by_hand(q, k, v, last, ranks, ones):
        chosen = lambda x: jnp.swapaxes(x[:, :, picked[0, 0]], 1, 2)
        vis = Visibility(last, ranks[0], ones[:, :1], ones)
        k = rope(chosen(k), ranks[0])
        return flash(rope(q, last), k, chosen(v), vis, Score(), scale=0.25, backend="reference")

    with interpreted():
        o = jax.jit(paged)(q, k, v, picked, last, ranks)
    close(o, jax.jit(by_hand)(q, k, v, last, ranks, ones), rtol=2e-5)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_who_sees_nothing_gets_zero_and_nothing_unlisted_is_used(page, backend):
    """NaN in pages that are not listed, behind the end and in hidden slots."""
    case = Case(page=page, pages=96 // page, listed=32 // page, key_bias=1)
    (q, k, v, _, _), _ = case.arguments()
    pages = 16 // page + np.arange(32 // page, dtype=np.int32)  # tokens 16 to 47
    tables = np.stack([pages, np.full_like(pages, -1)])[:, None]
    lengths, bias = np.int32([20, 32]), np.zeros((2, 1, 32), np.float32)
    bias[:, :, 7] = -1e30

    def spoil(x):
        flat = np.array(x).reshape(1, 3, 96, -1)
        flat[:, :, :16] = flat[:, :, 36:] = np.nan
        return flat.reshape(x.shape)

    tables, lengths, bias = map(jnp.asarray, (tables, lengths, bias))
    call = partial(paged_decode, scale=0.3, key_bias=bias, backend=backend)
    run = jax.jit(lambda k, v: call(q, k, v, tables, lengths))
    with interpreted():
        (o, lse), (clean, _) = run(spoil(k), spoil(v)), run(k, v)
    assert not np.asarray(o)[1].any(), "no page is listed"
    assert (np.asarray(lse)[1] == np.float32(-1e30)).all()
    assert np.isfinite(o).all()
    close(o, clean, rtol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_scores_far_from_zero(backend):
    """All of them far below or above: nothing vanishes or overflows, and splits merge at their true scale."""
    case = Case(splits=2, listed=40)
    (q, k, v, tables, _), more = case.arguments()
    for shift in (-500.0, 500.0):
        more["key_bias"] = jnp.asarray(shift + 30 * np.asarray(normal(5, (2, 1, 40 * 16))), jnp.float32)
        check((q, k, v, tables, None), more, backend, rtol=5e-5)


@pytest.mark.parametrize("page", [1, 8])
def test_no_races_and_nothing_uninitialised_is_read(page):
    rope = Rope(1e4)
    case = Case(1, 2, 4, 2, 8, 16, 1, 512 // page, page, 320 // page, 2, (1, 2, 2), 1, positions=2, rope=rope, splits=1)
    (q, k, v, tables, lengths), more = case.arguments()
    tables = jnp.asarray(np.where(np.arange(320 // page) % 3 == 1, -1, tables), jnp.int32)
    with without_races("tpu") as simulator:
        check((q, k, v, tables, lengths), more, "tpu", mode=simulator)


@pytest.mark.parametrize("backend", FAST)
def test_vmap_and_remat_change_nothing(backend):
    arrays, _ = Case(pools=2, lengths=(2,)).arguments()
    call = jax.jit(partial(paged_decode, scale=0.3, backend=backend))
    one = lambda *x: jax.tree.map(lambda y: y[0], call(*(y[None] for y in x)))
    with interpreted():
        plain = call(*arrays)
        other = jax.jit(jax.vmap(jax.checkpoint(one)))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), other(*arrays), plain)


def test_the_reference_is_differentiable_and_the_others_say_that_they_are_not():
    (q, k, v, tables, _), more = Case().arguments()
    loss = lambda q, k, v, backend: jnp.sum(jnp.sin(paged_decode(q, k, v, tables, **more, backend=backend)[0]))
    for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(q, k, v, "reference"):
        assert np.isfinite(g).all()
        assert np.any(g)
    with interpreted():
        for backend in FAST:
            for n in range(3):
                with pytest.raises(NotImplementedError, match=f"'{backend}' has no gradient.*'reference'"):
                    jax.grad(loss, argnums=n)(q, k, v, backend)


def test_a_named_backend_says_why_it_cannot_run():
    (q, k, v, tables, _), _ = Case().arguments()
    call = lambda q=q, k=k, v=v, backend="tpu": paged_decode(q, k, v, tables, scale=0.3, backend=backend)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    odd = lambda x: x[:, :, :5, :5]
    with interpreted():
        with pytest.raises(NotImplementedError, match="v_pages is float16"):
            call(v=v.astype(jnp.float16))
        with pytest.raises(NotImplementedError, match="tiles of 8 tokens but there are 5 pages of 5"):
            call(k=odd(k), v=odd(v))
        with pytest.raises(NotImplementedError, match="tiles of 16 tokens but there are 11 pages of 8"):
            call(k=k[:, :, :11, :8], v=v[:, :, :11, :8].astype(jnp.bfloat16))
    of = lambda backend: jax.jit(lambda k, v: call(k=k, v=v, backend=backend)[0])(odd(k), odd(v))
    close(of("xla"), of("reference"))
    with pytest.raises(NotImplementedError, match=r"backend 'gpu' needs JAX|'gpu' computes bfloat16 but q is float32"):
        call(backend="gpu")


def test_impossible_arguments_are_named():
    (q, k, v, tables, _), _ = Case().arguments()
    call = lambda q=q, k=k, v=v, tables=tables, lengths=None, **more: paged_decode(
        q, k, v, tables, lengths, scale=1.0, **more
    )
    for match, arguments in {
        "must hold 1 or 2 pools": {"k": k.repeat(3, 0), "v": v.repeat(3, 0)},
        "belong together": {"rope": Rope(1e4)},
        "splits is 0": {"splits": 0},
        r"tables has shape \(2, 2, 7\)": {"tables": tables.repeat(2, 1)},
        r"key_bias has shape \(2, 1, 5\) but must be \[2, 1 or 3, 112\]": {"key_bias": jnp.zeros((2, 1, 5))},
        "last axis must be 1 or 1 queries": {"lengths": jnp.zeros((2, 1, 4), jnp.int32)},
        "lists no pages": {"tables": tables[:, :, :0]},
    }.items():
        with pytest.raises(ConfigError, match=match):
            call(**arguments)
    with pytest.raises(ConfigError, match="page is 7 but must divide the cache's capacity 16"):
        pages_of(jnp.zeros((1, 1, 16, 4)), 7)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    (q, k, v, tables, _), _ = Case().arguments()
    text = lambda k=k, v=v: str(jax.make_jaxpr(lambda q: paged_decode(q, k, v, tables, scale=1.0))(q))
    assert "pallas_call" not in text()
    with compiling_for("tpu"):
        assert "pallas_call" in text()
        assert "pallas_call" not in text(k.astype(jnp.float16))
        assert "pallas_call" not in text(k[:, :, :5, :5], v[:, :, :5, :5])
    with interpreted():
        assert "pallas_call" not in text(), "a simulator is for who names the backend"


def test_the_cost_estimate_counts_rows_that_are_read():
    """A list of 64 tokens reads 64 tiles of 8 rows, whatever the cache holds."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    table = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    call = lambda *x: paged_decode(*x, scale=1.0, backend="tpu")
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(call)(shape(1, 1, 8, 64), shape(1, 1, 4096, 1, 64), shape(1, 1, 4096, 1, 64), table))
    assert f"flops={4 * 64 * 8 * 8 * 64}" in text
    assert f"transcendentals={64 * 8 * 8}" in text


@pytest.mark.parametrize(("page", "pages", "itemsize"), [(1, 64, 4), (8, 2, 2), (24, 3, 4), (1008, 1, 2), (4096, 2, 2)])
def test_units_are_whole_tiles_that_fit(page, pages, itemsize):
    cut = units(page, pages, itemsize)
    assert cut is not None
    assert cut.rows % (32 // itemsize) == 0
    assert cut.chunk % 128 == 0
    assert 256 <= cut.chunk <= 1024
    assert page % cut.rows == 0 or cut.rows % page == 0


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page", [1, 64])
def test_on_a_cpu_nothing_but_the_list_is_copied(page, dtype):
    """Temporaries are those of the list; the cache holds 16-bit floats as their bits, as `jaxattn.cache` does."""
    keys, listed = 32768, 2048
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)
    held = shape(1, 2, keys, 64, dtype="uint16" if dtype == "bfloat16" else dtype)
    floats = lambda x: x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.bfloat16)

    def call(q, k, v, tables):
        pages = (pages_of(floats(x), page) for x in (k, v))
        return paged_decode(q.astype(dtype), *pages, tables, scale=0.1, backend="xla")

    table = shape(1, 2, listed // page, dtype="int32")
    compiled = jax.jit(call).lower(shape(1, 1, 8, 64), held, held, table).compile()
    one = 2 * listed * 64 * 4  # a list's keys, in f32
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * one + 2**20 < 2 * keys * 64 * 2
