"""Profiles of heads that are wired by hand, and the watching policy against rows of attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxattn.analysis import heads, look
from jaxattn.analysis.answers import answer, read_prompts
from jaxattn.analysis.retrieval import Case, copies, recall_of, retrieval, span_of
from jaxattn.errors import ConfigError, DataError
from jaxattn.head_tables import with_head_tables
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, stack_layers
from jaxattn.policies import watch
from jaxattn.rope import RopeScaling
from tests.analysis.planted import ECHO, INDUCTION, MODEL, PREVIOUS, SINK, V, params
from tests.conformance.model import params_of
from tests.conformance.policies.cases import BASE, LENGTH, PROMPT, start, step, texts

STOP, MARK = 1, 2
NEEDLE = [9, 12, 7, 15]


def case(before: int = 6, behind: int = 8) -> Case:
    """Text of tokens from 16 on, with MARK, the needle and STOP in its midst, asked for by MARK."""
    rng = np.random.default_rng(before)
    hay = rng.integers(16, V, before + behind).tolist()
    prompt = [*hay[:before], MARK, *NEEDLE, STOP, *hay[before:]]
    return Case(prompt, before + 1, before + 5, [17, MARK])


CASES = [case(), case(3, 14), case(11, 2)]


@functools.cache
def scored():
    return retrieval(MODEL, params(), CASES, stop=(STOP,), new=8, rows=2)


def test_the_head_that_copies_scores_one_and_local_sink_and_echo_heads_nothing():
    """The echo head looks at the token that was consumed, and would score if rows and tokens were misaligned."""
    found = scored()
    assert found.answers == [NEEDLE] * 3
    assert found.recall.tolist() == [1.0] * 3
    for form in ("sets", "counts"):
        expected = np.zeros((2, 4))
        expected[INDUCTION] = 1.0
        np.testing.assert_array_equal(found.mean(form), expected)


def test_on_repeats_the_echo_head_echoes_and_the_induction_head_induces():
    tokens = heads.repeated(range(2, V), size=9, rows=3, start=0)
    assert tokens.shape == (3, 37)
    assert all(len(set(row[1:10])) == 9 and (row[1:10] == row[28:]).all() for row in tokens)
    found = heads.echo_and_induction(MODEL, params(), tokens, 9)
    assert found["echo"][ECHO] == pytest.approx(1.0, abs=1e-3)
    assert found["induction"][INDUCTION] == pytest.approx(1.0, abs=1e-3)
    where = np.arange(1, 4)
    m = np.arange(10, 37)
    occurrences = (m - 1) // 9
    uniform = float(np.mean(occurrences / (m + 1)))
    for name, own in (("echo", ECHO), ("induction", INDUCTION)):
        rest = [(1, h) for h in range(4) if (1, h) != own] + [PREVIOUS]
        assert max(found[name][h] for h in rest) < 1e-3
        np.testing.assert_allclose(found[name][0, where], uniform, atol=1e-6)  # heads without a query


def test_scores_over_blocks_of_rows_are_those_of_the_whole_matrix():
    cfg = ModelConfig(**(BASE | {"num_layers": 2, "mixers": ("k_bias",)}))
    variables, size = {"params": jax.tree.map(jnp.asarray, params_of(cfg))}, 9
    tokens = heads.repeated(range(19), size=size, rows=2, start=0)
    found = heads.echo_and_induction(cfg, variables, tokens, size)
    n = np.arange(37)
    rows = jax.jit(lambda tokens: [v.weights().values for v in look(cfg, variables, tokens).attention])
    for layer, values in enumerate(rows(jnp.asarray(tokens))):
        a = np.asarray(values)[..., 1:]
        sums = {"echo": 0.0, "induction": 0.0}
        for m in range(size + 1, 37):
            for occurrence in n[(n > 0) & (n < m) & ((m - n) % size == 0)]:
                sums["echo"] = sums["echo"] + a[:, :, m, occurrence]
                sums["induction"] = sums["induction"] + a[:, :, m, occurrence + 1]
        for name, total in sums.items():
            np.testing.assert_allclose(found[name][layer], total.mean(0) / 27, atol=1e-5)
    by_blocks = jax.jit(
        lambda tokens: [
            heads.repeats_of(view, size, block=8)["induction"] for view in look(cfg, variables, tokens).attention
        ]
    )(jnp.asarray(tokens))
    np.testing.assert_allclose(by_blocks, found["induction"], atol=1e-6)


def test_the_sink_head_looks_at_the_beginning():
    tokens = np.random.default_rng(0).integers(2, V, (3, 40)).astype(np.int32)
    found = heads.sinks(MODEL, params(), tokens)
    assert found[SINK] == pytest.approx(1.0, abs=1e-3)
    assert found[1, :3].max() < 0.2
    uniform = np.mean(1 / np.arange(1, 41))
    np.testing.assert_allclose(found[0, 1:], uniform, atol=1e-5)


# --- masks


def answered(model, params, cases, masked, by="uniform") -> float:
    """Of the needles' tokens, with heads [L, H] masked in answers."""
    model = dataclasses.replace(model, policy=f"mask_heads(top=1, by={by}, phases=answers)")
    variables = with_head_tables(model, params, {"mask_heads": np.asarray(masked, np.float32)})
    cursor = read_prompts(model, variables, [c.prompt for c in cases], room=10)
    found = answer(model, variables, cursor, [c.said for c in cases], new=8, stop=(STOP,))
    return float(np.mean([recall_of(c, ids) for c, ids in zip(cases, found, strict=True)]))


