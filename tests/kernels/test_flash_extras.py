"""What `flash` takes and gives beside q, k, v and o: scales per row, key biases, row statistics, T5 tables."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, self_visibility, visible
from jaxattn.rope import Alibi, RelativeBias, relative_bucket
from pallas_kernels import Score, compiling_for, flash, interpreted
from pallas_kernels.flash import merge, options
from pallas_kernels.flash.biases import edges, ranges
from pallas_kernels.flash.reference import NEVER, flash_reference
from pallas_kernels.flash.tpu import flash_tpu
from pallas_kernels.flash.xla import flash_xla
from tests.conformance.cases import close, inputs, normal, packed
from tests.kernels.simulators import without_races

SOFTMAX = Score()
SCORES = [
    Score("exp", "sum", row_sum=3.0, logit_bias=0.5, p=2.0),  # p is read by p_norm alone
    Score("exp", "sum_plus_one", row_sum=3.0),
    Score("exp", "p_norm", p=0.5),
    Score("sigmoid", "none", logit_bias=-2.0),
    Score("sigmoid", "p_norm", p=1.5),
    Score("elu1", "sum"),
    Score("relu", "count"),
    Score("identity", "clipped_sum"),
]
ids = lambda s: f"{s.activation}-{s.normaliser}"
T, SINKS, HEADS, KV_HEADS, DIM, VALUE_DIM = 70, 2, 4, 2, 8, 12


def small(name):
    """The backend with blocks far smaller than the sequence, behind what `flash` does for all of them."""
    fn, blocks = {
        "tpu": (flash_tpu, dict(block_q=16, block_k=24)),
        "xla": (flash_xla, dict(block_q=13, chunk_k=30)),
    }[name]

    def call(q, k, v, vis, score, *, scale=0.3, bias=None, key_bias=None, stats=False):
        q, scale = options.folded(q, scale)
        key_bias = options.dense(key_bias, len(q))
        return fn(q, k, v, vis, score, scale=scale, bias=bias, key_bias=key_bias, stats=stats, **blocks)

    return call


def both(fn, arrays, vis, score, **static):
    """Outputs and the gradients of a loss that weighs every entry of them differently."""
    weigh = lambda x, n: jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(n + jnp.arange(x.size)).reshape(x.shape))

    def loss(arrays):
        call = {"scale": 0.3, **static, **arrays}
        out = fn(*(call.pop(name) for name in "qkv"), vis, score, **call)
        return sum(weigh(x, n) for n, x in enumerate(jax.tree.leaves(out))), out

    with interpreted():
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def agree(ours, theirs, rtol=5e-5):
    jax.tree.map(lambda a, b: close(a, b, rtol=rtol), ours[0][1], theirs[0][1])
    jax.tree.map(lambda a, b: close(a, b, rtol=rtol), ours[1], theirs[1])


def documents(length=T, sinks=SINKS, batch=2, **rules):
    """Documents across tiles, one of length 1 and an empty one; padding in front, between and behind."""
    positions, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
    for segment, start, size in ((1, 4, length // 2), (3, 5 + length // 2, 1), (4, 7 + length // 2, length // 3)):
        positions[start : start + size], segments[start : start + size] = np.arange(size), segment
    wide = lambda x: jnp.asarray(np.tile(x, (batch, 1)))
    vis = self_visibility(batch, length, positions=wide(positions), segment_ids=wide(segments), **rules)
    return vis.prepend_global(sinks)


def everything(dtype=jnp.float32, length=T, keys=T + SINKS, batch=2, kb_shape=(2, HEADS), scale_axes=3):
    q, k, v = inputs(
        length, batch=batch, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, value_dim=VALUE_DIM, keys=keys, dtype=dtype
    )
    scale = jnp.asarray(0.3 + 0.2 * normal(11, (batch, length, HEADS)))
    return {
        "q": q,
        "k": k,
        "v": v,
        "key_bias": jnp.asarray(normal(12, (*kb_shape, keys))),
        "scale": {0: scale[0, 0, 0], 1: scale[0, 0], 3: scale}[scale_axes],
    }


@pytest.fixture(autouse=True)
def two_scans(monkeypatch):
    """Blocks of the XLA backend in two groups, scanned as those of long sequences are."""
    monkeypatch.setattr(importlib.import_module("pallas_kernels.flash.xla"), "MAX_GROUPS", 2)


@functools.cache
def expected(score, dtype=jnp.float32):
    return both(flash_reference, everything(dtype), documents(), score, stats=True)


# The kernel's members are asked one by one in test_flash_tpu.py: here those that read their rows differently.
@pytest.mark.parametrize(
    "score",
    [pytest.param(s, marks=() if ids(s) in ("exp-sum", "sigmoid-p_norm") else pytest.mark.slow) for s in SCORES],
    ids=ids,
)
@pytest.mark.parametrize("backend", ["tpu", pytest.param("xla", marks=pytest.mark.slow)])
def test_every_member_with_all_of_them(backend, score):
    agree(both(small(backend), everything(), documents(), score, stats=True), expected(score), rtol=1e-4)


@pytest.mark.parametrize("backend", ["tpu", "xla"])
def test_bfloat16_with_all_of_them(backend):
    ours = both(small(backend), everything(jnp.bfloat16), documents(), SOFTMAX, stats=True)
    assert ours[0][1][1].dtype == jnp.float32
    agree(ours, expected(SOFTMAX, jnp.bfloat16), rtol=2e-2)


@pytest.mark.parametrize(
    ("backend", "kb_shape", "scale_axes"),
    [
        ("tpu", (2, 1), 0),
        ("tpu", (2, KV_HEADS), 1),
        ("xla", (2, KV_HEADS), 1),
        ("xla", (1, HEADS), 3),
        pytest.param("tpu", (1, HEADS), 3, marks=pytest.mark.slow),
        pytest.param("xla", (2, 1), 0, marks=pytest.mark.slow),
    ],
)
def test_every_form(backend, kb_shape, scale_axes):
    """Without statistics; gradients have the form of what was given."""
    arrays = everything(kb_shape=kb_shape, scale_axes=scale_axes)
    vis = documents(window=20)
    agree(both(small(backend), arrays, vis, SOFTMAX), both(flash_reference, arrays, vis, SOFTMAX))


def test_one_equation_entry_by_entry():
    """The reference's scale, key bias and statistics against sums written out."""
    arrays, vis = everything(), documents()
    o, stat = flash_reference(
        **{n: arrays[n] for n in "qkv"}, vis=vis, score=SOFTMAX, scale=arrays["scale"], key_bias=arrays["key_bias"],
        stats=True,
    )  # fmt: skip
    q, k, v, key_bias, scale = (np.asarray(arrays[n], np.float64) for n in ("q", "k", "v", "key_bias", "scale"))
    see = np.asarray(visible(vis))
    for b, t, h in ((0, 10, 3), (1, 60, 1), (1, 40, 2)):
        s = scale[b, t, h] * k[b, :, h // 2] @ q[b, t, h] + key_bias[b, h]
        w = np.where(see[b, t], np.exp(s), 0)
        close(o[b, t, h], w @ v[b, :, h // 2] / w.sum(), rtol=1e-5)
        close(stat[b, t, h], np.log(w.sum()), rtol=1e-5)
    dead = np.asarray(vis.q_segments) == 0
    assert (np.asarray(stat)[dead] == NEVER).all()
    assert not np.asarray(o)[dead].any()


@pytest.mark.parametrize("backend", ["tpu", "xla", "reference"])
def test_minus_infinity_hides_a_key_from_exp_scores(backend):
    """As if its segment said so, forward and gradient; a row with nothing left gives 0 and -1e30."""
    arrays, vis = everything(kb_shape=(2, 1)), self_visibility(2, T).prepend_global(SINKS)
    hidden = (jnp.arange(T + SINKS) % 3 == 0) | (jnp.arange(T + SINKS) < 4)
    fn = flash_reference if backend == "reference" else small(backend)
    ours = both(fn, arrays | {"key_bias": jnp.where(hidden, -jnp.inf, arrays["key_bias"])}, vis, SOFTMAX, stats=True)
    masked = dataclasses.replace(vis, k_segments=jnp.where(hidden, 0, vis.k_segments))
    theirs = both(flash_reference, arrays, masked, SOFTMAX, stats=True)
    theirs[1]["key_bias"] = jnp.where(hidden, 0, theirs[1]["key_bias"])
    agree(ours, theirs)
    o, stat = ours[0][1]
    assert (np.asarray(stat)[:, :2] == NEVER).all(), "the first rows see hidden keys only"
    assert not np.asarray(o)[:, :2].any()


def split(arrays, vis, at):
    """The two halves of the keys."""
    for part in (slice(0, at), slice(at, None)):
        cut = {"k": arrays["k"][:, part], "v": arrays["v"][:, part], "key_bias": arrays["key_bias"][..., part]}
        yield (
            arrays | cut,
            dataclasses.replace(
                vis, k_positions=vis.k_positions[:, part], k_segments=vis.k_segments[:, part], aligned=None
            ),
        )


MERGED = [SOFTMAX, Score("exp", "p_norm", p=0.5), Score("sigmoid", "p_norm", p=2.0), Score("relu", "count")]


@pytest.mark.parametrize(
    ("backend", "score"),
    [pytest.param("xla", s, marks=pytest.mark.slow) for s in MERGED[:2]]
    + [("xla", s) for s in MERGED[2:]]
    + [("tpu", SOFTMAX)],
    ids=lambda x: x if isinstance(x, str) else ids(x),
)
def test_halves_of_the_keys_merge_to_the_whole(backend, score):
    """Forward, statistic and every gradient; some rows see keys of one half only, some of neither."""
    arrays, vis, fn = everything(), documents(), small(backend)

    def halves(q, k, v, vis, score, *, scale, key_bias):
        parts = []
        for part, vis_part in split({"k": k, "v": v, "key_bias": key_bias}, vis, 41):
            parts.append(
                fn(q, part["k"], part["v"], vis_part, score, scale=scale, key_bias=part["key_bias"], stats=True)
            )
        return merge(parts, score)

    agree(both(halves, arrays, vis, score), both(flash_reference, arrays, vis, score, stats=True))


def test_a_hidden_logit_belongs_to_one_part():
    plus_one = Score("exp", "sum_plus_one")
    arrays, vis = everything(), documents()
    parts = [
        flash_reference(*(part[n] for n in "qkv"), vis_part, score, scale=0.3, key_bias=part["key_bias"], stats=True)
        for (part, vis_part), score in zip(split(arrays, vis, 41), (plus_one, SOFTMAX), strict=True)
    ]
    arrays.pop("scale")
    jax.tree.map(close, merge(parts), flash_reference(**arrays, vis=vis, score=plus_one, scale=0.3, stats=True))
    with pytest.raises(ConfigError, match="each of which counts the hidden logit"):
        merge(parts, plus_one)
    with pytest.raises(ConfigError, match="no parts"):
        merge([])


def test_merging_one_part_or_very_different_parts_changes_nothing():
    o, stat = (jnp.asarray(normal(n, shape)) for n, shape in enumerate([(1, 3, 2, 4), (1, 3, 2)]))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), merge([(o, stat)]), (o, stat))
    far = (jnp.full_like(o, 7.0), jnp.full_like(stat, -500.0))
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), merge([far, (o, stat)]), (o, stat))
    low = merge([(o.astype(jnp.bfloat16), stat), (o.astype(jnp.bfloat16), stat)])
    assert low[0].dtype == jnp.bfloat16
    close(low[1], stat + np.log(2), rtol=1e-6)


