"""Long texts cut where the tokenizer cuts them anyway, so that their tokens need not be made all at once.

A tokenizer remembers some 150 bytes for each byte of a text. One whose pre-tokenizer cuts by regular expressions alone
gives the same ids for the pieces of a text as for the whole, if they meet where a pre-token ends and no added token is
near; one of bytes alone, wherever they meet. Other tokenizers (SentencePiece, whose merges may cross any blank) get
their texts whole.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SIZE = 1 << 20  # characters of a piece
WINDOW = 128  # around a place, to see whether the tokenizer cuts there
TRIES = 100  # places looked at before a piece becomes longer
_PLACE = re.compile(r"(?<=[A-Za-z])[\x00-@\[-`{-\x7f]")  # behind a letter, before what is none


def cutter(inner: tokenizers.Tokenizer) -> Callable[[str, int], Iterator[str]]:
    """A function that cuts (text, size of a piece) into pieces which give the ids of the whole."""
    if not _cuts_by_expressions(inner):
        return lambda text, size: iter((text,))
    added = sorted({token.content for token in inner.get_added_tokens_decoder().values()})
    reach = max([WINDOW, *(2 * len(text) for text in added)])
    pre = inner.pre_tokenizer
    normal = (lambda text: text) if inner.normalizer is None else inner.normalizer.normalize_str
    no_merges = inner.get_vocab_size() < 1000 and _no_merges(inner)

    def is_cut(text: str, at: int) -> bool:
        before, behind = text[max(0, at - reach) : at], text[at : at + reach]
        if any(token in before + behind for token in added):
            return False
        before, behind = normal(before), normal(behind)
        return no_merges or any(begin == len(before) for _, (begin, _) in pre.pre_tokenize_str(before + behind))

    def pieces(text: str, size: int) -> Iterator[str]:
        start = 0
        while start + size < len(text):
            places = range(start + size, len(text)) if no_merges else map(_start, _PLACE.finditer(text, start + size))
            at = next((at for at in itertools.islice(places, TRIES) if is_cut(text, at)), None)
            if at is None:
                size *= 2
                continue
            yield text[start:at]
            start = at
        yield text[start:]

    return pieces


def _start(match: re.Match[str]) -> int:
    return match.start()


def _cuts_by_expressions(inner: tokenizers.Tokenizer) -> bool:
    """Whether text is cut by expressions, digits and the byte alphabet alone, and at most composed (NFC) before."""
    state = lambda part: {} if part is None else json.loads(part.__getstate__())
    flat = lambda raw, inside: raw[inside] if raw.get("type") == "Sequence" else [raw]
    steps = flat(state(inner.pre_tokenizer), "pretokenizers")
    if any(not _harmless(step) for step in steps) or not steps[0]:
        return False
    return all(step.get("type", "NFC") == "NFC" for step in flat(state(inner.normalizer), "normalizers"))


def _no_merges(inner: tokenizers.Tokenizer) -> bool:
    """Whether the tokens are the bytes themselves."""
    return json.loads(inner.model.__getstate__()).get("merges") == []


def _harmless(step: dict[str, Any]) -> bool:
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step["add_prefix_space"]
    return kind == "Digits" or (kind == "Split" and step["behavior"] == "Isolated" and not step["invert"])
