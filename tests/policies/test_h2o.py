"""H2O against its rule in NumPy: what every key head keeps, what it answers, and what it must not lose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Call, get
from jaxattn.nn.stream import Stream
from jaxattn.policies import h2o
from tests.decoding import core_of, site_of

HEADS, KV_HEADS, DIM = 4, 2, 8
PROMPT, ANSWER, LEFT = 17, 24, 4
SIZE = PROMPT + ANSWER


@functools.cache
def arrays(length: int = SIZE, seed: int = 0, batch: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    draw = lambda heads: rng.normal(size=(batch, length, heads, DIM)).astype(np.float32)
    return 2 * draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def core(dim: int = DIM):
    return core_of(get("softmax"), dim)


@functools.partial(jax.jit, static_argnames=("spec", "window", "phase"))
def step(state, q, k, v, positions, segments, *, spec, window=None, phase="answer"):
    here = Stream(positions, segments, phase=phase)
    return h2o.step(state, q, k, v, here, spec=spec, site=site_of(q, k, v, window), core=core(q.shape[3]))[:2]


def places(left: tuple[int, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows with so many tokens of padding in front."""
    at = np.arange(length) - np.array(left)[:, None]
    return np.maximum(at, 0).astype(np.int32), (at >= 0).astype(np.int32)


def run(spec, qkv, *, prompt, left=(0, LEFT), window=None, width=1):
    """(o of a call, state behind it) of a prompt and then of `width` tokens at a time."""
    positions, segments = places(left, qkv[0].shape[1])
    state = h2o.init(spec, site_of(*qkv), batch=len(left), capacity=SIZE)
    out, at = [], 0
    answers = (qkv[0].shape[1] - prompt) // width
    for phase, size in [("prompt", prompt)] * bool(prompt) + [("answer", width)] * answers:
        cut = (x[:, at : at + size] for x in (*qkv, positions, segments))
        o, state = step(state, *cut, spec=spec, window=window, phase=phase)
        out.append((np.asarray(o), state))
        at += size
    return out


def softmax(s: np.ndarray) -> np.ndarray:
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


class Oracle:
    """One row and key head of the paper's rule, in f64: a list of (position, k, v, mass) in the order of positions."""

    def __init__(self, heavy: int, recent: int, window: int | None = None):
        self.heavy, self.recent, self.window, self.kept = heavy, recent, window or 10**9, []

    def read(self, q, k, v, start: int) -> np.ndarray:
        """o [T, G, D] of new queries [T, G, D] behind all that is kept, then one eviction."""
        self.kept += [[start + t, k[t], v[t], 0.0] for t in range(len(k))]
        out, gained = [], np.zeros(len(self.kept))
        for t in range(len(q)):
            ids = [n for n, e in enumerate(self.kept) if start + t - self.window < e[0] <= start + t]
            p = softmax(q[t].astype(float) @ np.stack([self.kept[n][1] for n in ids]).T.astype(float) / DIM**0.5)
            out.append(p @ np.stack([self.kept[n][2] for n in ids]))
            gained[ids] += p.sum(0)
        for entry, more in zip(self.kept, gained, strict=True):
            entry[3] += more
        newest = self.kept[-1][0]
        self.kept = [e for e in self.kept if e[0] > newest + 1 - self.window]
        if len(self.kept) > self.heavy + self.recent:
            cut = len(self.kept) - self.recent
            old = sorted(self.kept[:cut], key=lambda e: (-e[3], e[0]))[: self.heavy]
            self.kept = sorted(old, key=lambda e: e[0]) + self.kept[cut:]
        return np.stack(out)


