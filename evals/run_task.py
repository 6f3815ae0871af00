"""Accuracy of a trained run on a synthetic task, at the length it was trained at or any other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from evals.accuracy import Batch, make_hits
from jaxattn.errors import ConfigError
from jaxattn.reader import reads_state
from jaxattn.runs.opened import Trained
from train.data.bb import HELD_OUT
from train.data.tasks import TASKS, Task, make_task

TOKENS_AT_ONCE = 16_384


def choose_task(trained: Trained, text: str | None) -> tuple[Task, int]:
    """The task and its length: what `text` says, and for the rest what the run was trained on.

    Raises:
      ConfigError: no task, an unknown one, impossible options, a length or vocabulary the model cannot take.
    """
    source = trained.cfg.data.source
    name, options = TASKS.parse(source if text is None else text)
    length = options.pop("context", trained.cfg.data.context)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ConfigError(f"context is {length!r} but must be a whole number of at least 2.")
    if text is not None and source.partition("(")[0].strip() == name:
        options = TASKS.parse(source)[1] | options
    task = make_task(name, options)
    task.check(length)
    trained.check_length(length)
    size = trained.model.vocab_size
    if task.vocab_size > size:
        raise ConfigError(
            f"the task has {task.vocab_size} tokens but the model knows {size}: give {name}(vocab={size}), or train "
            "with a larger --model.vocab-size."
        )
    return task, length


def batches(task: Task, length: int, count: int, seed: int) -> Iterator[Batch]:
    """`count` sequences of the held-out stream, which training and validation never see."""
    size = max(1, TOKENS_AT_ONCE // length)
    for first in range(0, count, size):
        rows = range(first, min(first + size, count))
        examples = [task.sample(length, seed=seed, stream=HELD_OUT, index=i) for i in rows]
        tokens, targets, mask = (np.stack(part) for part in zip(*examples, strict=True))
        places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        yield {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": mask,
            "positions": places,
            "segment_ids": np.ones_like(tokens),
        }


def run_task(trained: Trained, task: Task, length: int, count: int, chunk: int | None = None) -> dict[str, Any]:
    """JSON-able: accuracy per token, exact (share of sequences with every token right), their standard errors.

    chunk: read that many tokens at a time through the decode state, 0 for as many as possible; None is one forward
    pass, unless some layer has to be read so (`evals.accuracy.make_hits`).
    """
    chunk = 0 if chunk is None and reads_state(trained.model) else chunk
    hits = make_hits(trained.model, chunk)
    found = [hits(trained.params, batch) for batch in batches(task, length, count, trained.cfg.data.seed)]
    share = np.concatenate([np.nanmean(h, axis=1) for h in found])  # tokens of one sequence depend on each other
    tokens = np.concatenate([h[np.isfinite(h)] for h in found])
    exact = np.concatenate([np.nanmin(h, axis=1) for h in found])
    return {
        "task": task.name,
        "options": dataclasses.asdict(task),
        "context": length,
        "trained_context": trained.cfg.data.context,
        "attn": trained.attn,
        "step": trained.step,
        "sequences": count,
        "chunk": chunk,
        "accuracy": float(tokens.mean()),
        "accuracy_error": float(share.std() / math.sqrt(count)),
        "exact": float(exact.mean()),
        "exact_error": float(exact.std() / math.sqrt(count)),
        "chance_accuracy": 1 / task.answers,
    }


def line(result: dict[str, Any]) -> str:
    """One readable line."""
    options = ", ".join(f"{k}={v}" for k, v in result["options"].items())
    return (
        f"{result['attn']} at step {result['step']}, {result['task']}({options}), {result['sequences']} x "
        f"{result['context']} tokens (trained at {result['trained_context']}): accuracy "
        f"{100 * result['accuracy']:.1f} ± {100 * result['accuracy_error']:.1f} % (blind guess "
        f"{100 * result['chance_accuracy']:.1f} %), whole sequences {100 * result['exact']:.1f} %"
    )
