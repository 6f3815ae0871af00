"""Tasks that go wrong in the ways that tasks on a new device do; asked by name in `test_device`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def add(a: int, b: int) -> dict[str, Any]:
    print("printed", a, flush=True)
    return {"sum": a + b, "pid": os.getpid()}


def fail() -> dict[str, Any]:
    raise ArithmeticError("an error\nof two lines")


def refuse() -> dict[str, Any]:
    raise NotImplementedError("backend 'gpu' cannot do this: use 'xla'.")


def absent() -> dict[str, Any]:
    from scripts.bench.device.tasks import Absent

    raise Absent("no such package")


def hang(noted: str) -> dict[str, Any]:
    """With a child, and deaf to everything but a kill."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(noted).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


def crash() -> dict[str, Any]:
    print("the last thing it said", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def leave() -> dict[str, Any]:
    os._exit(3)


def contend(name: str, shape: Any, pipe: Any) -> None:
    """A contender of `train_cpu`; that of jaxattn ends at once."""
    if name == "jaxattn":
        return
    with contextlib.suppress(EOFError):
        pipe.recv()
        while pipe.recv() is not None:
            pipe.send((1.0, 1.0))