@pytest.mark.parametrize(("heavy", "recent", "window"), [(4, 6, None), (4, 0, None), (5, 6, 9), (0, 3, None)])
def test_it_is_the_papers_rule_per_key_head(heavy, recent, window):
    """Outputs, kept positions and sums behind a prompt and every token: grouped heads, one row behind padding."""
    qkv = arrays()
    found = run(h2o.Spec(heavy, recent), qkv, prompt=PROMPT, window=window)
    for row, left in enumerate((0, LEFT)):
        for head in range(KV_HEADS):
            q, k, v = (x[row, left:] for x in qkv)
            q, oracle = q[:, 2 * head : 2 * head + 2], Oracle(heavy, recent, window)
            pieces = [PROMPT - left] + [1] * ANSWER
            at = 0
            for size, (o, state) in zip(pieces, found, strict=True):
                expected = oracle.read(q[at : at + size], k[at : at + size, head], v[at : at + size, head], at)
                np.testing.assert_allclose(o[row, -size:, 2 * head : 2 * head + 2], expected, atol=2e-5)
                where, mass = np.asarray(state.positions[row, head]), np.asarray(state.mass[row, head])
                order = [int(np.flatnonzero(where == e[0])[0]) for e in oracle.kept]
                assert sorted(where[where >= 0]) == [e[0] for e in oracle.kept]
                if heavy:  # else nobody asks for sums
                    np.testing.assert_allclose(mass[order], [e[3] for e in oracle.kept], rtol=1e-4)
                np.testing.assert_array_equal(np.asarray(state.keys)[row, order, head], [e[1] for e in oracle.kept])
                np.testing.assert_array_equal(np.asarray(state.values)[row, order, head], [e[2] for e in oracle.kept])
                at += size


