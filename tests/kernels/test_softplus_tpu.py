"""The TPU kernels of softplus rows, simulated on a CPU, against the dense f32 reference: forward and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, count_visible, self_visibility
from jaxattn.rope import Alibi, RawRelativeBias, RelativeBias
from pallas_kernels import compiling_for, interpreted
from pallas_kernels.softplus import softplus_attention
from pallas_kernels.softplus.reference import softplus_reference
from pallas_kernels.softplus.tpu import softplus_tpu
from tests.kernels.odd import in_both_dtypes
from tests.kernels.simulators import without_races


def inputs(length, *, batch=1, heads=4, kv_heads=2, dim=8, value_dim=12, keys=None, dtype=jnp.float32):
    """q and k of norm 1, as the mechanism makes them, and v."""
    draws = jax.random.split(jax.random.key(0), 3)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    q = unit(jax.random.normal(draws[0], (batch, length, heads, dim)))
    k = unit(jax.random.normal(draws[1], (batch, keys or length, kv_heads, dim)))
    v = jax.random.normal(draws[2], (batch, keys or length, kv_heads, value_dim))
    return tuple(x.astype(dtype) for x in (q, k, v))


def both(fn, arrays, vis, **options):
    """Output and all gradients of a loss that weighs every entry differently."""
    options = {"scale": 1.7, "p": 15.0, "exempt": 3} | options

    def loss(q, k, v, bias=None):
        o = fn(q, k, v, vis, bias=bias, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def close(ours, theirs, rtol):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * max(np.abs(theirs).max(), 1e-3))


def check(arrays, vis, rtol=3e-4, mode="plain", block_q=32, block_k=48, **options):
    """p = 15 multiplies rounding of φ, hence the limit."""
    with interpreted(mode):
        (_, o), ours = both(softplus_tpu, arrays, vis, block_q=block_q, block_k=block_k, **options)
    (_, expected), theirs = both(softplus_reference, arrays, vis, **options)
    assert o.dtype == expected.dtype
    close(o, expected, rtol)
    jax.tree.map(lambda a, b: close(a, b, rtol), ours, theirs)
    return np.asarray(o, np.float32)


@in_both_dtypes
def test_odd_sizes(shape, dtype):
    arrays = inputs(shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim,
                    value_dim=shape.value_dim, dtype=dtype)  # fmt: skip
    vis = self_visibility(1, shape.length)
    check(arrays, vis, rtol=5e-4 if dtype == jnp.float32 else 2e-2, block_q=None, block_k=None)


@pytest.mark.parametrize(  # each power and each number of exempt keys once: they are read apart
    ("exempt", "p"),
    [(0, 15.0), (3, 2.5), (0, None)]
    + [pytest.param(*x, marks=pytest.mark.slow) for x in ((0, 2.5), (3, 15), (3, None))],
)
def test_packed_documents(p, exempt):
    """Documents across tiles, one of length 1, padding in front and behind; segment 3 is empty."""
    lengths = [(0, 5), (1, 60), (2, 1), (4, 40), (0, 9)]
    segments = jnp.concatenate([jnp.full(n, s) for s, n in lengths])[None]
    positions = jnp.concatenate([jnp.arange(n) for _, n in lengths])[None]
    vis = self_visibility(1, 115, positions=positions, segment_ids=segments)
    o = check(inputs(115), vis, p=p, exempt=exempt)
    assert not o[:, :5].any()
    assert not o[:, 106:].any()


@pytest.mark.parametrize(
    "rules",
    [dict(window=20), dict(causal=False), dict(causal=False, window=9), dict(prefix_len=jnp.array([30, 0]))],
    ids=["window", "both sides", "window on both sides", "prefix"],
)
def test_rules_of_visibility_with_keys_that_everyone_sees(rules):
    vis = self_visibility(2, 70, **rules).prepend_global(2)
    check(inputs(70, batch=2, keys=72), vis, block_q=16, block_k=24)


def test_queries_that_continue_a_cache():
    q, k, v = inputs(5, batch=2, keys=70)
    written = jnp.arange(70) < jnp.array([[40], [66]])
    vis = Visibility(
        q_positions=jnp.array([[35], [61]]) + jnp.arange(5),
        k_positions=jnp.tile(jnp.arange(70), (2, 1)),
        q_segments=jnp.ones((2, 5), jnp.int32),
        k_segments=written.astype(jnp.int32),
    )
    check((q, k, v), vis, block_q=4, block_k=16)


@pytest.mark.parametrize("bias", [Alibi(jnp.array([0.1, 0.03, 0.2, 0.01])), RawRelativeBias(8)], ids=["alibi", "raw"])
def test_biases(bias):
    check((*inputs(60), bias), self_visibility(1, 60), block_q=16, block_k=24)


def test_uniform_rows_keep_their_weights():
    """All scores equal: the paper's rule is 0/0, ours keeps the plain mean; also where only the row's mean is met."""
    q, k, v = inputs(40)
    o = check((q * 0, k, v), self_visibility(1, 40), block_q=16, block_k=16)
    mean = jnp.cumsum(v, axis=1) / jnp.arange(1, 41)[:, None, None]
    close(o, jnp.repeat(mean, 2, axis=2), 1e-5)


def test_no_races_and_nothing_uninitialised_is_read():
    segments = jnp.concatenate([jnp.full(19, 1), jnp.full(1, 2), jnp.full(7, 3), jnp.full(3, 0)])[None]
    with without_races("tpu") as simulator:
        check(inputs(30, heads=2, kv_heads=1), self_visibility(1, 30, segment_ids=segments), block_q=8, block_k=8,
              mode=simulator)  # fmt: skip


def test_the_count_of_a_row_is_what_it_sees():
    vis = self_visibility(2, 1500, window=1100, segment_ids=jnp.tile(jnp.arange(1500) // 1300 + 1, (2, 1)))
    expected = np.minimum(np.where(np.arange(1500) < 1300, np.arange(1500), np.arange(1500) - 1300) + 1, 1100)
    np.testing.assert_array_equal(count_visible(vis)[1], expected)


def test_refusals_and_the_automatic_choice():
    q, k, v = inputs(8)
    call = lambda q=q, bias=None, backend="auto": softplus_attention(
        q, k, v, self_visibility(1, 8), scale=1.0, p=15.0, bias=bias, backend=backend
    )
    text = lambda **options: str(jax.make_jaxpr(lambda: call(**options))())
    with pytest.raises(NotImplementedError, match="computes on 'cpu'"):
        call(backend="tpu")
    with interpreted(), pytest.raises(NotImplementedError, match="q is float16"):
        call(q=q.astype(jnp.float16), backend="tpu")
    assert "pallas_call" not in text()
    with compiling_for("tpu"):
        assert "softplus_weigh" in text()
        assert "pallas_call" not in text(bias=RelativeBias(jnp.zeros((32, 4))))


def test_vmap_and_remat_change_nothing():
    q, k, v = inputs(40, batch=3)
    call = lambda q, k, v: softplus_tpu(
        q, k, v, self_visibility(len(q), 40), scale=1.7, p=15.0, exempt=3, block_q=16, block_k=16
    )
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))
    with interpreted():
        plain = loss(call)(q, k, v)
        one = lambda q, k, v: call(q[None], k[None], v[None])[0]
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(lambda a, b: close(a, b, 1e-6), loss(other)(q, k, v), plain)
