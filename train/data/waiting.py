"""What happens in steps of several seconds: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 10.0  # seconds between lines


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yields the items; says how many there were, on stderr, also while the next one is long in coming."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=label, total=total, console=Console(stderr=True), transient=True)
        return
    with waiting(label) as count:
        for item in items:
            yield item
            count[0] += 1


@contextlib.contextmanager
def waiting(label: str) -> Iterator[list[int]]:
    """Says every `EVERY` seconds that `label` is still going on; the number in the list, if any, is of things done."""
    count, begin, done = [0], time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(EVERY):
            minutes, seconds = divmod(int(time.monotonic() - begin), 60)
            so_far = f"{count[0]:,} so far, " if count[0] else ""
            with contextlib.suppress(OSError):
                print(f"{label}: {so_far}{minutes}:{seconds:02d}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield count
    finally:
        done.set()
        thread.join()