def test_without_heavy_ones_it_is_a_window_and_its_own_token():
    qkv = arrays()
    found = np.concatenate([o for o, _ in run(h2o.Spec(0, 5), qkv, prompt=0, left=(0, 0))], axis=1)
    softmax = get("softmax")
    vis = self_visibility(2, SIZE, window=6)
    expected = softmax.reference(*map(jnp.asarray, qkv), vis, Call(softmax.spec()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_kept_ones_stay_in_budget_with_the_newest_and_only_gain():
    spec, before = h2o.Spec(4, 6), {}
    for t, (_, state) in enumerate(run(spec, arrays(), prompt=PROMPT, left=(0, 0))):
        newest = PROMPT - 1 + t
        for place in np.ndindex(2, KV_HEADS):
            where, mass = np.asarray(state.positions[place]), np.asarray(state.mass[place])
            kept = where[where >= 0]
            assert len(set(kept)) == len(kept) == 10
            assert set(range(newest - 5, newest + 1)) <= set(kept)
            now = {int(p): float(m) for p, m in zip(where, mass, strict=True) if p >= 0}
            old = before.get(place, now)
            assert all(now[p] >= old[p] for p in now.keys() & old.keys())
            assert not set(now) - set(old) - {newest}, "a token that was dropped came back"
            before[place] = now


def test_three_columns_that_all_look_at_survive():
    """T=200, three keys with +6: heavy=8 and recent=16 hold nearly all of full attention's mass, a window little."""
    length, strong = 200, (11, 60, 97)
    rng = np.random.default_rng(1)
    k = rng.normal(size=(1, length, 1, DIM)).astype(np.float32)
    k[..., 0] = 0.0
    k[:, strong, :, 0] = 6.0
    q = 0.5 * rng.normal(size=(1, length, 1, DIM)).astype(np.float32)
    q[..., 0] = DIM**0.5
    s = (q[0, :, 0] @ k[0, :, 0].T) / DIM**0.5
    full = softmax(np.where(np.tril(np.ones_like(s)) > 0, s, -np.inf))
    found = run(h2o.Spec(8, 16), (q, k, k), prompt=0, left=(0,))
    rows = range(100, length)
    kept = [np.asarray(state.positions)[state.positions >= 0] for _, state in found]
    share = np.mean([full[t, kept[t]].sum() for t in rows])
    window = np.mean([full[t, t - 23 : t + 1].sum() for t in rows])
    assert set(strong) <= set(np.asarray(found[-1][1].positions).ravel())
    assert abs(share - 0.89) < 0.05
    assert window < 0.25
    lots = run(h2o.Spec(8, 16, by="lots"), (q, k, k), prompt=0, left=(0,))[-1][1]
    assert not set(strong) <= set(np.asarray(lots.positions).ravel())


def test_several_tokens_at_once_are_one_after_the_other():
    spec, qkv = h2o.Spec(4, 6), arrays()
    one, some = run(spec, qkv, prompt=PROMPT), run(spec, qkv, prompt=PROMPT, width=6)
    join = lambda found: np.concatenate([o for o, _ in found], axis=1)
    np.testing.assert_allclose(join(some), join(one), atol=1e-6)
    for a, b in zip(*(jax.tree.leaves(found[-1][1]) for found in (one, some)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_sums_of_a_long_prompt_are_those_of_its_whole_map(monkeypatch):
    """More queries than are summed at a time, over more than one band, and a number of them that is no multiple."""
    monkeypatch.setattr(h2o, "BAND", 128)
    monkeypatch.setattr(h2o, "BANDS", 3)
    q, k, v = arrays(300, batch=1)
    _, state = run(h2o.Spec(8, 300), (q, k, v), prompt=300, left=(0,))[0]
    s = np.einsum("tkgd,skd->kgts", q[0].reshape(300, KV_HEADS, -1, DIM), k[0]) / DIM**0.5
    sums = softmax(np.where(np.tril(np.ones((300, 300))) > 0, s, -np.inf)).sum((1, 2))
    np.testing.assert_allclose(np.asarray(state.mass)[0, :, :300], sums, rtol=1e-4)


def test_padding_among_the_steps_changes_nothing():
    spec, qkv = h2o.Spec(4, 6), arrays()
    _, state = run(spec, qkv, prompt=PROMPT)[-1]
    cut = (x[:, -1:] for x in qkv)
    o, after = step(state, *cut, np.full((2, 1), SIZE, np.int32), np.zeros((2, 1), np.int32), spec=spec)
    assert not np.asarray(o).any()
    np.testing.assert_array_equal(after.positions, state.positions)
    own = np.asarray(state.positions) >= 0
    np.testing.assert_array_equal(np.asarray(after.mass)[own], np.asarray(state.mass)[own])
    np.testing.assert_array_equal(np.asarray(after.head_keys)[own], np.asarray(state.head_keys)[own])


def test_a_second_piece_of_a_prompt_is_no_number():
    qkv, spec = arrays(), h2o.Spec(4, 6)
    _, state = run(spec, tuple(x[:, :PROMPT] for x in qkv), prompt=PROMPT)[0]
    positions, segments = places((0, 0), SIZE)
    rest = (x[:, PROMPT:] for x in (*qkv, positions, segments))
    o, _ = step(state, *rest, spec=spec, phase="prompt")
    assert np.isnan(np.asarray(o)).all()


def test_bf16_is_kept_as_its_bits_and_is_near_f32():
    spec, qkv = h2o.Spec(4, 6), arrays()
    half = tuple(jnp.asarray(x, jnp.bfloat16) for x in qkv)
    found = run(spec, half, prompt=PROMPT)
    expected = run(spec, tuple(np.asarray(x, np.float32) for x in half), prompt=PROMPT)
    assert found[-1][1].head_keys.dtype == jnp.uint16
    np.testing.assert_allclose(np.asarray(found[0][0], np.float32), expected[0][0], atol=0.03)
    np.testing.assert_allclose(np.asarray(found[1][0], np.float32), expected[1][0], atol=0.03)


def test_lots_keep_the_first_token_and_a_full_budget():
    spec = h2o.Spec(4, 6, by="lots")
    states = [state for _, state in run(spec, arrays(), prompt=PROMPT, left=(0, 0))]
    where = np.asarray(states[-1].positions)
    assert (where == 0).any(axis=2).all()
    assert ((where >= 0).sum(axis=2) == 10).all()
    assert len({tuple(sorted(where[0, head])) for head in range(KV_HEADS)}) == KV_HEADS, "all heads drew the same"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"heavy": -1}, "heavy is -1"), ({"heavy": 0, "recent": 0}, "at least one"), ({"by": "luck"}, "attention, lots")],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        h2o.Spec(**options)
