"""StreamingLLM against the paper's way of doing it, written in NumPy f64: a cache that is turned anew at every step."""

from __future__ import annotations

import dataclasses
import functools
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from convert.from_hf import convert
from evals.length import window_losses
from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, self_visibility
from jaxattn.mechanisms import get
from jaxattn.mechanisms._protocol import Call
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables
from jaxattn.nn.stream import Stream
from jaxattn.policies import Site
from jaxattn.policies.streaming_llm import POLICY, Spec, State
from jaxattn.reader import _one_by_one, hidden_in_one_pass, hidden_in_pieces, hidden_one_by_one
from jaxattn.rope import Alibi, RelativeBias, Rope, RopeScaling, alibi_slopes, frequencies
from jaxattn.text import load
from scripts.get import fetch
from tests.conformance.cases import normal

S, W, LENGTH = 3, 6, 50  # 5 (S + W) tokens and a rest
HEADS, KV_HEADS, DIM, VALUES = 4, 2, 16, 12
SPEC = Spec(S, W)
SITE = Site("softmax", 0, 1, HEADS, KV_HEADS, DIM, VALUES, "float32", rope=Rope(10_000.0), position="rope")
Q, K, V = (normal(i, (2, LENGTH, n, d)) for i, (n, d) in enumerate([(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUES)]))


# ------------------------------------------------------------------------------------------------ the oracle


def turned(x: np.ndarray, places: np.ndarray, rope: Rope | None) -> np.ndarray:
    """x [n, D] at places [n], by complex numbers."""
    if rope is None:
        return x
    freq = frequencies(x.shape[-1], rope.base, rope.fraction, rope.scaling)
    half = len(freq)
    z = (x[:, :half] + 1j * x[:, half : 2 * half]) * np.exp(1j * np.outer(places, freq)) * rope.scaling.amplitude
    return np.concatenate([z.real, z.imag, x[:, 2 * half :]], axis=1)


def oracle(q, k, v, *, sinks=S, recent=W, rope=SITE.rope, window=None, bias=None, null=None, shift=True) -> np.ndarray:
    """The released loop for one row, f64 [T, H, V]: cut the cache, turn it by its places, attend.

    window: of the layer, in places. bias(head, distance). null: a key [K, D] that is never turned, of value zero.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    for t in range(len(q)):
        kept = [j for j in range(t + 1) if j < sinks or t - j <= recent]
        slots = np.arange(len(kept)) if shift else np.array(kept)
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            query = turned(q[t : t + 1, h], slots[-1:], rope)[0]
            s = turned(k[kept, group], slots, rope) @ query * q.shape[2] ** -0.5
            s += 0 if bias is None else bias(h, slots[-1] - slots)
            s = np.where(slots[-1] - slots < (window or np.inf), s, -np.inf)
            values = v[kept, group]
            if null is not None:
                s = np.append(s, null[group] @ query * q.shape[2] ** -0.5)
                values = np.concatenate([values, np.zeros((1, v.shape[2]))])
            w = np.exp(s - s.max())
            out[t, h] = w @ values / w.sum()
    return out


def both(q, k, v, **options) -> np.ndarray:
    return np.stack([oracle(*row, **options) for row in zip(q, k, v, strict=True)])


# ------------------------------------------------------------------------------------------------ the policy


def program(spec, site, core):
    """A step; of the plain core one for all tests."""

    @functools.partial(jax.jit, static_argnums=5)
    def step(state, q, k, v, live, phase):
        here = Stream(jnp.zeros(live.shape, jnp.int32), live, phase=phase)
        return POLICY.step(state, q, k, v, here, spec=spec, site=site, core=core or core_of())[:2]

    return step


of_softmax = functools.cache(lambda spec, site: program(spec, site, None))


def core_of(name: str = "softmax", params=None, bias=None):
    mechanism = get(name)
    return mechanism.core(Call(mechanism.spec(), params or {}, bias=bias), DIM)


def run(pieces, *, spec=SPEC, site=SITE, core=None, live=None, q=Q, k=K, v=V, state=None):
    """o [B, T, H, V] and the state behind pieces of these many tokens, single ones as answers."""
    live = np.ones(q.shape[:2], np.int32) if live is None else live
    state = POLICY.init(spec, site, batch=len(q), capacity=1) if state is None else state

    step, out, at = of_softmax(spec, site) if core is None else program(spec, site, core), [], 0
    for n in pieces:
        o, state = step(state, *(x[:, at : at + n] for x in (q, k, v, live)), "answer" if n == 1 else "prompt")
        out.append(o)
        at += n
    assert at == q.shape[1]
    return np.concatenate(out, axis=1), state


ONES = [1] * LENGTH
ROPES = {
    "rope": SITE.rope,
    "partial": Rope(500.0, 0.5),
    "linear": Rope(10_000.0, 1.0, RopeScaling("linear", 4.0)),
    "yarn": Rope(10_000.0, 1.0, RopeScaling("yarn", 4.0, 16)),
    "llama3": Rope(10_000.0, 0.75, RopeScaling("llama3", 8.0, 16)),
    "none": None,
}


@pytest.mark.parametrize("name", ROPES)
def test_two_rotations_of_a_query_are_the_turned_cache(name):
    o, _ = run(ONES, site=dataclasses.replace(SITE, rope=ROPES[name]))
    np.testing.assert_allclose(o, both(Q, K, V, rope=ROPES[name]), atol=1e-5)


def test_the_identity_holds_in_f64():
    """Scores of the turned cache and of keys that are turned once, at the end of a text of 5 (S + W) tokens."""
    t, c, rope = 5 * (S + W), S + W, ROPES["partial"]
    q, k = (x[0, : t + 1, 0].astype(np.float64) for x in (Q, K))
    kept = np.array([j for j in range(t + 1) if j < S or t - j <= W])
    again = turned(k[kept], np.arange(c + 1), rope) @ turned(q[t:], np.array([c]), rope)[0]
    once = turned(k[kept], kept, rope)
    near, far = (turned(q[t:], np.array([at]), rope)[0] for at in (t, c))
    np.testing.assert_allclose(np.where(kept < S, once @ far, once @ near), again, atol=1e-12)


@pytest.mark.parametrize("pieces", [[LENGTH], [7] * 7 + [1], [20, 1, 1, 1, 20, 7], [2] * 25], ids=str)
def test_pieces_equal_single_tokens(pieces):
    """Also the mask M over all tokens at once, with a query for each group of keys."""
    np.testing.assert_allclose(run(pieces)[0], both(Q, K, V), atol=1e-5)


def test_rows_count_their_own_tokens_and_padding_takes_no_room():
    """Row 1 is row 0's text: padded in front, inside a piece, and where a row waits for others."""
    lengths, gap = [9, 9, 1, 1, 1, 9, 9, 1, 1, 9], [1, 2, 10, 18, 20, 21, 29, 30, 38, 39, 40]
    live = np.ones((2, LENGTH), np.int32)
    live[1, gap] = 0
    q, k, v = (np.stack([x[0], np.zeros_like(x[0]) + 9]) for x in (Q, K, V))
    there = np.flatnonzero(live[1])
    for x in (q, k, v):
        x[1, there] = x[0, : len(there)]
    o, state = run(lengths, q=q, k=k, v=v, live=live)
    expected = oracle(q[0], k[0], v[0])
    np.testing.assert_allclose(o[0], expected, atol=1e-5)
    np.testing.assert_allclose(o[1, there], expected[: len(there)], atol=1e-5)
    assert state.length.tolist() == [LENGTH, len(there)]


