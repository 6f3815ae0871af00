"""DuoAttention against its masks in NumPy, the gates' training form, and which heads a profile makes stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.head_tables import settled, with_head_tables
from jaxattn.mechanisms import get
from jaxattn.models import ModelConfig
from jaxattn.nn.stream import Stream
from jaxattn.policies import cost, duo, resolve
from jaxattn.policies.parts import key_heads
from jaxattn.reader import hidden_one_by_one
from tests.conformance.model import params_of
from tests.decoding import core_of, site_of
from tests.policies.key_heads import DIM, HEADS, KV_HEADS, LEFT, VALUES, arrays, places, run, softmax_over

LENGTH, PROMPT = 30, 15
QKV = arrays(LENGTH)


def expected(spec, row, left, prompt, window=None):
    """[T, H, V] by the masks of the paper, of one row's own tokens."""
    q, k, v = (x[row, left:] for x in QKV)
    out = np.zeros((len(q), HEADS, VALUES))
    full = key_heads.full_heads(spec.full, site_of(*QKV))
    for t in range(len(q)):
        at = np.arange(t + 1)
        at = at[at > t - (window or 10**9)]
        for head in range(KV_HEADS):
            near = (at < spec.sinks) | (t - at <= spec.recent)
            whole = head in full or (spec.prompt == "dense" and t < prompt - left)
            own = at if whole else at[near]
            group = slice(2 * head, 2 * head + 2)
            out[t, group] = softmax_over(q[t, group], k[own, head], v[own, head])
    return out


@pytest.mark.parametrize("prompt", ["stream", "dense"])
@pytest.mark.parametrize(
    ("full", "sinks", "recent", "window"),
    [("1", 3, 5, None), ("1", 3, 5, 9), ("2", 0, 4, None), ("0", 2, 1, None), ("3", 2, 3, None)],
)
def test_each_head_reads_its_own_keys(full, sinks, recent, window, prompt):
    spec = duo.Spec(full=full, sinks=sinks, recent=recent, prompt=prompt)
    found, _ = run(duo, spec, QKV, prompt=PROMPT, window=window)
    for row, left in enumerate((0, LEFT)):
        np.testing.assert_allclose(found[row, left:], expected(spec, row, left, PROMPT, window), atol=2e-5)


def test_pieces_and_several_tokens_of_an_answer_change_nothing():
    spec = duo.Spec(full="1", sinks=3, recent=5)
    whole, _ = run(duo, spec, QKV, prompt=PROMPT)
    pieces, _ = run(duo, spec, QKV, prompt=PROMPT, pieces=(6, 1, 8))
    several, _ = run(duo, spec, QKV, prompt=PROMPT, width=3)
    live = places((0, LEFT), LENGTH)[1] > 0
    for found in (pieces, several):
        np.testing.assert_allclose(found[live], whole[live], atol=2e-6)


def test_a_second_piece_of_a_dense_prompt_is_no_number():
    found, _ = run(duo, duo.Spec(full="1", prompt="dense"), QKV, prompt=PROMPT, pieces=(7, 8))
    assert np.isfinite(found[0, :7]).all()
    assert np.isnan(found[0, 7:PROMPT, 2:]).all()


def test_what_is_held_is_the_papers_formula():
    """n_full S + n_stream (sinks + recent + the token itself), of keys and values."""
    model = ModelConfig(**SMALL, policy="duo(full='1.0.3.2', sinks=4, recent=11)")
    heads = [1, 0, 2, 1]
    for layer, full in enumerate(heads):
        spent = cost(model.keeping, model.site(layer), length=99, capacity=100)
        tokens = full * 100 + (2 - full) * (4 + 11 + 1)
        counters = 4 + (4 + 8 * 100 if full else 0) + (8 * 16 if full < 2 else 0)  # lengths, positions, segments
        assert spent.held == tokens * (8 + 8) * 4 + counters
        assert spent.read == tokens / 2 * 2 * 16 * 4
        assert spent.share == tokens / 200


SMALL = {"vocab_size": 7, "num_layers": 4, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "d_ff": 8}


# ------------------------------------------------------------------------------------------------ gates


def twins(gates, qkv):
    """o [2B, T, H, V] of rows and their twins."""
    spec = duo.Spec(sinks=3, recent=5, twins=True)
    q, k, v = (jnp.concatenate([x, x]) for x in qkv)
    positions, segments = map(jnp.asarray, places((0,) * len(q), q.shape[1]))
    here = Stream(positions, segments, heads={"duo": gates})
    state = duo.init(spec, site_of(q, k, v), batch=len(q), capacity=q.shape[1])
    return duo.step(state, q, k, v, here, spec=spec, site=site_of(q, k, v), core=core_of(get("softmax"), DIM))[0]


@jax.jit
def gap_and_slope(gates):
    gap = lambda gates: (lambda o: jnp.mean((o[:2] - o[2:]) ** 2))(twins(gates, QKV))
    return twins(gates, QKV), *jax.value_and_grad(gap)(gates)


