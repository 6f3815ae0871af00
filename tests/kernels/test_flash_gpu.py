"""The Hopper kernels of `flash` in JAX's simulator of GPUs, against the reference; bfloat16 throughout.

What is simulated hands weights to the second product through shared memory; the form with registers is compiled in
`tests/aot/test_flash_gpu.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import Visibility, self_visibility
from jaxattn.rope import Alibi, RawRelativeBias, RelativeBias, relative_bucket
from pallas_kernels import Score, compiling_for, flash, interpreted
from pallas_kernels.flash import gpu_biases
from pallas_kernels.flash.gpu import flash_gpu
from pallas_kernels.flash.gpu_tiles import Visit, visits
from pallas_kernels.flash.reference import NEVER, flash_reference
from pallas_kernels.flash.tiles import certain, reachable
from pallas_kernels.shapes import ODD
from tests.conformance.cases import close, inputs, packed
from tests.kernels.late import delay
from tests.kernels.near import near
from tests.kernels.simulators import needs_costs, skip_module_without_gpus, without_races

skip_module_without_gpus()

SOFTMAX, SIGMOID = Score(), Score("sigmoid", "none", logit_bias=-2.0)
ids = lambda s: f"{s.activation}-{s.normaliser}"


def both(fn, arrays, vis, score, scale=0.2, bias=None, key_bias=None, **options):
    """Outputs and all gradients of a loss that weighs every entry differently."""

    def loss(q, k, v, bias, key_bias):
        o = fn(q, k, v, vis, score, scale=scale, bias=bias, key_bias=key_bias, **options)
        waves = lambda x: jnp.sum(jnp.sin(x.astype(jnp.float32)) * jnp.cos(jnp.arange(x.size)).reshape(x.shape))
        return sum(waves(x) for x in jax.tree.leaves(o)), o

    every = jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
    return jax.jit(every)(*arrays, bias, key_bias)


def check(arrays, vis, score=SOFTMAX, mode="plain", rtol=2e-2, **options):
    """Forward and gradients equal the reference's on the same rounded inputs; returns the kernel's output."""
    with interpreted(mode):
        (_, o), ours = both(flash_gpu, arrays, vis, score, **options)
    (_, expected), theirs = both(flash_reference, arrays, vis, score, **options)
    jax.tree.map(lambda a, b: near(a, b, rtol), o, expected)
    jax.tree.map(lambda a, b: near(a, b, rtol), ours, theirs)
    return o


def numbers(length, **shape):
    return inputs(
        length, **{"batch": 1, "heads": 2, "kv_heads": 1, "dim": 60, "value_dim": 64, **shape}, dtype=jnp.bfloat16
    )


def test_causal_softmax_of_grouped_heads_over_several_tiles():
    check(numbers(300, heads=4, kv_heads=2, value_dim=96), self_visibility(1, 300))


def test_causal_sigmoid_of_grouped_heads():
    check(numbers(130, heads=2, kv_heads=1), self_visibility(1, 130), SIGMOID)


def test_packed_documents_with_padding_in_front_between_and_behind():
    """One document of length 1, one that is empty (4), two rows of the batch that differ."""
    positions, segments = packed([9, 70, 1, 8, 60], 190)
    segments = jnp.where(segments == 1, 0, jnp.where(segments == 4, 0, segments))
    segments = segments.at[1, :100].set(1)
    positions = positions.at[1, :100].set(jnp.arange(100))
    vis = self_visibility(2, 190, positions=positions, segment_ids=segments)
    o = check(numbers(190, batch=2), vis, Score("exp", "sum_plus_one"))
    assert not np.asarray(o, np.float32)[np.asarray(segments) == 0].any(), "padding rows give zeros"


def per_key(n, keys, batch=1, least=NEVER):
    """Key biases of n heads, the first of which hides a key if it is exp's."""
    return jax.random.normal(jax.random.key(5), (batch, n, keys)).at[:, 0, 5].set(least)


def test_a_key_bias_per_query_head_of_packed_documents():
    """Each of a group's heads has its own, and its own gradient; some tiles have no mask."""
    vis = self_visibility(1, 197, segment_ids=packed([192, 1, 3], 197)[1][:1])
    check(numbers(197), vis, key_bias=per_key(2, 197))


