"""The Hopper kernel of `paged_decode` in JAX's simulator of GPUs, against the reference; bfloat16 throughout.

One warpgroup does all there is to do, so nobody can be late for another; its own waits are seen by the race detector.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxattn.rope import Rope
from pallas_kernels import compiling_for, interpreted
from pallas_kernels.flash.merge import merge
from pallas_kernels.paged_decode import paged_decode
from pallas_kernels.paged_decode.gpu import parts, unfit
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close
from tests.kernels.paged_decode_cases import CASES, TURNED, Case, check, normal
from tests.kernels.simulators import needs_costs, simulator, skip_module_without_gpus, without_races

skip_module_without_gpus()

SMALL = Case(heads=4, kv_heads=2, dim=32, value_dim=128, dtype="bfloat16")  # chunks of 64, of 128 where narrower
small = partial(dataclasses.replace, SMALL)
simulated = partial(check, backend="gpu", rtol=2e-2)

FEW = {
    "grouped heads, holes, ends inside a page, bias that hides": small(
        listed=11, tables=2, lengths=(2, 2), key_bias=2, splits=2
    ),
    "turned keys, a pool per sequence": small(
        pools=2, page=64, pages=4, listed=2, dim=64, positions=2, rope=Rope(1e4), splits=1
    ),
    "tokens, turned by half": small(
        page=1, pages=64, listed=90, lengths=(2,), value_dim=64, positions=1, rope=TURNED, splits=1
    ),
    "several queries, ends of their own, odd pages": small(
        batch=1, queries=3, page=24, pages=5, listed=6, lengths=(1, 2, 3), value_dim=48
    ),
}


@pytest.mark.parametrize("case", FEW.values(), ids=list(FEW))
def test_a_few_that_cover_most(case):
    simulated(*case.arguments())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in ODD if s.dim % 16 == 0 and s.value_dim % 16 == 0], ids=lambda s: s.name)
def test_odd_lengths_head_dims_and_groups(shape):
    """Lists of T slots, most of which end inside a page."""
    listed = -(-shape.length // 16)
    sizes = (1, 1, shape.heads, shape.kv_heads, shape.dim, shape.value_dim)
    (q, k, v, tables, _), more = Case(*sizes, pages=listed + 3, listed=listed, dtype="bfloat16").arguments()
    simulated((q, k, v, jnp.abs(tables), jnp.array([shape.length])), more)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_option(case):
    simulated(*dataclasses.replace(case, dim=32, value_dim=48, dtype="bfloat16", value_dtype="").arguments())


WIDE = {
    "more queries than a block has": small(batch=1, queries=20, lengths=(1, 1, 20), splits=1),
    "wide heads": small(batch=1, dim=256, value_dim=192, listed=9, splits=1),
    "wide heads, turned by less than a tile": small(batch=1, dim=192, positions=1, rope=Rope(1e4, fraction=0.25)),
    "pages of five": small(page=5, pages=30, listed=30, lengths=(2,), splits=2),
    "all pairs of a dim that is not a power of two": small(batch=1, dim=96, positions=1, rope=Rope(1e4)),
    "one key head": small(heads=3, kv_heads=1, tables=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE.values(), ids=list(WIDE))
def test_what_the_kernel_does_otherwise_where_it_is_wide(case):
    simulated(*case.arguments())


@pytest.mark.parametrize("page", [1, 16])
def test_who_sees_nothing_gets_zero_and_nothing_unlisted_is_used(page):
    """NaN in pages that are not listed, behind the end and in a hidden slot; uninitialised memory is NaN too."""
    case = small(page=page, pages=96 // page, listed=32 // page, key_bias=1, splits=1)
    (q, k, v, _, _), _ = case.arguments()
    pages = 16 // page + jnp.arange(32 // page)  # tokens 16 to 47
    tables = jnp.stack([pages, jnp.full_like(pages, -1)])[:, None]
    lengths = jnp.array([20, 32])
    bias = jnp.zeros((2, 1, 32)).at[:, :, 7].set(-1e30)

    def spoil(x):
        tokens = x.reshape(1, 2, 96, -1)
        return tokens.at[:, :, jnp.array([*range(16), 23, *range(36, 96)])].set(jnp.nan).reshape(x.shape)

    run = jax.jit(partial(paged_decode, scale=0.3, key_bias=bias, backend="gpu"))
    with interpreted(simulator("gpu")):
        o, lse = run(q, spoil(k), spoil(v), tables, lengths)
    expected, expected_lse = paged_decode(q, k, v, tables, lengths, scale=0.3, key_bias=bias, backend="reference")
    assert not o[1].any(), "no page is listed"
    assert (lse[1] == -1e30).all()
    close(o, expected, rtol=2e-2)
    close(lse, expected_lse, rtol=1e-3)


@pytest.mark.parametrize("page", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_no_races_and_nothing_uninitialised_is_read(page):
    """More chunks than buffers, so that buffers are filled again; holes in the list."""
    case = small(
        batch=1, queries=2, dim=64, page=page, pages=512 // page, listed=464 // page, lengths=(1, 2, 2), key_bias=1
    )
    case = dataclasses.replace(case, positions=2, rope=Rope(1e4), splits=1)
    (q, k, v, tables, _), more = case.arguments()
    tables = jnp.where(jnp.arange(464 // page) % 3 == 1, -1, jnp.abs(tables))
    with without_races("gpu") as simulator:
        simulated((q, k, v, tables, jnp.array([[[464, 463], [450, 464]]])), more, mode=simulator)


def test_scores_far_from_zero():
    """All of them far below or above: nothing vanishes or overflows, and splits merge at their true scale."""
    (q, k, v, tables, _), more = small(splits=2, listed=16).arguments()
    for shift in (-500.0, 500.0):
        more["key_bias"] = shift + 30 * normal(5, (2, 1, 16 * 16))
        simulated((q, k, v, tables, None), more)


@pytest.mark.slow
def test_disjoint_lists_merge():
    (q, k, v, _, _), more = small(pages=8).arguments()
    first, second = jnp.array([[[0, 3]], [[-1, -1]]]), jnp.array([[[5, 1, 7]], [[2, 2, 6]]])
    with interpreted():
        call = jax.jit(partial(paged_decode, **more, backend="gpu"))
        o, lse = merge([call(q, k, v, tables) for tables in (first, second)])
    together = jnp.concatenate([first, second], axis=2)
    expected, expected_lse = paged_decode(q, k, v, together, **more, backend="reference")
    close(o, expected, rtol=2e-2)
    close(lse, expected_lse, rtol=1e-3)


@pytest.mark.slow
def test_vmap_changes_nothing():
    arrays, _ = small(pools=2, lengths=(2,)).arguments()
    call = jax.jit(partial(paged_decode, scale=0.3, backend="gpu"))
    one = lambda *x: jax.tree.map(lambda y: y[0], call(*(y[None] for y in x)))
    with interpreted():
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), jax.jit(jax.vmap(one))(*arrays), call(*arrays))


def test_it_has_no_gradient_and_says_so():
    (q, k, v, tables, _), more = SMALL.arguments()
    loss = lambda *x: jnp.sum(paged_decode(*x, tables, **more, backend="gpu")[0].astype(jnp.float32))
    with interpreted():
        for n in range(3):
            with pytest.raises(NotImplementedError, match=r"'gpu' has no gradient.*'reference'"):
                jax.grad(loss, argnums=n)(q, k, v)


def test_what_it_cannot_do_it_says():
    (q, k, v, tables, _), _ = SMALL.arguments()
    call = lambda q=q, k=k, v=v, **more: paged_decode(q, k, v, tables, scale=0.3, backend="gpu", **more)
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with interpreted():
        with pytest.raises(NotImplementedError, match="'gpu' computes bfloat16 but v_pages is float32: keep the cache"):
            call(v=v.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="multiples of 16 up to 256 but q has 24: use 'xla'"):
            call(q=q[..., :24], k=k[..., :24])
        with pytest.raises(NotImplementedError, match="up to 256 but v_pages has 272"):
            call(v=jnp.zeros((*v.shape[:4], 272), jnp.bfloat16))
        with pytest.raises(NotImplementedError, match="multiples of 8 pairs of dims but rope turns 4: use 'xla'"):
            call(rope=Rope(1e4, fraction=0.25), key_positions=jnp.zeros((2, 1, 112), jnp.int32))
        assert unfit(q, k, v, Rope(1e4, fraction=0.0)) is None


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    (q, k, v, tables, _), _ = SMALL.arguments()
    text = lambda q=q, k=k, v=v: str(jax.make_jaxpr(lambda q: paged_decode(q, k, v, tables, scale=1.0))(q))
    kernel = "paged_decode_forward"
    assert kernel not in text()
    with compiling_for("gpu"):
        assert kernel in text()
        assert kernel not in text(q.astype(jnp.float32))
        assert kernel not in text(q[..., :24], k[..., :24])
    with interpreted():
        assert kernel not in text(), "a simulator is for who names the backend"


@needs_costs
@pytest.mark.parametrize("page", [1, 16, 48])
def test_the_cost_estimate_counts_rows_that_are_read(page):
    """A list of 192 tokens is three chunks of 64, whatever the cache holds; 4 of 8 columns are queries."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    cache = lambda width: shape(1, 2, 9600 // page, page, width)
    arrays = shape(1, 1, 8, 64), cache(64), cache(128), shape(1, 1, 192 // page, dtype=jnp.int32)
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(lambda *x: paged_decode(*x, scale=1.0, splits=1, backend="gpu"))(*arrays))
    assert f"flops={2 * 2 * 192 * 8 * (64 + 128)}" in text
    assert f"transcendentals={2 * 192 * 8}" in text
    moved = 2 * 192 * (2 * (64 + 128) + 4)  # keys, values and what is added
    beside = 2 * 8 * 64 * 2 + 192 // page * 4 + 4 + 2 * 8 * (128 + 1) * 4  # queries, table, end, results
    assert f"bytes_accessed={moved + beside}" in text


def test_lists_are_split_to_fill_the_device_but_not_into_crumbs():
    assert parts(8, 512, 264) == 32, "8 key heads of a long list: one wave that takes nearly every place"
    assert parts(8, 4, 264) == 4, "a short list: no more parts than chunks"
    assert parts(264, 512, 264) == 1, "enough blocks without"
    assert parts(100, 512, 264) > 2, "rather several waves that are full than one with 64 idle places"
