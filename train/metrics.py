"""Where numbers go: metrics.jsonl always, TensorBoard, wandb and trackio if asked."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxattn.errors import ConfigError, UserError
from train.config import LogConfig, RunConfig

Row = dict[str, Any]


class MetricsWriter:
    """Writes one row to every destination; scalars only beyond the JSONL file.

    Raises:
      ConfigError: a tracker that is not installed.
      UserError: metrics.jsonl cannot be written (disk full).
    """

    def __init__(self, folder: Path, cfg: RunConfig) -> None:
        self._path = folder / "metrics.jsonl"
        self._sinks: list[Callable[[int, Row], None]] = []
        with contextlib.ExitStack() as opened:  # closes what is open already when a tracker cannot be
            self._file = opened.enter_context(self._path.open("a", encoding="utf-8"))
            self._open_trackers(folder, cfg, cfg.log, opened)
            self._opened = opened.pop_all()

    def _open_trackers(self, folder: Path, cfg: RunConfig, log: LogConfig, opened: contextlib.ExitStack) -> None:
        if log.tensorboard:
            from tensorboardX import SummaryWriter

            board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

            def to_board(step: int, row: Row) -> None:
                for name, value in row.items():
                    board.add_scalar(name, value, step)

            self._sinks.append(to_board)
            opened.callback(board.close)
        for name, project in (("wandb", log.wandb), ("trackio", log.trackio)):
            if not project:
                continue
            try:
                tracker = importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(
                    f"log.{name} is {project!r} but {name} is not installed; pip install 'jaxattn[track]'."
                ) from error
            run = tracker.init(project=project, name=folder.name, config=cfg.to_dict())
            self._sinks.append(lambda step, row, run=run: run.log(row, step=step))
            opened.callback(run.finish)

    def write(self, row: Row) -> None:
        """Append one row; non-finite numbers become null in the JSON (JSON has no NaN)."""
        clean = {k: _json_safe(v) for k, v in row.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}); free space, then go on with --resume."
            ) from error
        scalars = {k: v for k, v in clean.items() if isinstance(v, int | float) and k != "step"}
        for sink in self._sinks:
            sink(row["step"], scalars)

    def close(self) -> None:
        self._opened.close()


def _json_safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
