"""What a run of the trainer is measured by: validation loss, the sink study, a task's accuracy, and its report."""

from __future__ import annotations

import logging
from typing import Any

import jax

from evals.accuracy import accuracy, make_hits
from evals.measure import make_measure, summarise
from evals.sinks import bigram_task, evaluate, held_out, table, write_study
from jaxattn.runs.config import RunConfig
from jaxattn.runs.rundir import RunDir
from train.data import Source
from train.data.task_source import TaskSource
from train.loop import Watch
from train.metrics import Row
from train.step import batch_loss

log = logging.getLogger("jaxattn")
_loss = jax.jit(batch_loss, static_argnums=0)

LOGGED_TABLES = (
    "first_token_weight",
    "first_token_weight_raw",
    "first_token_weight_nontrigger",
    "first_token_weight_nontrigger_raw",
    "first_token_weight_trigger",
    "first_token_weight_trigger_raw",
    "value_drain",
    "residual_peak",
    "sink_logit",
)
LOGGED_SCALARS = ("sink_rate", "sink_rate_slot", "risk_backcopy", "risk_bigram", "risk_bigram_excess")


def watching(cfg: RunConfig, source: Source) -> Watch:
    """Validation loss, sink metrics, a task's risks or accuracy while a run trains; then its sink study and report."""
    batches = source.val_batches(cfg.eval.batches)
    tokens = held_out(cfg, source)
    measure = make_measure(cfg.model, task=bigram_task(source))
    task = source.task if isinstance(source, TaskSource) else None
    hits = make_hits(cfg.model)

    def measured(params: Any) -> Row:
        parts = [jax.device_get(_loss(cfg.model, params, batch)) for batch in batches]
        total = sum(float(n) for _, n in parts)
        numbers = summarise(measure(params, tokens), epsilon=cfg.eval.epsilon)
        row: Row = {"val_loss": sum(float(s) for s, _ in parts) / max(total, 1.0)}
        if task is not None:
            found = accuracy(hits, params, batches)
            row |= {"val_accuracy": found["accuracy"]} | ({"val_exact": found["exact"]} if task.one_answer else {})
        row |= {k: numbers[k] for k in LOGGED_SCALARS if numbers.get(k) is not None}
        return row | {k: numbers[k] for k in LOGGED_TABLES if k in numbers}

    def finish(place: RunDir, params: Any) -> None:
        """Measure and report a run that has taken its last step."""
        try:
            result = evaluate(cfg, source, params, cfg.steps)
            print(table(result), flush=True)
            write_study(place.path, cfg, source, params, result)
            if cfg.report:
                from evals.report import write_report  # matplotlib is not needed before

                print(f"report: {write_report([place.path], place.path / 'report.html')}")
        except KeyboardInterrupt:
            log.warning(
                "step %d is saved, the last measurements and the report are not: --resume makes them", cfg.steps
            )
            raise

    return Watch(measured, finish)
