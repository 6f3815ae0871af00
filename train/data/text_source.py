"""Tokenised documents as a data source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxattn.errors import DataError
from jaxattn.open_tokenizer import byte_tokenizer, load_tokenizer
from jaxattn.runs.data_config import DataConfig
from jaxattn.tokenizer import Tokenizer
from train.data.bpe import cached_bpe
from train.data.cache_files import cache_root, digest
from train.data.corpus import Corpus, Tally
from train.data.entropy import text_entropies
from train.data.open_corpus import open_corpus
from train.data.perturb import parse_perturbation
from train.data.source import Source
from train.data.split import Spans, first_tokens, split
from train.data.store import TokenStore, build_store
from train.data.waiting import waiting

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class TextSource(Source):
    """Tokenised documents on disk."""

    store: TokenStore = field(kw_only=True, repr=False)
    train: Spans = field(kw_only=True, repr=False)
    val: Spans = field(kw_only=True, repr=False)

    def _train_batches(self) -> grain.IterDataset:
        from train.data.pipeline import text_batches

        return text_batches(self.store, self.train, self.layout(), self.seed)

    def _need_val(self) -> None:
        if not len(self.val):
            raise DataError(f"data.val_fraction={self.cfg.val_fraction} holds no document out: set it above 0.")

    def val_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, np.ndarray]]:
        """Packed validation documents."""
        from train.data.pipeline import take, text_batches

        self._need_val()
        return take(text_batches(self.store, self.val, self.layout(batch_size), self.cfg.seed), count)

    def held_out(self, n: int, length: int, *, perturbed: bool = True) -> np.ndarray:
        """Windows of validation documents, the end-of-text token excluded."""
        self._need_val()
        eos = -1 if self.tokenizer is None or self.tokenizer.eos is None else self.tokenizer.eos
        closed = self.store.ids[self.val.stop - 1] == eos
        room = self.val.stop - self.val.start - closed - length
        if not (room >= 0).any():
            raise DataError(
                f"no held-out document has {length} tokens (the longest has {int(room.max()) + length}): "
                "ask for shorter sequences, or raise --data.val-fraction."
            )
        fits = np.flatnonzero(room >= 0)
        starts = self.val.start[fits][:n]
        if len(starts) < n:
            rng = np.random.default_rng([self.cfg.seed, 1])
            picked = rng.choice(fits, n - len(starts), p=(room[fits] + 1) / (room[fits] + 1).sum())
            starts = np.concatenate([starts, self.val.start[picked] + rng.integers(0, room[picked] + 1)])
        out = np.stack([self.store.ids[s : s + length] for s in starts]).astype(np.int32)
        front = self._front()[:length]
        out[:, : len(front)] = front
        return self.perturb.replace(out, self.cfg.seed) if perturbed and self.perturb else out

    def encode_text(self, path: str, n: int, length: int) -> np.ndarray:
        """Windows of the file."""
        assert self.tokenizer is not None
        front = self._front()[:length]
        room = length - len(front)
        try:
            text = Path(path).expanduser().read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the text file {path!r} cannot be read as UTF-8 ({error}); check the file.") from error
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        if len(ids) < n * room:
            fewer = f"{len(ids) // room} sequences" if len(ids) >= room else "shorter ones"
            raise DataError(
                f"the text file {path!r} has {len(ids)} tokens, too few for {n} sequences of {length}: "
                f"give a longer text, or ask for {fewer}."
            )
        starts = np.arange(n) * (len(ids) // n if n else 0)
        rows = [np.concatenate([front, ids[s : s + room]]) for s in starts]
        return np.stack(rows) if n else np.zeros((0, length), np.int32)

    def _front(self) -> np.ndarray:
        """What the tokenizer puts before a text, and so stands before every sequence cut from one."""
        return np.asarray([] if self.tokenizer is None else self.tokenizer.around[0], np.int32)

    def entropies(self, max_tokens: int = 5_000_000) -> dict[str, float]:
        """Measured on the tokens."""
        return text_entropies(self.store, self.train, self.val, self.vocab_size, max_tokens)


def _tokenizer(cfg: DataConfig, corpus: Corpus, root: Path) -> Tokenizer:
    if cfg.tokenizer == "bytes":
        return byte_tokenizer()
    if cfg.tokenizer == "bpe":
        texts = corpus.read(Tally(cfg.max_bad_records))
        with waiting(f"a tokenizer of {cfg.vocab_size} entries from {corpus.name}"):
            return cached_bpe(texts, corpus.fingerprint, corpus.size, cfg.vocab_size, root)
    return load_tokenizer(cfg.tokenizer)


def text_source(cfg: DataConfig, place: dict[str, Any]) -> TextSource:
    """Opens a text corpus; `place` holds the seed and the process of `make_source`."""
    corpus = open_corpus(cfg.source, cfg.text_field)
    root = cache_root(cfg.cache_dir)
    tokenizer = _tokenizer(cfg, corpus, root)
    store = build_store(corpus, tokenizer, root, max_bad_records=cfg.max_bad_records)
    train, val = split(store.offsets, cfg.val_fraction, cfg.seed)
    train = first_tokens(train, cfg.unique_tokens)
    if not len(train):
        raise DataError(f"data.source={cfg.source!r} leaves no training text: give more documents.")
    meta = {
        **{k: v for k, v in store.meta.items() if not k.endswith("sha256")},
        "data_hash": digest(corpus.fingerprint, *tokenizer.identity()),
        "tokenizer": cfg.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "train_documents": len(train),
        "train_tokens": train.tokens,
        "val_documents": len(val),
        "val_tokens": val.tokens,
    }
    perturb = parse_perturbation(cfg.perturb, context=cfg.context, vocab=tokenizer.vocab_size, special=tokenizer.eos)
    return TextSource(
        **place,
        name=corpus.name,
        vocab_size=tokenizer.vocab_size,
        meta=meta,
        perturb=perturb,
        tokenizer=tokenizer,
        store=store,
        train=train,
        val=val,
    )
