"""Where numbers go: metrics.jsonl always, TensorBoard, wandb and trackio if asked."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxattn.errors import ConfigError, one_line, writing
from jaxattn.runs.config import LogConfig, RunConfig

log = logging.getLogger("jaxattn")

Row = dict[str, Any]
FLUSH_SECONDS = 10


class MetricsWriter:
    """Writes one row to every destination; scalars only beyond the JSONL file.

    A tracker that fails is left out from then on, with a warning: the run does not depend on it.

    Raises:
      ConfigError: a tracker that is not installed, or cannot be opened.
      UserError: metrics.jsonl cannot be written (disk full).
    """

    def __init__(self, folder: Path, cfg: RunConfig) -> None:
        self._path = folder / "metrics.jsonl"
        self._sinks: dict[str, Callable[[int, Row], None]] = {}
        with contextlib.ExitStack() as opened:  # closes what is open already when a tracker cannot be
            with writing(self._path, "free the path, then go on with --resume", "go on with --resume"):
                self._file = opened.enter_context(self._path.open("ab", buffering=0))
            self._open_trackers(folder, cfg, cfg.log, opened)
            self._opened = opened.pop_all()

    def _open_trackers(self, folder: Path, cfg: RunConfig, log: LogConfig, opened: contextlib.ExitStack) -> None:
        if log.tensorboard:
            board = _Board(folder / "tensorboard")
            self._sinks["TensorBoard"] = board.write
            opened.callback(self._close, "TensorBoard", board.close)
        for name, project in (("wandb", log.wandb), ("trackio", log.trackio)):
            if not project:
                continue
            try:
                tracker = importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(
                    f"log.{name} is {project!r} but {name} is not installed; pip install 'jaxattn[track]'."
                ) from error
            try:
                run = tracker.init(project=project, name=folder.name, config=cfg.to_dict())
            except Exception as error:  # whatever a tracker raises without a network or an account
                raise ConfigError(f"log.{name} is {project!r} but {name} cannot be opened ({error}).") from error
            self._sinks[name] = lambda step, row, run=run: run.log(row, step=step)
            opened.callback(self._close, name, run.finish)

    def write(self, row: Row) -> None:
        """Append one row; non-finite numbers become null in the JSON (JSON has no NaN)."""
        clean = {k: _json_safe(v) for k, v in row.items()}
        line = (json.dumps(clean) + "\n").encode()
        whole = os.fstat(self._file.fileno()).st_size
        with writing(self._path, "free the path, then go on with --resume", "go on with --resume"):
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(whole)  # no half of a row stays
                raise
        scalars = {k: v for k, v in clean.items() if isinstance(v, int | float) and k != "step"}
        for name, sink in list(self._sinks.items()):
            try:
                sink(row["step"], scalars)
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises; the run does not depend on it
                del self._sinks[name]
                log.warning("%s gets no more numbers from step %d on: %s", name, row["step"], _reason(error))

    def _close(self, name: str, close: Callable[[], object]) -> None:
        if name in self._sinks:
            try:
                close()
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("%s could not be closed in good order: %s", name, _reason(error))

    def close(self) -> None:
        self._opened.close()


class _Board:
    """TensorBoard events of one session.

    Written here and now: tensorboardX's `SummaryWriter` waits for ever once its thread has met a full disk.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self._event: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event  # made when it is imported
        with writing(folder, "free the path, or switch it off by --log.no-tensorboard"):
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._flushed = time.monotonic()

    def write(self, step: int, row: Row) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in row.items()]
        self._events.write_event(self._event(wall_time=time.time(), step=step, summary={"value": values}))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]


def _json_safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
