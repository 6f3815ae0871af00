"""Stop requests: SIGTERM and Ctrl-C end a run after the step in hand, a second one at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # exit code of the second, hurried, request


class StopSignal:
    """Context manager; `requested` is None, "SIGTERM" or "SIGINT" (the first one that came).

    The training loop polls `requested` after each step, saves, and exits 0 after SIGTERM, 130 after
    SIGINT. A second signal of either kind ends the process at once with 143 or 130 (`os._exit`), which
    is safe at any moment: a checkpoint is committed whole or not at all.

    Enter it in the main thread (`ValueError` elsewhere, as `signal.signal` says) and after
    `jax.distributed.initialize`, whose preemption notifier would otherwise take SIGTERM for itself.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python runs a handler only when the main thread is back in Python, which during a long compile
        # or device wait may be minutes. The wakeup fd is written by the C handler at once, so a thread
        # reading it can end the process within the promised second.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._note)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")  # ends the watcher
        self._watcher.join()
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name

    def _watch(self) -> None:
        seen = 0
        while (byte := os.read(self._read, 1)) != b"\0":
            if byte[0] not in SIGNALS:
                continue
            number = signal.Signals(byte[0])
            seen += 1
            if seen > 1:
                os.write(2, b"second stop signal: leaving at once; the last committed checkpoint is valid\n")
                os._exit(SIGNALS[number])
            self._note(number, None)
            os.write(2, f"{number.name}: saving after this step; a second one leaves at once\n".encode())
