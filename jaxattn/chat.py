"""Chat templates of HuggingFace tokenizers, rendered as transformers renders them, by a process with limits."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxattn import _chat_child
from jaxattn.errors import Corrupt, UserError, shown
from jaxattn.json_text import optional_object, read_text

Messages = Sequence[Mapping[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names of one field, the first the usual one
ADDITIONAL = "additional_chat_templates"  # the folder of templates other than the default
STARTING_SECONDS = 60.0  # of the rendering process, on a busy machine


def choose_template(found: Mapping[str, str], folder: Path, *, tools: bool = False) -> str:
    """The template for a conversation, among all of a folder (`read_templates`).

    Args:
      tools: take the template for tool use where there is one of its own.

    Raises:
      UserError: the folder has none, or several of which none is the default.
    """
    if tools and "tool_use" in found:
        return found["tool_use"]
    if found and "default" not in found:
        raise UserError(f"{folder} has the chat templates {shown(sorted(found))} but none is the default; name one so.")
    if not found:
        raise UserError(f"{folder} has no chat template; leave --chat out, or use an instruction-tuned checkpoint.")
    return found["default"]


def read_templates(folder: Path) -> dict[str, str]:
    """All templates of a folder by name: its .jinja files if there are any, else those in its JSON.

    Raises:
      Corrupt: a file of it is broken.
    """
    files = {p.name.removesuffix(".jinja"): p for p in sorted((folder / ADDITIONAL).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja", **files}
    if files:
        return {name: read_text(path).replace("\r\n", "\n").replace("\r", "\n") for name, path in files.items()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = optional_object(folder / name).get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            entries = [(entry.get("name"), entry.get("template")) for entry in value]
        else:
            entries = list(value.items()) if isinstance(value, dict) else None
        if value is None:
            continue
        if entries is None or not all(isinstance(x, str) for entry in entries for x in entry):
            raise Corrupt(
                f"{folder / name}: chat_template is {shown(value)} but must be text, or a list of objects with a name "
                "and a template."
            )
        return dict(entries)
    return {}


def render(
    template: str,
    special: Mapping[str, str],
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt that asks for the assistant's next message.

    Args:
      messages: role, content and whatever else the template reads (name, tool_calls, ...); a null is as if missing.
      variables: more that the template may read, such as enable_thinking.

    Raises:
      UserError: the template refuses these messages, or they do not fit it.
      Corrupt: it is no valid template, wants what the sandbox does not allow, or too much memory or time.
    """
    given = {
        **special,
        **variables,
        "messages": [_message(m) for m in messages],
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "variables": given}).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the messages are not what JSON can hold ({str(error)[:120]}).") from error
    found = _RENDERER.ask(request)
    if "text" in found:
        return found["text"]
    kind, reason = next(iter(found.items()))
    reason = " ".join(reason.split())[:300]
    if kind == "refused":
        raise UserError(f"the chat template refuses these messages: {reason}")
    if kind == "messages":
        raise UserError(f"the chat template does not fit these messages ({reason}).")
    raise Corrupt(f"the checkpoint's chat template cannot be used ({reason}).")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers hands it to a template: without nulls, and with reasoning under the names it is read by."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


class Renderer:
    """The rendering process: started when it is first needed, replaced when it had to be killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        """The process's answer; a template that takes too long is its own fault."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(len(request).to_bytes(8, "big") + request)
                self._process.stdin.flush()
                return self._read(_chat_child.MOST_SECONDS)
            except TimeoutError:
                self._stop()
                return {"template": f"it takes longer than {_chat_child.MOST_SECONDS} seconds"}
            except (OSError, ValueError):  # it died: beyond its limits in a way that Python cannot catch
                self._stop()
                return {"template": "the process that renders it has ended, beyond its memory or time"}
            except BaseException:  # interrupted: what is still to come would be the answer of the next question
                self._stop()
                raise

    def _start(self) -> None:
        command = [sys.executable, "-I", _chat_child.__file__, json.dumps([os.path.abspath(p) for p in sys.path])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
        )
        try:
            self._read(STARTING_SECONDS)
        except (OSError, ValueError) as error:
            self._stop()
            raise UserError("the process that renders chat templates does not start; is jinja2 installed?") from error

    def _read(self, seconds: float) -> dict[str, str]:
        """One message.

        Raises:
          TimeoutError: it does not come in time.
          ValueError: the process has ended.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        until, pipe, raw = time.monotonic() + seconds, self._process.stdout, b""
        with selectors.DefaultSelector() as ready:  # select() does not know descriptors from 1024 on
            ready.register(pipe, selectors.EVENT_READ)
            while len(raw) < 8 or len(raw) < 8 + int.from_bytes(raw[:8], "big"):
                if not ready.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                part = os.read(pipe.fileno(), 1 << 20)
                if not part:
                    raise ValueError("the process has ended")
                raw += part
        return json.loads(raw[8:])

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not yet sent
                        pipe.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()


_RENDERER = Renderer()
atexit.register(_RENDERER.close)
