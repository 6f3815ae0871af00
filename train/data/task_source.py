"""A synthetic task (`evals.tasks`) as a data source: fresh sequences without end, scored only where it says."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxattn.errors import ConfigError, DataError
from jaxattn.runs.data_config import DataConfig
from train.data.bb import HELD_OUT, TRAIN, VALIDATION
from train.data.cache_files import digest
from train.data.source import Source
from train.data.tasks import Task, parse_task

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class TaskSource(Source):
    """See `evals.tasks`. `unique_tokens` repeats that many tokens' worth of whole sequences."""

    task: Task = field(kw_only=True)

    def _train_batches(self) -> grain.IterDataset:
        from train.data.pipeline import task_batches

        unique = -(-self.cfg.unique_tokens // self.cfg.context)
        how = {"stream": TRAIN, "unique": unique, "unique_seed": self.cfg.seed}
        return task_batches(self.task, self.layout(), seed=self.seed, **how)

    def val_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, np.ndarray]]:
        """Fresh sequences of a stream of their own."""
        from train.data.pipeline import take, task_batches

        return take(task_batches(self.task, self.layout(batch_size), seed=self.cfg.seed, stream=VALIDATION), count)

    def held_out(self, n: int, length: int, *, perturbed: bool = True) -> np.ndarray:
        """Whole sequences of `length` tokens, which need not be the training context.

        Raises:
          ConfigError: the task has no sequence of that length.
        """
        self.task.check(length)
        rows = [self.task.sample(length, seed=self.cfg.seed, stream=HELD_OUT, index=i).tokens for i in range(n)]
        return np.stack(rows) if rows else np.zeros((0, length), np.int32)

    def encode_text(self, path: str, n: int, length: int) -> np.ndarray:
        """Always refused: the task has no tokenizer."""
        raise DataError(
            f"the text file {path!r} cannot be used with data.source={self.cfg.source!r}, which has no tokenizer: "
            "train on a text source, or leave the file out."
        )

    def entropies(self, max_tokens: int = 5_000_000) -> dict[str, float]:
        """Exact: a blind guess among the possible answers, and a perfect model, which is never wrong."""
        return {"unigram_nats": math.log(self.task.answers), "oracle_nats": 0.0}


def task_source(cfg: DataConfig, place: dict[str, Any]) -> TaskSource:
    """Opens a task; `place` holds the seed and the process of `make_source`.

    Raises:
      ConfigError: an unknown task or option, a context that does not fit, or a perturbation.
    """
    task = parse_task(cfg.source)
    try:
        task.check(cfg.context)
    except ConfigError as error:
        raise ConfigError(f"data.{error}") from error
    if cfg.perturb:
        raise ConfigError(
            f"data.perturb={cfg.perturb!r} would change the answers of data.source={cfg.source!r}: leave it out."
        )
    meta = {
        "source": cfg.source,
        "task": task.name,
        "options": dataclasses.asdict(task),
        "vocab_size": task.vocab_size,
        "data_hash": digest(repr(task)),
        "chance_accuracy": 1 / task.answers,
    }
    return TaskSource(**place, name=task.name, vocab_size=task.vocab_size, meta=meta, perturb=None, task=task)
