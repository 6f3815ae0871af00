"""What a process that prepares batches does about its trainer's death and about signals, which are the trainer's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0  # seconds that a worker told to end goes on, so that its trainer can take its step and save


def start(index: int, count: int) -> None:
    """Run first in worker `index` of `count`.

    Ctrl-C, a closed terminal and a batch system signal the whole group of processes. The worker leaves the first two
    to the trainer, and the third it follows late. When the trainer is gone, however it went, so is the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_trainer, name="trainer-is-gone", daemon=True).start()


def _end_later(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


def _end_with_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()  # waits for the end of a pipe, which the kernel closes
    os._exit(1)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Where workers are started: they begin with these signals blocked, until `start` has handlers for them.

    This process gets the signals in its other threads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # once; it lives as long as the workers, and must not hear of a hangup either
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # it has unblocked some, in whatever thread starts it
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
