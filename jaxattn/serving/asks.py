"""What a request asks for: the JSON body of `/v1/completions` and `/v1/chat/completions`, checked field by field."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Any

from jaxattn.errors import UserError
from jaxattn.sampling import Sampling
from jaxattn.text import Loaded

MOST_PROMPTS, MOST_STOPS, DEFAULT_TOKENS = 64, 8, 16
# What we do not offer, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}
IGNORED = ("user", "metadata", "store")
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stream", "stream_options",
)  # fmt: skip


class ApiError(Exception):
    """An answer other than 200: HTTP status, one sentence, and a code of the OpenAI kind."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclasses.dataclass(frozen=True)
class Ask:
    """A checked request; one choice for each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    most: int
    how: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def parse(body: bytes, loaded: Loaded, name: str, context: int, *, chat: bool) -> Ask:
    """Read a request body.

    Raises:
      ApiError: 400 for what cannot be read or done, 404 for another model than `name`.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body is a JSON {type(raw).__name__} but must be an object.")
    if raw.get("model", name) != name:
        raise ApiError(404, f"model {raw['model']!r} is not served here; use {name!r}.", "model_not_found")
    _refuse_unknown(raw, "messages" if chat else "prompt")
    try:
        prompts = (tuple(loaded.chat(_messages(raw))),) if chat else _prompts(raw, loaded)
    except UserError as error:
        raise ApiError(400, str(error)) from error
    longest = max(map(len, prompts))
    rest = context - longest
    most = _number(raw, "max_tokens", int, None)
    most = _number(raw, "max_completion_tokens", int, most)
    most = (max(rest, 1) if chat else DEFAULT_TOKENS) if most is None else most
    if most < 1:
        raise ApiError(400, f"max_tokens is {most} but must be at least 1.")
    if most > rest:
        raise ApiError(
            400,
            f"{longest} prompt tokens and max_tokens {most} exceed the context of {context} tokens; "
            "shorten the prompt or ask for fewer.",
            "context_length_exceeded",
        )
    try:
        how = Sampling(
            _number(raw, "temperature", float, 1.0), _number(raw, "top_k", int, 0), _number(raw, "top_p", float, 1.0),
            _number(raw, "min_p", float, 0.0),
        )  # fmt: skip
    except UserError as error:
        raise ApiError(400, str(error)) from error
    seed = _number(raw, "seed", int, None)
    seed = secrets.randbits(31) if seed is None else seed
    if not 0 <= seed < 1 << 32:
        raise ApiError(400, f"seed is {seed} but must be from 0 to {(1 << 32) - 1}.")
    options = raw.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, f"stream_options is {options!r} but must be an object.")
    return Ask(prompts, most, how, seed, _stop(raw), _flag(raw, "stream"), _flag(options, "include_usage"))


def _refuse_unknown(raw: dict[str, Any], text: str) -> None:
    known = [f for f in FIELDS if f not in ("prompt", "messages") or f == text]
    for field, value in raw.items():
        if field in NEUTRAL and not any(value == v and type(value) is type(v) for v in _typed(NEUTRAL[field])):
            raise ApiError(400, f"{field} is {value!r}, which this server does not do; leave it out.")
        if field not in known and field not in NEUTRAL and field not in IGNORED:
            raise ApiError(400, f"field {field!r} is not known; use {', '.join(known)}.")
    if text not in raw:
        raise ApiError(400, f"{text} is missing.")


def _typed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Whole numbers also as JSON may write them, 0 and 0.0."""
    return (*values, *(float(v) for v in values if type(v) is int))


def _messages(raw: dict[str, Any]) -> list[dict[str, str]]:
    found = raw["messages"]
    if not isinstance(found, list) or not found:
        raise ApiError(400, "messages must be a list of {role, content}, not empty.")
    out = []
    for number, message in enumerate(found):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} must be an object with a role and a content.")
        content = message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(t for t in texts if isinstance(t, str)) if len(texts) == len(content) else None
        if not isinstance(content, str):
            raise ApiError(400, f"{where}.content must be text.")
        out.append({"role": message["role"], "content": content})
    return out


def _prompts(raw: dict[str, Any], loaded: Loaded) -> tuple[tuple[int, ...], ...]:
    found = raw["prompt"]
    if isinstance(found, str) or (isinstance(found, list) and found and all(type(i) is int for i in found)):
        found = [found]
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_PROMPTS:
        raise ApiError(400, f"prompt must be text, token ids, or a list of up to {MOST_PROMPTS} of them.")
    out = []
    for prompt in found:
        if isinstance(prompt, str):
            out.append(tuple(loaded.encode(prompt)))
        elif isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
            if not all(0 <= i < loaded.model.vocab_size for i in prompt):
                raise ApiError(400, f"a token id of the prompt is not in 0..{loaded.model.vocab_size - 1}.")
            out.append(tuple(prompt))
        else:
            raise ApiError(400, "prompt must be text or a list of token ids.")
    return tuple(out)


def _number(raw: dict[str, Any], field: str, kind: type, default: Any) -> Any:
    value = raw.get(field)
    if value is None:
        return default
    wanted = (int, float) if kind is float else (int,)
    if type(value) not in wanted:
        raise ApiError(400, f"{field} is {value!r} but must be {'a number' if kind is float else 'a whole number'}.")
    try:
        return kind(value)
    except OverflowError as error:
        raise ApiError(400, f"{field} is too large.") from error


def _flag(raw: dict[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value not in (True, False, None) or type(value) is int:
        raise ApiError(400, f"{field} is {value!r} but must be true or false.")
    return bool(value)


def _stop(raw: dict[str, Any]) -> tuple[str, ...]:
    value = raw.get("stop") or ()
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or not all(isinstance(s, str) for s in value) or len(value) > MOST_STOPS:
        raise ApiError(400, f"stop must be text or a list of up to {MOST_STOPS} texts.")
    return tuple(s for s in value if s)
