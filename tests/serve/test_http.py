"""The server over real sockets: many streams at once, what it refuses, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import httpx
import pytest

from jaxattn.serving import slots as device
from jaxattn.serving.engine import Engine
from jaxattn.text import load
from tests.generate.helpers import byte_run
from tests.serve.over_http import TEMPLATE, alone, chunks, idle, post, server

STREAMS = 64


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    run = byte_run(tmp_path_factory.mktemp("serve"))
    (run / "hf").mkdir()
    (run / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return load(run)


@pytest.fixture(scope="module")
def place(loaded):
    with server(loaded) as found:
        yield found


# ---------------------------------------------------------------------------------------------------- answers


@pytest.mark.smoke
def test_64_streams_at_once_each_get_their_own_answer(loaded, place):
    url, engine = place
    asked = [(f"{i} " * (1 + i % 7), 3 + i % 20) for i in range(STREAMS)]
    most = 0

    async def one(client, prompt, tokens):
        nonlocal most
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = []
            async for line in response.aiter_lines():
                load = engine.load()
                most = max(most, load["waiting"] + load["busy"])
                lines.append(line)
        return chunks(lines)

    async def all_of_them():
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            return await asyncio.gather(*(one(client, *ask) for ask in asked))

    for (prompt, tokens), events in zip(asked, asyncio.run(all_of_them()), strict=True):
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == alone(loaded, loaded.encode(prompt), tokens)
        assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert most > 20, "they did not overlap"
    idle(engine)


def test_a_whole_answer_counts_its_tokens(loaded, place):
    reply = post(place[0], {"model": "tiny", "prompt": ["ab", "cde"], "max_tokens": 6, "temperature": 0}).json()
    assert [c["text"] for c in reply["choices"]] == [alone(loaded, loaded.encode(p), 6) for p in ("ab", "cde")]
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["usage"]["total_tokens"] == 5 + reply["usage"]["completion_tokens"]
    assert reply["object"] == "text_completion"


@pytest.mark.smoke
def test_chat_renders_the_template_and_streams_deltas(loaded, place):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"messages": messages, "max_tokens": 7, "temperature": 0}
    expected = alone(loaded, loaded.encode("user: hi\nassistant:"), 7)
    whole = post(place[0], body, "/v1/chat/completions").json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected}
    streamed = post(
        place[0], {**body, "stream": True, "stream_options": {"include_usage": True}}, "/v1/chat/completions"
    )
    *events, usage = chunks(streamed.text.split("\n"))
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == expected
    assert [e["choices"][0]["delta"].get("role") for e in events] == ["assistant"] + [None] * (len(events) - 1)
    assert usage["usage"] == whole["usage"]
    assert [e["usage"] for e in events] == [None] * len(events)


def test_a_stop_string_ends_the_answer_before_it(loaded, place):
    text = alone(loaded, loaded.encode("some"), 40)
    stop = text[5:7]
    reply = post(place[0], {"prompt": "some", "max_tokens": 40, "temperature": 0, "stop": stop}).json()
    assert reply["choices"][0] == {
        "index": 0, "text": text[: text.index(stop)], "finish_reason": "stop", "logprobs": None,
    }  # fmt: skip
    idle(place[1])


def test_a_seed_repeats_a_sampled_answer(place):
    body = {"prompt": "some", "max_tokens": 30, "temperature": 1.5, "top_k": 50}
    texts = [post(place[0], {**body, "seed": seed}).json()["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_model_is_listed_and_the_server_is_well(place):
    assert httpx.get(f"{place[0]}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{place[0]}/health").json() == {"status": "ok", "waiting": 0, "busy": 0, "slots": 6}


# ------------------------------------------------------------------------------------------------------ refusals

OK = {"prompt": "a"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 1900, 400, "not JSON"),
        (b"[1]", 400, "must be an object"),
        (b"", 400, "not JSON"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ({"prompt": "a" * 3000}, 413, "more than 2000 bytes"),
        ({**OK, "model": "gpt-4"}, 404, "'gpt-4' is not served"),
        ({**OK, "model": ["tiny"]}, 404, "not served"),
        ({}, 400, "prompt is missing"),
        ({"prompt": 5}, 400, "prompt is"),
        ({"prompt": []}, 400, "prompt is"),
        ({"prompt": [[]]}, 400, "prompt is"),
        ({"prompt": [999]}, 400, "not in 0..256"),
        ({"prompt": ["a"] * 65}, 400, "up to 64"),
        ({"prompt": "a" * 200}, 400, "exceed the context of 128"),
        ({**OK, "max_tokens": 128}, 400, "exceed the context of 128"),
        ({**OK, "max_tokens": 0}, 400, "max_tokens is 0"),
        ({**OK, "max_tokens": "9"}, 400, "max_tokens is '9'"),
        ({**OK, "max_tokens": True}, 400, "max_tokens is True"),
        ({**OK, "temperature": -1}, 400, "temperature is -1"),
        ({**OK, "top_p": 0}, 400, "top_p is 0"),
        ({**OK, "seed": 1 << 63}, 400, "seed is 9223372036854775808"),
        ({**OK, "stop": [1]}, 400, "stop is [1]"),
        ({**OK, "stream": "yes"}, 400, "stream is 'yes'"),
        ({**OK, "n": 2}, 400, "n is 2"),
        ({**OK, "n": True}, 400, "n is True"),
        ({**OK, "promt": "a"}, 400, "'promt' is not known"),
        ({**OK, "messages": []}, 400, "'messages' is not known"),
    ],
)
def test_bad_requests_get_one_sentence(place, body, status, words):
    reply = post(place[0], body)
    error = reply.json()["error"]
    assert (reply.status_code, words in error["message"]) == (status, True), error
    assert "\n" not in error["message"]
    assert post(place[0], {**OK, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    "messages", [None, [], [1], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]]
)
def test_bad_messages_get_one_sentence(place, messages):
    reply = post(place[0], {"messages": messages}, "/v1/chat/completions")
    assert reply.status_code == 400
    assert "messages" in reply.json()["error"]["message"]


def test_other_paths_and_methods(place):
    assert httpx.get(f"{place[0]}/v1/completions").status_code == 405
    assert httpx.get(f"{place[0]}/nothing").json()["error"]["message"] == "GET /nothing: Not Found."


def test_values_that_ask_for_nothing_are_accepted(place):
    body = {**OK, "max_tokens": 2, "n": 1, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "stop": None}
    assert post(place[0], body).status_code == 200


# -------------------------------------------------------------------------------------------- clients that go away


def test_clients_that_leave_give_their_slots_back(loaded):
    """Thirty clients hang up, some before and some in the middle of a stream; the next one is served at once."""
    with server(loaded, slots=2, context=4000) as (url, engine):
        body = {"prompt": "a", "max_tokens": 3900, "temperature": 0}

        async def leave(client, number):
            if number % 3 == 0:  # not streaming: the connection is dropped while it waits
                with contextlib.suppress(httpx.TimeoutException):
                    await client.post(f"{url}/v1/completions", json=body, timeout=0.3)
                return
            with contextlib.suppress(httpx.TimeoutException):
                async with client.stream(
                    "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=0.5
                ) as response:
                    async for _ in response.aiter_lines():
                        return

        async def all_of_them():
            async with httpx.AsyncClient() as client:
                await asyncio.gather(*(leave(client, n) for n in range(30)))

        asyncio.run(all_of_them())
        idle(engine)
        assert post(url, {"prompt": "a", "max_tokens": 3, "temperature": 0}).json()["choices"][0]["text"] == alone(
            loaded, loaded.encode("a"), 3
        )


def test_a_body_that_never_ends_is_cut_off(place):
    def endless():
        while True:
            yield b" " * 1000

    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):  # the server may hang up first
        assert httpx.post(f"{place[0]}/v1/completions", content=endless(), timeout=20).status_code == 413
    assert post(place[0], {**OK, "max_tokens": 2}).status_code == 200


def test_a_full_queue_is_said(loaded):
    with server(loaded, slots=1, queue=1, context=4000) as (url, engine):
        body = {"prompt": "a", "max_tokens": 3900, "temperature": 0, "stream": True}
        with contextlib.ExitStack() as stack:
            for waiting in (0, 1):
                stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60))
                deadline = time.monotonic() + 30
                while (load := engine.load()) != {"waiting": waiting, "busy": 1, "slots": 1}:
                    assert time.monotonic() < deadline, load
                    time.sleep(0.01)
            reply = post(url, OK)
            assert reply.status_code == 429
            assert "1 requests are waiting" in reply.json()["error"]["message"]
        idle(engine)
        assert post(url, {**OK, "max_tokens": 2}).status_code == 200


def test_a_broken_engine_answers_500_then_503(loaded, monkeypatch):
    """First a request that fails by itself, then what nobody survives."""
    with server(loaded) as (url, _):
        monkeypatch.setattr(device, "insert", lambda *args: 1 / 0)
        broken = post(url, OK)
        assert broken.status_code == 500
        assert "ZeroDivisionError" in broken.json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 200
        monkeypatch.setattr(Engine, "_read", lambda *args: 1 / 0)
        gone = post(url, OK)
        assert gone.status_code == 503
        assert "the engine has stopped (ZeroDivisionError" in gone.json()["error"]["message"]
        assert post(url, OK).status_code == 503
        assert httpx.get(f"{url}/health").status_code == 503