def test_alibi_and_a_key_bias_that_heads_share_next_to_keys_that_everyone_sees():
    """Behind a window and a prefix. A scale below zero turns the products around, not the biases."""
    vis = self_visibility(1, 140, window=40, prefix_len=jnp.array([30])).prepend_global(3)
    q, k, v = numbers(140, keys=143)
    # Outputs whose rounding is far below what a slope gains from distances.
    check((q, k, 0.05 * v), vis, scale=-0.2, bias=Alibi(jnp.array([0.05, 0.2])), key_bias=per_key(1, 143))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(96, 60), (192, 192), (192, 64), (250, 256)], ids=str)
@pytest.mark.parametrize("added", ["key bias per head", "alibi", "raw relative bias"])
def test_biases_of_other_head_dims(dims, added):
    segments = packed([130, 0, 20], 150)[1]
    q, k, v = numbers(150, dim=dims[0], value_dim=dims[1], keys=152)
    vis = self_visibility(1, 150, segment_ids=segments[:1]).prepend_global(2)
    more = {
        "key bias per head": {"key_bias": per_key(2, 152)},
        "alibi": {"bias": Alibi(jnp.array([0.05, 0.2]))},
        "raw relative bias": {"bias": RawRelativeBias(), "key_bias": per_key(1, 152)},
    }[added]
    check((q, k, 0.05 * v), vis, scale=0.1, **more)


def test_buckets_are_those_of_the_reference_with_a_logarithm_that_is_a_little_wrong(monkeypatch):
    distance, log2 = jnp.arange(-5, 400), jnp.log2
    for error in (-2e-6, 0.0, 2e-6):
        monkeypatch.setattr(jnp, "log2", lambda x, error=error: log2(x) + error)
        for buckets in gpu_biases.BUCKETS:
            expected = relative_bucket(distance, buckets)
            np.testing.assert_array_equal(gpu_biases.bucket(distance[None], buckets)[0], expected, err_msg=buckets)


@pytest.mark.parametrize("dims", [(192, 192), (192, 64), (250, 256)], ids=str)
def test_wide_heads_have_smaller_tiles_and_a_kernel_each_for_dk_and_dv(dims):
    """(192, 64): one for both. (250, 256): also tiles of 32, and values without a warpgroup that only fetches."""
    check(numbers(150, dim=dims[0], value_dim=dims[1]), self_visibility(1, 150, window=90))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(128, 192), (64, 256), (256, 64), (256, 192)], ids=str)
@pytest.mark.parametrize("score", [SOFTMAX, Score("sigmoid", "sum")], ids=ids)
def test_wide_keys_or_values(dims, score):
    check(numbers(140, dim=dims[0], value_dim=dims[1]), self_visibility(1, 140), score, scale=0.1, stats=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ODD, ids=lambda s: s.name)
@pytest.mark.parametrize("score", [SOFTMAX, SIGMOID], ids=ids)
@pytest.mark.parametrize("added", [False, True], ids=["", "biases"])
def test_odd_shapes(shape, score, added):
    q, k, v = numbers(
        shape.length, heads=shape.heads, kv_heads=shape.kv_heads, dim=shape.dim, value_dim=shape.value_dim
    )
    more = {"bias": RawRelativeBias(), "key_bias": per_key(shape.heads, shape.length)}
    vis = self_visibility(1, shape.length)
    check((q, k, 0.05 * v), vis, score, **(more if added else {}))  # outputs whose rounding no loss amplifies


@pytest.mark.slow
@pytest.mark.parametrize(
    "score",
    [
        Score("exp", "sum", row_sum=3.0, logit_bias=0.5),
        Score("exp", "sum_plus_one", logit_bias=-1.0),
        Score("sigmoid", "sum"),
        Score("elu1", "sum", row_sum=2.0),
        Score("elu1", "clipped_sum"),
        Score("relu", "sum_plus_one"),
        Score("relu", "none"),
        Score("identity", "clipped_sum"),
    ],
    ids=ids,
)
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("added", [False, True], ids=["", "biases"])
def test_every_member_on_packed_documents(score, stats, added):
    positions, segments = packed([70, 0, 1, 40], 131)
    vis = self_visibility(2, 131, positions=positions, segment_ids=segments)
    q, k, v = numbers(131, batch=2)
    least = NEVER if score.activation == "exp" else -3.0  # identity has a weight for it
    more = {"bias": Alibi(jnp.array([0.05, 0.2])), "key_bias": per_key(1, 131, batch=2, least=least)} if added else {}
    # Outputs below 1, whose rounding the loss does not amplify; but distances do, in what slopes gain.
    check((q, k, 0.05 * v), vis, score, scale=0.05, stats=stats, rtol=3e-2 if added else 2e-2, **more)


