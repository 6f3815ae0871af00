"""Processes that may hang, die or spoil their device without harm to the run: asked in turn, killed when late."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.bench.device.tasks import short

Answer = dict[str, Any]
START = 90.0  # seconds in which a process must have started
TRIES = 2  # starts that may fail in a row before a worker is given up
LOST = ("failed", "late", "died")  # of an answer: behind it the process, or its device, is not trusted any more


class Worker:
    """One process of one kind, started when it is asked, and anew behind whatever went wrong."""

    def __init__(self, name: str, logs: Path, environment: Mapping[str, str]):
        self.name, self._log = name, logs / f"{name}.log"
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._rest = b""
        self._failed_starts = 0
        self.closed = False  # for good
        self.starts = 0  # how often it has been started: what earlier ones held is gone

    def ask(self, task: str, limit: float, **arguments: Any) -> Answer:
        """The answer to a task (see `worker`), with `status` late or died if `limit` seconds brought none."""
        begun = time.monotonic()
        if self._process is None and (reason := self._start()):
            return {"status": "died", "reason": reason}
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead; reading says of what
            process.stdin.write(json.dumps({"task": task, "arguments": arguments}).encode() + b"\n")
            process.stdin.flush()
        answer = self._read(max(0.1, limit - (time.monotonic() - begun)))
        if answer["status"] in LOST:
            self.end()
        return {**answer, "seconds": round(time.monotonic() - begun, 2)}

    def _start(self) -> str:
        """Starts the process; why it could not, or nothing."""
        if self.closed:
            return "the run has ended."
        if self._failed_starts >= TRIES:
            return f"{self.name} did not start {TRIES} times in a row: see {self._log.name}."
        theirs, self._answers = os.pipe()[::-1]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        os.close(theirs)
        self._rest = b""
        self.starts += 1
        answer = self._read(START)
        if answer["status"] == "ok":
            self._failed_starts = 0
            return ""
        self._failed_starts += 1
        self.end()
        return answer["reason"]

    def _read(self, limit: float) -> Answer:
        """The next line, or what stood in its way."""
        until = time.monotonic() + limit
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return {"status": "late", "reason": f"no answer within {limit:.0f} s: killed."}
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                return {"status": "died", "reason": self._obituary()}
            self._rest += piece
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def _obituary(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = [line for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f"the process ended by {how}; its last line: {short(lines[-1]) if lines else 'none'}"

    def end(self) -> None:
        """Kills the process and all that it has started, and forgets it."""
        if (process := self._process) is None:
            return
        self.kill()
        self._process = None
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        os.close(self._answers)

    def kill(self) -> None:
        """Of any thread: whoever reads the answer sees that there will be none."""
        if (process := self._process) is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(process.pid, signal.SIGKILL)


class Crew:
    """The workers of a run. Leaving it kills them all."""

    def __init__(self, logs: Path, environments: Mapping[str, Mapping[str, str]]):
        """Args: environments: by name of a worker."""
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = {name: Worker(name, logs, more) for name, more in environments.items()}

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers for good; whoever waits for one is told."""
        for worker in self.workers.values():
            worker.closed = True
            worker.kill()

    def __getitem__(self, name: str) -> Worker:
        return self.workers[name]

    def share(self, do: Callable[[Worker, Any], None], *groups: tuple[Sequence[str], Iterable[Any]]) -> None:
        """`do(worker, job)` of every job, in order and as many at once as there are workers.

        Args:
          groups: names of workers, and the jobs that any of them takes.
        """
        lock = threading.Lock()

        def work(name: str, waiting: Iterator[Any]) -> None:
            while not self.workers[name].closed:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    return
                do(self.workers[name], job)

        hands = [(name, waiting) for names, jobs in groups for waiting in [iter(list(jobs))] for name in names]
        with ThreadPoolExecutor(len(hands)) as pool:
            list(pool.map(lambda hand: work(*hand), hands))  # raises what `do` raised