@pytest.mark.parametrize("buckets", [2, 3, 8, 13, 32, 48, 64])
def test_buckets_are_ranges_of_distances(buckets):
    distance = np.arange(-5, 400)
    expected = np.asarray(relative_bucket(jnp.asarray(distance), buckets))
    ours = np.full_like(distance, -1)
    for n, (first, behind) in enumerate(ranges(buckets)):
        ours[(distance >= first) & (distance < behind)] = n
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(np.searchsorted(edges(buckets), distance, side="right"), expected)


@pytest.mark.parametrize(
    ("score", "buckets"), [(SOFTMAX, 8), (Score("sigmoid", "none"), 32)], ids=["exp-8", "sigmoid-32"]
)
def test_t5_tables_in_the_kernel(score, buckets):
    """With the table's gradient, which keys that everyone sees do not enter."""
    arrays = everything(kb_shape=(2, KV_HEADS))
    arrays["bias"] = RelativeBias(jnp.asarray(normal(13, (buckets, HEADS))))
    vis = documents()
    ours = both(small("tpu"), arrays, vis, score, stats=True)
    agree(ours, both(flash_reference, arrays, vis, score, stats=True), rtol=1e-4)
    assert np.all(np.abs(ours[1]["bias"].table[:5]) > 1e-4), "a gradient for every bucket in use"


