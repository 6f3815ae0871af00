"""Chat templates of HuggingFace tokenizers, rendered in a sandbox: a template is text from a stranger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxattn.errors import Corrupt, UserError

Messages = Sequence[Mapping[str, str]]


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The template of a tokenizer folder and the special tokens it may name.

    Raises:
      UserError: the folder has none.
    """
    config = read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(f"{folder} has no chat template; leave --chat out, or use an instruction-tuned checkpoint.")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    text = lambda value: value["content"] if isinstance(value, dict) else value
    return template, {n: text(config[n]) for n in names if config.get(n) is not None}


def render(template: str, special: Mapping[str, str], messages: Messages) -> str:
    """The prompt that asks for the assistant's next message.

    Raises:
      UserError: the template refuses these messages.
      Corrupt: it is no valid template, or wants what the sandbox does not allow.
    """
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> Any:
        raise UserError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    try:
        return environment.from_string(template).render(
            raise_exception=refuse, messages=[dict(m) for m in messages], add_generation_prompt=True, **special
        )
    except (TemplateSyntaxError, SecurityError) as error:
        raise Corrupt(f"the checkpoint's chat template cannot be used ({error}).") from error
    except (TemplateError, TypeError, KeyError) as error:
        raise UserError(f"the chat template does not fit these messages ({error}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} without one. Raises `Corrupt` if it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path} cannot be read ({error}).") from error
    return found if isinstance(found, dict) else {}