@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_weights_over_the_number_of_visible_keys(stats):
    """A packed row and one behind its window; what sees nothing is zero."""
    positions, segments = packed([70, 0, 1, 40], 131)
    segments = segments.at[1].set(1)
    vis = self_visibility(2, 131, positions=positions.at[1].set(jnp.arange(131)), segment_ids=segments, window=50)
    o = check(numbers(131, batch=2), vis, Score("relu", "count"), stats=stats)
    rest = np.asarray(jax.tree.leaves(o)[0], np.float32)[np.asarray(segments) == 0]
    assert rest.size
    assert not rest.any()


RULES = {
    "both sides": (dict(causal=False), 0),
    "window and keys that everyone sees": (dict(window=20), 2),
    "window on both sides": (dict(causal=False, window=9), 0),
    "prefix": (dict(prefix_len=jnp.array([150, 0])), 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "sinks"), RULES.values(), ids=list(RULES))
def test_every_rule_of_visibility(rules, sinks):
    segments = packed([180, 21], 210)[1]
    segments = segments.at[1].set(jnp.where(jnp.arange(210) < 4, 0, 1))
    vis = self_visibility(2, 210, segment_ids=segments, **rules).prepend_global(sinks)
    check(numbers(210, batch=2, keys=210 + sinks), vis)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -0.3], ids=str)
def test_scales_that_turn_scores_around(scale):
    check(numbers(70), self_visibility(1, 70), scale=scale)


@pytest.mark.slow
def test_queries_that_continue_a_cache():
    written = jnp.arange(170) < jnp.array([[40], [166]])
    vis = Visibility(
        q_positions=jnp.array([[35], [161]]) + jnp.arange(5),
        k_positions=jnp.tile(jnp.arange(170), (2, 1)),
        q_segments=jnp.ones((2, 5), jnp.int32),
        k_segments=written.astype(jnp.int32),
        window=30,
    )
    check(numbers(5, batch=2, keys=170), vis)


def test_no_races_and_nothing_uninitialised_is_read():
    """What the simulator sees: loads and stores, not operands of products; see also the slot test."""
    more = {"bias": Alibi(jnp.array([0.1])), "key_bias": per_key(1, 200)}
    with without_races("gpu") as simulator:
        check(numbers(200, heads=1), self_visibility(1, 200), mode=simulator, **more)


@pytest.mark.parametrize(
    ("late", "only"),
    [("fetch", None), ("product", None), ("add_product", None), ("add_product", 1)],
    ids=["copies", "first products", "second products", "second products of one warpgroup"],
)
@pytest.mark.parametrize(
    ("dim", "added"),
    [(60, True), *(pytest.param(dim, False, marks=pytest.mark.slow) for dim in (60, 192, 256))],
    ids=["60-biases", "60", "192", "256"],
)
def test_nobody_relies_on_others_being_quick(dim, added, late, only, monkeypatch):
    simulator = delay(monkeypatch, late, only)
    arrays = numbers(300, heads=1, dim=dim, value_dim=max(dim, 64))
    more = {"bias": Alibi(jnp.array([0.1])), "key_bias": per_key(1, 300)} if added else {}
    check(arrays, self_visibility(1, 300), mode=simulator, **more)


def order(vis, block_q, block_k, by_key=False):
    """The tiles each block goes through [blocks of the batch, steps], and how many of them without a mask."""
    tiles = reachable(vis, block_q, block_k)
    table = np.asarray(visits(vis, block_q, block_k, by_key=by_key))
    for block in range(tiles.shape[0] * tiles.shape[2 if by_key else 1]):
        visit = Visit(table, block)
        yield [int(visit.tile(n)) for n in range(int(visit.count))], int(visit.whole)


@pytest.mark.parametrize("by_key", [False, True], ids=["by query", "by key"])
@pytest.mark.parametrize(
    ("window", "sinks"), [(None, 0), (16, 0), (16, 8)], ids=["causal", "window", "window and sinks"]
)
def test_every_tile_is_visited_once_and_masked_where_it_must_be(window, sinks, by_key):
    segments = packed([64, 1, 31], 104)[1]
    vis = dataclasses.replace(
        self_visibility(2, 104, window=window),
        q_segments=segments.at[1].set(1),
        k_segments=segments.at[1].set(1),
    ).prepend_global(sinks)
    needed, free = np.asarray(reachable(vis, 8, 8)), np.asarray(certain(vis, 8, 8))
    if by_key:
        needed, free = needed.swapaxes(1, 2), free.swapaxes(1, 2)
    needed, free = needed.reshape(-1, needed.shape[2]), free.reshape(-1, free.shape[2])
    unmasked = 0
    for row, (tiles, whole) in enumerate(order(vis, 8, 8, by_key)):
        assert len(set(tiles)) == len(tiles)
        assert set(np.flatnonzero(needed[row])) <= set(tiles) <= set(range(needed.shape[1]))
        assert free[row][tiles[:whole]].all()
        unmasked += whole
    assert unmasked > 0


