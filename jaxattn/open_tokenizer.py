"""A tokenizer by its name: "bytes", a file, a folder with a tokenizer's files, or "hf:NAME" from the hub.

The end-of-text token closes every document; bytes put nothing in front of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jaxattn.errors import DataError, UserError, one_line
from jaxattn.hf_added_tokens import ADDED, CONFIG, JSON, SPECIAL_MAP
from jaxattn.hf_tokenizer import FILES
from jaxattn.json_text import read_text
from jaxattn.rust import guarded
from jaxattn.tokenizer import END, Tokenizer, read_tokenizer

if TYPE_CHECKING:
    import tokenizers


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte (the table of GPT-2)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Token b is byte b; 256 is the end of text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_alphabet())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return Tokenizer(inner)


def parsed(body: str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes."""
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
            return Tokenizer(parsed(read_text(path)))
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
