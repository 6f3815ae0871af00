"""Landmark attention: block rules, rotation, the cache, and retrieval against a slow loop of its own."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, Visibility, default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms._landmark_retrieval import longest_chunk
from jaxattn.mechanisms.landmark import MECHANISM as LANDMARK
from jaxattn.mechanisms.landmark import Spec
from jaxattn.rope import Alibi, Rope, alibi_slopes
from tests.conformance.cases import arrays, close, inputs, packed, seen

ROPE = Rope(100.0)
HEADS = {"heads": 4, "kv_heads": 2, "key_dim": 16, "value_dim": 16}


@partial(jax.jit, static_argnames=("spec", "capacity", "batch"))
def state(spec, capacity, batch=2):
    return LANDMARK.init_state(spec, batch=batch, capacity=capacity, dtype=jnp.float32, **HEADS)


@partial(jax.jit, static_argnames=("spec", "rope"))
def jitted_step(now, q, k, v, positions, segments, spec, rope):
    return LANDMARK.step(now, q, k, v, positions, segments, Call(spec, rope=rope))


def at_once(batch, length):
    """Positions of one document a row, for NumPy, whose slices compile nothing."""
    return np.arange(length, dtype=np.int32)[None].repeat(batch, 0)


def decode(spec, q, k, v, pieces, *, rope=ROPE, capacity=None, segments=None, positions=None):
    """Outputs of `step` over consecutive pieces; the capacity counts tokens without landmarks."""
    batch, length = q.shape[:2]
    now = state(spec, capacity or length, batch)
    segments = np.ones((batch, length), np.int32) if segments is None else np.asarray(segments)
    positions = at_once(batch, length) if positions is None else np.asarray(positions)
    outputs, at = [], 0
    for n in pieces:
        cut = [x[:, at : at + n] for x in (q, k, v, positions, segments)]
        o, now = jitted_step(now, *cut, spec=spec, rope=rope)
        outputs.append(np.asarray(o))
        at += n
    return np.concatenate(outputs, axis=1)


def vis_of(q, positions=None, segments=None) -> Visibility:
    return seen(positions, segments, batch=q.shape[0], length=q.shape[1])


@partial(jax.jit, static_argnames=("which", "spec", "rope"))
def _run(which, *args, spec, rope):
    return getattr(LANDMARK, which)(*args, Call(spec, rope=rope))


def forward(spec, q, k, v, vis=None, rope=ROPE):
    return np.asarray(_run("forward", q, k, v, vis_of(q) if vis is None else vis, spec=spec, rope=rope))


def weights(spec, q, k, rope=None):
    return np.asarray(_run("weights", q, k, vis_of(q), spec=spec, rope=rope).values)


def test_who_attends_to_what():
    """f = 2: own tokens, tokens of earlier blocks, no landmark; a landmark asks like a token of its block."""
    q, k, _ = arrays(8)
    a = weights(Spec(block=2), q, k)
    expected = np.array(
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 1, 0],
            [1, 1, 0, 1, 1, 0, 1, 1],
        ],
        bool,
    )
    np.testing.assert_array_equal(a > 0, np.broadcast_to(expected, a.shape))
    np.testing.assert_allclose(a.sum(-1), 1.0, atol=1e-6)


def test_only_the_landmark_of_a_block_moves_its_weight():
    q, k, _ = arrays(12, heads=1, kv_heads=1, batch=1)
    q = np.abs(q)

    def rows(key, by):
        moved = k.copy()
        moved[:, key] += by
        return weights(Spec(block=3), q, moved)[0, 0, 9]

    plain, raised = rows(3, 0.0), rows(3, 1.0)
    assert raised[:3].sum() > 1.5 * plain[:3].sum()
    inside = lambda a: a[:3] / a[:3].sum()
    np.testing.assert_allclose(inside(raised), inside(plain), rtol=1e-5)
    token = rows(1, 3.0)
    np.testing.assert_allclose(token[:3].sum(), plain[:3].sum(), rtol=1e-5)
    assert token[1] > plain[1]


def test_rotation_is_by_the_positions_given_and_shifts_by_whole_blocks_change_nothing():
    q, k, v = arrays(30)
    at, spec = at_once(2, 30), Spec(block=7)
    o = forward(spec, q, k, v)
    turned = jax.jit(ROPE)
    close(o, forward(spec, turned(q, at), turned(k, at), v, rope=None))
    assert not np.allclose(o, forward(spec, q, k, v, rope=None), atol=1e-3)
    close(forward(spec, q, k, v, vis_of(q, at + 16)), o, rtol=1e-4)
    close(np.einsum("bhts,bshv->bthv", weights(spec, q, k, ROPE), v.repeat(2, axis=2)), o)
    close(_run("reference", q, k, v, vis_of(q), spec=spec, rope=ROPE), o)


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [14, 1, 1, 14]], ids=["one", "steps", "mixed"])
def test_steps_rotate_cached_keys_as_forward_does(pieces):
    q, k, v = arrays(30)
    close(decode(Spec(block=7), q, k, v, pieces), forward(Spec(block=7), q, k, v))


def test_the_cache_holds_keys_as_they_came_and_no_padding():
    q, k, v = arrays(12)
    segments = np.array([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 12], np.int32)
    positions = np.maximum(np.cumsum(segments, 1, dtype=np.int32) - 1, 0)
    now = state(Spec(block=7), 11)
    assert now.slots == 12
    for cut in (slice(0, 6), slice(6, 12)):
        x = [x[:, cut] for x in (q, k, v, positions, segments)]
        o, now = jitted_step(now, *x, spec=Spec(block=7), rope=ROPE)
    np.testing.assert_array_equal(now.length, [8, 12])
    np.testing.assert_array_equal(np.asarray(now.keys)[0, :8], k[0, segments[0] == 1])
    np.testing.assert_array_equal(np.asarray(now.positions)[0], [*range(8), 0, 0, 0, 0])
    close(o, forward(Spec(block=7), q, k, v, vis_of(q, positions, segments))[:, 6:])


def test_documents_of_a_row_share_a_cache():
    q, k, v = arrays(40)
    positions, segments = packed([11, 1, 21], 40)
    o = decode(Spec(block=7), q, k, v, [13, 1, 13, 13], positions=positions, segments=segments)
    close(o, forward(Spec(block=7), q, k, v, vis_of(q, positions, segments)))


def test_sink_tokens_are_seen_by_nobody():
    q, k, v = arrays(12)
    segments = [[GLOBAL] * 2 + [1] * 10] * 2
    o = forward(Spec(block=3), q, k, v, vis_of(q, np.maximum(at_once(2, 12) - 2, 0), segments))
    close(o[:, 2:], forward(Spec(block=3), q[:, 2:], k[:, 2:], v[:, 2:]))


# --- retrieval


def retrieval_by_loops(spec, q, k, v, pieces):
    """One query and head at a time, from the rules of the method, in float64 and without a cache."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, dim = q.shape
    size, top = spec.block + 1, spec.retrieve
    half = dim // 2
    freq = ROPE.base ** (-np.arange(half) / half)

    def turn(x, at):
        c, s = np.cos(at * freq), np.sin(at * freq)
        return np.concatenate([x[:half] * c - x[half:] * s, x[half:] * c + x[:half] * s])

    soft = lambda x: np.exp(x - np.max(x)) / np.sum(np.exp(x - np.max(x)))
    o = np.zeros((batch, length, heads, v.shape[-1]))
    at = 0
    for n in pieces:
        complete = at // size
        kept = list(range(complete))[-(spec.cache_blocks or complete or 1) :]
        past, tail = len(kept), at % size
        base = min(past, top + 1) * size
        newest = kept[-top:] if past > top else []
        for b in range(batch):
            gates = np.zeros((n, heads, past))
            for t in range(n):
                for h in range(heads):
                    turned = turn(q[b, at + t, h], base + tail + t)
                    scores = []
                    for c, number in enumerate(kept):
                        slot = c if past <= top else newest.index(number) + 1 if number in newest else 0
                        key = turn(k[b, number * size + size - 1, h // 2], slot * size + size - 1)
                        scores.append(turned @ key / dim**0.5)
                    if past:
                        gates[t, h] = soft(np.array(scores))
            if spec.select == "max_over_heads":
                gates[:] = gates.max(1, keepdims=True)
            if spec.select == "max_over_tokens":
                gates[:] = gates.max(0, keepdims=True)
            for t in range(n):
                for h in range(heads):
                    turned = turn(q[b, at + t, h], base + tail + t)
                    score = lambda j, p, u=turned, b=b, h=h: u @ turn(k[b, j, h // 2], p) / dim**0.5
                    chosen = sorted(np.argsort(-gates[t, h], kind="stable")[:top])
                    gate, groups = [], []
                    for j, c in enumerate(chosen):
                        slot = j + (kept[c] in newest)
                        first = kept[c] * size
                        inside = soft(np.array([score(first + i, slot * size + i) for i in range(size - 1)]))
                        groups.append(inside @ v[b, first : first + size - 1, h // 2])
                        gate.append(score(first + size - 1, slot * size + size - 1))
                    here = at + t
                    local = lambda j, a=at, s=base + tail: s + j - a
                    for first in range(at - tail, here // size * size, size):
                        inside = soft(np.array([score(first + i, local(first + i)) for i in range(size - 1)]))
                        groups.append(inside @ v[b, first : first + size - 1, h // 2])
                        gate.append(score(first + size - 1, local(first + size - 1)))
                    for j in range(here // size * size, here + 1):
                        if j % size < size - 1:
                            groups.append(v[b, j, h // 2])
                            gate.append(score(j, local(j)))
                    o[b, here, h] = soft(np.array(gate)) @ np.array(groups)
        at += n
    return o


@pytest.mark.parametrize("select", ["per_token_and_head", "max_over_heads", "max_over_tokens"])
@pytest.mark.parametrize("cache_blocks", [0, 3])
def test_retrieval_follows_the_rules(select, cache_blocks):
    """More blocks than are fetched, chunks that start and end inside blocks, a ring that wraps."""
    q, k, v = arrays(52)
    spec = Spec(block=3, retrieve=2, select=select, cache_blocks=cache_blocks, context=30)
    pieces = [12, 12, 1, 1, 12, 1, 1, 12]
    o = decode(spec, q, 3 * k, v, pieces)
    close(o, retrieval_by_loops(spec, q, 3 * k, v, pieces), rtol=1e-4)


def test_more_queries_than_fetch_at_one_time():
    q, k, v = arrays(84)
    for select in ("per_token_and_head", "max_over_tokens"):
        spec = Spec(block=3, retrieve=1, select=select, context=80)
        close(decode(spec, q, k, v, [42, 42]), retrieval_by_loops(spec, q, k, v, [42, 42]), rtol=1e-4)


@pytest.mark.parametrize("select", ["per_token_and_head", "max_over_heads", "max_over_tokens"])
def test_enough_blocks_at_their_own_positions_equal_one_shot(select):
    """Card 3, with rotation: 6 complete blocks are past when the last chunk begins, and 6 are fetched."""
    q, k, v = arrays(60)
    spec = Spec(block=7, retrieve=6, select=select)
    one_shot = forward(spec, q, k, v)
    for pieces in ([12] * 5, [12, 12, *[1] * 12, 12, 12]):
        np.testing.assert_allclose(decode(spec, q, k, v, pieces), one_shot, atol=1e-5)
    fewer = decode(dataclasses.replace(spec, retrieve=5), q, k, v, [12] * 5)
    close(fewer[:, :48], one_shot[:, :48])
    assert not np.allclose(fewer[:, 48:], one_shot[:, 48:], atol=1e-3)


def test_without_the_gate_results_change_and_blocks_weigh_alike():
    q, k, v = arrays(60)
    spec = Spec(block=7, retrieve=6)
    bare = dataclasses.replace(spec, gate=False)
    gated = decode(spec, q, k, v, [12] * 5)
    ungated = decode(bare, q, k, v, [12] * 5)
    assert np.max(np.abs(gated - ungated)) > 0.1
    np.testing.assert_allclose(ungated, forward(bare, q, k, v), atol=1e-5)
    a = weights(bare, q, k, ROPE)[:, :, -1]
    share = a[..., :56].reshape(2, 4, 7, 8).sum(-1)
    np.testing.assert_allclose(share, share[..., :1].repeat(7, -1), rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Fenced(Rope):
    """A rotation that turns everything at or beyond `end` into NaN."""

    end: int = 0

    def __call__(self, x, positions):
        return jnp.where((positions >= self.end)[..., None, None], jnp.nan, ROPE(x, positions))


@pytest.mark.parametrize("select", ["per_token_and_head", "max_over_tokens"])
def test_no_position_ever_exceeds_the_trained_ones(select):
    spec = Spec(block=7, retrieve=2, select=select, context=42)
    assert (spec.positions, longest_chunk(spec)) == (48, 24)
    q, k, v = arrays(400)
    assert np.all(np.isfinite(decode(spec, q, k, v, [24] * 16 + [1] * 16, rope=Fenced(100.0, end=48))))
    assert not np.all(np.isfinite(decode(spec, q, k, v, [24] * 4, rope=Fenced(100.0, end=47)))), "and 47 is used"


def test_the_longest_chunk_is_the_cards():
    """Trained at 512 with f = 50: with two blocks 357 positions; the paper evaluates chunks of 350 tokens."""
    assert longest_chunk(Spec(retrieve=2)) == 510 - 3 * 51
    assert longest_chunk(Spec(block=63, context=2048, retrieve=5)) == 2080 - 2080 % 64 - 6 * 64


def test_a_ring_of_blocks_has_a_size_of_its_own_and_forgets_the_oldest():
    spec = Spec(block=7, retrieve=2, cache_blocks=4)
    assert state(spec, 100).slots == state(spec, 10**6).slots == 5 * 8
    assert state(Spec(block=7, retrieve=2), 100).slots == 15 * 8
    q, k, v = arrays(80)
    before = decode(spec, q, k, v, [16] * 5)
    k[:, :32] += 5
    v[:, :32] += 5
    changed = decode(spec, q, k, v, [16] * 5)
    np.testing.assert_array_equal(before[:, 64:], changed[:, 64:])
    assert not np.allclose(before[:, 40:64], changed[:, 40:64], atol=1e-3)


@pytest.mark.parametrize("select", ["per_token_and_head", "max_over_tokens"])
def test_left_padding_and_padding_between_are_stepped_over(select):
    q, k, v = arrays(30)
    spec = Spec(block=3, retrieve=2, select=select)
    live = np.ones((2, 30), int)
    live[0, :6], live[0, 24:], live[1, 22:28] = 0, 0, 0
    segments = live.astype(np.int32)
    positions = np.maximum(np.cumsum(segments, 1, dtype=np.int32) - 1, 0)
    loud = np.where(segments[..., None, None] == 0, 20 * q, q)  # padding that would have its say in a choice
    o = decode(spec, loud, k, v, [10, 10, 10], positions=positions, segments=segments)
    assert not np.any(o[live == 0])
    for b in range(2):
        alone = [x[[b, b]][:, live[b] == 1] for x in (q, k, v)]  # twice: the program is that of two rows
        pieces = [int(n) for n in live[b].reshape(3, 10).sum(1)]
        close(o[b, live[b] == 1], decode(spec, *alone, pieces, capacity=30)[0])


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 0}, "landmark.block is 0 but must be a whole number of at least 1"),
        ({"retrieve": -1}, "landmark.retrieve is -1"),
        ({"select": "best"}, "landmark.select is 'best' but must be one of per_token_and_head, max_over_heads"),
        ({"retrieve": 4, "cache_blocks": 3}, "landmark.cache_blocks is 3 but 4 blocks .* use at least 4"),
        ({"retrieve": 9}, "landmark.retrieve is 9 .* use at most 8, or raise landmark.context"),
        ({"retrieve": 1, "context": 100}, "landmark.retrieve is 1 .*: raise landmark.context"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LANDMARK.make_spec(**fields)
    assert LANDMARK.make_spec(retrieve=8).retrieve == 8


def test_chunks_and_rows_that_retrieval_cannot_take():
    """Refused where the values are known, NaN in jit."""
    spec = Spec(block=7, retrieve=2, context=42)
    q, k, v = arrays(60)
    ones, at = np.ones((2, 60), np.int32), at_once(2, 60)
    cut = lambda a, b, at, ones: [jnp.asarray(x[:, a:b]) for x in (q, k, v, at, ones)]
    compiled = lambda now, a, b, at=at, ones=ones: jitted_step(now, *cut(a, b, at, ones), spec=spec, rope=ROPE)
    run = lambda now, a, b, at=at, ones=ones: LANDMARK.step(now, *cut(a, b, at, ones), Call(spec, rope=ROPE))
    new = state(spec, 50)
    with pytest.raises(ConfigError, match=r"chunk of 25 positions .*context 42 .* step at most 21 tokens"):
        run(new, 0, 25)
    _, now = compiled(new, 0, 24)
    _, late = compiled(now, 24, 29)
    with pytest.raises(ConfigError, match=r"end at position 52, beyond the 48 .*context 42: step 14 tokens"):
        run(late, 29, 53)
    bad = {"far": (late, 29, 53, at, ones), "gap": (now, 24, 29, at + 1, ones), "mixed": (now, 24, 29, at, ones + 1)}
    for name in ("gap", "mixed"):
        with pytest.raises(ConfigError, match="one document each"):
            run(*bad[name])
    for args in bad.values():
        assert np.all(np.isnan(compiled(*args)[0]))
    full = compiled(now, 24, 48)[1]
    for first in (48, 53):
        _, full = compiled(full, first, first + 5)
    with pytest.raises(ConfigError, match="capacity 64"):
        run(full, 0, 9, at + 58)


REFUSED = {
    "noncausal_self": {"causal": False},
    "window": {"window": 4},
    "prefix": {"prefix_len": jnp.asarray(np.array([3, 3]))},
    "position_bias": {},
}


@pytest.mark.parametrize("capability", REFUSED)
@pytest.mark.parametrize("function", ["forward", "reference", "weights"])
def test_what_is_off_is_refused_by_every_function(capability, function):
    q, k, v = inputs(10)
    vis = self_visibility(2, 10, **REFUSED[capability])
    bias = {"bias": Alibi(alibi_slopes(4))} if capability == "position_bias" else {}
    arrays = (q, k) if function == "weights" else (q, k, v)
    with pytest.raises(NotImplementedError, match=f"landmark does not support {capability}[.]"):
        getattr(LANDMARK, function)(*arrays, vis, Call(Spec(), **bias))


def test_step_refuses_windows_and_biases():
    q, k, v = inputs(3)
    call = (q, k, v, default_positions(2, 3), jnp.ones((2, 3), jnp.int32))
    for capability, option in (("window", {"window": 4}), ("position_bias", {"bias": Alibi(alibi_slopes(4))})):
        with pytest.raises(NotImplementedError, match=f"landmark does not support {capability}[.]"):
            LANDMARK.step(state(Spec(), 5), *call, Call(Spec(), **option))
