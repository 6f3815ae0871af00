"""Tokenizers of a run's data: bytes, a BPE trained on the corpus and cached, or one that is read.

The end-of-text token closes every document. Of these, bytes and our own BPE put nothing in front of a document (the
sink study needs data without a start token).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxattn.errors import DataError, UserError, one_line
from jaxattn.hf_added_tokens import ADDED, CONFIG, JSON, SPECIAL_MAP
from jaxattn.hf_tokenizer import FILES
from jaxattn.json_text import read_text
from jaxattn.rust import guarded
from jaxattn.tokenizer import END, Tokenizer, read_tokenizer
from train.data.cache import corrupt, digest, write_atomic

if TYPE_CHECKING:
    import tokenizers

_BPE_VERSION = "2"  # 2: words of a training text are bounded
LONGEST_WORD = 256
"""Characters: learning merges costs the square of a word's length, and a text without blanks is one word."""
SAMPLE_BYTES = 8_000_000
"""The BPE is trained on at most this much text: more changes a 2048-entry vocabulary little and costs
seconds."""


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte (the table of GPT-2)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b; 256 is the end of text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_byte_alphabet())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return Tokenizer(inner)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over the texts; the end of text is id 0, the 256 bytes are always there.

    A small corpus may give fewer than `vocab_size` entries: read `Tokenizer.vocab_size`.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    runs = "|".join(f"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(runs), "isolated"), level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=_byte_alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    inner.train_from_iterator(texts, trainer)
    inner.pre_tokenizer = level
    return Tokenizer(inner)


def sample(texts: Iterable[str], corpus_bytes: int, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """About `limit` bytes of text, spread evenly: the same share of every document, from its start."""
    share = min(1.0, limit / max(1, corpus_bytes))
    for text in texts:
        yield text[: max(1, round(len(text) * share))]


def cached_bpe(texts: Iterable[str], fingerprint: str, corpus_bytes: int, vocab_size: int, root: Path) -> Tokenizer:
    """The BPE of a corpus, trained once per (corpus, vocabulary size, version); `texts` is read only if
    needed.

    Raises:
      DataError: the cached file is not what was written; the remedy is to delete it.
    """
    key = digest("bpe", _BPE_VERSION, fingerprint, str(vocab_size), str(SAMPLE_BYTES))
    path = root / f"bpe-{vocab_size}-{key}.json"
    if path.exists():
        return Tokenizer(_from_json(_checked(path)))
    tokenizer = train_bpe(sample(texts, corpus_bytes), vocab_size)
    body = tokenizer.to_json()
    record = {"sha256": hashlib.sha256(body.encode("utf-8")).hexdigest(), "tokenizer": body}
    write_atomic(path, [json.dumps(record).encode("utf-8")])
    return tokenizer


def _checked(path: Path) -> str:
    try:
        record = json.loads(path.read_bytes())
        body, expected = record["tokenizer"], record["sha256"]
        actual = hashlib.sha256(body.encode("utf-8")).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(path, "is not a tokenizer written by jaxattn") from error
    if actual != expected:
        raise corrupt(path, f"does not match its checksum (SHA-256 {actual[:12]}, expected {expected[:12]})")
    return body


def _from_json(body: str) -> tokenizers.Tokenizer:
    import tokenizers

    return tokenizers.Tokenizer.from_str(body)


def load_tokenizer(name: str) -> Tokenizer:
    """A folder with a tokenizer's files, a tokenizer.json in one, another file of its kind, or "hf:NAME" from the hub.

    Raises:
      DataError: it is not there or cannot be read.
    """
    path = _from_hub(name) if name.startswith("hf:") else Path(name).expanduser()
    if not path.exists():
        raise DataError(
            f"data.tokenizer={name!r}: {str(path)!r} does not exist; give 'bpe', 'bytes', the path of a "
            "tokenizer.json or of a folder that holds one, or 'hf:NAME'."
        )
    try:
        if path.is_dir() or path.name == JSON:
            return read_tokenizer(path if path.is_dir() else path.parent)
        with guarded(f"{str(path)!r} is not a tokenizer.json"):
            return Tokenizer(_from_json(read_text(path)))
    except UserError as error:
        raise DataError(f"data.tokenizer={name!r}: {error}") from error


def _from_hub(name: str) -> Path:
    import huggingface_hub

    files = [*FILES, "merges.txt", CONFIG, SPECIAL_MAP, ADDED, "config.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name.removeprefix("hf:"), allow_patterns=files))
    except Exception as error:  # the client lets its HTTP library's own errors pass
        reason = one_line(str(error)[:300]).rstrip(".") or type(error).__name__
        raise DataError(
            f"data.tokenizer={name!r} cannot be fetched ({reason}): check the name and the network, or "
            "give a local path."
        ) from error
