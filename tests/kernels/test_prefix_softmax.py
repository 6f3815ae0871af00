"""The prefix softmax and its (m, u, w) algebra against a token-by-token loop in numpy."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from pallas_kernels.prefix_softmax import Partial, empty, merge, output
from pallas_kernels.prefix_softmax import prefix_softmax as plain

prefix_softmax = jax.jit(plain, static_argnames=("chunk", "backend"))
BACKENDS = ["reference", "xla"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def scores_and_values(length, *, batch=2, heads=3, value_dim=5, std=30.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    s = std * rng.standard_normal((batch, length, heads))
    return s.astype(dtype), rng.standard_normal((batch, length, heads, value_dim)).astype(dtype)


def prefixes(s, v, segments=None):
    """Every token's softmax over its segment so far, one numpy softmax each in f64: [B, T, H, V]."""
    s, v = np.asarray(s, np.float64), np.asarray(v, np.float64)
    segments = np.ones(s.shape[:2], int) if segments is None else np.asarray(segments)
    o = np.zeros(v.shape)
    for b, t in np.ndindex(*s.shape[:2]):
        if segments[b, t]:
            seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
            a = np.exp(s[b, seen] - s[b, seen].max(0))
            o[b, t] = np.einsum("sh,shv->hv", a / a.sum(0), v[b, seen])
    return o


