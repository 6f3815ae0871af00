"""Ctrl-C, SIGTERM and a closed terminal stop a command from its first moment on, without a traceback.

What a stop does depends on where the command is:

  leave   its modules are being imported, nothing has been begun: the process ends at once
  raise   inside `jaxattn.command.run_cli`: KeyboardInterrupt, so that whatever was begun is undone. It waits while a
          module is imported, because an import may swallow it, and comes again if something else did
  note    inside `StopSignal`, as a training loop is: nothing but a note, which the loop reads when it can stop

A further signal within a second is the same request (a key held down, a `kill` of a group and of its members); one
that comes later ends the process at once, which any checkpoint survives.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

Mode = Literal["leave", "raise", "note", "over"]

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}  # exit codes: 128 + the signal, as shells say
COMMANDS = ("jaxattn", "train", "evals", "convert", "pallas_kernels", "scripts")
SAME_REQUEST = 1.0  # seconds
RETRY = 0.1  # seconds until an interrupt that had to wait, or was swallowed, is tried again
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class _Handlers:
    """The handlers of this process while they are installed; made and removed in the main thread."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self.first: signal.Signals | None = None
        # Python runs a handler only when the main thread is back in Python, which during a long compile or device
        # wait may be minutes. The wakeup fd is written by the C handler at once, so a thread can act on it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old: dict[signal.Signals, Any] = {}
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._old[number] = signal.signal(number, self._handle)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._thread.start()

    def remove(self) -> None:
        """Back to the handlers that were there before."""
        self.reset()
        os.write(self._write, b"\0")  # ends the thread
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def reset(self) -> None:
        """`remove` for a forked child, which has no such thread and shares the pipe with its parent."""
        signal.set_wakeup_fd(self._old_fd)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._old.items():
            if handler is not None:  # None: not from Python, and so not to be had back
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(signal.Signals(number))
        self._interrupt(number, frame)

    def _note(self, number: signal.Signals) -> None:
        self.first = self.first or number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: do what `mode` says."""
        if self.first is None or self.mode in ("note", "over"):
            return
        if self.mode == "leave":
            _leave(self.first, b"interrupted\n")
        if signal.SIGALRM not in self._old:
            self._old[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._interrupt)
            sys.unraisablehook = _quiet_about_interrupts(sys.unraisablehook)
        signal.setitimer(signal.ITIMER_REAL, RETRY)
        if not (_importing(frame) or _unwinding()):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """In a thread of its own: count the signals, and end the process where the main thread need not be asked."""
        since = None
        while (byte := os.read(self._read, 1)) != b"\0":
            if byte[0] not in SIGNALS or signal.getsignal(byte[0]) != self._handle:  # a server has its own handlers
                continue
            number, now = signal.Signals(byte[0]), time.monotonic()
            self._note(number)
            if self.mode == "leave":
                _leave(number, b"interrupted\n")
            if since is None:
                since = now
                if self.mode == "note":
                    text = f"{number.name}: saving after this step; a second one, after a second, leaves at once\n"
                    _say(text.encode())
            elif now - since >= SAME_REQUEST:
                saved = b"left at once; the last committed checkpoint is valid\n"
                _leave(number, saved if self.mode == "note" else b"interrupted\n")


_installed: _Handlers | None = None
_leaving = threading.Lock()
_command_is_over = False


def install_for_command() -> None:
    """Take the signals now if `python -m` is about to run one of our commands; whoever imports the library keeps his.

    To be called where the first package of a command is imported, which comes before all that takes seconds.
    """
    global _installed
    if _installed is None and sys.argv[:1] == ["-m"]:  # Python is still looking for the module
        module = re.sub(r"^-\w*?m", "", sys.orig_argv[-len(sys.argv)])
        if module.partition(".")[0] in COMMANDS:
            _installed = _Handlers("leave")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A command's own work: a stop raises KeyboardInterrupt in here, and does nothing behind it."""
    global _installed, _command_is_over
    own = _installed is None and threading.current_thread() is threading.main_thread()
    if own:
        _installed = _Handlers("raise")
    handlers = _installed
    if handlers is None:  # a thread: its interrupts are the main thread's
        yield
        return
    try:
        handlers.mode = "raise"
        yield
    finally:
        handlers.mode, _command_is_over = "over", True
        if own and not _unwinding():
            _installed = None
            handlers.remove()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """The imports of a command that has begun nothing yet: a stop ends it at once in here."""
    handlers = _installed
    if handlers is None:
        yield
        return
    before, handlers.mode = handlers.mode, "leave"
    try:
        yield
    finally:
        handlers.mode = before


def end_interrupted() -> NoReturn:
    """End the process behind a KeyboardInterrupt, with the first signal's exit code.

    In good order, but without the interpreter's own end: JAX, interrupted while it traces, crashes in that.
    """
    _say(b"interrupted\n")
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(SIGNALS[(_installed and _installed.first) or signal.SIGINT])


class StopSignal:
    """Context manager for the main thread; `requested` is None or the name of the first signal that came.

    The training loop polls `requested` after each step, saves and ends. Outside a command it brings its own
    handlers and puts the old ones back. Enter it after `jax.distributed.initialize`, whose preemption notifier
    would otherwise take SIGTERM for itself.

    Raises:
      ValueError: another thread than the main one.
    """

    def __enter__(self) -> StopSignal:
        global _installed
        self._own = _installed is None
        if _installed is None:
            _installed = _Handlers("note")
        self._handlers = _installed
        self._before, self._handlers.mode = self._handlers.mode, "note"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _installed
        self._handlers.mode = self._before
        if self._own:
            _installed = None
            self._handlers.remove()

    @property
    def requested(self) -> str | None:
        return self._handlers.first.name if self._handlers.first else None


def _quiet_about_interrupts(before: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook for exceptions that Python has to ignore (in a finaliser, say): an interrupt comes again anyway."""
    return lambda raised: None if raised.exc_type is KeyboardInterrupt else before(raised)


def _importing(frame: FrameType | None) -> bool:
    """Whether some module is being imported in the calls that lead to `frame`."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _unwinding() -> bool:
    """Whether an interrupt is on its way already, and this is some `finally` or `__exit__` on it."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _say(text: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, text)


def _leave(number: signal.Signals, text: bytes) -> NoReturn:
    _leaving.acquire()  # for ever, where the other thread is at it
    _say((SHOW_CURSOR if os.isatty(2) else b"") + text)
    os._exit(SIGNALS[number])


def _after_fork() -> None:
    """A forked child (of some data loader) stops as its parent tells it to."""
    global _installed
    if _installed is not None:
        _installed.reset()
        _installed = None


def _at_exit() -> None:
    """Behind everything else that happens at the end: the interpreter is about to give up its handlers."""
    if _command_is_over:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)  # first in, last out
