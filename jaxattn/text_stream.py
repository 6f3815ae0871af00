"""Text as its tokens come: in the context of the prompt, no half characters, ended by stop strings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jaxattn.tokenizer import Tokenizer

CONTEXT = 8  # settled tokens in whose context the next ones are decoded
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OPEN = re.compile(r" (?:' ?|n'?|'[vr])?$")  # what the cleaning of blanks may still change


def _common(a: str, b: str) -> str:
    """The longest text that both begin with."""
    if a.startswith(b):
        return b
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))]


@dataclasses.dataclass
class _Piece:
    """The text of some tokens: with special tokens, for the search, and as it is shown."""

    full: str
    shown: str

    def until(self, at: int) -> str:
        """What is shown of the first `at` characters."""
        if self.full.endswith(self.shown):  # the same, or with a blank or a special token before it
            return self.shown[: max(0, at - (len(self.full) - len(self.shown)))]
        return _common(self.full[:at], self.shown)


class TextStream:
    """Turns new tokens into text that will not change any more.

    The text is transformers' decoding of prompt and new tokens less that of the prompt, so a tokenizer that strips a
    text's first blank does not strip one from the middle. Held back are half characters, runs of byte tokens (one that
    is no UTF-8 changes the whole run), and what may become a stop string.

    A stop string may lie over special tokens, which the text leaves out. It ends the text before its beginning. Of
    several the one that the earliest token completes counts, of those the one that begins first; however many tokens
    come at once.

    Attributes:
      stopped: a stop string has ended the text; what comes later is ignored.
      used: new tokens up to and including the one that completed the stop string; all of them without one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(s for s in stop if s)
        self._context = self._tail(self._whole([int(i) for i in prompt_ids]))
        self._base = self._texts(self._context)
        self._pending: list[int] = []  # tokens whose text may still change
        self._waiting: list[_Piece] = []  # settled text that may become a stop string
        self.stopped = False
        self.used = 0

    def add(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now; `last` gives out what was held back."""
        out = []
        for token in ids:
            if self.stopped:
                break
            self._pending.append(int(token))
            self.used += 1
            out.append(self._settle())
        if last and not self.stopped:
            out.append(self._settle(last=True))
        return "".join(out)

    @property
    def reason(self) -> str | None:
        """ "stop" if a stop string has ended the text, else None: whoever counts tokens knows more."""
        return "stop" if self.stopped else None

    def _texts(self, ids: Sequence[int]) -> tuple[str, str]:
        """With special tokens and without."""
        decode = self._tokenizer.decode
        return decode(ids, skip_special_tokens=False), decode(ids)

    def _new(self, pending: Sequence[int]) -> _Piece:
        """The text that these tokens add behind the context."""
        full, shown = self._texts([*self._context, *pending])
        behind = lambda text, base: text[len(_common(text, base)) :]
        return _Piece(behind(full, self._base[0]), behind(shown, self._base[1]))

    def _settle(self, *, last: bool = False) -> str:
        if self._pending:
            piece = self._new(self._pending)
            if not last and self._open(piece):
                return ""
            if self._stop and (done := self._completed(piece)) is not None:
                return done
            self._waiting.append(piece)
            self._context = self._tail([*self._context, *self._pending])
            self._base = self._texts(self._context)
            self._pending = []
        return self._release(len(self._full()) if last else self._certain())

    def _open(self, piece: _Piece) -> bool:
        """Whether tokens to come may change the text of the pending ones."""
        if piece.full.endswith("\ufffd") or piece.shown.endswith("\ufffd"):
            return True
        if self._tokenizer.byte_fallback and self._is_byte(self._pending[-1]):
            return True
        return self._tokenizer.cleans_up and _OPEN.search(piece.shown) is not None

    def _completed(self, piece: _Piece) -> str | None:
        """The rest of the text if the pending tokens complete a stop string."""
        before = self._full()
        if not any(s in before + piece.full for s in self._stop):
            return None
        for count in range(1, len(self._pending) + 1):
            so_far = _common(self._new(self._pending[:count]).full, piece.full)
            text = before + (piece.full if count == len(self._pending) else so_far)
            found = [text.find(s) for s in self._stop if s in text]
            if found:
                self.stopped = True
                self.used -= len(self._pending) - count
                self._waiting.append(piece)
                return self._release(min(found))
        return None

    def _full(self) -> str:
        return "".join(piece.full for piece in self._waiting)

    def _certain(self) -> int:
        """How much of the waiting text cannot be the beginning of a stop string."""
        text = self._full()
        starts = range(max(0, len(text) - max(map(len, self._stop), default=0) + 1), len(text))
        return next((at for at in starts if any(s.startswith(text[at:]) for s in self._stop)), len(text))

    def _release(self, count: int) -> str:
        """Give out what is shown of the first `count` characters that wait."""
        out = []
        while self._waiting and count >= len(self._waiting[0].full):
            piece = self._waiting.pop(0)
            count -= len(piece.full)
            out.append(piece.shown)
        if self._waiting and count:
            piece = self._waiting[0]
            shown = piece.until(count)
            out.append(shown)
            self._waiting[0] = _Piece(piece.full[count:], piece.shown[len(shown) :])
        return "".join(out)

    def _tail(self, ids: list[int]) -> list[int]:
        """The last tokens of a text, from one that decodes alike wherever it stands: no byte, no special token."""
        start = max(0, len(ids) - CONTEXT)
        while start and (self._is_byte(ids[start]) or not self._tokenizer.decode(ids[start : start + 1])):
            start -= 1
        return ids[start:]

    def _whole(self, prompt: list[int]) -> list[int]:
        """A prompt without the bytes of whole characters at its end: bytes to come are not to change them."""
        end = len(prompt)
        while end and self._is_byte(prompt[end - 1]):
            end -= 1
        return prompt if self._tokenizer.decode(prompt[end:]).endswith("\ufffd") else prompt[:end]

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.token(token) or "") is not None
