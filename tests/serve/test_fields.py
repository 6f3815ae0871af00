"""What a request may hold: neutral values are accepted, any other is one sentence, and nothing ends the server."""

from __future__ import annotations

import json

import httpx
import pytest

from jaxattn.serving.request_fields import CHAT, LABELS, NEUTRAL, TEXT
from jaxattn.text import load
from tests.generate.helpers import byte_run
from tests.serve.over_http import alone, post, server

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('Only users may speak here') }}{% endif %}"
    "{{ m.role }}{% if m.name %} ({{ m.name }}){% endif %}: {{ m['content'] + '|' }}{% endfor %}"
    "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}{{ reasoning_effort }}"
)
CHATS = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
TINY = {"max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    run = byte_run(tmp_path_factory.mktemp("fields"))
    (run / "hf").mkdir()
    (run / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return load(run)


@pytest.fixture(scope="module")
def url(loaded):
    with server(loaded) as (url, _):
        yield url
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0, "busy": 0, "slots": 6}


def refused(reply, *words):
    """One sentence in OpenAI's shape, that names all of `words`."""
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    message = error["message"]
    assert len(message) <= 2000
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------- bytes

BODY = b'{"prompt": "a", "max_tokens": 1, "x": 0}'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "a\xff"}', "byte 13 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a\x00"}', "not JSON"),
        (b'{"prompt": "\\ud800"}', "prompt holds half of a surrogate pair"),
        (b'{"prompt": ["a", "b\\udc00"]}', "prompt holds half of a surrogate pair"),
        (b'{"prompt": "a", "stop": ["\\ud800"]}', "stop holds half of a surrogate pair"),
        (b'{"prompt": "a", "metadata": {"\\ud800": "x"}}', "metadata holds half of a surrogate pair"),
        (b'{"prompt": "a", "\\ud800": 1}', "is not known"),
        (b'{"model": "\\ud800", "prompt": "a"}', ""),
        (b'{"prompt": "a", "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}", ""),
        (b'{"prompt": "a", "stop": ' + b"[" * 970 + b"]" * 970 + b"}", ""),
        (b'{"prompt": "a", "prompt": "b"}', "names 'prompt' twice"),
        (b'{"prompt": "a", "metadata": {"a": 1, "a": 1}}', "names 'a' twice"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 1900 + b"}", "exceed the context of 128"),
        (b'{"prompt": "a", "temperature": ' + b"9" * 1900 + b"}", "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf"),
        (b'{"prompt": "a", "top_p": NaN}', "top_p is nan"),
        (b'{"prompt": "a", "presence_penalty": NaN}', "presence_penalty is nan"),
        (b'{"prompt": "a", "top_k": 2147483648, "temperature": 1}', "top_k is 2147483648"),
        (b'{"prompt": "a", "seed": -9223372036854775809}', "seed is -9223372036854775809"),
        (b'{"prompt": [99999999999999999999999999]}', "of the prompt is not in"),
        (b'{"prompt": "a", "max_tokens": 1} x', "Extra data"),
        (b"null", "NoneType"),
    ],
)  # fmt: skip
def test_odd_bytes_are_one_sentence(url, body, words):
    reply = post(url, body)
    if b"model" in body:
        assert reply.status_code == 404
        assert "'\\ud800' is not served here" in reply.json()["error"]["message"]
    elif b'{"a":{' in body and reply.status_code == 200:
        assert reply.json()["usage"]  # as deep as this Python reads
    else:
        refused(reply, words)


@pytest.mark.parametrize(
    "body",
    [b"\xef\xbb\xbf" b'{"prompt": "a", "max_tokens": 1}', b'{"prompt": "\\u0000", "max_tokens": 1}',
     b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}', b'{"prompt": "\xf0\x9f\x98\x80"}'],
)  # fmt: skip
def test_odd_but_valid_bytes_are_answered(url, body):
    reply = post(url, body)
    assert reply.status_code == 200, reply.text


# --------------------------------------------------------------------------------------------------------- fields

ODD = [True, 1.5, -7, 1 << 70, "odd", [], {}, ["x"], [[1]], {"a": 1}, [None]]
RIGHT = {  # what a field of this table may be among ODD
    "prompt": ("odd", ["x"], [[1]]), "temperature": (1.5, 1 << 70), "seed": (-7,), "stream": (True,),
    "stop": ("odd", [], ["x"]), "stream_options": ({},), "chat_template_kwargs": ({},),
}  # fmt: skip


