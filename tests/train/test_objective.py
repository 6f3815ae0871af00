"""The chunked loss is the plain one, in value and gradient, with and without padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objective import cross_entropy, token_losses


def plain(hidden, kernel, targets, mask):
    losses = token_losses(jnp.einsum("bte,en->btn", hidden, kernel), targets)
    return jnp.sum(jnp.where(mask, losses, 0.0))


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 11, 8))
    kernel = jax.random.normal(keys[1], (8, 29))
    targets = jax.random.randint(keys[2], (3, 11), 0, 29)
    mask = jax.random.bernoulli(keys[3], 0.7, (3, 11))
    ours = lambda h, k: 0.3 * cross_entropy(h, k, targets, mask, chunk)[0]
    theirs = lambda h, k: 0.3 * plain(h, k, targets, mask)
    assert cross_entropy(hidden, kernel, targets, mask, chunk)[1] == mask.sum()
    np.testing.assert_allclose(ours(hidden, kernel), theirs(hidden, kernel), rtol=1e-5)
    value, grads = jax.value_and_grad(ours, argnums=(0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, theirs(hidden, kernel), rtol=1e-5)
    for got, want in zip(grads, jax.grad(theirs, argnums=(0, 1))(hidden, kernel), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_masked_tokens_have_no_gradient_and_huge_logits_stay_finite():
    hidden = 1e3 * jnp.ones((1, 4, 2))
    kernel = jnp.array([[30.0, -30.0, 0.0], [0.0, 1.0, 2.0]])
    mask = jnp.array([[True, False, True, False]])
    grad = jax.grad(lambda h: cross_entropy(h, kernel, jnp.ones((1, 4), jnp.int32), mask)[0])(hidden)
    assert np.all(np.isfinite(grad))
    assert not np.any(grad[0, 1])
    assert np.any(grad[0, 0])