def test_what_is_kept_are_the_first_and_the_newest_in_bytes_that_stay():
    size = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    start = POLICY.init(Spec(S, W), SITE, batch=2, capacity=10**9)
    for pieces in (ONES, [20, 20, 10]):
        _, state = run(pieces)
        held = lambda ring: sorted(ring.positions[0][ring.segments[0] != 0].tolist())
        assert held(state.sinks) == list(range(S))
        assert held(state.ring) == list(range(LENGTH - 1 - W, LENGTH)), "the oldest is the next token's slot"
        assert size(state) == size(start)
        for ring in (state.sinks, state.ring):
            for row in range(2):
                np.testing.assert_array_equal(ring.values[row], V[row, ring.positions[row]])


def test_bfloat16_is_held_as_bits():
    site = dataclasses.replace(SITE, dtype="bfloat16")
    o, state = run(ONES, site=site, **{n: x.astype(jnp.bfloat16) for n, x in (("q", Q), ("k", K), ("v", V))})
    assert state.ring.head_keys.dtype == state.sinks.head_values.dtype == jnp.uint16
    np.testing.assert_allclose(o.astype(np.float32), both(Q, K, V), atol=0.05)


def test_no_sinks_is_a_window_and_no_shift_counts_in_the_text():
    o, state = run([20, *[1] * 30], spec=Spec(0, W))
    np.testing.assert_allclose(o, both(Q, K, V, sinks=0), atol=1e-5)
    assert state.sinks is None
    o, _ = run([20, *[1] * 30], spec=Spec(S, W, shift=False))
    np.testing.assert_allclose(o, both(Q, K, V, shift=False), atol=1e-5)
    assert np.abs(o - both(Q, K, V)).max() > 0.01


@pytest.mark.parametrize("window", [2, 5, 8, 40])
def test_a_layers_own_window_counts_places(window):
    o, state = run([20, *[1] * 30], site=dataclasses.replace(SITE, window=window))
    np.testing.assert_allclose(o, both(Q, K, V, window=window), atol=1e-5)
    assert state.ring.slots == min(window, W + 1)