@pytest.mark.parametrize("field", [*TEXT, "messages", "chat_template_kwargs", "reasoning_effort", *NEUTRAL, *LABELS])
def test_a_value_of_the_wrong_type_is_one_sentence_that_names_it(url, field):
    path = CHATS if field in CHAT and field not in TEXT else "/v1/completions"
    own = {"messages": [USER]} if path == CHATS else {"prompt": "a"}
    for value in ODD:
        reply = post(url, {**own, "max_tokens": 1, field: value}, path)
        right = RIGHT.get(field, ())
        right += tuple(v for v in ODD if any(type(v) is type(n) and v == n for n in NEUTRAL.get(field, ())))
        right += tuple(v for v in ODD if type(v) is LABELS.get(field))
        right += ("odd",) if field == "reasoning_effort" else ()
        if any(type(value) is type(r) and value == r for r in right) or (field, value) == ("reasoning_effort", True):
            assert reply.status_code == 200, (field, value, reply.text)
        elif field == "reasoning_effort":
            assert reply.status_code == 200  # the template's own affair
        elif field == "model":
            assert reply.status_code == 404
        else:
            refused(reply, field)


@pytest.mark.parametrize("path", ["/v1/completions", CHATS])
def test_null_and_values_that_ask_for_nothing_change_nothing(url, path):
    own = {"messages": [USER]} if path == CHATS else {"prompt": "hi"}
    bare = post(url, {**own, "max_tokens": 6, "temperature": 0}, path).json()["choices"]
    known = [f for f in (CHAT if path == CHATS else TEXT) if f not in ("messages", "max_tokens", "temperature")]
    bodies = [dict.fromkeys([*known, *NEUTRAL, *LABELS])]
    bodies += [{field: value} for field, values in NEUTRAL.items() for value in values]
    bodies += [{f: float(v)} for f, values in NEUTRAL.items() for v in values if type(v) is int]
    bodies += [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "parallel_tool_calls": True},
        {"store": False, "parallel_tool_calls": False, "prompt_cache_key": "k", "service_tier": "auto"},
        {"top_k": -1, "top_p": 1, "min_p": 0, "stop": "", "seed": 3, "stream": False},
        {"top_k": 0, "stop": [], "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"max_completion_tokens": 6},
        {"model": "tiny"},
    ]
    for body in bodies:
        reply = post(url, {"max_tokens": 6, "temperature": 0, **body, **own}, path)
        assert reply.status_code == 200, (body, reply.text)
        assert reply.json()["choices"] == bare, body


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, ("max_tokens is 3", "max_completion_tokens is 4", "give one")),
        ({"max_completion_tokens": 0}, ("max_completion_tokens is 0",)),
        ({"response_format": {"type": "json_object"}}, ("response_format", "json_object", '{"type": "text"}')),
        ({"tools": [{"type": "function"}]}, ("tools is", "leave it out or give []")),
        ({"tool_choice": "required"}, ("tool_choice is 'required'", '"none" or "auto"')),
        ({"logprobs": 0}, ("logprobs is 0",)),
        ({"n": 2}, ("n is 2", "give 1")),
        ({"echo": 0}, ("echo is 0",)),
        ({"frequency_penalty": False}, ("frequency_penalty is False",)),
        ({"web_search_options": {}}, ("web_search_options is {}", "leave it out.")),
        ({"stream_options": {"include_usage": 1}}, ("stream_options.include_usage is 1",)),
        ({"stream_options": {"include_obfuscation": True}}, ("stream_options.include_obfuscation is True",)),
        ({"stream_options": {"include_usagee": True}}, ("stream_options.include_usagee is not known",)),
        ({"temprature": 1}, ("'temprature' is not known", "did you mean 'temperature'?")),
        ({"x" * 1500: 1}, ("is not known",)),
        ({"chat_template_kwargs": {}}, ("'chat_template_kwargs' is not known",)),
    ],
)
def test_what_is_not_computed_is_refused_with_a_remedy(url, body, words):
    refused(post(url, {"prompt": "a", **body}), *words)


