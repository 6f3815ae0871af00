"""The XLA backend of `flash` against its reference, with blocks far smaller than the sequence."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, self_visibility, visible
from pallas_kernels import Score, flash
from pallas_kernels.flash import xla
from pallas_kernels.flash.reference import flash_reference
from pallas_kernels.flash.xla import flash_xla
from tests.conformance.cases import close, inputs, packed
from tests.kernels.scores import SCORES, ids


@pytest.mark.parametrize(
    ("score", "aligned"),
    [
        pytest.param(s, a, id=f"{ids(s)}-{a}", marks=() if a or s.normaliser in ("sum", "none") else pytest.mark.slow)
        for s in SCORES
        for a in (True, False)
    ],
)
def test_many_blocks_and_chunks_equal_the_reference(score, aligned, monkeypatch):
    monkeypatch.setattr(xla, "MAX_GROUPS", 3)  # compiles in less than half of the time
    q, k, v = inputs(501, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    positions, segments = packed([200, 1, 250], 501, batch=1)
    vis = self_visibility(1, 501, positions=positions, segment_ids=segments)
    vis = vis if aligned else dataclasses.replace(vis, aligned=None)
    run = lambda fn, **kw: jax.jit(
        jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(fn(*x, vis, score, scale=0.3, **kw))), argnums=(0, 1, 2))
    )(q, k, v)
    ours = run(flash_xla, block_q=13, chunk_k=60)  # 39 blocks: groups of 13, scanned
    theirs = run(flash_reference)
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4), ours, theirs)


@pytest.mark.parametrize("backend", ["xla"])
@pytest.mark.optimised
def test_temporary_memory_is_linear_in_length(backend, monkeypatch):
    """Forward and backward at 8 times the length need about 8 times the memory, not 64 times."""
    monkeypatch.setattr(xla, "MAX_GROUPS", 2)

    def bytes_at(length):
        q, k, v = (jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32) for _ in range(3))
        loss = lambda q, k, v: jnp.sum(flash(q, k, v, self_visibility(1, length), Score(), scale=1.0, backend=backend))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    small, large = bytes_at(2048), bytes_at(16384)
    assert large < 16 * small, (small, large)
    assert large < 16384 * 16384 * 4 / 10, "no T x T array"


def test_global_keys_are_seen_by_every_live_query_and_by_no_padding():
    vis = self_visibility(1, 4, segment_ids=jnp.array([[1, 2, 2, 0]]), window=1).prepend_global(1)
    see = np.asarray(visible(vis))[0]
    np.testing.assert_array_equal(see[:, 0], [True, True, True, False])
    np.testing.assert_array_equal(see[:, 1:], np.diag([True, True, True, False]))
    assert vis.aligned == 1
    assert int(vis.k_segments[0, 0]) == GLOBAL


def test_sliced_rows_and_columns_see_what_the_whole_sees():
    cuts = lambda vis: [vis, vis.rows(2, 4).columns(1, 5), vis.pad_rows(2).pad_columns(3)]
    seen = jax.jit(lambda vis: [visible(cut) for cut in cuts(vis)])(self_visibility(2, 9, window=3))
    whole, part, padded = map(np.asarray, seen)
    np.testing.assert_array_equal(part, whole[:, 2:6, 1:6])
    np.testing.assert_array_equal(padded[:, :9, :9], whole)
    assert not np.any(padded[:, 9:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"normaliser": "max"}, "normaliser 'max'"),
        ({"activation": "exp", "normaliser": "none"}, "lets exp overflow"),
        ({"p": 0.0}, "p is 0.0"),
    ],
)
def test_impossible_scores_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Score(**fields)