@pytest.mark.parametrize("by", ["uniform", "zero"])
def test_without_the_head_that_copies_nothing_is_found_and_without_the_others_everything(by):
    top = np.where(heads.order(scored().mean()) == 1, 1.0, 0.0)
    share = lambda masked: answered(MODEL, params(), CASES, masked, by)
    assert share(top) <= 0.25
    rest = np.ones((2, 4))
    rest[INDUCTION] = rest[PREVIOUS] = 0  # which copies within a prompt and its answer, but not from the needle
    assert share(rest) == 1.0
    assert share(np.zeros((2, 4))) == 1.0


def test_heads_are_ordered_by_score_and_of_equals_the_lowest_comes_first():
    found = heads.order(np.array([[0.1, 0.9, 0.1], [0.0, 0.5, 0.9]]))
    np.testing.assert_array_equal(found, [[4, 1, 5], [6, 3, 2]])


# --- rows and what is made of them


WATCHED = {
    "rope and slots": {"rope_scaling": RopeScaling(kind="linear", factor=4.0), "mixers": ("k_bias",)},
    "alibi and a window": {"position": "alibi", "mixers": ("sigmoid(window=9)",)},
    "learned tokens": {"mixers": ("sink_token(tokens=2)",)},
    "softplus": {"mixers": ("softplus",)},
}


@pytest.mark.parametrize("name", WATCHED)
def test_a_watched_head_looks_where_its_row_of_attention_is_largest(name):
    """In grouped heads, behind padding, in a prompt and in every step of an answer."""
    cfg = ModelConfig(**(BASE | {"num_layers": 2, "policy": "watch"} | WATCHED[name]))
    plain, params, inputs = dataclasses.replace(cfg, policy=""), params_of(cfg), [jnp.asarray(x) for x in texts()]
    states, seen = start(cfg, 3, LENGTH + 4, params), {}
    for at, size, phase in [(0, PROMPT, "prompt"), *((n, 1, "answer") for n in range(PROMPT, LENGTH))]:
        _, states = step(cfg, phase, params, states, *(x[:, at : at + size] for x in inputs))
        seen[at + size - 1] = np.stack([state.top for state in states], axis=1)
    view = jax.jit(lambda params: [v.weights().values for v in look(plain, params, *inputs).attention])(
        {"params": params}
    )
    rows = np.stack([np.asarray(v)[..., -LENGTH:] if cfg.prefix_tokens == 0 else np.asarray(v) for v in view], axis=1)
    assert len(seen) == LENGTH - PROMPT + 1
    for at, top in seen.items():
        row = rows[:, :, :, at + cfg.prefix_tokens]
        found = row.argmax(-1) - cfg.prefix_tokens
        expected = np.where(found >= 0, found - np.array([0, 4, 0])[:, None, None], found)
        near = np.sort(row, axis=-1)
        clear = near[..., -1] - near[..., -2] > 1e-6
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(top[clear], expected[clear])


