"""Short convolutions: the sum as defined, packed documents apart, steps equal to the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.conv import causal_conv, causal_conv_step, empty_tail
from jaxattn.errors import ConfigError
from jaxattn.mechanisms import resolve_mixer

WIDTH, CHANNELS = 4, 3


def by_hand(x, kernel, segments):
    """One token after the other; padding is stepped over."""
    y = np.zeros_like(x)
    for b in range(len(x)):
        live = [t for t in range(x.shape[1]) if segments[b, t]]
        for n, t in enumerate(live):
            for back, s in enumerate(reversed(live[max(0, n - WIDTH + 1) : n + 1])):
                if segments[b, s] == segments[b, t]:
                    y[b, t] += kernel[back] * x[b, s]
    return y


def draw(length):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, length, CHANNELS)), rng.normal(size=(WIDTH, CHANNELS))
    return x.astype(np.float32), kernel.astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_packed_documents_between_padding_on_both_sides(length):
    x, kernel = draw(length)
    segments = np.array([[0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0], [5] * 20], np.int32)[:, :length]
    y = causal_conv(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(segments))
    np.testing.assert_allclose(y, by_hand(x, kernel, segments), atol=1e-6)


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [2, 7, 1, 10]])
def test_steps_with_padding_in_between(pieces):
    x, kernel = draw(20)
    segments = np.array(
        [[0, 0, 1, 1, 1, 0, 0, 1, 1, 2, 0, 2, 2, 2, 0, 3, 3, 3, 3, 0], [4] * 9 + [0] + [4] * 10], np.int32
    )
    tail, out, at = empty_tail(batch=2, width=WIDTH, channels=CHANNELS, dtype=jnp.float32), [], 0
    step = jax.jit(causal_conv_step)
    for n in pieces:
        y, tail = step(tail, jnp.asarray(x[:, at : at + n]), jnp.asarray(kernel), jnp.asarray(segments[:, at : at + n]))
        out.append(y)
        at += n
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), by_hand(x, kernel, segments), atol=1e-6)


def test_the_mixer_text():
    assert resolve_mixer("conv").conv == 3
    assert resolve_mixer("conv(width=5)").conv == 5
    for bad in ("conv(width=0)", "conv(size=3)", "conv(width='3')"):
        with pytest.raises(ConfigError, match="conv takes width alone"):
            resolve_mixer(bad)
