"""MInference against its three patterns in NumPy, pair by pair; and its search, on heads whose pattern is planted."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evals.minference_search
from jaxattn.analysis import minference_search
from jaxattn.errors import ConfigError
from jaxattn.mechanisms import get
from jaxattn.mechanisms._protocol import Call
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import variables_of
from jaxattn.nn.stream import Stream
from jaxattn.policies import dense, minference
from jaxattn.policies.command import Asked
from jaxattn.policies.minference import PATTERNS, TABLES, Spec
from jaxattn.reader import hidden_in_pieces
from jaxattn.text import load
from tests.decoding import site_of
from tests.generate.helpers import byte_run

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 45
LEFT = (0, 7)
OWN = Spec(init=5, local=9, vertical=9, slash=7, blocks=3, block=4, last=6, sinks=3, near=2)
TRACES: list[object] = []


@functools.cache
def arrays(size: int = SIZE, sharp: float = 2.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(2, size, heads, DIM)).astype(np.float32)
    return sharp * draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def places(left: tuple[int, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows with so many tokens of padding in front."""
    at = np.arange(size) - np.array(left)[:, None]
    return np.maximum(at, 0).astype(np.int32), (at >= 0).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("spec", "window", "phase", "policy"))
def step(state, qkv, positions, segments, heads=None, *, spec, window=None, phase="prompt", policy=minference):
    TRACES.append(spec)
    softmax = get("softmax")
    core = softmax.core(Call(softmax.spec()), DIM)
    here = Stream(positions, segments, phase=phase, heads=heads)
    return policy.step(state, *qkv, here, spec=spec, site=site_of(*qkv, window), core=core)[:2]


def prompt(spec, qkv=None, left=LEFT, heads=None, window=None):
    """(o, state) of a prompt."""
    qkv = arrays() if qkv is None else qkv
    state = minference.init(spec, site_of(*qkv), batch=len(left), capacity=qkv[0].shape[1] + 4)
    o, state = step(state, qkv, *places(left, qkv[0].shape[1]), heads, spec=spec, window=window)
    return np.asarray(o.astype(jnp.float32)), state


# --- the rule in NumPy


def softmax(s: np.ndarray) -> np.ndarray:
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


def largest(x: np.ndarray, count: int) -> list[int]:
    return list(np.argsort(-x, kind="stable")[:count])


