"""Do the converted checkpoint's tokenizer and chat template give what those of the source give in transformers?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from convert.sources import Folder, Gguf
from jaxattn.chat import choose_template, read_templates, render
from jaxattn.errors import UserError, shown
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.tokenizer import read_tokenizer

TEXTS = ("", " two  blanks\n\n\tand more ", "naïve cafe\u0301, 東京 🙂 №½", "don't 1234 <s></s><|endoftext|> x=[1, 2]")
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Which way?"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "  One? "},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ],
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One line for a person, and whether it is good news."""

    line: str
    same: bool


def compare(source: Folder | Gguf, side: Path, texts: list[str]) -> Compared:
    """Token ids and chat renderings of both; `side` is where the checkpoint keeps its source's files.

    Of a GGUF file only what is inside a text is compared: what goes around it is llama.cpp's rule, not transformers'.
    """
    import transformers

    if not has_tokenizer(side):
        return Compared("tokens: the source has no tokenizer, nothing to compare", True)
    place: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if isinstance(source, Gguf):
        place |= {"pretrained_model_name_or_path": source.path.parent, "gguf_file": source.path.name}
    else:
        place |= {"pretrained_model_name_or_path": source.path}
    try:
        theirs: Any = transformers.AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # noqa: BLE001  whatever transformers raises
        reason = " ".join(str(error).split())[:200]
        return Compared(f"tokens: transformers cannot read the source's tokenizer ({reason}), nothing to compare", True)
    try:
        ours = read_tokenizer(side)
    except UserError as error:
        return Compared(f"tokens differ: transformers reads the source's tokenizer, but {error}", False)
    texts = [*texts, *TEXTS]
    for around in (False,) if isinstance(source, Gguf) else (False, True):
        for text in texts:
            wanted = theirs(text, add_special_tokens=around)["input_ids"]
            found = ours.encode(text, add_special_tokens=around)
            if found != wanted:
                return Compared(_difference(repr(text), wanted, found), False)
    templates = read_templates(side)
    if theirs.chat_template is None or "default" not in templates:
        missing = (theirs.chat_template is None) == (not templates)
        return Compared(f"tokens: {len(texts)} texts equal those of transformers; no chat template", missing)
    template = choose_template(templates, side)
    for messages in CHATS:
        if (pair := _chat(theirs, ours, template, messages)) is not None:
            return Compared(_difference(f"a chat of {len(messages)}", *pair), False)
    return Compared(f"tokens: {len(texts)} texts and {len(CHATS)} chats equal those of transformers", True)


def _chat(theirs: Any, ours: Any, template: str, messages: list[dict[str, str]]) -> tuple[Any, Any] | None:
    """Both renderings, or both rows of ids, where they differ; a template that refuses has to refuse both."""
    try:
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001  a template can raise anything
        wanted = None
    try:
        found = render(template, ours.named, messages)
    except UserError:
        found = None
    if found != wanted:
        return wanted, found
    if wanted is None or found is None:
        return None
    ids = theirs(wanted, add_special_tokens=False)["input_ids"], ours.encode(found, add_special_tokens=False)
    return None if ids[0] == ids[1] else ids


def _difference(what: str, theirs: Any, ours: Any) -> str:
    return f"tokens differ on {what[:60]}: transformers has {shown(theirs)}, ours {shown(ours)}"
