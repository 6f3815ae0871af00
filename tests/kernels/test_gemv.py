"""The product of a few rows on a CPU against NumPy in f64; when it is used, and what its absence says."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _cpu, compiling_for
from pallas_kernels.linear.gemv import MOST_ROWS, TARGET, gemv, usable

needs_numba = pytest.mark.skipif(bool(_cpu.missing()), reason=f"numba's kernels: {_cpu.missing()}")


def operands(rows, d_in, d_out, dtype):
    rng = np.random.default_rng(d_in)
    return (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, d_in), (d_out, d_in)))


def calls(function, *args):
    return jax.jit(function).lower(*args).as_text().count(TARGET)


@needs_numba
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (37, 101), (576, 63)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_product_with_rows_of_weights(rows, d_in, d_out, dtype):
    x, w = operands(rows, d_in, d_out, dtype)
    y = jax.jit(gemv)(x, w)
    assert y.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.sqrt(d_in) * max(1, np.abs(expected).max()))
    assert calls(gemv, x, w) == (rows <= MOST_ROWS)


@needs_numba
@pytest.mark.parametrize("live", [[], [2], [0, 7], [1, 2, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_rows_of_zeros_are_zeros_and_leave_the_others_alone(live):
    """What stood in the result's memory is gone; numbers that XLA flushes to zero count as zero."""
    x, w = operands(8, 70, 37, jnp.float32)
    dead = jnp.full((8, 70), 1e-40).at[::2].set(-0.0)
    kept = jnp.isin(jnp.arange(8), jnp.asarray(live, jnp.int32))[:, None]
    y = jax.jit(gemv)(jnp.where(kept, x, dead), w)
    np.testing.assert_allclose(y, np.where(kept, np.asarray(x) @ np.asarray(w).T, 0), atol=1e-4)
    assert not np.any(np.asarray(y)[~np.asarray(kept)[:, 0]])


@needs_numba
def test_a_batch_of_rows_reads_the_weights_once():
    x, w = operands(4, 24, 10, jnp.float32)
    each = jax.vmap(gemv, in_axes=(0, None))
    np.testing.assert_allclose(jax.jit(each)(x[:, None], w)[:, 0], gemv(x, w), atol=1e-6)
    assert calls(each, x[:, None], w) == 1
    own = jnp.stack([w, 2 * w])  # weights of their own: nothing to share
    np.testing.assert_allclose(jax.vmap(gemv)(jnp.stack([x, x]), own)[1], 2 * gemv(x, w), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(gemv, in_axes=(None, 0))(x, own)[1], 2 * gemv(x, w), rtol=1e-5)


@needs_numba
def test_it_runs_in_a_loop_on_the_device_and_keeps_nan():
    _, w = operands(1, 24, 24, jnp.float32)
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: gemv(x, w), x))
    x = jnp.ones((1, 24))
    np.testing.assert_allclose(loop(x), x @ w.T @ w.T @ w.T, rtol=1e-4)
    assert np.isnan(loop(x.at[0, 3].set(jnp.nan))).all()


@needs_numba
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_numbers_leaves_the_others_alone(value):
    x, w = operands(6, 70, 37, jnp.float32)
    y = np.asarray(jax.jit(gemv)(x.at[2, 69].set(value), w))
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(np.asarray(jax.jit(gemv)(x, w)), 2, 0))


def test_what_stands_in_the_way_is_said(monkeypatch):
    with compiling_for("tpu"):
        assert _cpu.missing() == "they are for CPUs and this is tpu"
        assert not usable(jnp.zeros((2, 2)))
    real = importlib.metadata.distribution

    def without_tbb(name):
        if name == "tbb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without_tbb)
    _cpu._unable.cache_clear()
    try:
        assert _cpu.missing() in (
            "the package tbb is not installed (extra cpu)",
            "the package numba is not installed (extra cpu)",
        )
    finally:
        _cpu._unable.cache_clear()


@needs_numba
def test_types_it_does_not_read_go_elsewhere():
    assert usable(jnp.zeros((2, 2), jnp.bfloat16))
    assert not usable(jnp.zeros((2, 2), jnp.float16))
