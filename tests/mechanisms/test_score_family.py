"""The cards' identities and hand-worked rows, independent of the library's own template."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call, get
from jaxattn.rope import Alibi, alibi_slopes
from tests.conformance.cases import normal, seen
from tests.mechanisms.programs import run


def rows(name, q, k, params=None, **spec):
    """Dense weights [B, H, T, P+S] of a causal call."""
    mechanism, vis = get(name), seen(batch=q.shape[0], length=q.shape[1])
    return jax.device_get(run(mechanism, "weights", mechanism.make_spec(**spec), q, k, vis, params=params))


@partial(jax.jit, static_argnames=("name", "options", "causal"))
def _attend(name, q, k, v, options, causal, **arrays):
    return jaxattn.attend(name, q, k, v, causal=causal, **arrays, **dict(options))


def attend(name, q, k, v, *, causal=True, params=None, kv_positions=None, segment_ids=None, **options):
    """Compiled, and as a NumPy array."""
    arrays = {"params": params, "kv_positions": kv_positions, "segment_ids": segment_ids}
    given = {k: x for k, x in arrays.items() if x is not None}
    return np.asarray(_attend(name, q, k, v, tuple(options.items()), causal, **given))


def qkv(length=9, heads=2, dim=4, seed=0):
    return [normal(3 * seed + i, (1, length, heads, dim)) for i in range(3)]


# Three keys, one head, D = 4 so that scale = 1/2; scores of the last row are exactly 1, -1, 0.
Q = np.float32([[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]])[None, :, None]
K = np.float32([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]])[None, :, None]
E, SIG = np.exp, lambda x: 1 / (1 + np.exp(-x))
LAST = np.array([1.0, -1.0, 0.0])

HAND_WORKED = [
    ("softmax", {}, E(LAST) / E(LAST).sum()),
    ("softmax", {"row_sum": 0.2}, 0.2 * E(LAST) / E(LAST).sum()),
    ("softmax", {"p": 2.0}, E(LAST) / np.sqrt((E(LAST) ** 2).sum())),
    ("softmax", {"p": 0.5}, E(LAST) / (np.sqrt(E(LAST)).sum()) ** 2),
    ("sigmoid", {}, SIG(LAST)),
    ("sigmoid", {"train_len": 64}, SIG(LAST - np.log(64))),
    ("sigmoid", {"normalise": True}, SIG(LAST) / SIG(LAST).sum()),
    ("sigmoid", {"p": 2.0}, SIG(LAST) / np.sqrt((SIG(LAST) ** 2).sum())),
    ("elu", {}, np.array([2.0, E(-1.0), 1.0])),
    ("elu", {"normalise": True}, np.array([2.0, E(-1.0), 1.0]) / (3 + E(-1.0))),
    ("relu", {}, np.array([1 / 3, 0, 0])),
    ("identity", {}, LAST),
    ("kernel_linear", {}, LAST),
    ("kernel_linear", {"normalise": True}, LAST / 1.0),
]


@pytest.mark.parametrize(
    ("name", "spec", "expected"), HAND_WORKED, ids=lambda x: str(x) if isinstance(x, str | dict) else ""
)
def test_hand_worked_row(name, spec, expected):
    np.testing.assert_allclose(rows(name, Q, K, **spec).values[0, 0, 2], expected, atol=1e-6)


def test_off_by_one_row_and_its_slot():
    a = rows("softmax_off_by_one", Q, K)
    z = 1 + E(LAST).sum()
    np.testing.assert_allclose(a.values[0, 0, 2], np.concatenate([[1 / z], E(LAST) / z]), atol=1e-6)
    assert a.slots == 1


@pytest.mark.parametrize("name", ["softmax_off_by_one", "k_bias", "kv_bias"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_weights_of_slots_are_exact(name, size):
    """Also where one minus the other weights is nothing but rounding: each weight to a part in 10^4 of itself."""
    q, k, _ = qkv()
    q = q * np.float32(size)
    params = get(name).init_params(jax.random.key(0), get(name).spec(), heads=2, kv_heads=2, key_dim=4, value_dim=4)
    slot = np.asarray(params["k"], np.float64) if "k" in params else np.zeros((2, 4))
    keys = np.concatenate([slot[None, None], k.astype(np.float64)], axis=1)
    s = np.einsum("bthd,bshd->bhts", q.astype(np.float64), keys) / 2
    s = np.where(np.tri(9, 10, 1, dtype=bool), s, -np.inf)
    exact = np.exp(s - s.max(-1, keepdims=True))
    exact /= exact.sum(-1, keepdims=True)
    found = np.asarray(rows(name, q, k, params).values)
    assert found.min() >= 0
    assert exact[..., 0].min() < (1e-7 if size == 30.0 else 1)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-37)  # f32 holds nothing smaller
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)


def test_kernel_elu_row():
    phi = lambda x: np.where(x > 0, x + 1, np.exp(x))
    w = phi(np.asarray(Q)[0, 2, 0]) @ phi(np.asarray(K)[0, :, 0]).T / 2
    np.testing.assert_allclose(rows("kernel_elu", Q, K).values[0, 0, 2], w / w.sum(), atol=1e-6)


def test_kernel_mlp_row_and_clipped_normaliser():
    eye = np.eye(4, dtype=np.float32)
    params = {"w1": 3 * eye, "w2": eye[::-1]}
    phi = lambda x: np.maximum(3 * x, 0)[..., ::-1]
    w = phi(np.asarray(Q)[0, 2, 0]) @ phi(np.asarray(K)[0, :, 0]).T / 2
    np.testing.assert_allclose(rows("kernel_mlp", Q, K, params).values[0, 0, 2], w / max(abs(w.sum()), 1), atol=1e-6)


def test_k_bias_of_zeros_is_softmax_off_by_one():
    q, k, v = qkv()
    params = {"k": np.zeros((2, 4), np.float32)}
    np.testing.assert_allclose(
        attend("k_bias", q, k, v, params=params),
        attend("softmax_off_by_one", q, k, v),
        atol=1e-6,
    )


def test_kv_bias_that_nobody_chooses_is_softmax():
    q, k, v = qkv()
    q = np.abs(q)
    params = {"k": np.full((2, 4), -1e4, np.float32), "v": np.ones((2, 4), np.float32)}
    np.testing.assert_allclose(attend("kv_bias", q, k, v, params=params), attend("softmax", q, k, v), atol=1e-6)


def test_fixed_value_and_learnable_dims_of_the_k_bias():
    q, k, v = qkv()
    spec = dict(value_scale=5.0, key_dims=1)
    o = attend("k_bias", q, k, v, params={"k": np.float32([[2], [-2]])}, **spec)
    slot, value = np.zeros((2, 1, 1, 2, 4))
    slot[..., 0], value[..., 0] = [2.0, -2.0], 5.0
    s = np.einsum("bthd,bshd->bhts", q, np.concatenate([slot, k], 1)) / 2
    w = np.where(np.tri(9, 10, 1, dtype=bool), np.exp(s), 0)
    expected = np.einsum("bhts,bshv->bthv", w / w.sum(-1, keepdims=True), np.concatenate([value, v], 1))
    np.testing.assert_allclose(o, expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"key_dims is 9 but the key dim is 4"):
        get("k_bias").init_params(
            jax.random.key(0), get("k_bias").spec(key_dims=9), heads=2, kv_heads=2, key_dim=4, value_dim=4
        )


def test_v_bias_is_softmax_plus_a_constant():
    q, k, v = qkv()
    bias = np.arange(8, dtype=np.float32).reshape(2, 4)
    o = attend("v_bias", q, k, v, params={"v": bias})
    np.testing.assert_allclose(o, attend("softmax", q, k, v) + bias, atol=1e-6)


def test_scaled_rows_equal_a_scaled_output():
    q, k, v = qkv()
    np.testing.assert_allclose(attend("softmax", q, k, v, row_sum=0.05), 0.05 * attend("softmax", q, k, v), atol=1e-7)


def test_normalised_sigmoid_rows_sum_to_one():
    q, k, _ = qkv()
    np.testing.assert_allclose(rows("sigmoid", q, k, normalise=True).values.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "elu", "identity"])
def test_unnormalised_attention_is_additive_over_keys(name):
    q, k, v = qkv(12)
    full = attend(name, q, k, v, causal=False)
    for cut in (1, 5, 11):
        ids = np.arange(12, dtype=np.int32)[None]
        part = lambda a, b, ids=ids: attend(name, q, k[:, a:b], v[:, a:b], causal=False, kv_positions=ids[:, a:b])
        np.testing.assert_allclose(part(0, cut) + part(cut, 12), full, atol=1e-5)
    normal = attend("softmax", q, k, v, causal=False)
    one = attend("softmax", q, k[:, :5], v[:, :5], causal=False)
    assert not np.allclose(one, normal, atol=1e-2)


def test_sigmoid_with_zero_queries_has_the_bias_as_weight():
    n = 16
    _, k, _ = qkv(n)
    a = rows("sigmoid", np.zeros_like(k), k, train_len=n).values[0, 0]
    np.testing.assert_allclose(a[np.tril_indices(n)], 1 / (1 + n), rtol=1e-5)
    np.testing.assert_allclose(a[-1].sum(), n / (n + 1), rtol=1e-5)


def test_sigmoid_is_not_shift_invariant_and_needs_the_full_alibi_distance():
    q, k, v = qkv()
    full = Alibi(alibi_slopes(2))
    keys_only = lambda i, j: full.slopes[None, :, None, None] * j[:, None, None, :]
    for name, equal in (("softmax", True), ("sigmoid", False)):
        a, b = (jax.jit(partial(jaxattn.attend, name, bias=bias))(q, k, v) for bias in (full, keys_only))
        assert np.allclose(a, b, atol=1e-5) == equal


def test_sigmoid_gradient_is_p_times_one_minus_p():
    q, k, v = qkv()
    do = normal(5, v.shape)
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(jaxattn.attend("sigmoid", *x) * do), argnums=(0, 1, 2)))
    dq, dk, dv = gradients(q, k, v)
    p = rows("sigmoid", q, k).values
    ds = p * (1 - p) * np.einsum("bthv,bshv->bhts", do, v) / 2
    np.testing.assert_allclose(dv, np.einsum("bhts,bthv->bshv", p, do), atol=1e-5)
    np.testing.assert_allclose(dq, np.einsum("bhts,bshd->bthd", ds, k), atol=1e-5)
    np.testing.assert_allclose(dk, np.einsum("bhts,bthd->bshd", ds, q), atol=1e-5)


def test_relu_divides_by_the_visible_keys_only():
    q, k, v = np.ones((3, 1, 6, 1, 4), np.float32)
    segments = np.int32([[1, 1, 1, 2, 2, 0]])
    a = attend("relu", q, k, v, segment_ids=segments)
    np.testing.assert_allclose(a[0, :, 0, 0], [2, 2, 2, 2, 2, 0], atol=1e-6)
    vis = self_visibility(1, 6, window=2)
    windowed = jax.device_get(run(get("relu"), "weights", get("relu").spec(), q, k, vis)).values[0, 0]
    np.testing.assert_allclose(windowed[4], [0, 0, 0, 1, 1, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("softmax", {"p": -1.0}, "p is -1"),
        ("softmax", {"row_sum": 0.0}, "row_sum is 0"),
        ("softmax", {"p": 2.0, "row_sum": 0.5}, "set one of them"),
        ("sigmoid", {"train_len": -4}, "train_len is -4"),
        ("sigmoid", {"normalise": 1}, "must be True or False"),
        ("sigmoid", {"train_len": "x"}, "must be a number"),
        ("sink_token", {"tokens": 0}, "tokens is 0"),
    ],
)
def test_impossible_options_are_refused_by_name(name, spec, message):
    mechanism = get(name)
    q, k, v = map(jnp.asarray, qkv())
    vis = self_visibility(1, 9)
    with pytest.raises(ConfigError, match=message):
        mechanism.forward(q, k, v, vis, Call(mechanism.make_spec(**spec)))