def masked_softmax(s, v):
    """The same in one dense softmax, for autodiff."""
    see = jnp.tril(jnp.ones((s.shape[1], s.shape[1]), bool))
    a = jax.nn.softmax(jnp.where(see, jnp.moveaxis(s, 1, 2)[:, :, None], -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", a, v)


def worst(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


@every_backend
@pytest.mark.parametrize("length", [1, 16, 75])
def test_every_prefix_is_a_softmax_at_score_std_30(backend, length):
    s, v = scores_and_values(length)
    o, _ = prefix_softmax(s, v, chunk=16, backend=backend)
    assert worst(o, prefixes(s, v)) < 1e-5
    with jax.enable_x64(True):
        s, v = scores_and_values(length, dtype=np.float64)
        o, last = prefix_softmax(s, v, chunk=16, backend=backend)
        assert o.dtype == last.u.dtype == jnp.float64
        assert worst(o, prefixes(s, v)) < 1e-12
        assert worst(output(last), prefixes(s, v)[:, -1]) < 1e-12


def test_early_rows_of_a_chunk_survive_a_later_maximum():
    """Rows far below the largest score of their chunk keep their own maximum."""
    s = jnp.linspace(-500.0, 500.0, 64)[None, :, None]
    _, v = scores_and_values(64, batch=1, heads=1)
    assert worst(prefix_softmax(s, v, chunk=64)[0], prefixes(s, v)) < 1e-5


def test_one_pass_is_step_by_step_is_blocks_merged_at_any_split():
    s, v = scores_and_values(40)
    o, last = prefix_softmax(s, v, chunk=16)
    state, outputs = empty((2, 3), 5), []
    for t in range(40):
        one, state = prefix_softmax(s[:, t : t + 1], v[:, t : t + 1], initial=state)
        outputs.append(one)
    assert worst(jnp.concatenate(outputs, axis=1), o) < 1e-5
    assert worst(output(state), output(last)) < 1e-5
    leaf = lambda t: Partial(m=s[:, t], u=np.ones_like(s[:, t]), w=v[:, t])
    for cuts in ([0, 1, 40], [0, 17, 40], [0, 3, 9, 31, 40], range(41)):
        blocks = [
            prefix_softmax(s[:, a:b], v[:, a:b], chunk=8)[1] if b - a > 1 else leaf(a)
            for a, b in itertools.pairwise(cuts)
        ]
        forth, back = empty((2, 3), 5), empty((2, 3), 5)
        for block in blocks:
            forth = merge(forth, block)
        for block in reversed(blocks):
            back = merge(back, block)
        assert worst(output(forth), output(last)) < 1e-6
        assert worst(output(back), output(forth)) < 1e-6


@every_backend
def test_a_constant_added_to_all_scores_changes_nothing(backend):
    s, v = scores_and_values(50, std=1.0)
    run = lambda c: prefix_softmax(s + np.float32(c), v, chunk=16, backend=backend)[0]
    assert worst(run(100.0), run(0.0)) < 1e-4
    far = run(1e4)  # f32 scores are 1e-3 apart there
    assert np.all(np.isfinite(far))
    assert worst(far, run(0.0)) < 1e-2


@every_backend
@pytest.mark.parametrize("level", [-200.0, -1e4, 1e4])
def test_equal_scores_give_running_means_whatever_their_level(backend, level):
    s, v = scores_and_values(40, std=0.0)
    means = np.cumsum(v, axis=1) / np.arange(1, 41)[:, None, None]
    assert worst(prefix_softmax(s + np.float32(level), v, chunk=16, backend=backend)[0], means) < 1e-5


def test_the_two_forms_found_in_public_copies_are_wrong():
    s, v = scores_and_values(40)
    # Sums of exponentials relative to different running maxima.
    a = jnp.exp(s - jax.lax.cummax(jnp.asarray(s), axis=1))
    mixed = jnp.cumsum(a[..., None] * v, axis=1) / jnp.cumsum(a, axis=1)[..., None]
    assert worst(mixed, prefixes(s, v)) > 0.5
    assert worst(prefix_softmax(s, v)[0], prefixes(s, v)) < 1e-5
    # A state that starts at (m, u, w) = (0, 0, 0): nothing is left of scores below -104.
    low = np.full_like(s, -200.0)
    zero = jax.tree.map(jnp.zeros_like, empty((2, 3), 5))
    from_zero = prefix_softmax(low, v, initial=zero)[1]
    assert not np.any(from_zero.u), "0/0"
    assert np.all(prefix_softmax(low, v)[1].u > 0)


PACKED = np.array(
    [
        [0, 0, 1, 1, 1, 0, 1, 2, 2, 3, 3, 3, 3, 3, 0, 0, 0],
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9, 9],
        [0] * 17,
        [0] * 16 + [5],
    ],
    np.int32,
)


@every_backend
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_packed_and_padded_segments(backend, chunk):
    s, v = scores_and_values(17, batch=4)
    s[PACKED == 0] = 1e4  # padding holds rubbish
    v[PACKED == 0] = 1e4
    o, last = prefix_softmax(s, v, segments=jnp.asarray(PACKED), chunk=chunk, backend=backend)
    expected = prefixes(s, v, PACKED)
    assert worst(o, expected) < 1e-5
    assert not np.any(np.asarray(o)[PACKED == 0])
    newest = [13, 16, 0, 16]  # the state is that of the last token that is not padding
    assert worst(output(last), expected[np.arange(4), newest]) < 1e-5
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(last))
    assert not np.any(last.u[2])
    assert np.all(last.m[2] == np.float32(-1e30))


@every_backend
@pytest.mark.parametrize("at", [1, 3, 6, 9, 14])
def test_a_state_goes_on_in_its_own_segment_only(backend, at):
    s, v = scores_and_values(17, batch=4)
    expected = prefixes(s, v, PACKED)
    run = partial(prefix_softmax, chunk=4, backend=backend)
    _, state = run(s[:, :at], v[:, :at], segments=jnp.asarray(PACKED[:, :at]))
    held = np.array([row[row != 0][-1] if np.any(row) else 0 for row in PACKED[:, :at]], np.int32)
    o, _ = run(
        s[:, at:], v[:, at:], segments=jnp.asarray(PACKED[:, at:]), initial=state, initial_segment=jnp.asarray(held)
    )
    assert worst(o, expected[:, at:]) < 1e-5
    # Without its segment the state belongs to the first token that is not padding.
    _, state = run(s[1:2, :9], v[1:2, :9])
    o, _ = run(s[1:2, 9:], v[1:2, 9:], segments=jnp.asarray(PACKED[1:2, 9:]), initial=state)
    assert worst(o, prefixes(s[1:2], v[1:2])[:, 9:]) < 1e-5


@every_backend
def test_gradients_are_those_of_masked_softmax(backend):
    with jax.enable_x64(True):
        s, v = map(jnp.asarray, scores_and_values(37, dtype=np.float64, std=3.0))
        g = jnp.asarray(np.random.default_rng(1).standard_normal(v.shape))
        late = g.at[:, :20].set(0.0)

        def ours(s, v, g):
            return jnp.sum(g * jnp.sin(prefix_softmax(s, v, chunk=8, backend=backend)[0]))

        def theirs(s, v, g):
            return jnp.sum(g * jnp.sin(masked_softmax(s, v)))

        def resumed(s, v, g):
            """Outputs from 20 on, through merged single tokens, an initial state and a returned state."""
            token = lambda t: Partial(m=s[:, t], u=jnp.ones_like(s[:, t]), w=v[:, t])
            state = merge(token(0), prefix_softmax(s[:, 1:20], v[:, 1:20], chunk=8, backend=backend)[1])
            o, last = prefix_softmax(s[:, 20:-1], v[:, 20:-1], initial=state, chunk=8, backend=backend)
            o = jnp.concatenate([o, output(merge(last, token(-1)))[:, None]], axis=1)
            return jnp.sum(g[:, 20:] * jnp.sin(o))

        grad = lambda f, g: jax.jit(jax.grad(f, argnums=(0, 1)))(s, v, g)
        for run, weigh in ((ours, g), (resumed, late)):
            for a, b in zip(grad(run, weigh), grad(theirs, weigh), strict=True):
                assert worst(a, b) < 1e-12


@every_backend
def test_gradients_of_padding_are_zero_and_finite(backend):
    s, v = scores_and_values(17, batch=4)
    loss = lambda s, v: jnp.sum(jnp.sin(prefix_softmax(s, v, segments=PACKED, chunk=4, backend=backend)[0]))
    for g in jax.jit(jax.grad(loss, argnums=(0, 1)))(s, v):
        assert np.all(np.isfinite(g))
        assert not np.any(np.asarray(g)[PACKED == 0])


@pytest.mark.optimised
def test_temporary_memory_is_linear_in_length():
    """Forward, and forward with backward, at 4 times the length need about 4 times the memory, not 16 times."""

    def bytes_at(length, run):
        s = jax.ShapeDtypeStruct((1, length, 2), jnp.float32)
        v = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        return jax.jit(run).lower(s, v).compile().memory_analysis().temp_size_in_bytes

    forward = lambda s, v: prefix_softmax(s, v)[0]
    backward = jax.grad(lambda s, v: jnp.sum(jnp.sin(forward(s, v))), argnums=(0, 1))
    for run in (forward, backward):
        small, large = bytes_at(1024, run), bytes_at(4096, run)
        assert large < 4.5 * small, (small, large)
        assert large < 4096 * 4096 * 4 / 10, "no T x T array"


def test_low_precision_values_keep_an_f32_state():
    s, v = scores_and_values(40, std=3.0)
    o, last = prefix_softmax(s, jnp.asarray(v, jnp.bfloat16), chunk=16)
    assert o.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(last)} == {jnp.dtype(jnp.float32)}
    assert worst(o, prefixes(s, v)) < 2e-2


def test_bad_calls_are_refused():
    s, v = scores_and_values(4)
    with pytest.raises(NotImplementedError, match="prefix_softmax: backend 'gpu'"):
        prefix_softmax(s, v, backend="gpu")
    with pytest.raises(ConfigError, match="chunk 0"):
        prefix_softmax(s, v, chunk=0)
    with pytest.raises(ConfigError, match="0 tokens"):
        prefix_softmax(s[:, :0], v[:, :0])
