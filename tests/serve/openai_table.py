"""What the official client's parameters do here: `python -m tests.serve.openai_table` writes the table of it.

Every parameter of `chat.completions.create` and `completions.create` is tried with the real client against a real
server, with values that ask for nothing, values that are computed, and values that are not.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxattn.command import run_cli
from jaxattn.text import load
from tests.generate.helpers import byte_run
from tests.serve.over_http import TEMPLATE, server

TABLE = Path(__file__).resolve().parents[2] / "jaxattn" / "serving" / "openai.md"
HEAD = """# The OpenAI client's parameters

Written by `python -m tests.serve.openai_table` from what the server answers; a test compares. Python's `None` is as if
left out. A model whose chat template reads `reasoning_effort`, or other keys of messages, is given them. What says
something about a request but nothing about its answer (`user`, `metadata`, `store`, ...) is accepted and not kept.
"""
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
BOTH: dict[str, list[Any]] = {  # parameter -> values that are tried
    "model": ["tiny", "gpt-4o"],
    "frequency_penalty": [None, 0, 0.5],
    "logit_bias": [None, {}, {"5": 1}],
    "max_tokens": [None, 5, 0, 1000],
    "n": [None, 1, 2],
    "presence_penalty": [None, 0, 0.5],
    "seed": [None, 7, -7, 1 << 63],
    "stop": [None, "x", ["x", "yz"], [5], ["x"] * 9],
    "stream": [None, False, True],
    "stream_options": [None, {"include_usage": True}, {"include_obfuscation": True}],
    "temperature": [None, 0, 0.7, 2, -1],
    "top_p": [None, 1, 0.5, 0],
    "user": [None, "me"],
    "extra_headers": [{"X-Anything": "1"}],
    "extra_query": [{"a": "1"}],
    "extra_body": [{"top_k": 5, "min_p": 0.1}, {"top_k": -1, "repetition_penalty": 1}, {"repetition_penalty": 1.1}],
    "timeout": [30],
}
CHAT: dict[str, list[Any]] = BOTH | {
    "messages": [
        [USER], [{**USER, "content": [{"type": "text", "text": "hi"}]}], [USER, {"role": "assistant", "content": None}],
        [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{**USER, "name": "bob"}], [],
    ],
    "audio": [None, {"format": "wav", "voice": "ash"}],
    "function_call": ["auto", "none", {"name": "f"}],
    "functions": [[], [{"name": "f"}]],
    "logprobs": [None, False, True],
    "max_completion_tokens": [None, 5, 0],
    "metadata": [None, {"a": "b"}],
    "modalities": [None, ["text"], ["text", "audio"]],
    "moderation": [None, {"model": "omni-moderation-latest"}],
    "parallel_tool_calls": [True, False],
    "prediction": [None, {"type": "content", "content": "x"}],
    "prompt_cache_key": ["k"],
    "prompt_cache_options": [{"mode": "implicit"}],
    "prompt_cache_retention": [None, "24h"],
    "reasoning_effort": [None, "low"],
    "response_format": [{"type": "text"}, {"type": "json_object"}, SCHEMA],
    "safety_identifier": ["x"],
    "service_tier": [None, "auto", "default", "flex"],
    "store": [None, False, True],
    "tool_choice": ["none", "auto", "required"],
    "tools": [[], [TOOL]],
    "top_logprobs": [None, 0, 3],
    "verbosity": [None, "medium", "low"],
    "web_search_options": [{}],
}  # fmt: skip
TEXT: dict[str, list[Any]] = BOTH | {
    "prompt": [None, "", "a", ["a", "b"], [5, 6], [[5], [6]], [5, "a"], [999]],
    "best_of": [None, 1, 2],
    "echo": [None, False, True],
    "logprobs": [None, 0, 3],
    "suffix": [None, "", "x"],
}


@contextlib.contextmanager
def tiny() -> Iterator[str]:
    """A server of a tiny model with a chat template, by its address."""
    with tempfile.TemporaryDirectory() as folder:
        run = byte_run(Path(folder))
        (run / "hf").mkdir()
        (run / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        with server(load(run)) as (url, _):
            yield url


def methods(client: Any) -> dict[str, tuple[Any, dict[str, list[Any]], dict[str, Any]]]:
    """The client's methods by name, with the values to be tried and what every call needs."""
    return {
        "chat.completions.create": (client.chat.completions.create, CHAT, {"messages": [USER]}),
        "completions.create": (client.completions.create, TEXT, {"prompt": "a"}),
    }


def unanswered(client: Any) -> list[str]:
    """Parameters that the client has and this file does not, and the other way round."""
    out = []
    for name, (method, cases, _) in methods(client).items():
        out += [f"{name}: {p}" for p in set(inspect.signature(method).parameters) ^ set(cases)]
    return sorted(out)


def tried(method: Any, needs: dict[str, Any], parameter: str, value: Any) -> str:
    """ "works", or the status and the sentence."""
    from openai import APIStatusError

    own = {} if parameter in ("max_tokens", "max_completion_tokens") else {"max_tokens": 2}
    try:
        answer = method(**{"model": "tiny", **needs, **own, parameter: value})
        if parameter == "stream" and value:
            answer = list(answer)[-1]
    except APIStatusError as error:
        return f"{error.status_code}: {error.body['message']}"  # ty: ignore
    assert answer.choices[0].finish_reason in ("length", "stop")
    return "works"


def table(url: str) -> str:
    """The markdown text."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    lines = [HEAD]
    for name, (method, cases, needs) in methods(client).items():
        lines += [f"## `{name}`", "", "| parameter | value | answer |", "|---|---|---|"]
        for parameter, values in cases.items():
            found: dict[str, list[str]] = {}
            for value in values:
                written = f"`{json.dumps(value)}`" if value is not None else "`None`"
                found.setdefault(tried(method, needs, parameter, value), []).append(written)
            rows = [f"| `{parameter}` | {', '.join(shown)} | {answer} |" for answer, shown in found.items()]
            lines += [row.replace("\n", " ") for row in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    with tiny() as url:
        TABLE.write_text(table(url))
    print(TABLE)
    return 0


if __name__ == "__main__":
    run_cli(main) if len(sys.argv) == 1 else sys.exit(f"error: no arguments are known, but {sys.argv[1:]} were given.")
