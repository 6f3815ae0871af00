"""Text to token ids and back: one class over `tokenizers.Tokenizer`, and the reader of HuggingFace folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxattn.errors import Corrupt, Incomplete

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
END_NAMES = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


class Tokenizer:
    """Text to token ids and back; `bos` and `eos` are the ids of the start and the end of a text, or None.

    Settings of one call that a file may hold (truncation, padding) are reset: they are no part of the tokenizer.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, bos: int | None = None, eos: int | None = None):
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = (inner.token_to_id(name) for name in END_NAMES)
        self._guess = next((i for i in ids if i is not None), None)
        self.bos: int | None = bos
        self.eos: int | None = self._guess if eos is None else eos

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of the text, with the start and end tokens that this tokenizer puts around one."""
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of several texts, on all cores."""
        return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; broken UTF-8 becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def identity(self) -> tuple[str, ...]:
        """Parts of a digest that changes whenever the ids of some document would."""
        around = self.encode("")
        return (self.to_json(), *([f"{around} {self.eos}"] if around or self.eos != self._guess else []))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a HuggingFace tokenizer.json."""
        Path(path).write_text(self.to_json(), "utf-8")

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._inner.to_str()


def read_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a HuggingFace folder.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    import tokenizers

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise Incomplete(f"{folder} has no tokenizer.json; copy the tokenizer's files there.")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise Corrupt(f"{path} is not a tokenizer.json ({error}).") from error
    except Exception as error:  # `tokenizers` raises the base class
        raise Corrupt(f"{path} is not a tokenizer.json ({error}).") from error
