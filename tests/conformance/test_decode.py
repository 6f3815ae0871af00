"""Every mechanism: decoding token by token, or in pieces, gives the forward's answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import default_positions, self_visibility
from jaxattn.rope import Alibi, alibi_slopes
from tests.conformance.cases import CASES, DEFAULTS, able, close, inputs

default = pytest.mark.parametrize("case", DEFAULTS, ids=str)


def decode(case, q, k, v, pieces, *, capacity=None, window=None, positions=None, segments=None, bias=None):
    """Outputs of `step` over consecutive pieces of the given lengths."""
    batch, length, heads, dim = q.shape
    params = case.params(heads, k.shape[2], dim, v.shape[3])
    state = case.mechanism.init_state(
        case.spec,
        batch=batch,
        capacity=capacity or length,
        heads=heads,
        kv_heads=k.shape[2],
        key_dim=dim,
        value_dim=v.shape[3],
        dtype=q.dtype,
    )
    positions = default_positions(batch, length) if positions is None else positions
    segments = jnp.ones((batch, length), jnp.int32) if segments is None else segments
    outputs, at = [], 0

    @jax.jit
    def step(state, q, k, v, p, s):
        q, v = case.mechanism.apply_gains((q, v), q, v, p, spec=case.spec, params=params)
        return case.mechanism.step(state, q, k, v, p, s, spec=case.spec, params=params, window=window, bias=bias)

    for n in pieces:
        cut = lambda x, a=at, n=n: x[:, a : a + n]
        o, state = step(state, cut(q), cut(k), cut(v), cut(positions), cut(segments))
        outputs.append(o)
        at += n
    return jnp.concatenate(outputs, axis=1)


PIECES = {"steps": [1] * 20, "one": [20], "two": [13, 7], "mixed": [9, 1, 1, 9]}
# Every way to cut on the default settings; the variants once, in a way that holds long pieces and single steps.
CUTS = [(case, name) for case in CASES for name in (PIECES if case in DEFAULTS else ["mixed"])]


@pytest.mark.parametrize(("case", "pieces"), [(c, PIECES[n]) for c, n in CUTS], ids=[f"{c}-{n}" for c, n in CUTS])
def test_steps_equal_forward(case, pieces):
    q, k, v = inputs(20, value_dim=8)
    close(decode(case, q, k, v, pieces, capacity=29), case.forward(q, k, v))


@pytest.mark.parametrize("case", able("window"), ids=str)
def test_windowed_steps_equal_windowed_forward(case):
    q, k, v = inputs(20)
    vis = self_visibility(2, 20, window=4)
    close(decode(case, q, k, v, [11] + [1] * 9, window=4), case.forward(q, k, v, vis))


@pytest.mark.parametrize("case", able("position_bias"), ids=str)
def test_steps_with_a_position_bias_equal_forward(case):
    q, k, v = inputs(20)
    bias = Alibi(alibi_slopes(4))
    close(decode(case, q, k, v, [8] + [1] * 12, bias=bias), case.forward(q, k, v, bias=bias))


@default
def test_left_padded_prompts_decode_like_unpadded_ones(case):
    q, k, v = inputs(20)
    alone = case.forward(q[:, 6:], k[:, 6:], v[:, 6:])
    positions = jnp.maximum(default_positions(2, 20) - 6, 0)
    segments = (jnp.arange(20) >= 6).astype(jnp.int32)[None].repeat(2, 0)
    o = decode(case, q, k, v, [12] + [1] * 8, positions=positions, segments=segments)
    close(o[:, 6:], alone)
    assert not np.any(o[:, :6])


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.mechanism.capabilities.state == "kv"], ids=str)
def test_a_full_cache_is_refused_outside_jit_and_poisoned_inside(case):
    q, k, v = inputs(6)
    state = case.mechanism.init_state(
        case.spec, batch=2, capacity=5, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=jnp.float32
    )
    call = dict(spec=case.spec, params=case.params(4, 2, 16, 16))
    ones, positions = jnp.ones((2, 6), jnp.int32), default_positions(2, 6)
    with pytest.raises(ConfigError, match="capacity 5"):
        case.mechanism.step(state, q, k, v, positions, ones, **call)
    step = jax.jit(
        lambda s, a, b: case.mechanism.step(
            s, *(x[:, a:b] for x in (q, k, v)), positions[:, a:b], ones[:, a:b], **call
        ),
        static_argnums=(1, 2),
    )
    o, state = step(state, 0, 3)
    assert np.all(np.isfinite(o))
    o, state = step(state, 3, 6)
    assert np.all(np.isnan(o)), "an overflowing step must never look like an answer"


@pytest.mark.parametrize("case", [c for c in DEFAULTS if c.mechanism.capabilities.state == "recurrent"], ids=str)
def test_a_recurrent_state_has_the_same_size_for_any_context(case):
    make = lambda capacity: case.mechanism.init_state(
        case.spec, batch=2, capacity=capacity, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=jnp.float32
    )
    shapes = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes(jax.eval_shape(lambda: make(8))) == shapes(jax.eval_shape(lambda: make(100_000)))
