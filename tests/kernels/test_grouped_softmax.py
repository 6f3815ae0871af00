"""Grouped softmax: the paper's identities, hand-worked rows, and the tiled form against the equation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import softmax
from pallas_kernels.grouped_softmax import grouped_softmax as unjitted
from pallas_kernels.grouped_softmax import reference
from pallas_kernels.grouped_softmax.reference import NEVER, grouped_softmax_reference
from pallas_kernels.grouped_softmax.xla import grouped_softmax_xla
from tests.conformance.cases import arrays, close, inputs, normal, packed
from tests.mechanisms.programs import run

dense_rows = jax.jit(reference.dense_rows, static_argnums=2)
dense_scores = jax.jit(reference.dense_scores, static_argnums=2)
grouped_softmax = jax.jit(unjitted, static_argnames=("block", "scale", "backend"))


def landmarks(length, block):
    return np.arange(length) % block == block - 1


def test_hand_worked_rows():
    """L = 3, so landmarks are 2 and 5; scores are ln of small whole numbers."""
    s = np.log(np.float32([1, 2, 4, 3, 5, 100, 7]))[None, None, None].repeat(7, axis=2)
    a, log_z = map(np.asarray, dense_rows(s, self_visibility(1, 7), 3))
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1 / 3, 2 / 3, 0, 0, 0, 0, 0],
            [1 / 3, 2 / 3, 0, 0, 0, 0, 0],  # a landmark: the tokens of its block, never itself
            [4 / 7 / 3, 8 / 7 / 3, 0, 3 / 7, 0, 0, 0],
            [4 / 12 / 3, 8 / 12 / 3, 0, 3 / 12, 5 / 12, 0, 0],
            [4 / 12 / 3, 8 / 12 / 3, 0, 3 / 12, 5 / 12, 0, 0],
            [4 / 111 / 3, 8 / 111 / 3, 0, 100 / 111 * 3 / 8, 100 / 111 * 5 / 8, 0, 7 / 111],
        ]
    )
    np.testing.assert_allclose(a[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_z[0, 0]), [1, 3, 3, 7, 12, 12, 111], rtol=1e-5)


def test_landmarks_that_score_the_log_sum_of_their_block_give_plain_softmax():
    """Card 1, in f64: the two levels then cancel."""
    with jax.enable_x64(True):
        s = 3 * np.random.default_rng(0).normal(size=(2, 3, 40, 40))
        mark, vis = landmarks(40, 8), self_visibility(2, 40)
        for c in np.flatnonzero(mark):
            s[..., c] = np.log(np.exp(s[..., c - 7 : c]).sum(-1))
        a, log_z = dense_rows(s, vis, 8)
        see = np.tril(np.ones((40, 40), bool)) & ~mark
        e = np.where(see, np.exp(s), 0)
        np.testing.assert_allclose(a, e / e.sum(-1, keepdims=True), atol=1e-14)
        np.testing.assert_allclose(log_z, np.log(e.sum(-1)), atol=1e-12)


@pytest.mark.parametrize("block", [2, 5, 8, 51])
def test_rows_sum_to_one_and_landmark_columns_are_exactly_zero(block):
    """Card 2."""
    q, k, _ = arrays(60, kv_heads=4)
    a = np.asarray(dense_rows(dense_scores(q, 20 * k, 0.25), self_visibility(2, 60), block)[0])
    np.testing.assert_allclose(a.sum(-1), 1.0, atol=1e-5)
    assert not np.any(a[..., landmarks(60, block)])
    assert np.all(a >= 0)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_one_block_is_plain_causal_attention(backend):
    """Card 2: T <= f."""
    q, k, v = inputs(30)
    vis = self_visibility(2, 30)
    o, log_z = grouped_softmax(q, k, v, vis, block=31, scale=0.25, backend=backend)
    close(o, run(softmax.MECHANISM, "reference", softmax.Spec(), q, k, v, vis))
    s = np.einsum("bthd,bshd->bths", np.asarray(q, np.float64), np.asarray(k).repeat(2, axis=2)) / 4
    mass = np.log(np.sum(np.where(np.tri(30, dtype=bool)[:, None], np.exp(s), 0), axis=-1))
    close(log_z, mass)


def test_values_of_landmarks_are_never_read():
    q, k, v = arrays(40)
    call = partial(grouped_softmax, q, k, vis=self_visibility(2, 40), block=8, scale=0.25)
    changed = v.copy()
    changed[:, landmarks(40, 8)] = 1e4
    np.testing.assert_array_equal(call(v=v)[0], call(v=changed)[0])


def scattered(total, lengths, seed=0):
    """Documents in a row of `total` with padding strewn between all their tokens."""
    rng = np.random.default_rng(seed)
    positions, segments = np.zeros((2, total), np.int32), np.zeros((2, total), np.int32)
    for b in range(2):
        at = np.sort(rng.permutation(total)[: sum(lengths)])
        positions[b, at] = np.concatenate([np.arange(n) for n in lengths])
        segments[b, at] = np.repeat(np.arange(len(lengths), 0, -1), lengths)  # ids need not increase
    return jnp.asarray(positions), jnp.asarray(segments)


LAYOUTS = {
    "one": lambda n: (default_positions(2, n), jnp.ones((2, n), jnp.int32)),
    "packed": lambda n: packed([n // 3, 1, n // 2], n),
    "scattered": lambda n: scattered(n, [n // 2, 5, n // 5]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("block", "block_q", "tile_k"), [(8, 32, 24), (3, 16, 7), (51, 128, 512)])
def test_tiles_equal_the_equation_in_value_and_gradient(layout, block, block_q, tile_k):
    """In f64, through o and log Z, at sizes that cut rows, tiles and blocks anywhere."""
    with jax.enable_x64(True):
        q, k, v = inputs(110, value_dim=8, dtype=jnp.float64)
        positions, segments = LAYOUTS[layout](110)
        vis = self_visibility(2, 110, positions=positions, segment_ids=segments)
        by_o, by_z = normal(11, (2, 110, 4, 8)), normal(12, (2, 110, 4))

        def both(f):
            def scalar(q, k, v):
                o, log_z = f(q, k, v, vis, block=block, scale=0.5)
                live = log_z > NEVER / 2
                return jnp.sum(by_o * jnp.sin(o)) + jnp.sum(by_z * jnp.where(live, jnp.sin(log_z), 0)), (o, log_z)

            return jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)

        ours = both(partial(grouped_softmax_xla, block_q=block_q, tile_k=tile_k))
        theirs = both(grouped_softmax_reference)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), ours, theirs)


def test_queries_apart_from_their_keys_and_rows_without_any():
    q, k, v = arrays(9, keys=40)
    at = np.asarray(default_positions(2, 40))
    q_segments, k_segments = np.ones((2, 9), np.int32), np.ones((2, 40), np.int32)
    q_segments[0, 0], q_segments[1, 0], k_segments[:, 3] = 0, 2, GLOBAL
    vis = Visibility(at[:, :9] + np.int32([[25], [31]]), at, q_segments, k_segments)
    call = partial(grouped_softmax, vis=vis, block=8, scale=0.25)
    ours = jax.tree.map(np.asarray, call(q, k, v))
    jax.tree.map(close, ours, call(q, k, v, backend="reference"))
    assert not np.any(ours[0][:, 0])
    assert np.all(ours[1][:, 0] == NEVER)
    k[:, 3] += 9
    v[:, 3] += 9
    np.testing.assert_array_equal(ours[0], call(q, k, v)[0])


def test_disjoint_keys_merge_by_their_masses():
    """What retrieval relies on: whole blocks may be attended to apart."""
    q, k, v = arrays(40)

    @jax.jit
    def parts(q, k, v):
        vis = self_visibility(2, 40).rows(32, 8)
        call = partial(unjitted, q, block=8, scale=0.25)
        one, two = call(k[:, :16], v[:, :16], vis.columns(0, 16)), call(k[:, 16:], v[:, 16:], vis.columns(16, 24))
        return one, two, call(k, v, vis)

    (one, z_one), (two, z_two), (whole, log_z) = jax.device_get(parts(q[:, 32:], k, v))
    share = 1 / (1 + np.exp(z_two - z_one))[..., None]
    close(one * share + two * (1 - share), whole)
    close(np.logaddexp(z_one, z_two), log_z)


def test_bf16_is_within_the_official_tolerances():
    """Card 5, as far as there is no GPU kernel: 1e-2 forward, 4e-2 gradients."""
    q, k, v = inputs(256, dim=64, value_dim=64, dtype=jnp.bfloat16)
    vis, do = self_visibility(2, 256), normal(4, (2, 256, 4, 64))

    def both(f, *x):
        def scalar(*x):
            o = f(*x, vis, block=64, scale=0.125)[0]
            return jnp.sum(do * o.astype(jnp.float32)), o

        grads, o = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*x)
        return o, grads

    o, grads = both(grouped_softmax_xla, q, k, v)
    assert o.dtype == jnp.bfloat16
    assert all(g.dtype == jnp.bfloat16 for g in grads)
    exact, exact_grads = both(grouped_softmax_reference, *(np.asarray(x, np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(o, np.float32), exact, atol=1e-2, rtol=1e-2)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=4e-2, rtol=4e-2)


@pytest.mark.parametrize("block", [8, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.optimised
def test_memory_grows_with_length_not_with_its_square(block):
    """One [T, T] array of f32 at T = 8192 would be 268 MB."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def run(q, k, v, segments):
            vis = self_visibility(1, length, segment_ids=segments)
            return jnp.sum(jnp.sin(unjitted(q, k, v, vis, block=block, scale=0.25)[0]))

        compiled = jax.jit(jax.grad(run, (0, 1, 2))).lower(x, x, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(2048), temporaries(8192)
    assert large < 16e6
    assert large < 5 * small


def test_backends_are_named():
    q, k, v = inputs(8)
    with pytest.raises(NotImplementedError, match=r"grouped_softmax: backend 'gpu' (needs JAX|computes bfloat16)"):
        unjitted(q, k, v, self_visibility(2, 8), block=3, scale=1.0, backend="gpu")
    with pytest.raises(ConfigError, match="'cuda' is not known"):
        unjitted(q, k, v, self_visibility(2, 8), block=3, scale=1.0, backend="cuda")
