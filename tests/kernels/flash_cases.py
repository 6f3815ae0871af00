"""What the tests of attention kernels on GPUs share."""

from __future__ import annotations

import numpy as np


def near(actual, expected, rtol=2e-2):
    """Of the same type and equal up to `rtol` of the largest magnitude; what cancels may leave 1e-7."""
    assert actual.dtype == expected.dtype
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, atol=rtol * float(np.abs(expected).max()) + 1e-7, rtol=0)
