"""Tiny runs of the trainer, in this process and as processes that can be killed, and how to compare them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import RunConfig
from jaxattn.runs.load import read_config
from train.data.open import open_source
from train.presets import get_preset
from train.start_from import abstract_state

ROOT = Path(__file__).resolve().parents[2]
TIMING = ("tokens_per_s", "time_s")  # all other columns of a row are functions of the configuration
TINY: dict[str, dict[str, Any]] = {
    "data": {"context": 16, "batch_size": 4},
    "model": {"d_model": 16, "num_layers": 1},
    "optim": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
    "eval": {"every": 0, "sequences": 4, "batches": 1, "length": 16},
    "checkpoint": {"every": 4},
    "log": {"tensorboard": False},
}


def tiny(folder: Path, steps: int = 12, **changes: Any) -> RunConfig:
    """The bb preset cut down to seconds; `optim={"lr": 1.0}` changes a group, `seed=1` a plain field."""
    cfg = get_preset("bb")
    top: dict[str, Any] = {"steps": steps, "run_dir": str(folder), "report": False}
    groups = {name: dict(values) for name, values in TINY.items()}
    for name, value in changes.items():
        if isinstance(value, dict):
            groups[name] = groups.get(name, {}) | value
        else:
            top[name] = value
    parts = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in groups.items()}
    return dataclasses.replace(cfg, **top, **parts)


def flags(cfg: RunConfig) -> list[str]:
    """The command line that makes `cfg` out of the bb preset."""
    words = ["--preset=bb"]

    def collect(now: Any, base: Any, prefix: str) -> None:
        for field in dataclasses.fields(now):
            value, default = getattr(now, field.name), getattr(base, field.name)
            name = f"{prefix}{field.name.replace('_', '-')}"
            if dataclasses.is_dataclass(value):
                collect(value, default, f"{name}.")
            elif value != default and isinstance(value, bool):
                words.append(f"--{name}" if value else f"--{prefix}no-{field.name.replace('_', '-')}")
            elif value != default:
                words.append(f"--{name}={value}")

    collect(cfg, get_preset("bb"), "")
    return words


def start(words: list[str], cwd: Path, *, module: str = "train.pretrain", **env: str) -> subprocess.Popen[str]:
    """The command as a process of its own, with pipes on both outputs."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test can signal its whole group
    )


def finish(process: subprocess.Popen[str], seconds: float = 90) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; a process that hangs is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, out, err


def command(words: list[str], cwd: Path, **options: str) -> tuple[int, str, str]:
    return finish(start(words, cwd, **options))


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Return as soon as metrics.jsonl has a row of `step` or a later one."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended by itself: {process.communicate()}")
        if path.exists() and any(row["step"] >= step for row in rows(folder, torn=True)):
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"no step {step} in {seconds} s: {process.communicate()}")


def stop_at(words: list[str], folder: Path, step: int, number: int) -> tuple[int, str, str, float]:
    """Start a run, signal it as soon as it has logged `step`; exit code, outputs and seconds to the end."""
    process = start(words, folder.parent)
    wait_for_step(folder, step, process)
    at = time.monotonic()
    os.kill(process.pid, number)
    code, out, err = finish(process, 30)
    return code, out, err, time.monotonic() - at


def kill_at(words: list[str], folder: Path, step: int) -> None:
    code, out, err, _ = stop_at(words, folder, step, signal.SIGKILL)
    assert code == -signal.SIGKILL, (code, out, err)


def rows(folder: Path, torn: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl, strictly JSON; `torn` leaves out a last line that is still being written."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").split("\n")
    if not torn:
        assert lines[-1] == "", "the last line has no end"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines[:-1]]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(folder)]


def steps_of(folder: Path) -> list[int]:
    return Checkpoints(folder / "checkpoints", config={}, read_only=True).steps()


def restore(folder: Path, step: int | None = None, batches: int = 2) -> tuple[int, Any, list[dict[str, np.ndarray]]]:
    """Step, state and the batches that come next, of the newest (or one) checkpoint of a run."""
    cfg = read_config(folder)
    source, model = open_source(cfg)
    cfg = dataclasses.replace(cfg, model=model)
    iterator = source.train_iterator()
    try:
        found = Checkpoints(folder / "checkpoints", config={}, read_only=True).restore(
            abstract_state(cfg), iterator, step
        )
        return found.step, found.state, [next(iterator) for _ in range(batches)]
    finally:
        iterator.close()


def assert_same(left: Any, right: Any) -> None:
    """Equal to the bit, leaf by leaf."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Every row once and equal, the same state to the bit and the same data to come."""
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(unbroken)]
    assert untimed(folder) == untimed(unbroken)
    step, state, data = restore(folder)
    other_step, other_state, other_data = restore(unbroken)
    assert step == other_step
    assert_same(state, other_state)
    assert_same(data, other_data)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a run, by name, except the lock."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