def test_a_named_backend_says_why_it_cannot_run():
    q, k, v = numbers(8)
    call = lambda q=q, k=k, v=v, score=SOFTMAX, **more: flash_gpu(
        q, k, v, self_visibility(1, 8), score, scale=1.0, **more
    )
    with pytest.raises(NotImplementedError, match=r"computes on 'cpu'.*compiling_for"):
        call()
    with compiling_for("gpu"):
        with pytest.raises(NotImplementedError, match="'gpu' computes bfloat16 but k is float32: cast it"):
            call(k=k.astype(jnp.float32))
        with pytest.raises(NotImplementedError, match="head dims up to 256 but v has 257"):
            call(v=jnp.zeros((1, 8, 1, 257), jnp.bfloat16))
        with pytest.raises(NotImplementedError, match="Alibi and RawRelativeBias but this is RelativeBias: use 'xla'"):
            call(bias=RelativeBias(jnp.zeros((32, 2))))
        with pytest.raises(NotImplementedError, match="with 2 to 60 buckets but this has 64"):
            call(bias=RawRelativeBias(64))
        with pytest.raises(NotImplementedError, match="up to 16 query heads of a key head but these are 17"):
            call(q=jnp.zeros((1, 8, 17, 60), jnp.bfloat16), key_bias=jnp.zeros((1, 17, 8)))
        with pytest.raises(NotImplementedError, match=r"normalisers .* but this is 'p_norm'"):
            call(score=Score("exp", "p_norm", p=2.0))


def test_a_simulator_with_too_few_threads_is_refused_instead_of_waited_for(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    with interpreted(), pytest.raises(NotImplementedError, match="3 warpgroups takes more threads than the 2"):
        flash_gpu(*numbers(8), self_visibility(1, 8), SOFTMAX, scale=1.0)


def test_auto_takes_the_kernel_only_where_it_is_compiled_and_fits():
    q, k, v = numbers(8)
    text = lambda q, **more: str(
        jax.make_jaxpr(lambda q: flash(q, k, v, self_visibility(1, 8), SOFTMAX, scale=1.0, **more))(q)
    )
    assert "flash_forward" not in text(q)
    with compiling_for("gpu"):
        assert "flash_forward" in text(q)
        assert "flash_forward" in text(q, bias=Alibi(jnp.ones(2)), key_bias=jnp.zeros((1, 1, 8)))
        assert "flash_forward" not in text(q, bias=RelativeBias(jnp.zeros((32, 2))))
        assert "flash_forward" not in text(q.astype(jnp.float32))


@pytest.mark.slow
def test_vmap_changes_nothing():
    q, k, v = numbers(40, batch=2)
    call = lambda q, k, v: flash_gpu(q, k, v, self_visibility(len(q), 40), SOFTMAX, scale=0.3)
    loss = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32))), argnums=(0, 1, 2)))
    with interpreted():
        each = jax.vmap(lambda q, k, v: call(q[None], k[None], v[None])[0])
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-2), loss(each)(q, k, v), loss(call)(q, k, v))


@needs_costs
def test_the_cost_estimate_counts_tiles_up_to_the_diagonal():
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, 64), jnp.bfloat16) for _ in range(3))
    with compiling_for("gpu"):
        text = lambda vis: str(jax.make_jaxpr(lambda *x: flash_gpu(*x, vis, SOFTMAX, scale=1.0))(q, k, v))
        half, whole = text(self_visibility(1, 2048)), text(self_visibility(1, 2048, causal=False))
    tile = 4 * 128 * 128 * 64
    assert f"flops={136 * tile}" in half
    assert f"flops={256 * tile}" in whole


@needs_costs
def test_the_cost_estimate_of_wide_heads_counts_the_fifth_product():
    q, k, v = (jax.ShapeDtypeStruct((1, 1024, 1, 192), jnp.bfloat16) for _ in range(3))
    loss = lambda *x: jnp.sum(flash_gpu(*x, self_visibility(1, 1024, causal=False), SOFTMAX, scale=1.0))
    with compiling_for("gpu"):
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    product = 2 * 1024 * 1024 * 192
    assert text.count(f"flops={2 * product}") == 2, "forward and dv"
    assert text.count(f"flops={3 * product}") == 2, "dq and dk"
