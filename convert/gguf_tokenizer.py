"""The byte-level BPE tokenizer of a GGUF file, as a `tokenizers.Tokenizer` and its HuggingFace files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxattn.errors import Corrupt, Unsupported

CONTROL, USER_DEFINED = 3, 4
# How text is cut before the merges, by `tokenizer.ggml.pre`.
GPT4_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEX = {"llama-bpe": GPT4_LIKE % 3, "llama3": GPT4_LIKE % 3, "qwen2": GPT4_LIKE.replace("{1,%d}", "")}
DIGITS = ("smollm",)
PLAIN = ("gpt-2", "default")


def tokenizer_of(fields: dict[str, Any], origin: str) -> Any:
    """Build the tokenizer.

    Raises:
      Unsupported: no byte-level BPE, or an unknown way to cut text.
      Corrupt: tokens and merges contradict each other.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise Unsupported(f"{origin}: tokenizer {model!r} is no byte-level BPE; take tokenizer.json from the original.")
    if pre not in (*REGEX, *DIGITS, *PLAIN):
        known = ", ".join((*REGEX, *DIGITS, *PLAIN))
        raise Unsupported(
            f"{origin}: pre-tokenizer {pre!r} is not one of {known}; take tokenizer.json from the original."
        )
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type", [])
    merges = fields.get("tokenizer.ggml.merges")
    if not tokens or merges is None or (kinds and len(kinds) != len(tokens)):
        raise Corrupt(f"{origin}: tokens, token types and merges of its tokenizer do not fit together.")
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        made = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False))
    except Exception as error:
        raise Corrupt(f"{origin}: its tokenizer is inconsistent ({str(error)[:100]}).") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in REGEX)
    if pre in REGEX:
        first: list[Any] = [pre_tokenizers.Split(Regex(REGEX[pre]), behavior="isolated", invert=False)]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    made.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=False) if k == USER_DEFINED])
    return made


def save(fields: dict[str, Any], folder: Path, origin: str) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens, chat template)."""
    tokenizer_of(fields, origin).save(str(folder / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if not 0 <= int(number) < len(tokens):
                raise Corrupt(
                    f"{origin}: tokenizer.ggml.{key}_token_id is {number} but there are {len(tokens)} tokens."
                )
            config[f"{name}_token"] = tokens[int(number)]
    config["add_bos_token"] = bool(fields.get("tokenizer.ggml.add_bos_token", False))
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