def test_an_empty_prompt_and_none_are_what_a_text_begins_with(url, loaded):
    for prompt in ("", None):
        reply = post(url, {"prompt": prompt, "max_tokens": 5, "temperature": 0}).json()
        assert reply["choices"][0]["text"] == alone(loaded, loaded.encode(""), 5)
        assert reply["usage"]["prompt_tokens"] == 1


def test_every_seed_of_64_bits_is_one(url):
    """Also beside another prompt, whose seed is the next."""
    drawn = []
    for seed in (-(1 << 63), -1, (1 << 32) - 1, (1 << 63) - 1):
        body = {"prompt": ["a", "b"], "max_tokens": 20, "temperature": 2.0, "seed": seed}
        first, again = (post(url, body).json()["choices"] for _ in range(2))
        assert first == again
        drawn.append(first[0]["text"])
    assert len(set(drawn)) == 4


def test_a_query_is_refused(url):
    refused(post(url, {"prompt": "a"}, "/v1/completions?best_of=3"), "'best_of'")


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": 5, "content": "a"}], "messages[0].role is 5"),
        ([USER, {"role": "user"}], "messages[1].content is None"),
        ([{"role": "user", "content": 5}], "messages[0].content is 5"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] is"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "only text is read"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"a": 1}}]}], "cache_control"),
        ([{**USER, "tool_call_id": "7"}], "messages[0].tool_call_id is '7', which the model's chat template does not"),
        ([{"role": "nobody", "content": "a"}], "the chat template refuses these messages: Only users may speak here"),
        ([{"role": "user\ud800", "content": "a"}], "messages holds half of a surrogate pair"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], "messages holds half of a"),
        ([["user", "a"]], "messages[0] is"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_rendered_are_one_sentence(url, messages, words):
    refused(post(url, {"messages": messages}, CHATS), words)


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"messages": [{**USER, "name": "bob"}]}, "user (bob): hi|"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "user: hi|assistant: |"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": None, "refusal": None, "annotations": []}]},
         "user: hi|assistant: |"),
        ({"messages": [{"role": "developer", "content": [{"type": "text", "text": t} for t in "ab"]}]},
         "developer: ab|"),
        ({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}, "user: hi|thinking=False"),
        ({"messages": [USER], "reasoning_effort": "low"}, "user: hi|low"),
        ({"messages": [{**USER, "content": "\x00é😀"}]}, "user: \x00é😀|"),
    ],
)  # fmt: skip
def test_the_template_sees_what_was_sent(url, loaded, body, prompt):
    reply = post(url, {**body, "max_tokens": 5, "temperature": 0}, CHATS).json()
    assert reply["choices"][0]["message"]["content"] == alone(loaded, loaded.encode(prompt), 5)
    assert reply["usage"]["prompt_tokens"] == len(prompt.encode())


@pytest.mark.parametrize(
    "more", [{"chat_template_kwargs": {"thinking_budget": 5}}, {"chat_template_kwargs": {"messages": []}},
             {"chat_template_kwargs": {"template": "x"}}],
)  # fmt: skip
def test_what_the_template_does_not_read_is_refused(url, more):
    (name,) = more["chat_template_kwargs"]
    refused(post(url, {"messages": [USER], **more}, CHATS), f"chat_template_kwargs.{name} is", "leave it out")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "use /v1/completions"),
        ("{% for", "the checkpoint's chat template cannot be used"),
        ("{{ 1 // 0 }}", "division"),
        (["a", 1], "chat_template is"),
    ],
)
def test_a_model_whose_template_is_missing_or_fails_serves_the_rest(tmp_path, template, words):
    run = byte_run(tmp_path)
    (run / "hf").mkdir()
    (run / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    with server(load(run)) as (url, _):
        refused(post(url, {"messages": [USER], **TINY}, CHATS), words)
        assert post(url, {"prompt": "a", **TINY}).status_code == 200


def test_the_model_by_its_name(url):
    assert httpx.get(f"{url}/v1/models/tiny").json() == httpx.get(f"{url}/v1/models").json()["data"][0]
    for name in ("gpt-4", "a/b", "%ff", "tiny/"):
        reply = httpx.get(f"{url}/v1/models/{name}")
        assert reply.status_code == 404
        assert "is not served here; use 'tiny'." in reply.json()["error"]["message"]
