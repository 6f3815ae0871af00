"""`prefix_softmax` by way of the Hopper kernel of `linear_scan`, in JAX's simulator of GPUs; bfloat16 values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, interpreted
from pallas_kernels.linear_scan.xla import linear_scan_xla
from pallas_kernels.prefix_softmax import empty, gpu, prefix_softmax, segment_runs
from pallas_kernels.shapes import ODD
from tests.kernels.near import all_near
from tests.kernels.prefix_softmax_cases import SMALL, both, inputs, packs, recurrence
from tests.kernels.simulators import needs_gpus

PACKED = dict(segments=packs(), initial_segment=jnp.array([1, 9, 2]))
PACKED_SHAPE = dataclasses.replace(SMALL, batch=3)


def run(s, v, *, segments, initial, initial_segment):
    return gpu.prefix_softmax_gpu(s, v, *segment_runs(segments, initial_segment), initial)


def check(arrays, tolerance, **options):
    ours = both(run, arrays, **options)
    expected = both(recurrence, [x.astype(jnp.float32) for x in arrays], **options)
    all_near(ours, expected, tolerance)
    assert [x.dtype for x in ours[1]] == [x.dtype for x in arrays]
    return ours


@pytest.fixture
def exact(monkeypatch):
    """Another backend's products in f32 in the kernel's place: what is left are the formulas around it."""
    monkeypatch.setattr(gpu, "linear_scan_gpu", linear_scan_xla)


@pytest.mark.parametrize("slope", [0.0, 40.0, -40.0], ids=["", "rising", "falling"])
def test_the_recurrence_is_the_softmax_of_every_prefix(exact, slope):
    s, *rest = inputs()
    check((s + slope * jnp.arange(75.0)[None, :, None], *rest), 2e-5)


def test_the_recurrence_of_packed_rows_and_whatever_padding_holds(exact):
    s, v, *state = inputs(PACKED_SHAPE)
    padding = np.asarray(packs()) == 0
    ours = check((s, v, *state), 2e-5, **PACKED)
    bad = (jnp.where(padding[..., None], jnp.nan, s), jnp.where(padding[..., None, None], jnp.nan, v), *state)
    jax.tree.map(np.testing.assert_array_equal, both(run, bad, **PACKED), ours)


def test_the_recurrence_behind_a_state_of_another_document_with_far_larger_scores(exact):
    s, v, m, u, w = inputs()
    options = dict(segments=jnp.ones((2, 75), jnp.int32), initial_segment=jnp.array([2, 3]))
    check((s, v, m + 300, u, w), 2e-5, **options)


def test_the_recurrence_without_a_state_before(exact):
    s, v, *_ = inputs()
    _, grads = check((s, v, *jax.tree.leaves(empty((2, 3), 5))), 2e-5)
    assert all(np.all(np.isfinite(x)) for x in grads)


@needs_gpus
def test_packed_rows_through_the_kernel():
    with interpreted():
        check(inputs(PACKED_SHAPE, jnp.bfloat16), 4e-2, **PACKED)


@needs_gpus
@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in ODD if s.value_dim <= 128], ids=lambda s: s.name)
def test_odd_shapes(shape):
    with interpreted():
        check(inputs(shape, jnp.bfloat16), 4e-2)


@needs_gpus
def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    s, v, *_ = inputs(dtype=jnp.bfloat16)
    text = lambda s, v, **options: str(jax.make_jaxpr(lambda *x: prefix_softmax(*x, **options))(s, v))
    assert "linear_scan_forward" not in text(s, v)
    with compiling_for("gpu"):
        assert "linear_scan_forward" in text(s, v)
        assert "linear_scan_forward" not in text(s, v.astype(jnp.float32))
        assert "linear_scan_forward" not in text(s[:, :1], v[:, :1])
        with pytest.raises(NotImplementedError, match="computes bfloat16 but v is float32: cast it"):
            prefix_softmax(s, v.astype(jnp.float32), backend="gpu")
    with pytest.raises(NotImplementedError, match="computes on 'cpu'"):
        prefix_softmax(s, v, backend="gpu")
