"""A byte-level BPE trained on a run's own corpus, and kept in the cache.

It puts nothing in front of a document (the sink study needs data without a start token).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxattn.open_tokenizer import byte_alphabet, parsed
from jaxattn.tokenizer import END, Tokenizer
from train.data.cache_files import corrupt, digest, write_atomic

_BPE_VERSION = "2"  # 2: words of a training text are bounded
LONGEST_WORD = 256
"""Characters: learning merges costs the square of a word's length, and a text without blanks is one word."""
SAMPLE_BYTES = 8_000_000
"""The BPE is trained on at most this much text: more changes a 2048-entry vocabulary little and costs
seconds."""


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
        initial_alphabet=byte_alphabet(),
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
        return Tokenizer(parsed(_checked(path)))
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
