"""What the tests of block-sparse attention share: lists of blocks, biases, and the answer by a dense mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import block_sparse
from pallas_kernels.flash.reference import NEVER
from tests.conformance.cases import close, normal
from tests.kernels.scores import SOFTMAX


def draw_lists(batch, lists, queries, keys, block_q, block_k, width=4, seed=0):
    """Blocks in any order, some repeated, some foreign, some unused."""
    shape = (batch, lists, -(-queries // block_q), width)
    return jnp.asarray(np.random.default_rng(seed).integers(-1, -(-keys // block_k) + 1, shape), jnp.int32)


def both(backend, arrays, vis, score=SOFTMAX, **options):
    """Output, statistic and all gradients of a loss that weighs every entry of both differently.

    Args:
      arrays: q, k, v and maybe a key bias.
    """

    def loss(q, k, v, key_bias=None):
        bias = {} if key_bias is None else {"key_bias": key_bias}
        o, stat = block_sparse(q, k, v, vis, score, scale=0.3, stats=True, backend=backend, **bias, **options)
        weighed = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape))
        seen = jnp.where(stat > NEVER, stat, 0.0)
        return weighed(jnp.sin(o.astype(jnp.float32))) + 0.1 * weighed(jnp.sin(seen)), (o, stat)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)


def draw_bias(batch, heads, keys, seed=5):
    """A key bias for `heads` heads; every seventh key of the first one is hidden, each its own way."""
    bias = np.array(normal(seed, (batch, heads, keys)))
    bias[:, 0, 2::7] = NEVER
    return jnp.asarray(bias)


def check(backend, arrays, vis, score=SOFTMAX, rtol=2e-5, **options):
    """Both outputs and the gradients equal the reference; returns the outputs."""
    (_, (o, stat)), ours = both(backend, arrays, vis, score, **options)
    (_, (o_expected, stat_expected)), theirs = both("reference", arrays, vis, score, **options)
    assert o.dtype == o_expected.dtype
    assert stat.dtype == jnp.float32
    close(o, o_expected, rtol=rtol)
    near = np.asarray(stat_expected) > NEVER
    np.testing.assert_array_equal(np.asarray(stat)[~near], np.float32(NEVER))
    close(stat[near], stat_expected[near], rtol=rtol)
    jax.tree.map(lambda a, b: close(a, b, rtol=rtol), ours, theirs)
    return np.asarray(o, np.float32), np.asarray(stat)
