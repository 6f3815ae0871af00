"""Equal up to rounding: what the tests of several kernels ask."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def near(actual, expected, rtol=2e-2):
    """Of the same type and equal up to `rtol` of the largest magnitude; what cancels may leave 1e-7."""
    assert actual.dtype == expected.dtype
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, atol=rtol * float(np.abs(expected).max()) + 1e-7, rtol=0)


def all_near(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every array of two trees has its shape and no error above `tolerance` of its largest magnitude."""

    def one(a, b):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()

    jax.tree.map(one, ours, theirs)