def test_biases_count_places():
    slopes, table = np.asarray(alibi_slopes(HEADS)), normal(5, (32, HEADS))
    site = dataclasses.replace(SITE, rope=None, bias=True)
    o, _ = run([20, *[1] * 30], site=site, core=core_of(bias=Alibi(jnp.asarray(slopes))))
    np.testing.assert_allclose(o, both(Q, K, V, rope=None, bias=lambda h, d: -slopes[h] * d), atol=1e-5)
    o, _ = run([20, *[1] * 30], site=site, core=core_of(bias=RelativeBias(jnp.asarray(table))))
    np.testing.assert_allclose(o, both(Q, K, V, rope=None, bias=lambda h, d: table[d, h]), atol=1e-5)  # exact below 16


def test_constant_slots_see_the_query_at_its_place_in_the_cache():
    key = normal(6, (KV_HEADS, DIM))
    o, _ = run([20, *[1] * 30], core=core_of("k_bias", {"k": jnp.asarray(key)}))
    np.testing.assert_allclose(o, both(Q, K, V, null=key), atol=1e-5)


def test_zero_sink_is_softmax_with_a_key_and_a_value_of_zeros():
    zero = np.zeros((KV_HEADS, DIM))
    o, _ = run([20, *[1] * 30], core=core_of("softmax_off_by_one"))
    np.testing.assert_allclose(o, both(Q, K, V, null=zero), atol=1e-5)
    forward = get("softmax_off_by_one").forward
    off = jax.jit(lambda q, k, v: forward(q, k, v, self_visibility(2, LENGTH), Call(None)))(Q, K, V)
    np.testing.assert_allclose(off, both(Q, K, V, sinks=0, recent=LENGTH, rope=None, null=zero), atol=1e-6)


def test_a_text_of_millions_of_tokens_is_read_like_its_beginning():
    """Keys and queries at places beyond what a product of floats can hold."""
    far = 4_000_000
    _, state = run([20], q=Q[:, :20], k=K[:, :20], v=V[:, :20])
    assert isinstance(state, State)
    state = dataclasses.replace(state, length=jnp.full(2, far, jnp.int32))
    rest = {"q": Q[:, 20:], "k": K[:, 20:], "v": V[:, 20:]}
    o, _ = run([1] * 30, state=state, **rest)
    np.testing.assert_allclose(o[:, W:], both(Q, K, V)[:, 20 + W :], atol=1e-5)


@pytest.mark.parametrize("at", [0, 1, 4095, 10**5, 4_000_000, 2**31 - 2])
def test_angles_are_exact_at_every_place(at):
    for name in ("rope", "yarn", "llama3"):
        rope = ROPES[name]
        angle = at * frequencies(64, rope.base, rope.fraction, rope.scaling).astype(np.longdouble)
        cos, sin = (np.asarray(x)[0, 0, 0] for x in rope.exact_tables(jnp.full((1, 1), at, jnp.int32), 64))
        np.testing.assert_allclose(cos, rope.scaling.amplitude * np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin, rope.scaling.amplitude * np.sin(angle), atol=1e-6)


# ------------------------------------------------------------------------------------------------ in a model


BASE = ModelConfig(
    vocab_size=31, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, max_positions=24, rope_fraction=0.5
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 40)).astype(np.int32)


@functools.cache
def variables(model: ModelConfig):
    return jax.jit(Decoder(model).init)(jax.random.key(1), jnp.zeros((1, 3), jnp.int32))


def under(policy: str, **more) -> ModelConfig:
    return dataclasses.replace(BASE, policy=policy, **more)


@pytest.mark.parametrize("mixer", ["softmax", "sink_token(tokens=2)"])
def test_up_to_its_budget_a_model_is_dense_and_then_goes_on(mixer):
    dense = dataclasses.replace(BASE, mixers=(mixer,))
    model = dataclasses.replace(dense, policy="streaming(sinks=4, recent=7)")
    known = 4 + 7 + 1 - model.prefix_tokens
    expected = hidden_in_one_pass(dense, variables(dense), jnp.asarray(TOKENS))
    steps = hidden_one_by_one(model, variables(dense), TOKENS)
    np.testing.assert_allclose(steps[:, :known], expected[:, :known], atol=1e-5)
    assert np.abs(steps - expected)[:, known:].max() > 1e-3, "the budget must bind"
    np.testing.assert_allclose(hidden_in_pieces(model, variables(dense), TOKENS, piece=16), steps, atol=1e-5)


