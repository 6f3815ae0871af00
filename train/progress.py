"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import errno
import math
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxattn.errors import UserError


class TrainingProgress:
    """Context manager; `update` once a step, `say` for lines that stay.

    `lost` is why nobody can read the lines any more (the reader of a pipe left, the terminal was closed, the disk of
    a log is full), else None.
    """

    def __init__(self, total: int, start: int, print_every: int) -> None:
        self.lost: Exception | None = None
        self._total, self._every, self._step = total, print_every, start
        self._terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_s: float, seconds_left: float) -> None:
        """Show step, loss, tokens/s and the time left."""
        numbers = f"loss {loss:.4f}  {tokens_per_s:,.0f} tok/s"
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._terminal and (step % self._every == 0 or step == self._total):
            self.say(f"step {step}/{self._total}  {numbers}  {_clock(seconds_left)} left")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        try:
            if self._terminal:
                self._bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, flush=True)
        except OSError as error:
            gone = error.errno in (errno.EPIPE, errno.EIO)
            self.lost = BrokenPipeError(*error.args) if gone else UserError(f"the output cannot be written: {error}.")


def evaluation_line(row: dict[str, Any]) -> str:
    """One readable line of an evaluation."""
    parts = [f"step {row['step']}: val_loss {row['val_loss']:.4f}", f"sink_rate {row['sink_rate']:.1f} %"]
    if "val_accuracy" in row:
        parts.insert(1, f"accuracy {100 * row['val_accuracy']:.1f} %")
    if "val_exact" in row:
        parts.insert(2, f"whole answers {100 * row['val_exact']:.1f} %")
    for name, key in (("backcopy", "risk_backcopy"), ("bigram excess", "risk_bigram_excess")):
        parts += [f"{name} {row[key]:.3f}"] if key in row else []
    table = row.get("first_token_weight_nontrigger", row["first_token_weight"])
    heads = [x for layer in table for x in layer if x is not None]
    parts.append(f"start-token weight {max(heads, default=math.nan):.3f}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
