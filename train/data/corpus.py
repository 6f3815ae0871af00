"""Corpora: a source string becomes documents, with corrupt records counted and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from jaxattn.errors import DataError, one_line


@dataclass
class Tally:
    """Counts corrupt records; the first one above the limit stops the run."""

    limit: int = 0
    records: list[str] = field(default_factory=list)

    def bad(self, record: str, why: str) -> None:
        """Notes one corrupt record.

        Raises:
          DataError: more than `limit` were seen; names this record.
        """
        self.records.append(one_line(f"{record}: {why}"))
        if len(self.records) > self.limit:
            seen = f" (number {len(self.records)})" if self.limit else ""
            raise DataError(
                f"{record} is corrupt{seen}: {why}; repair or remove it, or set --data.max-bad-records "
                f"to at least {len(self.records)} to skip and count such records."
            )


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    `fingerprint` changes when any byte that is read, or the way of reading it, changes. `read` yields the
    text of each document and reports corrupt records to the tally; `size` is in bytes, `files` counts the
    inputs.
    """

    name: str
    fingerprint: str
    size: int
    files: int
    read: Callable[[Tally], Iterator[str]]