def test_learned_tokens_in_front_are_the_first_sinks():
    model = under("streaming(sinks=3, recent=5)", mixers=("sink_token(tokens=2)",))
    states = jax.jit(lambda v: Decoder(model).apply(v, 2, 64, method="start"))(variables(model))
    at = np.tile(np.arange(20, dtype=np.int32), (2, 1))
    _, states = _one_by_one(model, variables(model), states, TOKENS[:, :20], at, np.ones_like(at))
    assert states[0].sinks.segments.tolist() == [[GLOBAL, GLOBAL, 1]] * 2
    assert states[0].sinks.positions.tolist() == [[0, 1, 2]] * 2


def test_generation_goes_on_beyond_the_context_in_constant_memory():
    prompt = TOKENS[:, :10]
    with pytest.raises(ConfigError, match="24 positions"):
        jaxattn.generate(BASE, variables(BASE), prompt, max_new_tokens=100)
    model = under("streaming(sinks=2, recent=9)")
    made = jaxattn.generate(model, variables(BASE), prompt, max_new_tokens=100)
    assert made.tokens.shape == (2, 100)
    text = np.concatenate([prompt, made.tokens], axis=1)
    out = hidden_one_by_one(model, variables(BASE), text[:, :-1])
    logits = jax.jit(lambda v, out: Decoder(model).apply(v, out, method="logits"))(variables(BASE), out)
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, 9:], made.tokens)
    size = lambda room: jax.eval_shape(lambda: Decoder(model).apply(variables(BASE), 1, room, method="start"))
    assert size(64) == size(10**6)


@pytest.mark.optimised
@pytest.mark.parametrize("sinks", [0, 4, 2000])
def test_a_step_writes_in_place(sinks):
    model = under(f"streaming(sinks={sinks}, recent=8000)", max_positions=0, num_layers=1)
    states = jax.eval_shape(lambda: Decoder(model).apply(variables(model), 1, 64, method="start"))
    places = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    program = _one_by_one.lower(model, variables(model), states, places, places, places).compile()
    ring = model.kv_heads * 8001 * model.head_dim * 4
    assert program.memory_analysis().temp_size_in_bytes < ring / 10


LONGROPE = RopeScaling("longrope", 2.0, 24, short_factors=(1.0,) * 2, long_factors=(2.0,) * 2)
REFUSED = {
    "sinks=4, recent=252 and the token itself are 257 positions, more than the 24 .* recent of at most 19": {
        "policy": "streaming(sinks=4, recent=252)"
    },
    "use fewer sinks": {"policy": "streaming(sinks=30, recent=1)"},
    "position 'learned'": {"position": "learned"},
    "position 'sinusoid'": {"position": "sinusoid"},
    "kind 'dynamic'": {"rope_scaling": RopeScaling("dynamic", 2.0, 24)},
    "kind 'longrope'": {"rope_scaling": LONGROPE},
    "feature map": {"mixers": ("kernel_elu",)},
    "2 learned tokens in front, which sinks=1": {"mixers": ("sink_token(tokens=2)",)},
    "streaming.sinks is -1": {"policy": "streaming(sinks=-1)"},
    "streaming.recent is 0": {"policy": "streaming(recent=0)"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_stream_is_refused_by_name(reason):
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(BASE, **{"policy": "streaming(sinks=1, recent=5)", **REFUSED[reason]})


def test_what_has_no_place_to_lose_streams():
    for change in ({"mixers": ("kernel_elu",), "position": "nope"}, {"position": "alibi"}, {"position": "relative"}):
        assert under("streaming(sinks=1, recent=5)", **change).position_limit == 0
    assert under("streaming(sinks=4, recent=19)").position_limit == 0
    assert under("streaming(sinks=4, recent=19, shift=False)").position_limit == 24


def test_an_unlimited_budget_is_no_more_than_the_text():
    for length in (1, 2, 3, 7, 24):
        spec = POLICY.unlimited(Spec(), length)
        assert length <= spec.keys <= max(length, 2)


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.optimised
def test_a_real_model_needs_its_sinks_and_no_more_than_four(tmp_path):
    """Text of four times the cache: the card asks for 1.5 times the perplexity without, and 2 % between 4 and 8."""
    convert(fetch("smollm2"), tmp_path / "smol")
    loaded = load(tmp_path / "smol", dtype="float32")
    text = "\n\n".join(topics[name] for name in ("typesfunctions", "import", "objects", "naming", "exceptions"))
    ids = np.asarray([loaded.encode(text)[:1025]], np.int32)
    ready, found = decoding_variables(loaded.model, loaded.params), {}
    for sinks in (0, 4, 8):
        model = dataclasses.replace(loaded.model, policy=f"streaming(sinks={sinks}, recent={256 - sinks})")
        found[sinks] = float(np.exp(window_losses(model, ready, ids, piece=512)[0, 256:].mean()))
    assert found[0] > 1.5 * found[4]
    assert abs(found[8] / found[4] - 1) < 0.02
