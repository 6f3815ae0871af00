"""Public clients as they send by default: the answer is the model's own, or one sentence."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest

from jaxattn.text import load
from tests.generate.helpers import byte_run
from tests.serve import openai_table
from tests.serve.over_http import TEMPLATE, alone, server

PROMPT = "user: hi\nassistant:"
USER = {"role": "user", "content": "hi"}
MOST = 9


def needs(module, package):
    """A mark that skips where a client is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"pip install {package}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The address, and the text that a greedy answer to USER is."""
    run = byte_run(tmp_path_factory.mktemp("clients"))
    (run / "hf").mkdir()
    (run / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    loaded = load(run)
    with server(loaded) as (url, _):
        yield SimpleNamespace(
            url=url, api=f"{url}/v1", text=alone(loaded, loaded.encode(PROMPT), MOST),
            completion=alone(loaded, loaded.encode("a"), MOST),
        )  # fmt: skip


@pytest.fixture
def openai(place):
    from openai import OpenAI

    return OpenAI(base_url=place.api, api_key="none", max_retries=0)


# ------------------------------------------------------------------------------------------------- OpenAI's own


@needs("openai", "openai")
def test_every_parameter_of_openais_client_is_answered(openai):
    """A new one of the client is to be tried: add it to `openai_table`, and where it is needed to `serving.fields`."""
    assert openai_table.unanswered(openai) == []


@needs("openai", "openai")
def test_the_table_says_what_the_server_does(place):
    """Run `python -m tests.serve.openai_table` to write it again."""
    found = openai_table.table(place.url)
    assert found == openai_table.TABLE.read_text()
    assert "| 5" not in found, "the server failed"


@needs("openai", "openai")
def test_openais_client_gets_chats_streams_and_usage(openai, place):
    whole = openai.chat.completions.create(model="tiny", messages=[USER], max_completion_tokens=MOST, temperature=0)
    assert whole.choices[0].message.content == place.text
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), MOST)
    events = list(
        openai.chat.completions.create(
            model="tiny", messages=[USER], max_tokens=MOST, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *parts, last = events
    assert "".join(part.choices[0].delta.content for part in parts) == place.text
    assert [part.usage for part in parts] == [None] * len(parts)
    assert last.usage == whole.usage
    assert last.choices == []
    with openai.chat.completions.stream(model="tiny", messages=[USER], max_tokens=MOST, temperature=0) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == place.text


@needs("openai", "openai")
def test_openais_client_completes_lists_models_and_is_told_what_is_wrong(openai, place):
    from openai import BadRequestError, NotFoundError

    made = openai.completions.create(model="tiny", prompt=["a", [97]], max_tokens=MOST, temperature=0)
    assert [choice.text for choice in made.choices] == [place.completion] * 2
    assert openai.models.list().data[0] == openai.models.retrieve("tiny")
    with pytest.raises(NotFoundError, match="'gpt-4' is not served here"):
        openai.models.retrieve("gpt-4")
    with pytest.raises(BadRequestError, match="response_format") as caught:
        openai.chat.completions.create(model="tiny", messages=[USER], response_format={"type": "json_object"})
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_value")


# -------------------------------------------------------------------------------------------------------- others


@needs("huggingface_hub", "huggingface-hub")
def test_huggingfaces_client(place):
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=place.api, model=None)
    ask = {"messages": [USER], "model": "tiny", "max_tokens": MOST, "temperature": 0}
    answer = client.chat_completion(**ask)
    assert answer.choices[0].message.content == place.text
    assert answer.usage.total_tokens == len(PROMPT) + MOST
    parts = [event.choices[0].delta.content for event in client.chat_completion(**ask, stream=True)]
    assert "".join(parts) == place.text
    with pytest.raises(Exception, match="frequency_penalty is"):
        client.chat_completion(**ask, frequency_penalty=0.5)


@needs("langchain_openai", "langchain-openai")
def test_langchain(place):
    from langchain_openai import ChatOpenAI, OpenAI

    own = {"model": "tiny", "base_url": place.api, "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**own, max_tokens=MOST)
    answer = chat.invoke("hi")
    assert answer.content == place.text
    assert answer.usage_metadata["output_tokens"] == MOST
    assert "".join(part.content for part in chat.stream([("user", "hi")])) == place.text
    assert OpenAI(**own, max_tokens=MOST).invoke("a") == place.completion
    with pytest.raises(Exception, match="tools is"):
        chat.bind_tools([{"name": "f", "description": "x", "parameters": {"type": "object", "properties": {}}}]).invoke(
            "hi"
        )


@needs("litellm", "litellm")
def test_litellm(place, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its prices are not fetched
    import litellm

    own = {"model": "openai/tiny", "api_base": place.api, "api_key": "none", "temperature": 0, "max_retries": 0}
    own |= {"max_tokens": MOST}
    answer = litellm.completion(messages=[USER], **own)
    assert answer.choices[0].message.content == place.text
    assert answer.usage.completion_tokens == MOST
    parts = list(litellm.completion(messages=[USER], stream=True, **own))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == place.text
    again = [USER, answer.choices[0].message.model_dump(), USER]  # an answer goes back as it came
    assert litellm.completion(messages=again, **own).choices[0].finish_reason == "length"
    with pytest.raises(litellm.BadRequestError, match="n is 2"):
        litellm.completion(messages=[USER], n=2, **own)
