"""Stop strings over HTTP: where the text ends, why, and how many tokens are counted, in one piece and as a stream."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jaxattn
from jaxattn.text import load
from jaxattn.text_stream import TextStream
from tests.generate.helpers import byte_run
from tests.serve.over_http import post, server

MOST = 24


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(byte_run(tmp_path_factory.mktemp("stops")))


@pytest.fixture(scope="module")
def url(loaded):
    with server(loaded, block=8) as (url, _):
        yield url


def test_tokens_are_counted_up_to_the_one_that_completes_the_stop_string(loaded, url):
    """Though the device makes eight at a time."""
    ids = loaded.encode("some")
    free = jaxattn.generate(
        loaded.model, loaded.params, np.asarray([ids]), max_new_tokens=MOST, stop_tokens=loaded.stop_tokens
    )
    new = free.tokens[0][: int(free.lengths[0])].tolist()
    text = loaded.tokenizer.decode(new)
    seen = 0
    for at in (1, 4, 9):
        stop = text[at : at + 2]
        if len(stop) < 2 or "\ufffd" in stop:
            continue
        stream = TextStream(loaded.tokenizer, [stop], prompt_ids=ids)
        want = stream.add(new, last=True)
        assert stream.stopped
        body = {"prompt": "some", "max_tokens": MOST, "temperature": 0, "stop": [stop, "never"]}
        reply = post(url, body).json()
        assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == (want, "stop")
        assert reply["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": stream.used,
            "total_tokens": 4 + stream.used,
        }
        lines = post(url, body | {"stream": True, "stream_options": {"include_usage": True}}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == want
        assert [e["usage"]["completion_tokens"] for e in events if e.get("usage")] == [stream.used]
        seen += 1
    assert seen
