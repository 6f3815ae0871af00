"""The tokenizer of a GGUF file, by the rules of llama.cpp's loader: as a `tokenizers.Tokenizer` and its HF files.

Two models are read: `gpt2`, byte-level merges behind a pre-tokenizer (`gguf_pre`), and `llama`, SentencePiece pieces
whose scores say what merges first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert import gguf_vocab
from convert.gguf_pre import PRE
from convert.gguf_vocab import Vocabulary
from jaxattn.errors import Corrupt, Unsupported, shown
from jaxattn.hf_tokenizer import GGUF
from jaxattn.rust import guarded

MOST_PIECE = 512  # characters of a SentencePiece token, whose every cut is looked up
REMEDY = "take tokenizer.json from the original."


def tokenizer_of(fields: dict[str, Any], origin: str) -> Any:
    """Build the tokenizer.

    Raises:
      Unsupported: neither byte-level nor SentencePiece merges, or an unknown way to cut text.
      Corrupt: a field is of another type than GGUF's, or tokens and merges contradict each other.
    """
    from tokenizers import AddedToken, processors

    vocab = gguf_vocab.read(fields, origin)
    if vocab.model not in ("gpt2", "llama"):
        raise Unsupported(
            f"{origin}: tokenizer {shown(vocab.model)} is neither gpt2 nor llama (SentencePiece); {REMEDY}"
        )
    with guarded(f"{origin}: its tokenizer is inconsistent"):
        made = _byte_level(vocab) if vocab.model == "gpt2" else _pieces(vocab)
        strip = vocab.strip_right()
        add = lambda kind, special: [
            AddedToken(vocab.tokens[i], special=special, normalized=False, rstrip=i in strip)
            for i in vocab.of_kind(kind)
        ]
        made.add_tokens([*add("control", True), *add("unknown", True), *add("user", False)])
        ends = [vocab.tokens[i] if i is not None else "" for i in (vocab.first, vocab.last)]
        single = [part for part in (f"{ends[0]}:0" * bool(ends[0]), "$A:0", f"{ends[1]}:0" * bool(ends[1])) if part]
        special = [(text, made.token_to_id(text)) for text in dict.fromkeys(ends) if text]
        made.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B:1"], special_tokens=special
        )
        made.encode("a")
    return made


def _byte_level(vocab: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if vocab.pre not in PRE:
        raise Unsupported(f"{vocab.origin}: pre-tokenizer {shown(vocab.pre)} is not one of {', '.join(PRE)}; {REMEDY}")
    if vocab.merges is None:
        raise Corrupt(f"{vocab.origin}: tokenizer.ggml.merges is missing; {REMEDY}")
    pairs: dict[tuple[str, str], None] = {}
    for merge in vocab.merges:
        if (cut := merge.find(" ", 1)) > 0:
            pairs.setdefault((merge[:cut], merge[cut + 1 :]))
    pre = PRE[vocab.pre]
    made = Tokenizer(models.BPE(vocab=vocab.ids, merges=list(pairs), ignore_merges=pre.whole_words))
    cuts = [pre_tokenizers.Split(Regex(e), behavior="isolated", invert=False) for e in pre.expressions]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _pieces(vocab: Vocabulary) -> Any:
    """SentencePiece's merges: of two neighbours that are a token together, those with the best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if vocab.scores is None:
        raise Corrupt(f"{vocab.origin}: tokenizer.ggml.scores is missing, which says what merges first; {REMEDY}")
    ids, found = vocab.ids, []
    for token, number in ids.items():
        if len(token) > MOST_PIECE:
            raise Corrupt(
                f"{vocab.origin}: token {number} has {len(token)} characters; at most {MOST_PIECE} are believed."
            )
        for cut in range(1, len(token)):
            if token[:cut] in ids and token[cut:] in ids:
                found.append((-vocab.scores[number], number, -cut, token[:cut], token[cut:]))
    unknown = next((vocab.tokens[i] for i in vocab.of_kind("unknown")), None)
    model = models.BPE(
        vocab=ids, merges=[pair[-2:] for pair in sorted(found)], byte_fallback=True, fuse_unk=True, unk_token=unknown
    )
    made = Tokenizer(model)
    blank = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if vocab.space_prefix else blank
    strip = [decoders.Strip(content=" ", left=1)] if vocab.space_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def save(fields: dict[str, Any], folder: Path, origin: str) -> None:
    """Write tokenizer.json, tokenizer_config.json (special tokens, chat templates) and generation_config.json (the
    tokens at which generation ends)."""
    (folder / "tokenizer.json").write_text(tokenizer_of(fields, origin).to_str(pretty=True), "utf-8")
    vocab = gguf_vocab.read(fields, origin)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "made_from": GGUF,
    }
    for name, number in vocab.named.items():
        config[f"{name}_token"] = vocab.tokens[number]
    if templates := _templates(fields, origin):
        config["chat_template"] = templates
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False), "utf-8")
    write("tokenizer_config.json", config)
    ends = {"bos_token_id": vocab.named.get("bos"), "eos_token_id": sorted(vocab.ends)}
    if ends := {key: value for key, value in ends.items() if value not in (None, [])}:
        write("generation_config.json", ends)


def _templates(fields: dict[str, Any], origin: str) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them by name where there are several."""
    key = "tokenizer.chat_template"
    found = {name.removeprefix(f"{key}."): text for name, text in fields.items() if name.startswith(f"{key}.")}
    if key in fields:
        found = {"default": fields[key], **found}
    for name, text in found.items():
        if not isinstance(text, str):
            raise Corrupt(f"{origin}: the chat template {name!r} is {shown(text)} but must be text.")
    if list(found) == ["default"]:
        return found["default"]
    return [{"name": name, "template": text} for name, text in found.items()] or None
