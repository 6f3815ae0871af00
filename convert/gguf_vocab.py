"""Tokens, their kinds and the special ones of a GGUF file, checked, and read as llama.cpp's loader reads them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from convert.gguf_pre import PRE
from jaxattn.errors import Corrupt, shown

KINDS = {2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}
NAMES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}  # as gguf spells
# Tokens whose text alone says that generation ends with them.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
# Of filling in the middle: the first that is there, unless a key names it. Generation ends with these too.
FILL = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # which stay in the text, whatever their kind


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens.

    `kinds` [N] are values of `KINDS` or "normal"; `first` and `last` are put around a text; `ends` end generation.
    """

    origin: str
    model: str
    pre: str
    tokens: list[str]
    ids: dict[str, int]
    kinds: list[str]
    scores: list[float] | None
    merges: list[str] | None
    named: dict[str, int]
    ends: frozenset[int]
    first: int | None
    last: int | None
    space_prefix: bool
    phi3: bool

    def of_kind(self, kind: str) -> list[int]:
        return [i for i, k in enumerate(self.kinds) if k == kind]

    def strip_right(self) -> set[int]:
        """Special tokens that swallow the blanks behind them: those of Phi-3, which llama.cpp knows by its name."""
        if not self.phi3:
            return set()
        special = {i for i, k in enumerate(self.kinds) if k in ("control", "user", "unknown")}
        return {i for i in special if self.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")}


def read(fields: dict[str, Any], origin: str) -> Vocabulary:
    """Check and read the fields `tokenizer.ggml.*`.

    Raises:
      Corrupt: naming the field, its value and what it must be.
    """
    model = _text(fields, "model", origin, "")
    pre = _text(fields, "pre", origin, "default") or "default"
    tokens = _list(fields, "tokens", str, origin)
    if not tokens:
        raise Corrupt(f"{origin}: tokenizer.ggml.tokens is missing or empty; take the tokenizer from the original.")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise Corrupt(f"{origin}: tokenizer.ggml.tokens holds {shown(twice)} twice; it is damaged.")
    numbers = _list(fields, "token_type", int, origin)
    scores = _list(fields, "scores", float, origin)
    for name, values in (("token_type", numbers), ("scores", scores)):
        if values is not None and len(values) < len(tokens):
            raise Corrupt(f"{origin}: tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens.")
    kinds = [KINDS.get(number, "normal") for number in numbers or [1] * len(tokens)][: len(tokens)]
    named = {name: i for name, key in NAMES.items() if (i := token_id(fields, key, origin)) is not None}
    if model == "llama":  # as old files mean without saying
        named = {**{name: i for name, i in (("unk", 0), ("bos", 1), ("eos", 2)) if i < len(tokens)}, **named}
    usual = model == "llama" or (model == "gpt2" and pre in PRE and PRE[pre].add_bos)
    around = []
    for name, default in (("bos", usual), ("eos", False)):
        asked = flag(fields, f"add_{name}_token", origin)
        if asked and name not in named:
            raise Corrupt(f"{origin}: tokenizer.ggml.add_{name}_token is true but no {name}_token_id is named.")
        around.append(named.get(name) if (default if asked is None else asked) else None)
    ends = _ends(fields, ids, kinds, named, origin)
    title = fields.get("general.name")
    return Vocabulary(
        origin, model, pre, tokens, ids, kinds, scores, _list(fields, "merges", str, origin), named, ends, *around,
        space_prefix=_or(flag(fields, "add_space_prefix", origin), model == "llama"),
        phi3=isinstance(title, str) and ("phi-3" in title.lower() or "phi3" in title.lower()),
    )  # fmt: skip


def _ends(
    fields: dict[str, Any], ids: dict[str, int], kinds: list[str], named: dict[str, int], origin: str
) -> frozenset[int]:
    """Every token that ends generation: those the file names, and those whose text says so; `kinds` are set right."""
    found = {ids[text] for text in ENDS if text in ids}
    for number in found:
        kinds[number] = "control"
    for name, texts in FILL.items():
        number = token_id(fields, name, origin)
        if number is None and (text := next((text for text in texts if text in ids), None)) is not None:
            number = ids[text]
            kinds[number] = "control"
        found |= set() if number is None else {number}
    for text in SHOWN:
        if text in ids:
            kinds[ids[text]] = "user"
    for name in ("eos", "eot", "eom"):
        number = named.get(name) if name in named else token_id(fields, name, origin)
        found |= set() if number is None else {number}
    has = lambda *texts: any(ids.get(text) in found for text in texts)
    # In harmony's and Solar's formats a message ends with <|end|>, and another follows
    if has("<|end|>") and has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>"):
        found.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = "user"
    if has("</s>") and has("<|tool_response>", "<|plamo:eos|>"):
        found.discard(ids["</s>"])
        kinds[ids["</s>"]] = "normal"
    return frozenset(found)


def token_id(fields: dict[str, Any], name: str, origin: str) -> int | None:
    """A token id by its field, None where it is not named.

    Raises:
      Corrupt: it is no whole number, or no token has it.
    """
    value, tokens = fields.get(f"tokenizer.ggml.{name}_token_id"), fields.get("tokenizer.ggml.tokens")
    if value is None:
        return None
    count = len(tokens) if isinstance(tokens, list) else 1 << 31
    if type(value) is not int or not 0 <= value < count:
        raise Corrupt(
            f"{origin}: tokenizer.ggml.{name}_token_id is {shown(value)} but must be a whole number from 0 to "
            f"{count - 1}."
        )
    return value


def flag(fields: dict[str, Any], name: str, origin: str) -> bool | None:
    """A field that is true or false, None where it is missing. Raises `Corrupt` if it is anything else."""
    value = fields.get(f"tokenizer.ggml.{name}")
    if value is not None and type(value) is not bool:
        raise Corrupt(f"{origin}: tokenizer.ggml.{name} is {shown(value)} but must be true or false.")
    return value


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _text(fields: dict[str, Any], name: str, origin: str, default: str) -> str:
    value = fields.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, str):
        raise Corrupt(f"{origin}: tokenizer.ggml.{name} is {shown(value)} but must be text.")
    return value


def _list(fields: dict[str, Any], name: str, kind: type, origin: str) -> list[Any] | None:
    value = fields.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    kinds = (float, int) if kind is float else (kind,)
    good = lambda x: type(x) in kinds and (kind is not float or math.isfinite(x))
    if not isinstance(value, list) or not all(map(good, value)):
        bad = next((x for x in value if not good(x)), None) if isinstance(value, list) else value
        wanted = {str: "texts", int: "whole numbers", float: "finite numbers"}[kind]
        raise Corrupt(f"{origin}: tokenizer.ggml.{name} holds {shown(bad)} but must be a list of {wanted}.")
    return value