def test_a_row_of_nothing_but_padding_keeps_what_it_had():
    cfg = ModelConfig(**(BASE | {"num_layers": 2, "policy": "watch"}))
    params, inputs = params_of(cfg), [jnp.asarray(x[:, :PROMPT]) for x in texts()]
    states = start(cfg, 3, LENGTH, params)
    assert (np.asarray(states[0].top) == watch.NOTHING).all()
    _, states = step(cfg, "prompt", params, states, *inputs)
    before, (tokens, positions, _) = [np.asarray(s.top) for s in states], (x[:, -1:] for x in inputs)
    _, states = step(cfg, "answer", params, states, tokens, positions, jnp.zeros((3, 1), jnp.int32))
    np.testing.assert_array_equal([s.top for s in states], before)


def test_padding_behind_a_prompt_is_not_its_newest_token():
    cfg = ModelConfig(**(BASE | {"num_layers": 2, "policy": "watch"}))
    params, inputs = params_of(cfg), [np.array(x[:, :PROMPT]) for x in texts()]
    cut = PROMPT - 5
    _, states = step(cfg, "prompt", params, start(cfg, 3, LENGTH, params), *(x[:, :cut] for x in inputs))
    inputs[2][:, cut:] = 0
    _, padded = step(cfg, "prompt", params, start(cfg, 3, LENGTH, params), *inputs)
    np.testing.assert_array_equal([s.top for s in padded], [s.top for s in states])


def test_copies_are_counted_by_token_and_by_step_and_never_beyond_one():
    own = Case([5, 6, 7, 6, 8, 5, 9], 1, 5, [])  # the needle is 6 7 6 8
    looks = np.array([1, 2, 2, 3, 0, 3, 1, 3])
    answer = [6, 7, 6, 6, 5, 6, 6, 6]
    sets, counts = copies(own, answer, looks[:, None, None])
    assert sets.item() == pytest.approx(2 / 3)  # of 6, 7 and 8
    assert counts.item() == 1.0  # six copies over four places
    sets, counts = copies(own, answer[:3], looks[:3, None, None])
    assert counts.item() == pytest.approx(2 / 4)
    assert recall_of(own, [6, 8, 8, 3]) == pytest.approx(2 / 4)
    assert recall_of(own, [8, 6, 7, 6]) == 1.0


def test_an_answer_counts_if_it_holds_more_than_half_of_its_needle():
    found = scored()
    half = found._replace(recall=np.array([0.5, 0.51, 1.0]), sets=np.arange(3.0)[:, None, None] + np.zeros((3, 2, 4)))
    assert half.counted.tolist() == [False, True, True]
    assert (half.mean() == 1.5).all()
    with pytest.raises(DataError, match="none of the 3 answers holds more than 50% of its needle"):
        found._replace(recall=np.array([0.5, 0.0, 0.2])).mean()


def test_a_needle_is_where_its_tokens_stand_exactly():
    assert span_of([3, 1, 2, 1, 2, 4], [[1, 2]]) == (1, 3)
    assert span_of([3, 1, 2, 1, 2, 4], [[9, 1], [1, 2, 4]]) == (3, 6)
    assert span_of([3, 1, 2, 1, 2, 4], [[1, 2]], 2) == (3, 5)
    with pytest.raises(DataError, match="not in the prompt as they stand"):
        span_of([1, 3, 2], [[1, 2], []])  # the same set in another order is another needle


