"""The messages of a chat request, as the model's own chat template is to see them."""

from __future__ import annotations

import re
from typing import Any

from jaxattn.chat import choose_template
from jaxattn.errors import UserError, shown
from jaxattn.serving.request_fields import ApiError
from jaxattn.text import Loaded

# What a template is given anyway, and what `jaxattn.chat.render` calls its arguments.
TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "template", "special", "self")


def encode_chat(raw: dict[str, Any], loaded: Loaded) -> tuple[int, ...]:
    """Token ids of `messages` under the template, with `chat_template_kwargs` and `reasoning_effort`.

    Raises:
      ApiError: 400 for messages that are none, what the template does not read, and what it refuses.
    """
    try:
        if not loaded.templates:
            raise ApiError(
                400,
                "messages cannot be rendered: the model has no chat template; use /v1/completions.",
                param="messages",
            )
        template = choose_template(loaded.templates, loaded.folder)
        messages = _messages(raw.get("messages"), template)
        variables = _variables(raw, template, loaded)
        return tuple(loaded.chat(messages, **variables))
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from error


def _reads(template: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template) is not None


def _variables(raw: dict[str, Any], template: str, loaded: Loaded) -> dict[str, Any]:
    """What else the template is to see."""
    given = raw.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        raise ApiError(
            400, f"chat_template_kwargs is {shown(given)} but must be an object.", param="chat_template_kwargs"
        )
    found = {f"chat_template_kwargs.{name}": value for name, value in (given or {}).items()}
    found |= {"reasoning_effort": raw["reasoning_effort"]} if raw.get("reasoning_effort") is not None else {}
    out = {}
    for field, value in found.items():
        name = field.removeprefix("chat_template_kwargs.")
        if name in TAKEN or name in loaded.tokenizer.named or not _reads(template, name):
            raise _unread(field, value, field.split(".")[0])
        out[name] = value
    return out


def _messages(found: Any, template: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found:
        raise _wrong("messages", found, "a list of objects with role and content, not empty")
    out = []
    for number, message in enumerate(found):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _wrong(where, message, "an object with a role and a content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise _wrong(f"{where}.role", role, "text, such as 'user'")
        kept = {"role": role, "content": _content(message.get("content"), f"{where}.content", role)}
        for key, value in message.items():
            if key in kept or value is None:
                continue
            if _reads(template, key):
                kept[key] = value
            elif value not in ([], {}, ""):
                raise _unread(f"{where}.{key}", value, "messages")
        out.append(kept)
    return out


def _content(content: Any, where: str, role: str) -> str:
    """Text, or text in parts; an assistant that said nothing has the empty text."""
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, content, "text, or a list of {'type': 'text', 'text': ...}")
    texts = []
    for number, part in enumerate(content):
        rest = {**part, "type": None} if isinstance(part, dict) and part.get("type") == "text" else {}
        text = rest.pop("text", None)
        if not isinstance(text, str) or any(value not in (None, [], {}) for value in rest.values()):
            raise _wrong(f"{where}[{number}]", part, "{'type': 'text', 'text': ...}; only text is read here")
        texts.append(text)
    return "".join(texts)


def _wrong(where: str, value: Any, must: str) -> ApiError:
    return ApiError(400, f"{where} is {shown(value)} but must be {must}.", param="messages")


def _unread(where: str, value: Any, param: str) -> ApiError:
    sentence = f"{where} is {shown(value)}, which the model's chat template does not read; leave it out."
    return ApiError(400, sentence, "unsupported_value", param)
