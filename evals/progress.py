"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import track


def bar(name: str) -> Callable[[Iterable[int]], Iterator[int]]:
    """What numbers pass through, to be shown as they come."""

    def show(numbers: Iterable[int]) -> Iterator[int]:
        console = Console(stderr=True)
        yield from track(list(numbers), name, transient=True, console=console, disable=not console.is_terminal)

    return show
