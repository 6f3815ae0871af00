"""The bigram table of the Bigram-Backcopy task, estimated from text.

The paper (arXiv 2410.13835) uses tinyshakespeare. The built-in counts keep its 65 characters but come from
the docstrings of CPython 3.11's standard library (English prose about code, PSF-2.0), with runs of blanks
collapsed; `python -m train.data.bb_table` counted them. Only the counts are shipped, so every Python version
draws the same data.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jaxattn.command import run_cli
from jaxattn.errors import DataError

CHARS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The 65 characters of tinyshakespeare; a character's id is its place here."""

START, DELIMITER, VOCAB = 65, 66, 67
_COUNTS = Path(__file__).with_name("bb_counts.json")
_BITS = 16


@dataclass(frozen=True)
class BigramTable:
    """Rows of next-character probabilities, exact multiples of 2**-16.

    Attributes:
      weights: [65, 65] int64, each row sums to 65536; P(y | x) = weights[x, y] / 65536.
      unigram: [65] int64, the same for single characters; sums to 65536.
      triggers: ids of the most frequent characters, most frequent first.
    """

    weights: np.ndarray
    unigram: np.ndarray
    triggers: tuple[int, ...]

    def __getstate__(self) -> dict:
        """Without what is computed from it: megabytes, for which a worker process would wait at its start."""
        return {name: self.__dict__[name] for name in ("weights", "unigram", "triggers")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    @cached_property
    def rows(self) -> list[bytes]:
        """65 lookup tables of 65536 bytes: a uniform 16-bit number to the next character, without
        rounding."""
        return [np.repeat(np.arange(65, dtype=np.uint8), row).tobytes() for row in self.weights]

    @cached_property
    def first(self) -> np.ndarray:
        """[65] float64 distribution of the character after the start token: unigram without triggers."""
        p = self.unigram.astype(np.float64)
        p[list(self.triggers)] = 0
        return p / p.sum()

    @cached_property
    def first_cumulative(self) -> list[float]:
        """Running sums of `first`, without the last: bisecting a number of [0, 1) gives a character."""
        return np.cumsum(self.first)[:-1].tolist()

    @cached_property
    def copies(self) -> list[bool]:
        """66 flags: True for the triggers."""
        return [i in self.triggers for i in range(START + 1)]

    @property
    def probabilities(self) -> np.ndarray:
        """[65, 65] float64 row-stochastic."""
        return self.weights / float(1 << _BITS)


def estimate_table(text: str) -> np.ndarray:
    """Counts character pairs: [65, 65] int64, entry [x, y] is how often y follows x directly.

    Characters outside `CHARS` are gaps: no pair reaches across one.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    ids = np.full(int(codes.max(initial=0)) + 1, -1, np.int64)
    for i, c in enumerate(CHARS):
        if ord(c) < len(ids):
            ids[ord(c)] = i
    x = ids[codes]
    a, b = x[:-1], x[1:]
    both = (a >= 0) & (b >= 0)
    return np.bincount(a[both] * 65 + b[both], minlength=65 * 65).reshape(65, 65)


def _quantise(counts: np.ndarray) -> np.ndarray:
    """Integer weights that sum to 2**16, by largest remainder; every non-zero count keeps at least 1."""
    total = 1 << _BITS
    share = counts * (total / counts.sum())
    weights = np.where(counts > 0, np.maximum(1, np.floor(share)), 0).astype(np.int64)
    rest = total - int(weights.sum())
    order = np.argsort(-(share - weights), kind="stable")
    if rest >= 0:
        weights[order[:rest]] += 1
    else:
        weights[weights.argmax()] += rest
    return weights


def make_table(counts: np.ndarray, triggers: int = 3) -> BigramTable:
    """The table of [65, 65] pair counts; a character that was never followed by one takes the unigram row.

    Raises:
      DataError: the text has too few different characters for this many triggers.
    """
    occurrences = counts.sum(axis=0) + counts.sum(axis=1)
    if (occurrences > 0).sum() < triggers + 2:
        raise DataError(
            f"the text for data.bb_table has {int((occurrences > 0).sum())} of the 65 characters, too "
            f"few for data.bb_triggers={triggers}: give a longer English text."
        )
    unigram = _quantise(occurrences)
    rows = [_quantise(row) if row.sum() else unigram for row in counts]
    ranked = np.argsort(-occurrences, kind="stable")[:triggers]
    return BigramTable(np.stack(rows), unigram, tuple(int(i) for i in ranked))


def load_table(path: str = "", triggers: int = 3) -> BigramTable:
    """The built-in table, or one counted in the UTF-8 text file `path`.

    Raises:
      DataError: the file is missing, not UTF-8, or too poor.
    """
    if not path:
        counts = np.zeros((65, 65), np.int64)
        for x, row in json.loads(_COUNTS.read_text("utf-8"))["counts"].items():
            for y, n in row.items():
                counts[CHARS.index(x), CHARS.index(y)] = n
        return make_table(counts, triggers)
    try:
        text = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.bb_table={path!r} cannot be read as UTF-8 text ({error}); check the file.") from error
    return make_table(estimate_table(text), triggers)


def _docstrings() -> str:
    """All docstrings of this Python's standard library, blanks collapsed."""
    from train.data.corpus import Tally
    from train.data.stdlib import stdlib_corpus

    found: list[str] = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in stdlib_corpus().read(Tally()):
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
        found.extend(doc for node in nodes if (doc := ast.get_docstring(node)))
    return re.sub(r"\n{2,}", "\n\n", re.sub(r"[ \t]+", " ", "\n\n".join(found)))


def main() -> None:
    """Counts the pairs anew and writes bb_counts.json; run on CPython 3.11 to reproduce the shipped file."""
    import platform

    text = _docstrings()
    counts = estimate_table(text)
    table = {
        CHARS[x]: {CHARS[y]: int(counts[x, y]) for y in np.flatnonzero(counts[x])} for x in range(65) if counts[x].any()
    }
    record = {
        "provenance": f"pair counts in the docstrings of the standard library of CPython "
        f"{platform.python_version()} (PSF-2.0), {len(text)} characters, blanks collapsed; written by "
        "python -m train.data.bb_table",
        "counts": table,
    }
    _COUNTS.write_text(json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n", "utf-8")
    print(f"{_COUNTS}: {int(counts.sum())} pairs")


if __name__ == "__main__":
    run_cli(main)