@pytest.mark.parametrize(
    ("score", "bias"),
    [
        (SOFTMAX, RelativeBias(jnp.asarray(normal(1, (8, 2))))),
        pytest.param(Score("sigmoid", "p_norm", p=2.0), Alibi(jnp.ones(2)), marks=pytest.mark.slow),
    ],
    ids=["exp, table", "sigmoid, alibi"],
)
@pytest.mark.parametrize(
    ("length", "block"),
    [
        (30, 8),
        pytest.param(257, 64, marks=pytest.mark.slow),
        pytest.param(1000, 256, marks=pytest.mark.slow),
    ],
)
def test_no_races_and_nothing_uninitialised_is_read(length, block, score, bias):
    q, k, v = inputs(length, batch=1, heads=2, kv_heads=1, dim=8, value_dim=8)
    positions, segments = packed([length // 2, 0, 1, length // 3], length, batch=1)
    vis = self_visibility(1, length, positions=positions, segment_ids=segments)
    key_bias = jnp.asarray(normal(5, (1, 2, length)))

    def loss(fn, q, k, v, key_bias, bias, **blocks):
        o, stat = fn(q, k, v, vis, score, scale=0.3, key_bias=key_bias, bias=bias, stats=True, **blocks)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(stat)), (o, stat)

    run = lambda fn, **blocks: jax.jit(
        jax.value_and_grad(functools.partial(loss, fn, **blocks), argnums=range(5), has_aux=True)
    )(q, k, v, key_bias, bias)
    with without_races("tpu") as simulator, interpreted(simulator):
        ours = run(flash_tpu, block_q=block, block_k=block)
    agree(ours, run(flash_reference), rtol=1e-4)


@pytest.mark.parametrize("backend", ["tpu", pytest.param("xla", marks=pytest.mark.slow)])
def test_vmap_and_remat_change_nothing(backend):
    arrays = everything()
    run = lambda a, batch: small(backend)(
        *(a[n] for n in "qkv"),
        self_visibility(batch, T).prepend_global(SINKS),
        SOFTMAX,
        scale=a["scale"],
        key_bias=a["key_bias"],
        stats=True,
    )
    plain, one = (lambda a: run(a, 2)), (lambda a: run(jax.tree.map(lambda x: x[None], a), 1))
    loss = lambda call: lambda a: sum(jnp.sum(jnp.sin(x)) for x in call(a))
    with interpreted():
        gradient = jax.jit(jax.grad(loss(plain)))(arrays)
        other = jax.vmap(jax.checkpoint(one))
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-6), jax.jit(jax.grad(loss(other)))(arrays), gradient)