def test_gates_of_one_are_the_full_stream_and_of_zero_an_a_shape():
    o, gap, slope = gap_and_slope(jnp.ones(HEADS))
    assert gap == 0
    assert not np.asarray(slope).any()
    np.testing.assert_array_equal(o[:2], o[2:])
    o, gap, slope = gap_and_slope(jnp.zeros(HEADS))
    assert gap > 0
    assert (np.asarray(slope) < 0).all(), "a larger gate brings every head nearer to the full stream"
    spec = duo.Spec(full="0", sinks=3, recent=5)
    np.testing.assert_allclose(o[2], expected(spec, 0, 0, 0), atol=2e-5)
    np.testing.assert_allclose(o[0], expected(duo.Spec(full="3"), 0, 0, 0), atol=2e-5)


def test_the_slope_of_a_gate_is_its_two_branches_apart():
    """∂o/∂α = o^F - o^stream, and the full branch hands nothing back to queries and keys of its stream."""
    gates = jnp.array([0.2, 0.7, 0.5, 1.0])
    o, _, slope = gap_and_slope(gates)
    whole, streamed = np.asarray(o[:2], np.float64), np.asarray(gap_and_slope(jnp.zeros(HEADS))[0][2:], np.float64)
    apart = whole - streamed
    wanted = -2 * (1 - np.asarray(gates)) * np.sum(apart**2, axis=(0, 1, 3)) / apart.size
    np.testing.assert_allclose(slope, wanted, rtol=2e-4, atol=1e-7)
    back = jax.jit(jax.grad(lambda q: jnp.sum(twins(jnp.ones(HEADS), (q, *QKV[1:]))[2:])))(QKV[0])
    assert not np.asarray(back).any()


# ------------------------------------------------------------------------------------------------ which heads


def test_the_quantile_is_of_the_whole_model_and_a_key_head_has_its_largest_gate():
    table = np.array([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.4, 0.7]], np.float32)  # key heads: .9 .3 / .8 .7
    for sparsity, text in ((0.5, "1.1"), (0.25, "1.3"), (0.0, "3.3"), (1.0, "0.0")):
        plan = resolve(settled(f"duo(sparsity={sparsity}, sinks=1)", {"duo": table}, kv_heads=2))
        assert (plan.spec.full, plan.spec.sinks) == (text, 1)
    assert (
        settled("duo(full='2')", {"duo": table}, 2) == "duo(sparsity=0.5, sinks=64, recent=256, prompt='stream', "
        "full='2', twins=False)"
    )
    assert settled("h2o(heavy=3)", {"duo": table}, 2) == "h2o(heavy=3)"
    equal = resolve(settled("duo", {"duo": np.ones((2, 4))}, 2)).spec.full
    assert equal == "3.0", "of equals the first half"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("duo", "--heads FILE"),
        ("duo(full='4')", "2 key heads, but full names one beyond them"),
        ("duo(full='x')", "hexadecimal number a layer"),
        ("duo(full='-1')", "hexadecimal number a layer"),
        ("duo(full='1', sinks=-1)", "duo.sinks is -1"),
        ("duo(full='1', recent=0)", "duo.recent is 0"),
        ("duo(full='1', sparsity=1.5)", "duo.sparsity is 1.5"),
        ("duo(full='1', prompt=half)", "duo.prompt is 'half'"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(text, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        ModelConfig(**SMALL, policy=text)


def test_twins_need_pairs_and_gates():
    q, k, v = (jnp.asarray(x[:1]) for x in QKV)
    spec, site = duo.Spec(twins=True), site_of(q, k, v)
    state, core = duo.init(spec, site, batch=1, capacity=LENGTH), core_of(get("softmax"), DIM)
    here = Stream(*map(jnp.asarray, places((0,), LENGTH)), heads={"duo": jnp.ones(HEADS)})
    with pytest.raises(ConfigError, match="even batch"):
        duo.step(state, q, k, v, here, spec=spec, site=site, core=core)


def test_a_table_of_scores_reaches_the_right_heads_of_each_group():
    """ZeroTuning with a factor a head, around heads that attend in two groups, as around all at once."""
    tokens = np.random.default_rng(1).integers(0, 7, (2, 20))
    table = np.random.default_rng(2).uniform(0.2, 5.0, (2, 4)).astype(np.float32)
    found, base = [], SMALL | {"num_layers": 2}
    for policy in ("zero_tuning", "zero_tuning, duo(full='1.2', sinks=2, recent=30)"):
        model = ModelConfig(**base, policy=policy)
        variables = with_head_tables(model, params_of(model), {"zero_tuning": table})
        found.append(np.asarray(hidden_one_by_one(model, variables, tokens, prefill=11)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    plain = ModelConfig(**base)
    bare = np.asarray(hidden_one_by_one(plain, {"params": params_of(plain)}, tokens, prefill=11))
    assert np.abs(bare - found[0]).max() > 0.01
