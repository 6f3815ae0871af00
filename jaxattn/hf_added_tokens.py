"""Added and special tokens of a HuggingFace folder: which of its files name them, and which of those count."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxattn.errors import Corrupt, shown
from jaxattn.json_text import field, optional_object

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import AddedToken

JSON, CONFIG, SPECIAL_MAP, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_DIGITS = 20  # of an id that is written as text: Python turns thousands of them into no number
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def settings_of(folder: Path, config: dict[str, Any], saved: dict[str, Any] | None) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json laid over it where transformers still reads that."""
    settings = {key: value for key, value in config.items() if key != "tokenizer_class"}
    if saved is not None:
        settings.pop("add_bos_token", None)
        settings.pop("add_eos_token", None)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        return settings
    for key, value in optional_object(folder / SPECIAL_MAP).items():
        if key in NAMED and value is not None:
            _token(value, f"{folder / SPECIAL_MAP}: {key}")
        if isinstance(value, dict) and key != "extra_special_tokens":
            value = {**value, "special": True}
        elif key == "extra_special_tokens" and isinstance(value, list):
            before = settings.get(key) or []
            value = [*before, *(x for x in value if x not in before)] if isinstance(before, list) else value
        settings[key] = value
    return settings


def added_tokens(
    folder: Path, settings: dict[str, Any], saved: dict[str, Any] | None
) -> tuple[list[AddedToken], dict[str, AddedToken]]:
    """Added tokens in the order of their ids, and by their text."""
    by_id: dict[int, AddedToken] = {}
    by_text: dict[str, AddedToken] = {}

    def keep(number: Any, token: Any, origin: Path, key: str) -> None:
        written = isinstance(number, str) and number.isdecimal() and len(number) <= MOST_DIGITS
        if not (written or (type(number) is int and number >= 0)):
            wanted = f"a whole number from 0 on, of at most {MOST_DIGITS} digits"
            raise Corrupt(f"{origin}: {key} has the id {shown(number)} but must have {wanted}.")
        made = _token(token, f"{origin}: {key}")
        by_id[int(number)] = by_text[made.content] = made

    if "added_tokens_decoder" in settings:
        for number, token in field(settings, "added_tokens_decoder", dict, folder / CONFIG, {}).items():
            if not isinstance(token, dict):
                raise Corrupt(f"{folder / CONFIG}: added_tokens_decoder has {shown(token)} where an object belongs.")
            keep(number, token, folder / CONFIG, "added_tokens_decoder")
    else:
        special = {text for text in map(_text, (settings.get(key) for key in NAMED)) if text}
        extra = settings.get("extra_special_tokens")
        special |= {text for text in map(_text, extra if isinstance(extra, list) else []) if text}
        for text, number in optional_object(folder / ADDED).items():
            flags = {"special": text in special, "normalized": text not in special}
            keep(number, {"content": text, **flags}, folder / ADDED, shown(text))
        for token in field(saved or {}, "added_tokens", list, folder / JSON, []):
            if not isinstance(token, dict):
                raise Corrupt(f"{folder / JSON}: added_tokens has {shown(token)} where an object belongs.")
            keep(token.get("id"), token, folder / JSON, "added_tokens")
    return [token for _, token in sorted(by_id.items())], by_text


def _text(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _token(value: Any, origin: str) -> AddedToken:
    """An added token from its JSON: text, or an object of text and flags.

    Raises:
      Corrupt: it is neither.
    """
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise Corrupt(f"{origin} is {shown(value)} but must be text, or an object with its text as content.")
    flags = {key: field(value, key, bool, origin) for key in FLAGS}
    return AddedToken(value["content"], **{key: flag for key, flag in flags.items() if flag is not None})


def special_tokens(
    settings: dict[str, Any], defaults: dict[str, str], by_text: dict[str, AddedToken], origin: Path
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Named tokens (bos_token, ..., then a model's own *_token and named extra ones), and the extra ones."""
    named = {}
    for key in NAMED:
        value = settings.get(key, defaults.get(key))
        if value is not None:
            token = _token(value, f"{origin}: {key}")
            named[key] = by_text.get(token.content, token)
    for key, value in settings.items():
        if key.endswith("_token") and key not in NAMED and isinstance(value, str | dict):
            named[key] = _token(value, f"{origin}: {key}")
    extra, more = settings.get("extra_special_tokens"), settings.get("additional_special_tokens")
    if isinstance(extra, dict):
        named |= {key: _token(value, f"{origin}: extra_special_tokens.{key}") for key, value in extra.items()}
    elif extra is not None and not isinstance(extra, list):
        raise Corrupt(f"{origin}: extra_special_tokens is {shown(extra)} but must be a list or an object of tokens.")
    if isinstance(extra, dict) or "extra_special_tokens" not in settings:
        extra = field({"additional_special_tokens": more}, "additional_special_tokens", list, origin, [])
    return named, [_token(x, f"{origin}: extra_special_tokens") for x in extra or []]


def add(
    inner: tokenizers.Tokenizer, added: list[AddedToken], named: dict[str, AddedToken], extra: list[AddedToken]
) -> None:
    """Added tokens first, in the order of their ids, then the special tokens that are not among them."""
    tokens = list(added)  # of a text that comes twice the later flags count
    there = {token.content for token in (*added, *inner.get_added_tokens_decoder().values())}
    tokens += [token for token in (*named.values(), *extra) if token.content not in there]
    texts = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in texts
    inner.add_tokens(tokens)


def post_process(
    inner: tokenizers.Tokenizer, post: Any, settings: dict[str, Any], named: dict[str, AddedToken], origin: Path
) -> None:
    """What is put around a text: as tokenizer.json says, or as add_bos_token and add_eos_token do."""
    from tokenizers import processors

    asked = [field(settings, f"add_{name}_token", bool, origin) for name in ("bos", "eos")]
    if post is not None and asked == [None, None]:
        inner.post_processor = post
        return
    ends = [named[key].content if flag and key in named else "" for key, flag in zip(NAMED[:2], asked, strict=True)]
    single = [part for part in (f"{ends[0]}:0" * bool(ends[0]), "$A:0", f"{ends[1]}:0" * bool(ends[1])) if part]
    inner.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[(text, inner.token_to_id(text)) for text in dict.fromkeys(ends) if text],
    )
