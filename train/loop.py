"""The training loop: batches in, checkpoints, metrics and a report out.

One run is a function of its configuration: parameters, data order and evaluation come from one seed,
and a run that is stopped (or killed) and resumed gives the same numbers to the bit as an unbroken one.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.errors import ConfigError, DataError, Mismatch, TrainingStopped, writing
from jaxattn.models import at_context
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import RESUMABLE, RunConfig, with_older_fields
from jaxattn.runs.load import load_base, merge_lora, read_config
from jaxattn.runs.manifest import diff_config
from jaxattn.runs.parameters import new_paths
from jaxattn.runs.run_tokenizer import write_own_tokenizer
from jaxattn.runs.rundir import RunDir, environment, open_run, write_json_atomic
from jaxattn.signals import StopSignal
from train import sessions
from train.data import Source
from train.data.open import open_source
from train.describe_backends import describe_backends
from train.mesh import data_mesh, inside, replicate, shard_batch
from train.metrics import MetricsWriter, Row
from train.progress import TrainingProgress, evaluation_line
from train.start_from import abstract_state, copy_side_files, describe_swap, first_state, put
from train.step import make_train_step

log = logging.getLogger("jaxattn")

RESUME = "go on with --resume"
STOPPED = {"SIGTERM": 0, "SIGINT": 130, "SIGHUP": 129}  # exit codes of a run that was told to stop and has saved


class Watch(NamedTuple):
    """What is measured of a run besides its loss, by whoever starts it."""

    evaluate: Callable[[Any], Row]
    """Parameters -> columns of a row of metrics, at every evaluation."""
    finish: Callable[[RunDir, Any], None]
    """Measures and reports a run that has taken its last step: its folder, its parameters."""


class Trainer(NamedTuple):
    """What a run is made of; it stays the same from the first step to the last."""

    cfg: RunConfig
    place: RunDir
    checkpoints: Checkpoints
    batches: Any
    """The training iterator, which the loop moves."""
    watch: Watch
    mesh: jax.sharding.Mesh
    start: int
    """The step that it begins behind."""
    frozen: Any
    """What LoRA leaves as it is, else None."""


def run(cfg: RunConfig, watching: Callable[[RunConfig, Source], Watch]) -> int:
    """Train as configured; returns the exit code: 0, also after SIGTERM, or 130 after Ctrl-C, 129 after SIGHUP.

    Args:
      watching: what is measured on the way and at the end, made for the resolved configuration and its data.

    Raises:
      UserError: anything a user can mend, before the first step where it can be known.
      TrainingStopped: the loss became non-finite, or too many steps were skipped in a row.
    """
    cfg = cfg.resolved()
    folder = Path(cfg.run_dir or default_run_dir(cfg))
    # What can be wrong with the data or the devices shows before an older run is touched.
    source, model = open_source(cfg)
    cfg = dataclasses.replace(cfg, model=model, run_dir=str(folder))
    new_paths(cfg)  # refuses an attention that the checkpoint's parameters do not fit
    mesh = data_mesh(cfg.data.batch_size, cfg.optim.accumulate)
    backends = describe_backends(cfg)
    primary = jax.process_index() == 0
    opened = open_run(folder, resume=cfg.resume, overwrite=cfg.overwrite, primary=primary)
    with writing(folder, "choose another --run-dir", RESUME), opened as place, inside(mesh):
        saved = {k: v for k, v in cfg.to_dict().items() if k not in ("resume", "overwrite")}
        with Checkpoints(place.checkpoints, keep=cfg.checkpoint.keep, config=saved) as checkpoints:
            iterator = source.train_iterator()
            try:
                state, frozen, start = _first_state(cfg, checkpoints, iterator, mesh)
                if cfg.steps < start:
                    raise ConfigError(
                        f"steps is {cfg.steps} but the run in {folder} is at step {start}: "
                        f"give --steps={start} or more."
                    )
                _describe(place, saved, source, start)
                print(backends, flush=True)
                copy_side_files(cfg, place.path)
                write_own_tokenizer(place.path, cfg, source.tokenizer)
                watch = watching(cfg, source)
                trainer = Trainer(cfg, place, checkpoints, iterator, watch, mesh, start, frozen)
                code, state = _train(trainer, state)
            finally:
                iterator.close()
        if code is None:
            watch.finish(place, merge_lora(cfg, state["params"], frozen))
    return code or 0


def default_run_dir(cfg: RunConfig) -> str:
    """runs/PRESET-ATTN-seedSEED, with characters that file systems dislike replaced."""
    attn = at_context(cfg.attn, cfg.data.context).replace(" ", "")
    attn = "".join(c if c.isalnum() or c in "_.=-" else "-" for c in attn)
    return f"runs/{cfg.preset}-{attn.strip('-')}-seed{cfg.seed}"


def _first_state(cfg: RunConfig, checkpoints: Checkpoints, iterator: Any, mesh: Any) -> tuple[Any, Any, int]:
    """A fresh state at step 0, or the newest valid checkpoint's, with the data iterator moved along.

    Second, what LoRA leaves as it is (else None).
    """
    fresh = not cfg.resume or checkpoints.latest() is None
    base = load_base(cfg) if cfg.start.source and (fresh or cfg.lora.rank) else None
    frozen = replicate(base, mesh) if cfg.lora.rank else None
    if fresh:
        if cfg.resume:
            before = read_config(Path(cfg.run_dir)).to_dict()
            if differences := diff_config(before, cfg.to_dict(), ignore=RESUMABLE):
                raise Mismatch(
                    f"{cfg.run_dir} was started with another configuration ({'; '.join(differences)}): use the "
                    "saved values or another --run-dir."
                )
            log.warning("the run in %s has no checkpoint yet; it starts at step 0", cfg.run_dir)
        state = first_state(cfg)
        if base is not None:
            print(describe_swap(cfg), flush=True)
            state = state if cfg.lora.rank else state | {"params": put(state["params"], base)}
        return replicate(state, mesh), frozen, 0
    checkpoints.check_config(cfg.to_dict(), ignore=RESUMABLE, complete=with_older_fields)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    restored = checkpoints.restore(abstract_state(cfg, sharding), iterator)
    print(f"resumed {checkpoints.path(restored.step)}", flush=True)
    return restored.state, frozen, restored.step


def _describe(place: RunDir, saved: dict[str, Any], source: Source, start: int) -> None:
    """Write what the run is before its first step; drop metric rows a resumed run will write again."""
    sessions.begin(place, start, saved["log"]["every"], environment())
    write_json_atomic(place.config, saved | {"resume": False, "overwrite": False})
    facts = {"name": source.name, "vocab_size": source.vocab_size, "meta": source.meta}
    write_json_atomic(place.path / "data.json", facts | {"entropies": source.entropies()})


def _train(run: Trainer, state: Any) -> tuple[int | None, Any]:
    """The loop proper: returns the exit code (None: all steps are taken, what is left is the report) and the state."""
    cfg, checkpoints, start, frozen = run.cfg, run.checkpoints, run.start, run.frozen
    train_step = make_train_step(cfg.model, cfg.optim, cfg.steps, cfg.lora if cfg.lora.rank else None, frozen)
    evaluate, writer = run.watch.evaluate, MetricsWriter(run.place.path, cfg)
    step, skips, clock = start, 0, _Clock()

    def settle(pending: tuple[int, Any, Any] | None) -> Row | None:
        """Read a step's numbers (one step late, so that the device never waits) and judge them."""
        nonlocal skips
        if pending is None:
            return None
        at, numbers, batch = pending
        row = {k: v.item() for k, v in jax.device_get(numbers).items()}
        skips = 0 if row.pop("applied") else skips + 1
        if skips:
            _refuse_or_skip(cfg, run.place, at, row, skips, batch)
        speed = clock.rate(row.pop("tokens"))
        return {"step": at, **row, "tokens_per_s": round(speed, 1), "time_s": round(clock.total, 3)}

    progress = TrainingProgress(cfg.steps, start, cfg.log.print_every)
    failed: Exception | None = None
    try:
        with StopSignal() as stop, progress:
            pending = None
            if cfg.start.source and step == 0:  # what there is to improve on
                row = {"step": 0} | evaluate(merge_lora(cfg, state["params"], frozen))
                progress.say(evaluation_line(row))
                writer.write(row)
            while step < cfg.steps and stop.requested is None and progress.lost is None:
                try:
                    batch = next(run.batches)
                except DataError as error:  # a worker is gone, perhaps by the same stop as this process
                    failed = error
                    break
                state, numbers = train_step(state, shard_batch(batch, run.mesh))
                row, pending = settle(pending), (step + 1, numbers, batch)
                step += 1
                _log(row, cfg, writer, progress, clock)
                checkpoints.poll()
                due = cfg.eval.every and step % cfg.eval.every == 0
                saving = step % cfg.checkpoint.every == 0
                last = step == cfg.steps or stop.requested is not None
                if not (due or saving or last):
                    continue
                row, pending = settle(pending), None
                assert row is not None
                clock.pause()
                if due or step == cfg.steps:
                    row |= evaluate(merge_lora(cfg, state["params"], frozen))
                    progress.say(evaluation_line(row))
                _log(row, cfg, writer, progress, clock, always=True)
                if saving or last:
                    checkpoints.save(step, state, run.batches)
                clock.resume()
            if (row := settle(pending)) is not None:  # the end came after the last look at it
                _log(row, cfg, writer, progress, clock, always=True)
            if step > start or checkpoints.latest() is None:
                checkpoints.save(step, state, run.batches)  # nothing to do where it has just been saved
            checkpoints.wait()
            if stop.requested is not None:
                progress.say(f"{stop.requested}: saved step {step}; go on with --resume")
    finally:
        writer.close()
    if stop.requested is not None:
        return STOPPED[stop.requested], state
    if failed := failed or progress.lost:
        log.warning("saved step %d; go on with --resume", step)
        raise failed
    return None, state


