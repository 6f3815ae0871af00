"""`paged_decode` compiled by numba for single queries on a CPU, against the f32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compiling_for, recording
from pallas_kernels._cpu import missing
from pallas_kernels.paged_decode import paged_decode
from tests.kernels.paged_decode_cases import Case

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CASES = {
    "one pool, lists for all": Case(),
    "pools and lists of their own": Case(pools=2, tables=3, lengths=(2, 3)),
    "lengths for all heads": Case(lengths=(2,)),
    "bf16": Case(dtype="bfloat16", lengths=(2, 1)),
    "one head, wide values": Case(heads=1, kv_heads=1, batch=1, dim=7, value_dim=192),
    "a list of tokens": Case(page=1, pages=90, listed=33),
}


def run(case, backend, **changes):
    arrays, more = case.arguments()
    with recording() as choices:
        o, log_z = jax.jit(lambda *x: paged_decode(*x, **more | changes, backend=backend))(*arrays)
    return np.asarray(o, np.float32), np.asarray(log_z), choices["paged_decode"]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_equals_the_reference(case):
    o, log_z, choice = run(case, "auto")
    assert list(choice) == ["numba"]
    expected, expected_z, _ = run(case, "reference")
    tolerance = 2e-2 if case.dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(o, expected, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(log_z, expected_z, rtol=tolerance)


def test_nothing_listed_gives_zeros_and_unlisted_pages_are_not_read():
    (q, k, v, tables, _), more = Case(batch=2).arguments()
    tables = jnp.asarray([[[-1, -1]], [[3, 5]]])
    unread = jnp.array([0, 1, 2, 4, 6])
    k, v = (x.at[:, :, unread].set(jnp.nan) for x in (k, v))
    o, log_z = paged_decode(q, k, v, tables, **more)
    assert not np.asarray(o[0]).any()
    assert (log_z[0] == -1e30).all()
    assert np.isfinite(o[1]).all()


def test_vmap_and_what_goes_elsewhere():
    case = Case(lengths=(2, 3), tables=3, pools=2)
    arrays, more = case.arguments()
    call = lambda *x: paged_decode(*x, **more)[0]
    stacked = jax.vmap(call)(*(jnp.stack([x, x]) for x in arrays))
    np.testing.assert_allclose(stacked[1], call(*arrays), rtol=1e-6)
    assert list(run(Case(queries=2), "auto")[2]) == ["xla"]
    assert list(run(Case(key_bias=1), "auto")[2]) == ["xla"]
    with compiling_for("tpu"), recording() as choices:
        jax.eval_shape(call, *arrays)
    assert "numba" not in choices["paged_decode"]
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda q: jnp.sum(call(q, *arrays[1:])))(arrays[0])
