"""What a request asks for: the JSON body of `/v1/completions` and `/v1/chat/completions`, checked field by field."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

from jaxattn.errors import UserError, shown
from jaxattn.json_text import loads
from jaxattn.sampling import Sampling
from jaxattn.serving.messages import encode_chat
from jaxattn.serving.request_fields import CHAT, TEXT, ApiError, check_fields, flag, number, refusal
from jaxattn.text import Loaded

MOST_PROMPTS, MOST_STOPS, DEFAULT_TOKENS = 64, 8, 16
STREAM_OPTIONS = ("include_usage", "include_obfuscation")


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
        raw = loads(body, unique=True)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error}); send an object in UTF-8.") from error
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body is a JSON {type(raw).__name__} but must be an object.")
    if raw.get("model") not in (None, name):
        raise ApiError(
            404, f"model {shown(raw['model'])} is not served here; use {name!r}.", "model_not_found", "model"
        )
    check_fields(raw, CHAT if chat else TEXT)
    text = "messages" if chat else "prompt"
    if text not in raw:
        raise ApiError(400, f"{text} is missing.", param=text)
    how, seed, stop = _sampling(raw), _seed(raw), _stop(raw)
    stream, usage = flag(raw, "stream"), _usage(raw)
    asked = _most(raw)
    prompts = (encode_chat(raw, loaded),) if chat else _prompts(raw, loaded)
    longest = max(map(len, prompts))
    most = asked or (max(context - longest, 1) if chat else DEFAULT_TOKENS)
    if longest + most > context:
        raise ApiError(
            400,
            f"{longest} prompt tokens and max_tokens {shown(most)} exceed the context of {context} tokens; "
            "shorten the prompt or ask for fewer.",
            "context_length_exceeded",
            text,
        )
    return Ask(prompts, most, how, seed, stop, stream, usage)


def _sampling(raw: dict[str, Any]) -> Sampling:
    top_k = number(raw, "top_k", int, 0)
    temperature, top_p, min_p = (
        number(raw, f, float, d) for f, d in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))
    )
    try:
        return Sampling(temperature, 0 if top_k == -1 else top_k, top_p, min_p)
    except UserError as error:
        raise ApiError(400, str(error), param=str(error).split(" ", 1)[0]) from error


def _seed(raw: dict[str, Any]) -> int:
    seed = number(raw, "seed", int, None)
    if seed is None:
        return secrets.randbits(31)
    if not -(1 << 63) <= seed < 1 << 63:
        raise refusal("seed", seed, "an integer of 64 bits")
    return seed


def _most(raw: dict[str, Any]) -> int | None:
    """Tokens that are asked for at most, under either name."""
    names = ("max_tokens", "max_completion_tokens")
    found = {name: value for name in names if (value := number(raw, name, int, None)) is not None}
    for name, value in found.items():
        if value < 1:
            raise refusal(name, value, "at least 1")
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name} is {shown(value)}" for name, value in found.items())
        raise ApiError(400, f"{both}: they mean the same; give one of them.", param="max_tokens")
    return next(iter(found.values()), None)


def _usage(raw: dict[str, Any]) -> bool:
    options = raw.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise refusal("stream_options", options, "an object")
    for key in options:
        if key not in STREAM_OPTIONS:
            raise ApiError(400, f"stream_options.{key} is not known; use {STREAM_OPTIONS[0]}.", param="stream_options")
    if flag(options, "include_obfuscation", "stream_options.include_obfuscation"):
        raise ApiError(
            400, "stream_options.include_obfuscation is True, which this server does not do; leave it out.",
            "unsupported_value", "stream_options",
        )  # fmt: skip
    return flag(options, "include_usage", "stream_options.include_usage")


def _prompts(raw: dict[str, Any], loaded: Loaded) -> tuple[tuple[int, ...], ...]:
    found = raw["prompt"]
    if found is None:
        found = ""  # as OpenAI's: what a text begins with
    if isinstance(found, str) or (isinstance(found, list) and found and all(type(i) is int for i in found)):
        found = [found]
    if not isinstance(found, list) or not 1 <= len(found) <= MOST_PROMPTS:
        raise refusal("prompt", found, f"text, token ids, or a list of up to {MOST_PROMPTS} of them")
    return tuple(_prompt(prompt, loaded) for prompt in found)


def _prompt(prompt: Any, loaded: Loaded) -> tuple[int, ...]:
    if isinstance(prompt, str):
        try:
            return tuple(loaded.encode(prompt))
        except UserError as error:
            raise ApiError(400, str(error), param="prompt") from error
    if not isinstance(prompt, list) or not prompt or not all(type(i) is int for i in prompt):
        raise refusal("prompt", prompt, "text or a list of token ids, of one kind and not empty")
    for token in prompt:
        if not 0 <= token < loaded.model.vocab_size:
            raise ApiError(
                400, f"token {shown(token)} of the prompt is not in 0..{loaded.model.vocab_size - 1}.", param="prompt"
            )
    return tuple(prompt)


def _stop(raw: dict[str, Any]) -> tuple[str, ...]:
    value = raw.get("stop")
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found) or len(found) > MOST_STOPS:
        raise refusal("stop", value, f"text or a list of up to {MOST_STOPS} texts")
    return tuple(s for s in found if s)