def test_what_has_no_heads_to_look_at_is_refused_and_scanned_layers_are_not():
    lightning = ModelConfig(vocab_size=V, num_layers=2, d_model=16, num_heads=2, mixers=("lightning",))
    for run in (
        lambda: retrieval(lightning, {}, CASES),
        lambda: heads.sinks(lightning, {}, np.zeros((1, 4), np.int32)),
    ):
        with pytest.raises(ConfigError, match=r"layers \(lightning\) keep no keys that a head could look at"):
            run()
    scanned = dataclasses.replace(MODEL, scan_layers=True)
    found = retrieval(scanned, stack_layers(params(), scanned), CASES[:2], stop=(STOP,), new=8, rows=2)
    np.testing.assert_array_equal(found.sets, scored().sets[:2])
    with pytest.raises(ConfigError, match="60 tokens are to be read but the model knows 48"):
        heads.sinks(MODEL, params(), np.zeros((1, 60), np.int32))
    with pytest.raises(ConfigError, match="exceed the model's 48 positions"):
        retrieval(MODEL, params(), [case(20, 20)], new=8)
    with pytest.raises(ConfigError, match="a block of 30 tokens"):
        heads.repeated(range(20), size=30, rows=1, start=0)


def test_layers_without_keys_have_zeros():
    mixed = ModelConfig(**(BASE | {"num_layers": 2, "mixers": ("lightning", "softmax")}))
    own = Case([3, 4, 5, 6, 7], 1, 4, [3])
    found = retrieval(mixed, jax.tree.map(jnp.asarray, params_of(mixed)), [own], new=3)
    assert not found.sets[:, 0].any()


# --- a model that learned it


LEARNED = ModelConfig(vocab_size=40, num_layers=2, d_model=64, num_heads=4, mlps=("none",), max_positions=64)
BLOCK, LEAD, LEARNING = 12, 4, 2


@functools.cache
def learned():
    """Parameters of a model that was trained to go on with a block of tokens that comes again. Of its second
    layer one head learns: left alone, all of them would copy."""
    rng, optimizer = np.random.default_rng(0), optax.adam(4e-3)
    params = jax.jit(Decoder(LEARNED).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            logits = Decoder(LEARNED).apply({"params": params}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses[:, LEAD + BLOCK :])

        grads = jax.grad(loss)(params)
        own = grads["layer_1"]["attn"]
        for name in "qkvo":
            per_head = jnp.arange(64) // 16 == LEARNING
            own[name]["kernel"] *= per_head[:, None] if name == "o" else per_head
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(200):
        tokens = rng.integers(4, 40, (32, LEAD + BLOCK)).astype(np.int32)
        params, state = step(params, state, jnp.asarray(np.concatenate([tokens, tokens[:, LEAD:]], axis=1)))
    return params


def test_in_a_trained_model_one_head_copies_and_without_it_nothing_is():
    rng, own = np.random.default_rng(1), []
    for _ in range(16):
        prompt = rng.permutation(np.arange(4, 40))[: LEAD + BLOCK].tolist()
        own.append(Case(prompt, LEAD + 1, LEAD + 9, [prompt[LEAD]]))
    found = retrieval(LEARNED, learned(), own, new=8, rows=16)
    assert found.recall.mean() > 0.95
    scores, one = found.mean(), np.arange(8).reshape(2, 4) == 4 + LEARNING
    assert scores[one] > 0.9
    assert scores[~one].max() < 0.5
    masked = lambda heads: answered(LEARNED, learned(), own, heads)
    assert masked(one) < 0.15  # by chance 1 in 36
    rest = ~one & (np.arange(2)[:, None] == 1)
    assert masked(rest) > found.recall.mean() - 0.05
