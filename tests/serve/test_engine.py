"""Continuous batching: whoever the neighbours are, a request gets the tokens it would get alone."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import jaxattn
from jaxattn.errors import ConfigError
from jaxattn.sampling import Sampling
from jaxattn.serving.engine import TURN, Engine
from jaxattn.serving.ticket import QueueFull, Stopped
from tests.serve.engines import GREEDY, Inbox, ask, engines, model_of  # noqa: F401 (a fixture)

MECHANISMS = ["softmax", "softmax(window=7)", "landmark(block=5)", "based", "titans(depth=1)", "sink_token", "aaren"]


def prompts(count, longest=19):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 41, 1 + int(n)).tolist() for n in rng.integers(0, longest, count)]


@pytest.mark.parametrize("attn", MECHANISMS)
def test_requests_in_shared_slots_get_what_each_gets_alone(attn, running):
    """Ten requests of other lengths over three slots: they begin and end at different times."""
    model, params = model_of(attn, num_layers=2 if attn == "softmax" else 1)  # how many does not depend on the kind
    engine = running(model, params)
    asked = [(ids, 3 + 5 * (i % 4)) for i, ids in enumerate(prompts(10))]
    inboxes = [ask(engine, ids, most) for ids, most in asked]
    for inbox, (ids, most) in zip(inboxes, asked, strict=True):
        alone = jaxattn.generate(model, params, np.asarray([ids]), max_new_tokens=most).tokens[0]
        assert inbox.wait() == alone.tolist()
        assert inbox.reason == "length"
    assert engine.load() == {"waiting": 0, "busy": 0, "slots": 3}


def test_a_long_prompt_is_read_in_chunks_between_the_others_tokens(running):
    model, params = model_of("softmax")
    engine = running(model, params, context=1100)
    short = ask(engine, [3, 4, 5], 1000)
    assert short.first.wait(60)
    long = prompts(1, 2)[0] * 500
    late = ask(engine, long, 5)
    assert late.first.wait(60)
    assert not short.done.is_set()
    late.wait()
    assert late.tokens == jaxattn.generate(model, params, np.asarray([long]), max_new_tokens=5).tokens[0].tolist()
    short.ticket.cancel()


def test_short_prompts_soon_decode_together_and_a_long_one_lets_the_others_go_on():
    """Who is live whenever a block is decoded."""
    model, params = model_of("softmax")
    engine = Engine(model, params, slots=8, context=1100, queue=64, block=4)
    seen, program = [], engine._program

    def watched(variables, slots, live):
        seen.append(int(live.sum()))
        return program(variables, slots, live)

    engine._program = watched
    inboxes = [ask(engine, [i, 3, 4], 9) for i in range(8)]
    engine.start()
    for inbox in inboxes:
        inbox.wait()
    assert seen == [8, 8, 8]
    seen.clear()
    first = ask(engine, [5], 1000)
    assert first.first.wait(60)
    late = ask(engine, [6] * (3 * TURN + 1), 5)
    late.wait()
    assert 3 <= seen.index(2) < 1000 // 4
    first.ticket.cancel()
    engine.close()


@pytest.mark.smoke
def test_every_row_has_its_own_sampling_and_seed(running):
    model, params = model_of("softmax")
    engine = running(model, params)
    hows = [Sampling(0.8), GREEDY, Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.7), Sampling(1.2, min_p=0.2)]
    inboxes = [ask(engine, [1, 2, 3], 12, how, seed) for seed, how in enumerate(hows)]
    for seed, (inbox, how) in enumerate(zip(inboxes, hows, strict=True)):
        alone = jaxattn.generate(
            model, params, np.asarray([[1, 2, 3]]), max_new_tokens=12, key=jax.random.key(seed),
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, min_p=how.min_p,
        )  # fmt: skip
        assert inbox.wait() == alone.tokens[0].tolist(), how


def test_a_stop_token_ends_a_row_and_is_its_last(running):
    model, params = model_of("softmax")
    alone = jaxattn.generate(model, params, np.asarray([[7, 8, 9]]), max_new_tokens=30).tokens[0].tolist()
    stop = alone[10]
    engine = running(model, params)
    inbox = ask(engine, [7, 8, 9], 30, stop=[stop])
    assert inbox.wait() == alone[: alone.index(stop) + 1]
    assert inbox.reason == "stop"


def test_a_cancelled_request_frees_its_slot_for_the_next(running):
    model, params = model_of("softmax")
    engine = running(model, params, slots=1, context=4000)
    endless, waiting, last = ask(engine, [1], 3900), ask(engine, [2], 3900), ask(engine, [3], 4)
    assert endless.first.wait(60)
    waiting.ticket.cancel()
    endless.ticket.cancel()
    assert last.wait() == jaxattn.generate(model, params, np.asarray([[3]]), max_new_tokens=4).tokens[0].tolist()
    assert not waiting.tokens
    assert endless.reason is None
    assert engine.load()["busy"] == 0


def test_too_many_waiting_are_refused_and_those_who_left_do_not_count(running):
    model, params = model_of("softmax")
    engine = running(model, params, slots=1, queue=2, context=4000)
    first = ask(engine, [1], 3900)
    assert first.first.wait(60)
    second, third = ask(engine, [1], 5), ask(engine, [1], 5)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        ask(engine, [1], 5)
    second.ticket.cancel()
    fourth = ask(engine, [1], 5)
    first.ticket.cancel()
    assert third.wait() == fourth.wait()


@pytest.mark.parametrize(("ids", "most"), [([], 3), ([1], 0), ([1] * 60, 5)])
def test_impossible_requests_are_refused(running, ids, most):
    engine = running(*model_of("softmax"))
    with pytest.raises(ConfigError):
        ask(engine, ids, most)


def test_impossible_engines_are_refused():
    model, params = model_of("softmax", max_positions=32)
    for more, words in (({"slots": 0}, "slots is 0"), ({"context": 33}, "knows 32 positions")):
        with pytest.raises(ConfigError, match=words):
            Engine(model, params, **({"slots": 1, "context": 8, "queue": 1} | more))


def test_whoever_is_answered_counts_as_busy(running):
    """Alone, and beside others."""
    engine = running(*model_of("softmax"))
    for count in (1, 2):
        inboxes, seen = [Inbox() for _ in range(count)], []

        def tell(tokens, reason, inbox, seen):
            if not reason:
                seen.append(engine.load()["busy"])
            inbox(tokens, reason)

        for inbox in inboxes:
            engine.submit([1], 60, GREEDY, 0, (), functools.partial(tell, inbox=inbox, seen=seen))
        for inbox in inboxes:
            inbox.wait()
        assert 0 not in seen
        assert count in seen


@pytest.mark.parametrize("length", [10, 24, 25, 31])
def test_an_answer_may_take_the_last_position(running, length):
    """What a block makes beyond the end has positions that the model does not know, and means nothing."""
    model, params = model_of("softmax", position="learned", max_positions=32)
    engine = running(model, params, context=32, block=8)
    alone = jaxattn.generate(model, params, np.asarray([[3] * length]), max_new_tokens=32 - length).tokens[0].tolist()
    inbox = ask(engine, [3] * length, 32 - length)
    assert (inbox.wait(), inbox.reason) == (alone, "length")


def test_closing_before_the_start_tells_those_who_wait():
    engine = Engine(*model_of("softmax"), slots=1, context=64, queue=4)
    waiting = ask(engine, [1], 5)
    engine.close()
    assert waiting.reason == "error"


def test_closing_tells_those_who_wait():
    engine = Engine(*model_of("softmax"), slots=1, context=4000, queue=4)
    engine.start()
    taken, waiting = ask(engine, [1], 3900), ask(engine, [1], 5)
    assert taken.first.wait(60)
    engine.close()
    assert (taken.reason, waiting.reason) == ("error", "error")
    with pytest.raises(Stopped):
        ask(engine, [1], 5)
