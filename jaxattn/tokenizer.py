"""Text to token ids and back: one class over `tokenizers.Tokenizer`, and the reader of HuggingFace folders."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxattn import hf_tokenizer
from jaxattn.errors import UserError
from jaxattn.long_text import SIZE, cutter
from jaxattn.rust import guarded
from jaxattn.split_regex import KNOWN, QUIET

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
PROBES = ("a", "0", " ", "\n", "。", "é", "A", "1", "!")
END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


def _odd_regex(inner: tokenizers.Tokenizer) -> bool:
    """Whether it cuts or rewrites text by an expression that nobody here knows, over which the library may panic."""
    parts = [json.loads(part.__getstate__()) for part in (inner.normalizer, inner.pre_tokenizer) if part is not None]
    odd = False

    def look(value: object) -> None:
        nonlocal odd
        if isinstance(value, dict):
            odd |= "Regex" in value and value["Regex"] not in KNOWN
        for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(below)

    look(parts)
    return odd


class Tokenizer:
    """Text to token ids and back; `bos`, `eos` and `pad` are the ids of a text's start, its end and what fills rows, or
    None.

    Settings of one call that a file may hold (truncation, padding, dropout of merges) are reset: they are no part of
    the tokenizer. `named` are the special tokens with a name, as a chat template sees them.
    """

    def __init__(self, inner: tokenizers.Tokenizer, named: Mapping[str, str] | None = None, *, clean_up: bool = False):
        self._inner, self.cleans_up = inner, clean_up
        self.named = dict(named or {})
        self.byte_fallback = inner.decoder is not None and b"ByteFallback" in inner.decoder.__getstate__()
        inner.no_truncation()
        inner.no_padding()
        if getattr(inner.model, "dropout", None) is not None:
            inner.model.dropout = None
        self._quiet = _odd_regex(inner)
        self._cut = cutter(inner)
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = (inner.token_to_id(name) for name in END_NAMES)
        self._guess = next((i for i in ids if i is not None), None)
        find = lambda key: inner.token_to_id(self.named[key]) if key in self.named else None
        self.bos: int | None = find("bos_token")
        self.pad: int | None = find("pad_token")
        self.eos: int | None = self._guess if (eos := find("eos_token")) is None else eos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of the text, with the start and end tokens that this tokenizer puts around one.

        Raises:
          UserError: the text holds half a character (a lone surrogate).
          Corrupt: the tokenizer's own rules fail on this text.
        """
        return list(itertools.chain(*self.encode_parts(text, add_special_tokens=add_special_tokens)))

    def encode_parts(self, text: str, *, add_special_tokens: bool = True, size: int = SIZE) -> Iterator[list[int]]:
        """`encode`, part by part: a long text needs the memory of `size` characters at a time where it can be cut.

        Raises:
          UserError, Corrupt: as `encode`.
        """
        check_text(text)
        if len(text) <= size:
            yield self._ids(text, add_special_tokens)
            return
        front, back = self.around if add_special_tokens else ([], [])
        yield front
        for piece in self._cut(text, size):
            yield self._ids(piece, False)
        yield back

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        with guarded("the tokenizer fails on this text", quiet=self._quiet or len(text) > QUIET):
            return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """From which character to which each token of `encode(text, add_special_tokens=False)` goes.

        Raises:
          UserError, Corrupt: as `encode`.
        """
        check_text(text)
        with guarded("the tokenizer fails on this text", quiet=self._quiet or len(text) > QUIET):
            return self._inner.encode(text, add_special_tokens=False).offsets

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        for text in texts:
            check_text(text)
        with guarded("the tokenizer fails on a text", quiet=self._quiet or max(map(len, texts), default=0) > QUIET):
            return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; broken UTF-8 becomes U+FFFD."""
        with guarded("the tokenizer cannot decode", quiet=False):
            text = self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def token(self, number: int) -> str | None:
        """The token as the vocabulary writes it, None for an id that it does not have."""
        return self._inner.id_to_token(number)

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids put before a text and behind it."""
        # A vocabulary need not have letters, and a text that has no token is nowhere.
        body, text = next(((ids, x) for x in PROBES if (ids := self._ids(x, False))), ([], ""))
        ids = self._ids(text, True)
        if not body:
            return ids, []
        at = next(i for i in range(len(ids) + 1) if ids[i : i + len(body)] == body)
        return ids[:at], ids[at + len(body) :]

    def identity(self) -> tuple[str, ...]:
        """Parts of a digest that changes whenever the ids of some document would."""
        plain = self.around == ([], []) and self.eos == self._guess
        return (self.to_json(), *([] if plain else [f"{self.around} {self.eos}"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a HuggingFace tokenizer.json."""
        Path(path).write_text(self.to_json(), "utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._inner.to_str()


def read_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a HuggingFace folder, as transformers' AutoTokenizer reads it.

    Raises:
      CheckpointError: there is none, a file of it is broken, or it needs a package that is not installed.
    """
    parts = hf_tokenizer.read(Path(folder))
    return Tokenizer(parts.inner, parts.named, clean_up=parts.clean_up)


def check_text(text: str, what: str = "the text") -> None:
    """Refuse what is no text.

    Raises:
      UserError: naming the first lone surrogate, which stands for a byte or half a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        kind = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a character"
        raise UserError(f"{what} has {kind} (U+{code:04X}) at character {error.start}; remove it.") from error


def clean_up(text: str) -> str:
    """Without the blanks before punctuation that some tokenizers decode to, as transformers removes them."""
    for old in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(old, old.strip())
    return text