def _log(
    row: Row | None,
    cfg: RunConfig,
    writer: MetricsWriter,
    progress: TrainingProgress,
    clock: _Clock,
    always: bool = False,
) -> None:
    if row is None:
        return
    progress.update(row["step"], row["loss"], row["tokens_per_s"], clock.left(cfg.steps - row["step"]))
    if always or row["step"] % cfg.log.every == 0:
        writer.write(row)


def _refuse_or_skip(cfg: RunConfig, place: RunDir, at: int, row: Row, skips: int, batch: Any) -> None:
    """A step was not applied: say so, or stop and leave the batch behind."""
    loss_bad = not np.isfinite(row["loss"])
    if loss_bad and cfg.optim.nonfinite == "stop":
        path = place.path / f"nonfinite_step_{at:08d}.npz"
        try:
            np.savez_compressed(path, **batch)
            where = f"its batch is in {path}"
        except OSError as error:
            where = f"its batch could not be kept ({error.strerror})"
        raise TrainingStopped(
            f"the loss of step {at} is {row['loss']} (gradient norm {row['grad_norm']}); {where}, "
            "every checkpoint is from before it: lower optim.lr, or go on with --optim.nonfinite=skip --resume."
        )
    if skips >= cfg.optim.max_skips:
        raise TrainingStopped(
            f"{skips} steps in a row were skipped up to step {at} (loss {row['loss']}, gradient norm "
            f"{row['grad_norm']}); lower optim.lr or raise optim.max_skips."
        )
    why = "loss" if loss_bad else "gradient" if not np.isfinite(row["grad_norm"]) else "loss spike"
    log.warning("step %d skipped (%s: loss %s, gradient norm %s)", at, why, row["loss"], row["grad_norm"])


class _Clock:
    """Training seconds without evaluations and saves, and the speed since the last reading."""

    def __init__(self) -> None:
        self.total, self._mark, self._steps, self._first = 0.0, time.perf_counter(), 0, 0.0

    def _advance(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.total += passed
        return passed

    def rate(self, tokens: float) -> float:
        """Tokens per second since the last call."""
        passed = self._advance()
        self._steps += 1
        if self._steps == 1:
            self._first = self.total  # compilation; left out of the forecast
        return tokens / max(passed, 1e-9)

    def left(self, steps: int) -> float:
        """Seconds that `steps` more will take at the mean speed so far."""
        return steps * (self.total - self._first) / max(self._steps - 1, 1)

    def pause(self) -> None:
        self._advance()

    def resume(self) -> None:
        self._mark = time.perf_counter()