def pairs(spec: Spec, pattern: str, q: np.ndarray, k: np.ndarray, window: int | None = None) -> np.ndarray:
    """Who reads whom, [T, T], of one head of a prompt q, k [T, D]."""
    size, b = len(q), spec.block
    t, s = np.arange(size)[:, None], np.arange(size)
    sees = (s <= t) & (True if window is None else t - s < window)
    count, up = -(-size // b), lambda n: -(-n // b)
    tiles = np.zeros((count, count), bool)
    if pattern == "a_shape":
        for i in range(count):
            for j in range(i + 1):  # the tile's nearest pair, in whole blocks of offsets
                tiles[i, j] = j < up(spec.init) or i == j or (i - j - 1) < up(spec.local)
    elif pattern == "vertical_slash":
        last = min(spec.last, size)
        s = np.where(sees[size - last :], q[size - last :] @ k.T / np.sqrt(DIM), -np.inf)
        w = softmax(s)
        columns = np.array([w[:, j * b : (j + 1) * b].sum() for j in range(count)])
        offset = np.arange(size - last, size)[:, None] - np.arange(size)
        diagonals = np.array([w[(offset >= j * b) & (offset < (j + 1) * b)].sum() for j in range(count)])
        columns[: up(spec.sinks)] = np.inf
        diagonals[: up(spec.near)] = np.inf
        for j in largest(columns, max(up(spec.vertical), up(spec.sinks))):
            tiles[:, j] = True
        for m in largest(diagonals, up(spec.slash)):
            for i in range(count):
                for off in range(m * b, (m + 1) * b):
                    for row in range(i * b, (i + 1) * b):
                        if row - off >= 0:
                            tiles[i, (row - off) // b] = True
    else:
        mean = lambda x: np.array([x[j * b : (j + 1) * b].sum(axis=0) for j in range(count)])
        scores = mean(q) @ mean(k).T
        for i in range(count):
            row = scores[i, : i + 1].copy()
            row[[0, i]] = np.inf
            tiles[i, largest(row, spec.blocks)] = True
    return sees & np.repeat(np.repeat(tiles, b, axis=0), b, axis=1)[:size, :size]


def expected(spec: Spec, patterns, qkv, left=LEFT, window=None) -> tuple[np.ndarray, np.ndarray]:
    """o [B, T, H, V] and the share of tiles below the diagonal that are read, [B, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    o, share = np.zeros((*q.shape[:3], v.shape[3])), np.zeros((len(q), q.shape[2]))
    for row, pad in enumerate(left):
        for h in range(q.shape[2]):
            own = q[row, pad:, h], k[row, pad:, h // 2]
            seen = pairs(spec, patterns[h], *own, window)
            s = np.where(seen, own[0] @ own[1].T / np.sqrt(DIM), -np.inf)
            o[row, pad:, h] = softmax(s) @ v[row, pad:, h // 2]
            count = -(-len(own[0]) // spec.block)
            tiles = [(i, j) for i in range(count) for j in range(i + 1)]
            cut = lambda i, j: seen[i * spec.block : (i + 1) * spec.block, j * spec.block : (j + 1) * spec.block]  # noqa: B023
            share[row, h] = np.mean([cut(i, j).any() for i, j in tiles])
    return o, share


def close(found, wanted, left=LEFT, tolerance=2e-5):
    for row, pad in enumerate(left):
        np.testing.assert_allclose(found[row, pad:], wanted[row, pad:], atol=tolerance, rtol=0)


# --- attention


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_is_softmax_over_its_pairs_each_once(pattern):
    """Grouped heads, padding in front, a last block that is not full; and what it says that it read."""
    o, state = prompt(dataclasses.replace(OWN, pattern=pattern))
    wanted, share = expected(OWN, [pattern] * HEADS, arrays())
    close(o, wanted)
    np.testing.assert_allclose(state.density, share.mean(axis=1), atol=1e-6)
    assert 0.1 < share.mean() < 0.9, "the budgets leave nothing out, or all"


def test_a_window_of_the_layer_hides_keys_from_the_choice_too():
    o, _ = prompt(OWN, window=11)
    close(o, expected(OWN, ["vertical_slash"] * HEADS, arrays(), window=11)[0])


def test_heads_take_pattern_and_budgets_from_tables_in_one_program():
    def table(numbers, a, b):
        return dict(zip(TABLES, (jnp.array(x, jnp.float32) for x in (numbers, a, b)), strict=True))

    before = len(TRACES)
    spec = dataclasses.replace(OWN, near=1)
    mixed = [1, 0, 2, 1]
    own = {0: (5, 9), 1: (9, 7), 2: (3, 0)}
    o, _ = prompt(spec, heads=table(mixed, *zip(*(own[n] for n in mixed), strict=True)))
    close(o, expected(spec, [PATTERNS[n] for n in mixed], arrays())[0])
    few = dataclasses.replace(spec, vertical=4, slash=4)
    o, _ = prompt(spec, heads=table([1] * 4, [4] * 4, [4] * 4))
    close(o, expected(few, ["vertical_slash"] * 4, arrays())[0])
    o, _ = prompt(spec, heads=table([1, 3, 0, 0.5], [9] * 4, [9] * 4))
    assert len(TRACES) == before + 1, "another table compiles another program"
    bad = np.isnan(o).all(axis=(0, 1, 3))
    assert list(bad) == [False, True, False, True], "a number that is no pattern must never look like an answer"
    assert np.isfinite(o[:, :, ~bad]).all()


def test_answers_read_all_and_a_second_piece_of_a_prompt_none():
    _, state = prompt(OWN)
    few = tuple(x[:, :1] for x in arrays())
    at, live = np.array([[SIZE], [SIZE - LEFT[1]]], np.int32), np.ones((2, 1), np.int32)
    o, after = step(state, few, at, live, spec=OWN, phase="answer")
    wanted, cache = step(state.cache, few, at, live, spec=dense.Spec(), phase="answer", policy=dense)
    np.testing.assert_array_equal(o, wanted)
    np.testing.assert_array_equal(after.cache.head_keys, cache.head_keys)
    np.testing.assert_array_equal(after.density, state.density)
    more = tuple(x[:, :2] for x in arrays())
    o, _ = step(state, more, at + np.arange(2, dtype=np.int32), np.ones((2, 2), np.int32), spec=OWN)
    assert np.isnan(o).all()


def planted(size: int, column: int, offset: int) -> tuple[np.ndarray, ...]:
    """q, k, v of heads that look at one column and along one diagonal with nearly all their weight."""
    rng = np.random.default_rng(1)
    codes = rng.choice([-1.0, 1.0], size=(size + offset, 64))
    k = np.zeros((1, size, 1, 66), np.float32)
    q = np.zeros((1, size, HEADS, 66), np.float32)
    k[0, :, 0, :64], k[0, column, 0, :64], k[0, column, 0, 64] = codes[:size], 0, 64
    for t in range(size):
        if t >= offset:
            q[0, t, :, :64] = 6 * codes[t - offset]
        q[0, t, :, 64] = 6.0
    v = rng.normal(size=(1, size, 1, 8)).astype(np.float32)
    return q, k, v


def test_a_strong_column_and_diagonal_are_kept_where_an_a_shape_loses_them():
    """More than 0.99 of the weight, at no more tiles."""
    size, column, offset = 192, 37, 90
    q, k, v = planted(size, column, offset)
    spec = Spec(vertical=16, slash=24, block=8, last=16, sinks=2, near=2)
    shape = Spec(pattern="a_shape", init=16, local=24, block=8)
    site = site_of(q, k, v)
    at = np.arange(size)[None]
    vis = minference.Visibility(at, at, np.ones_like(at), np.ones_like(at))
    seen = {}
    for own in (spec, shape):
        mask, _ = minference.chosen(jnp.asarray(q), jnp.asarray(k), vis, {}, spec=own, site=site, scale=66**-0.5)
        seen[own] = np.repeat(np.repeat(np.asarray(mask[0, 0]), 8, 0), 8, 1)
    s = q[0, :, 0].astype(np.float64) @ k[0, :, 0].astype(np.float64).T * 66**-0.5
    w = softmax(np.where(np.tri(size, dtype=bool), s, -np.inf))
    late = slice(offset + 40, None)
    kept = {own: (w * mask)[late].sum(axis=1) for own, mask in seen.items()}
    assert kept[spec].min() > 0.99
    assert kept[shape].max() < 0.1
    assert seen[spec].sum() <= 1.35 * seen[shape].sum()


def test_bfloat16_answers_like_float32():
    """Which blocks are chosen is decided in f32 from the same numbers."""
    rounded = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays())
    o, _ = prompt(OWN, tuple(jnp.asarray(x, jnp.bfloat16) for x in rounded))
    wanted, _ = expected(OWN, ["vertical_slash"] * HEADS, rounded)
    close(o, wanted, tolerance=0.03)


def test_the_control_draws_as_many_tiles_without_looking():
    for pattern in PATTERNS[1:]:
        spec = dataclasses.replace(OWN, pattern=pattern, by="lots")
        _, lots = prompt(spec)
        _, other = prompt(spec, arrays(sharp=0.1))
        _, own = prompt(dataclasses.replace(spec, by="attention"))
        np.testing.assert_array_equal(lots.density, other.density)
        np.testing.assert_allclose(lots.density, own.density, rtol=0.25)
        assert np.abs(prompt(spec)[0] - prompt(OWN)[0]).max() > 0.05


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("pattern", "a-shape", "a_shape, vertical_slash, block"),
        ("by", "luck", "attention, lots"),
        ("vertical", -1, "0 or more"),
        ("slash", 0, "at least 1"),
        ("block", 0, "at least 1"),
        ("last", 129, "at most 128"),
    ],
)
def test_impossible_options_are_refused_by_name(field, value, words):
    with pytest.raises(ConfigError, match=f"minference.{field} is .*{words}"):
        Spec(**{field: value})


def test_more_dense_layers_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="2 layers, so first=3"):
        ModelConfig(vocab_size=9, num_layers=2, d_model=16, num_heads=2, policy="minference(first=3)")


# --- the search


HEADED = Spec(init=16, local=24, block=8, last=16, sinks=2, near=2)


def kinds(size: int = 160) -> tuple[np.ndarray, ...]:
    """q, k, v of four heads: one looks at its neighbours, one along a far diagonal, one at a column, one at some block
    of keys from each block of queries. Sums over blocks tell of the last alone."""
    rng, b = np.random.default_rng(1), HEADED.block
    codes = np.repeat(rng.choice([-1.0, 1.0], size=(size // 2, 64)), 2, axis=0)
    codes[1::2] *= -1
    named = np.repeat(rng.choice([-1.0, 1.0], size=(size // b, 32)), b, axis=0)
    k, q = np.zeros((1, size, 1, 97), np.float32), np.zeros((1, size, HEADS, 97), np.float32)
    k[0, :, 0, :64], k[0, :, 0, 64:96] = codes, named
    k[0, 80:88, 0, 96] = -64 / 7
    k[0, 85, 0, 96] = 64
    for t in range(size):
        q[0, t, 0, :64] = 8 * codes[max(0, t - 3)]
        q[0, t, 1, :64] = 8 * codes[max(0, t - 72)]
        q[0, t, 2, :64], q[0, t, 2, 96] = (8 * codes[t], 0) if t < 85 else (0, 8)
        q[0, t, 3, 64:96] = 16 * named[b * np.random.default_rng(t // b).integers(0, t // b + 1)]
    return q, k, rng.normal(size=(1, size, 1, 8)).astype(np.float32)


@functools.cache
def searched() -> minference_search.Found:
    model = ModelConfig(
        vocab_size=9, num_layers=1, d_model=16, num_heads=HEADS, num_kv_heads=1, key_dim=97, value_dim=8
    )
    q, k, v = (jnp.asarray(x) for x in kinds())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minference_search, "_inputs", lambda *given: {0: (q, k, v, {})})
        return minference_search.search(model, {}, np.zeros(q.shape[1], np.int32), HEADED)


def test_the_search_finds_what_was_planted_within_the_target():
    found = searched()
    names = [PATTERNS[n] for n in found.tables[TABLES[0]][0]]
    assert names == ["a_shape", "vertical_slash", "vertical_slash", "block"]
    assert (found.tiles <= found.target).all()
    assert (found.tiles[0] > 0.6 * found.target).all(), "budgets are far from matched"
    best = found.errors[0].min(axis=1)
    assert (best < 0.05).all()
    assert (found.errors[0, 1:, 0] > 0.2).all(), "the A-shape serves these heads too, so nothing was planted"


def test_a_target_is_the_tiles_of_the_a_shape_and_less_than_all():
    _, state = prompt(dataclasses.replace(HEADED, pattern="a_shape"), arrays(size=160), left=(0, 0))
    found = searched()
    assert found.target == round(float(state.density[0]) * found.dense)
    model = ModelConfig(vocab_size=9, num_layers=1, d_model=16, num_heads=2)
    with pytest.raises(ConfigError, match="longer prompt"):
        minference_search.search(model, {}, np.zeros(30, np.int32), HEADED)


def test_the_command_writes_tables_that_the_policy_reads(tmp_path, monkeypatch, capsys):
    run = byte_run(tmp_path)
    words = [run, "--text", tmp_path / "text.txt", "--tokens", 160, "--init", 8, "--local", 16, "--block", 8]
    monkeypatch.setattr(
        "sys.argv", ["evals.minference_search", *map(str, words), "--out", str(tmp_path / "heads.json")]
    )
    assert evals.minference_search.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["heads"].values()) == 2
    assert printed["error"] <= printed["error_a_shape"]
    assert printed["density"] <= printed["target_density"]
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    policy = "minference(block=8, last=32)"
    loaded = load(run, asked=Asked(policy, tmp_path / "heads.json"))
    ids = np.asarray(loaded.encode("another page " * 16), np.int32)[None, :160]
    hidden = hidden_in_pieces(loaded.model, variables_of(loaded.params), ids)
    plain = dataclasses.replace(loaded.model, policy="")
    assert np.isfinite(hidden).all()
    assert np.abs(hidden - hidden_in_pieces(plain, variables_of(loaded.params), ids)).max() > 1e-3