def test_the_public_function_hands_them_to_every_backend():
    arrays, vis = everything(), documents()
    call = lambda backend: jax.jit(lambda a: flash(**a, vis=vis, score=SOFTMAX, stats=True, backend=backend))(arrays)
    theirs = call("reference")
    with interpreted():
        for backend in ("auto", "xla", "tpu"):
            jax.tree.map(close, call(backend), theirs)
    with compiling_for("tpu"):
        text = str(jax.make_jaxpr(lambda a: flash(**a, vis=vis, score=SOFTMAX, stats=True))(arrays))
    assert "pallas_call" in text


def test_single_rows_on_a_cpu_take_arrays_as_scale():
    arrays = everything(length=1, keys=9)
    vis = Visibility(jnp.full((2, 1), 8), jnp.tile(jnp.arange(9), (2, 1)), jnp.ones((2, 1), int), jnp.ones((2, 9), int))
    key_bias = arrays.pop("key_bias")
    for more in ({}, {"key_bias": key_bias}, {"stats": True}):
        call = lambda backend, more=more: flash(**arrays, **more, vis=vis, score=SOFTMAX, backend=backend)
        jax.tree.map(close, call("auto"), call("reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": jnp.ones(3)}, r"scale has shape \(3,\) but must be a number, \[heads\] = \(4,\)"),
        ({"scale": jnp.ones((2, T, 1))}, r"scale has shape \(2, 70, 1\)"),
        ({"key_bias": jnp.ones((2, T + SINKS))}, r"key_bias has shape \(2, 72\) but must be \[batch, heads, keys\]"),
        ({"key_bias": jnp.ones((2, 3, T + SINKS))}, "heads 1, 2 or 4"),
        ({"key_bias": jnp.ones((2, 4, T))}, "keys 72"),
    ],
)
def test_other_shapes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        flash(**(everything() | change), vis=documents(), score=SOFTMAX)


def test_the_cost_estimate_counts_the_key_bias():
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.float32) for _ in range(3))
    key_bias = jax.ShapeDtypeStruct((1, 4, 2048), jnp.float32)
    vis = self_visibility(1, 2048)

    def forward_bytes(*arrays):
        call = lambda q, k, v, kb=None: flash(q, k, v, vis, SOFTMAX, scale=1.0, key_bias=kb, backend="tpu")
        with compiling_for("tpu"):
            text = str(jax.make_jaxpr(call)(*arrays))
        return int(text.split("bytes_accessed=")[1].split(",")[0].split(")")[0].strip())

    assert forward_bytes(q, k, v, key_bias) - forward_bytes(q, k, v) == 4 * 2048 * 4
