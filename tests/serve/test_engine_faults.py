"""A request that goes wrong ends alone: whatever it does to the model, the others and the engine go on."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn import _generate, reader
from jaxattn.errors import ConfigError
from jaxattn.nn import decoding, layerwise
from jaxattn.nn.decoding import why_plain
from jaxattn.nn.layers import ROWS
from jaxattn.rope import RopeScaling
from jaxattn.sampling import Sampling
from jaxattn.serving import engine as engine_module
from jaxattn.serving import slots as device
from jaxattn.serving.engine import Engine
from jaxattn.serving.ticket import Stopped
from tests.serve.engines import GREEDY, ask, model_of

MODEL, PARAMS = model_of("softmax")


@pytest.fixture(scope="module")
def engine():
    found = Engine(MODEL, PARAMS, slots=3, context=256, queue=64, block=4)
    found.start()
    yield found
    found.close()


def alone(ids, most, params=PARAMS):
    return jaxattn.generate(MODEL, params, np.asarray([ids]), max_new_tokens=most).tokens[0].tolist()


def well(engine):
    """The engine answers, and all its slots are free again."""
    assert ask(engine, [3, 4], 6).wait() == alone([3, 4], 6)
    assert not engine.failure
    assert engine.load() == {"waiting": 0, "busy": 0, "slots": 3}


def failing(function, when):
    """`function`, which raises where `when` says so of its arguments, once."""
    left = [1]

    def call(*args, **more):
        if left[0] and when(*args, **more):
            left[0] = 0
            raise OverflowError("Python integer 2147483648 out of bounds for int32\nand more" + "x" * 5000)
        return function(*args, **more)

    return call


def test_a_prompt_that_fails_ends_alone_and_its_neighbours_go_on(engine, monkeypatch):
    """Also one that fails at its second piece."""
    neighbours = [ask(engine, [i], 120) for i in (1, 2)]
    assert all(inbox.first.wait(60) for inbox in neighbours)
    read = engine_module.prefill_chunks

    def broken(model, variables, tokens, *rest):
        if tokens.shape[1] < 140:
            return read(model, variables, tokens, *rest)
        pieces = read(model, variables, tokens, *rest)
        return (piece if i == 0 else 1 / 0 for i, piece in enumerate(pieces))

    monkeypatch.setattr(engine_module, "prefill_chunks", broken)
    bad, good = ask(engine, [5] * 140, 5), ask(engine, [7], 5)
    bad.wait()
    assert bad.reason == "error"
    assert bad.ticket.failure == "the prompt could not be read (ZeroDivisionError: division by zero)"
    assert good.wait() == alone([7], 5)
    assert [inbox.wait() for inbox in neighbours] == [alone([i], 120) for i in (1, 2)]
    well(engine)


def test_a_prompt_that_cannot_even_begin_ends_alone(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "split", failing(jax.random.split, lambda *args: True))
        inbox = ask(engine, [1], 5)
        inbox.wait()
    assert inbox.reason == "error"
    assert "could not be read (OverflowError" in inbox.ticket.failure
    well(engine)


@pytest.mark.parametrize(("owner", "place"), [(device, "insert"), (None, "_program")])
def test_when_the_slots_fail_those_in_them_end_and_the_next_are_served(engine, monkeypatch, owner, place):
    owner = owner or engine
    monkeypatch.setattr(owner, place, failing(getattr(owner, place), lambda *args: True))
    first, second = ask(engine, [1], 200), ask(engine, [2], 5)
    assert first.done.wait(60)
    assert second.done.wait(60)
    assert first.reason == "error"
    assert first.ticket.failure.startswith("OverflowError: Python integer 2147483648 out of bounds for int32 and more")
    assert len(first.ticket.failure) <= 200
    well(engine)


def test_logits_that_are_no_numbers_end_their_request_alone():
    """Token 7 makes everything behind it NaN."""
    params = {**PARAMS, "embed": PARAMS["embed"].at[7].set(jnp.nan)}
    found = Engine(MODEL, params, slots=3, context=256, queue=64, block=4)
    found.start()
    try:
        ids = next([i] for i in range(8, 41) if 7 not in alone([i], 150, params))
        neighbour = ask(found, ids, 150)
        assert neighbour.first.wait(60)
        bad, other = ask(found, [1, 7, 2], 20), ask(found, [*ids], 20, Sampling(0.0, 3))
        for inbox in (bad, other, neighbour):
            inbox.wait()
        assert bad.reason == "error"
        assert "no numbers" in bad.ticket.failure
        assert not bad.tokens
        assert neighbour.tokens == alone(ids, 150, params)
        assert other.tokens == neighbour.tokens[:20]
        lone = ask(found, [7], 5)
        lone.wait()
        assert lone.reason == "error"
        assert ask(found, ids, 5).wait() == neighbour.tokens[:5]
    finally:
        found.close()


def test_whoever_cannot_be_told_is_let_go(engine):
    def deaf(tokens, reason):
        raise RuntimeError("Event loop is closed")

    for count in (1, 2):
        tickets = [engine.submit([1], 200, GREEDY, 0, (), deaf) for _ in range(count)]
        deadline = time.monotonic() + 30
        while not all(ticket.cancelled for ticket in tickets):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        well(engine)


@pytest.mark.parametrize(
    ("ids", "seed", "words"),
    [([41], 0, "token 41"), ([-1], 0, "token -1"), ([1 << 40], 0, "token 10995"), ([1], 1 << 63, "seed is 9223"),
     ([1], -(1 << 63) - 1, "seed is -922")],
)  # fmt: skip
def test_what_the_device_cannot_hold_is_refused_before_it_gets_there(engine, ids, seed, words):
    with pytest.raises(ConfigError, match=words):
        ask(engine, ids, 3, seed=seed)
    well(engine)


def test_every_seed_of_64_bits_draws_its_own(engine):
    hot = Sampling(5.0)
    seeds = [0, 1, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, -1, -(1 << 63), (1 << 63) - 1]
    drawn = [tuple(ask(engine, [1], 24, hot, seed).wait()) for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    own = jaxattn.generate(
        MODEL, PARAMS, np.asarray([[1]]), max_new_tokens=24, key=jax.random.key((1 << 32) - 1), temperature=5.0
    )
    assert own.tokens[0].tolist() == list(drawn[2])


def test_an_engine_that_cannot_go_on_tells_everybody(monkeypatch):
    found = Engine(MODEL, PARAMS, slots=2, context=256, queue=64, block=4)
    monkeypatch.setattr(found, "_program", lambda *args: 1 / 0)
    monkeypatch.setattr(device, "empty", lambda *args: 1 / 0)  # no memory for new slots either
    inboxes = [ask(found, [1], 200) for _ in range(3)]  # in front of the start, which the first of them would end
    found.start()
    for inbox in inboxes:
        inbox.wait()
    assert [inbox.reason for inbox in inboxes] == ["error"] * 3
    assert "ZeroDivisionError" in found.failure
    with pytest.raises(Stopped, match="ZeroDivisionError"):
        ask(found, [1], 5)


@pytest.mark.parametrize("committed", [False, True], ids=["", "committed"])
def test_a_warm_engine_compiles_nothing_more(committed):
    """Also with parameters that are bound to a device, as those of a checkpoint are."""
    params = jax.device_put(PARAMS, jax.devices()[0]) if committed else PARAMS
    found = Engine(MODEL, params, slots=3, context=300, queue=64, block=4)
    found.warm_up()
    want = alone([3, 4], 6)  # which compiles its own
    programs = (
        layerwise._enter, layerwise._layer, layerwise._leave, reader._start, reader._start_again,
        _generate._counters, device.insert, device.empty,
    )  # fmt: skip
    before = [program._cache_size() for program in programs]
    found.start()
    try:
        for count in (1, 3):
            inboxes = [ask(found, [3] * (1 + 90 * i), 100, Sampling(0.5 * i)) for i in range(count)]
            inboxes.append(ask(found, [4] * 200, 5))
            for inbox in inboxes:
                inbox.wait()
        assert ask(found, [3, 4], 6).wait() == want
    finally:
        found.close()
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("attn", "more"),
    [
        ("landmark(block=5,retrieve=1,context=24)", {}),
        ("softmax", {"rope_scaling": RopeScaling("dynamic", 4.0, original_length=24)}),
    ],
    ids=["pieces of a mechanism", "whole prompts"],
)
def test_every_size_of_a_prompt_is_compiled_before_the_first_comes(attn, more):
    model, params = model_of(attn, num_layers=1, **more)
    found = Engine(model, params, slots=2, context=300, queue=64, block=4)
    found.warm_up()
    before = [program._cache_size() for program in (layerwise._layer, reader._start_again)]
    found.start()
    try:
        for length in (1, 30, 60, 130, 290):
            assert len(ask(found, [3] * length, 2).wait()) == 2
    finally:
        found.close()
    assert [program._cache_size() for program in (layerwise._layer, reader._start_again)] == before


def test_generate_compiles_a_block_once_for_parameters_that_are_bound_to_a_device():
    params = jax.device_put(PARAMS, jax.devices()[0])
    before = _generate.decode_block._cache_size()
    jaxattn.generate(MODEL, params, np.asarray([[1, 2]]), max_new_tokens=3 * _generate.BLOCK)
    assert _generate.decode_block._cache_size() <= before + 1
    turned = decoding._turned._cache_size()
    jaxattn.generate(MODEL, params, np.asarray([[1, 2]]), max_new_tokens=3)
    assert decoding._turned._cache_size() == turned, "the parameters of the next call are laid out by the same programs"


@pytest.mark.skipif(bool(why_plain(MODEL)), reason="products of single rows go to XLA here")
def test_parameters_are_turned_and_cast_once():
    model, params = model_of("softmax", dtype="bfloat16")
    rows = decoding.decoding_variables(model, params)[ROWS]
    kernel = params["layer_0"]["mlp"]["up"]["kernel"]
    assert {str(x.dtype) for x in jax.tree.leaves(rows)} == {"bfloat16"}
    np.testing.assert_array_equal(rows["layer_0"]["mlp"]["up"]["kernel"], kernel.astype(jnp.bfloat16).T)
