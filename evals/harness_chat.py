"""Conversations of the harness's tasks in a checkpoint's chat template, as its own HuggingFace model writes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jaxattn.errors import ConfigError, UserError
from jaxattn.text import Loaded

log = logging.getLogger("jaxattn")

MARK = "THE-MODEL-CONTINUES-HERE "  # the blank shows whether a template trims messages
OURS = ("add_generation_prompt", "messages")


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse what is no more variable of a template.

    Raises:
      ConfigError: naming it.
    """
    for name in OURS:
        if name in variables:
            raise ConfigError(f"chat_template_args hold {name}, which the harness itself decides; leave it out.")


def conversation(
    loaded: Loaded, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any], *, ask: bool
) -> str:
    """The text of a conversation, without its system message where the template refuses one.

    Args:
      variables: more that the template may read.
      ask: whether the text goes on to the next message's beginning; else it ends inside the last message, which the
        model is to continue.

    Raises:
      UserError: the template refuses the messages, or leaves out the last one.
    """
    if not ask:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": last["content"] + MARK}]
    try:
        text = loaded.render(messages, add_generation_prompt=ask, **variables)
    except UserError as error:
        rest = [message for message in messages if message["role"] != "system"]
        if len(rest) == len(messages):
            raise
        log.warning("prompts have no system message, because %s", error)
        text = loaded.render(rest, add_generation_prompt=ask, **variables)
    if ask:
        return text
    at = text.rfind(MARK.strip())
    if at < 0:
        raise UserError("the chat template leaves out the last message, which the model is to continue.")
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()  # a template that trims trims here too
