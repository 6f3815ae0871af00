"""The fields of a request: which change the answer, which ask for nothing, and the sentence for any other.

Nothing is passed over: a field that would change the answer in a way that is not computed here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxattn.errors import near, one_line, shown

COMMON = (
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream",
    "stream_options",
)  # fmt: skip
TEXT = ("prompt", *COMMON)
CHAT = ("messages", *COMMON, "chat_template_kwargs", "reasoning_effort")

# What is not computed here, with the values besides null that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}
# What says something about a request but nothing about its answer.
LABELS: dict[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "metadata": dict,
    "store": bool,
    "parallel_tool_calls": bool,
}
NOUNS = {str: "text", dict: "an object", bool: "true or false", int: "a whole number", float: "a number"}


class ApiError(Exception):
    """An answer other than 200: HTTP status, one sentence, a code of the OpenAI kind, and the field it is about."""

    def __init__(
        self, status: int, message: str, code: str = "invalid_request_error", param: str | None = None
    ) -> None:
        self.status, self.message, self.code = status, one_line(message), code
        self.param = None if param is None else one_line(param)[:100]
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal(field: str, value: Any, must: str) -> ApiError:
    """The sentence for a value that `must` be something else."""
    return ApiError(400, f"{field} is {shown(value)} but must be {must}.", param=field)


def check_fields(raw: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse what is not `known`, and not NEUTRAL or LABELS with a value that asks for nothing.

    Raises:
      ApiError: 400.
    """
    known = tuple(known)
    for field, value in raw.items():
        if field not in known and field not in NEUTRAL and field not in LABELS:
            hint = near(field[:80], [*known, *NEUTRAL, *LABELS])
            raise ApiError(
                400, f"field {shown(field)} is not known: {hint}leave it out, or use {', '.join(known)}.", param=field
            )
        if why := _no_text(value):
            raise ApiError(400, f"{field} {why}.", param=field)
        if value is None:
            continue
        if field in LABELS and type(value) is not LABELS[field]:
            raise refusal(field, value, NOUNS[LABELS[field]])
        if field in NEUTRAL and not any(_same(value, neutral) for neutral in NEUTRAL[field]):
            nothing = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[field])
            raise ApiError(
                400,
                f"{field} is {shown(value)}, which this server does not do; leave it out"
                f"{f' or give {nothing}' if nothing else ''}.",
                "unsupported_value",
                field,
            )


def _same(value: Any, neutral: Any) -> bool:
    """Whole numbers also as JSON may write them, 1 and 1.0."""
    return value == neutral and (type(value) is type(neutral) or (type(value), type(neutral)) == (float, int))


def _no_text(value: Any) -> str:
    """Why the texts in a value cannot be read; empty if they can."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no text; send whole characters"
    except RecursionError:
        return "is nested too deep; send less"
    return ""


def number(raw: Mapping[str, Any], field: str, kind: Callable[[Any], Any], default: Any) -> Any:
    """An int or a float; `default` where there is none or null. Raises `ApiError` 400 for anything else."""
    value = raw.get(field)
    if value is None:
        return default
    if type(value) not in ((int, float) if kind is float else (int,)):
        raise refusal(field, value, "a number" if kind is float else "a whole number")
    try:
        return kind(value)
    except OverflowError as error:
        raise refusal(field, value, "smaller") from error


def flag(raw: Mapping[str, Any], field: str, name: str = "") -> bool:
    """True or false; false where there is none or null. Raises `ApiError` 400 for anything else."""
    value = raw.get(field)
    if value is not None and type(value) is not bool:
        raise refusal(name or field, value, "true or false")
    return bool(value)
