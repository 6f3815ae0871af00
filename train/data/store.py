"""The tokenised corpus: one file of ids, memory-mapped, with the document borders beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxattn.errors import DataError
from jaxattn.json_text import read_object
from jaxattn.tokenizer import Tokenizer
from train.data.cache_files import corrupt, digest, file_digest, write_atomic
from train.data.corpus import Corpus, Tally
from train.data.waiting import progress

_VERSION = "1"
_BLOCK = 256
LONG = 1 << 20  # characters of a document that is tokenised by itself, in parts where it can be cut


@dataclass(frozen=True)
class TokenStore:
    """Token ids of a corpus. Pickles as its path, so that worker processes map the file and copy nothing."""

    path: Path
    dtype: str
    offsets: np.ndarray = field(repr=False)
    """[documents + 1] int64: document d is ids[offsets[d]:offsets[d + 1]], its end-of-text token included."""
    meta: dict = field(repr=False)

    @cached_property
    def ids(self) -> np.ndarray:
        """[tokens] all ids, memory-mapped read-only."""
        if self.offsets[-1] == 0:
            return np.zeros(0, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r")

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "ids"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def build_store(corpus: Corpus, tokenizer: Tokenizer, root: Path, *, max_bad_records: int = 0) -> TokenStore:
    """Tokenises the corpus once per (corpus, tokenizer); later calls map the cached files.

    Every non-empty document is closed with the end-of-text token, and begins with the start token where the tokenizer
    has it so. An empty document has no tokens.

    Raises:
      DataError: no text at all, too many corrupt records, or cache files that are not what was written.
    """
    key = digest("tokens", _VERSION, corpus.fingerprint, *tokenizer.identity())
    record_path = root / f"tokens-{key}.json"
    if not record_path.exists():
        _write(corpus, tokenizer, record_path, max_bad_records)
    store = _open(record_path)
    for start in range(0, len(store.ids), 1 << 24):
        if (top := int(store.ids[start : start + (1 << 24)].max())) >= tokenizer.vocab_size:
            raise corrupt(record_path, f"speaks of token {top}, of a vocabulary of {tokenizer.vocab_size}")
    bad = store.meta["bad_records"]
    if len(bad) > max_bad_records:
        tally = Tally(max_bad_records)
        for entry in bad:
            record, _, why = entry.partition(": ")
            tally.bad(record, why)
    return store


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts by the hundreds, but a long one alone."""
    block: list[str] = []
    for text in texts:
        if len(text) > LONG:
            yield from filter(None, (block, [text]))
            block = []
            continue
        block.append(text)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _write(corpus: Corpus, tokenizer: Tokenizer, record_path: Path, max_bad_records: int) -> None:
    tally, lengths = Tally(max_bad_records), []
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    characters = 0

    def encoded() -> Iterator[bytes]:
        nonlocal characters
        front, back = tokenizer.around
        end = [] if tokenizer.eos is None or back[-1:] == [tokenizer.eos] else [tokenizer.eos]
        for block in _blocks(progress(corpus.read(tally), f"tokenising {corpus.name}")):
            characters += sum(map(len, block))
            if len(block) == 1 and len(block[0]) > LONG:
                lengths.append(0)
                parts = tokenizer.encode_parts(block[0])
                for ids in itertools.chain(progress(parts, f"a document of {len(block[0]):,} characters"), [end]):
                    lengths[-1] += len(ids)
                    yield np.asarray(ids, dtype).tobytes()
                continue
            for ids in tokenizer.encode_batch(block):
                ids = ids + end if ids != [*front, *back] else []
                lengths.append(len(ids))
                yield np.asarray(ids, dtype).tobytes()

    ids_path, offsets_path = record_path.with_suffix(".ids"), record_path.with_suffix(".offsets")
    _, ids_sha = write_atomic(ids_path, encoded())
    try:
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype("<i8")
        if offsets[-1] == 0:
            raise DataError(
                f"data.source={corpus.name!r} is empty: it has {len(lengths)} documents and no text in them."
            )
        _, offsets_sha = write_atomic(offsets_path, [offsets.tobytes()])
        record = {
            "ids_sha256": ids_sha,
            "offsets_sha256": offsets_sha,
            "dtype": dtype.name,
            "source": corpus.name,
            "documents": len(lengths),
            "empty_documents": lengths.count(0),
            "tokens": int(offsets[-1]),
            "characters": characters,
            "bytes": corpus.size,
            "files": corpus.files,
            "corpus_hash": corpus.fingerprint,
            "bad_records": tally.records,
        }
        # Written last: a record on disk means that both files before it are whole.
        write_atomic(record_path, [json.dumps(record).encode("ascii")])
    finally:
        if not record_path.exists():
            for path in (ids_path, offsets_path):  # large, and of no use without the record
                path.unlink(missing_ok=True)


def _open(record_path: Path) -> TokenStore:
    try:
        meta = read_object(record_path, "delete it", DataError)
        expected = {".ids": meta["ids_sha256"], ".offsets": meta["offsets_sha256"]}
        dtype, count = np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]), meta["documents"]
        if not all(isinstance(entry, str) for entry in meta["bad_records"]):
            raise TypeError("bad_records")
    except (DataError, KeyError, TypeError) as error:
        raise corrupt(record_path, "is not a record written by jaxattn") from error
    for suffix, sha in expected.items():
        path = record_path.with_suffix(suffix)
        if not path.exists():
            raise corrupt(record_path, f"has lost its partner {path.name!r}")
        if file_digest(path) != sha:
            raise DataError(
                f"the cache file {str(path)!r} does not match its checksum: delete it and "
                f"{str(record_path)!r}, then run again to build them anew."
            )
    offsets = np.fromfile(record_path.with_suffix(".offsets"), dtype="<i8").astype(np.int64)
    tokens = record_path.with_suffix(".ids").stat().st_size / dtype.itemsize
    if len(offsets) - 1 != count or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 0).any():
        raise corrupt(record_path, "does not fit its partners")
    return TokenStore(record_path.with_suffix(".ids"), dtype.name, offsets, meta)
