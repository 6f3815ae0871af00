"""The folder of one run: who may write in it, and what it says about where it was made.

A run leaves `config.json`, `environment.json`, `sessions.json`, `metrics.jsonl` and `checkpoints/` in one folder.
`open_run` decides, before anything is trained, whether the folder is new, resumed or overwritten,
proves that it can be written, and keeps every other process out of it with `run.lock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxattn.errors import UserError, shown
from jaxattn.json_text import loads

log = logging.getLogger("jaxattn")

LOCK = "run.lock"
PACKAGES = ("jaxattn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE")
PROBE_BYTES = 1 << 16  # enough that a full disk refuses it, small enough to cost nothing


@dataclass(frozen=True)
class RunDir:
    """An open run folder. `resumed` is true when a run was already there and goes on."""

    path: Path
    resumed: bool

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


@contextlib.contextmanager
def open_run(
    path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False, primary: bool = True
) -> Iterator[RunDir]:
    """Create or reopen the folder of a run and hold its lock until the block ends.

    `overwrite` renames the old folder to `NAME.old-1` (then `-2`, ...): nothing is ever deleted. In a
    run of several processes only process 0 passes `primary=True`; the others neither lock nor create.

    Raises `UserError`: a run is there and neither flag was given; `resume` without a run; the folder is
    in use by another process; a file is in its place; it cannot be written or the disk is full.
    """
    folder = Path(os.path.abspath(os.fspath(path)))
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other: pass one of them.")
    existing = _has_run(folder)
    if not primary:
        yield RunDir(folder, resumed=resume)
        return
    if existing and not (resume or overwrite):
        raise UserError(
            f"{folder} already holds a run: go on with it by --resume, replace it by --overwrite, "
            "or choose another --run-dir."
        )
    if resume and not existing:
        raise UserError(
            f"{folder} holds no run to resume (neither config.json nor checkpoints/): check --run-dir, "
            "or drop --resume to start one."
        )
    with contextlib.ExitStack() as stack:
        if existing and overwrite:
            _set_aside(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(folder)
            stack.callback(_release, lock)
            _probe(folder)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used as the run folder: {error.strerror or error}; "
                "choose another --run-dir or free the path."
            ) from error
        if _has_run(folder) != resume:  # another process came between the look and the lock
            raise UserError(f"{folder} was changed by another run a moment ago: choose another --run-dir.")
        yield RunDir(folder, resumed=resume)


def _has_run(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "checkpoints").is_dir()


def _set_aside(folder: Path) -> None:
    """Rename an old run out of the way; only a folder that `open_run` itself has made."""
    if not (folder / LOCK).is_file():
        raise UserError(
            f"{folder} has no {LOCK}, so it was not made by this library and --overwrite leaves it alone: "
            "move it away yourself or choose another --run-dir."
        )
    lock = _take_lock(folder)  # refuses while the old run is still going
    try:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be moved to {aside.name}: {error.strerror}; choose another --run-dir."
            ) from error
        log.warning("the old run was moved from %s to %s; delete that when it is not needed", folder, aside)
    finally:
        _release(lock)


# ------------------------------------------------------------------------------------------------ the lock


def _take_lock(folder: Path) -> int:
    """Lock `folder` for this process and return the open file descriptor.

    `flock` rather than O_EXCL: the kernel drops it when the holder dies, by whatever signal, so there is
    no stale lock to judge and no race in taking one over. The text inside only serves the messages, and
    the one case flock cannot decide: a holder on another host of a file system that does not share locks.
    """
    path = folder / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        held = not _flock(fd, folder)
        holder = _holder(fd)
        name = f"process {holder.get('pid', '(unknown)')} on host {holder.get('host', '(unknown)')}"
        if held:
            raise UserError(f"{folder} is in use by {name}: wait for it, stop it, or choose another --run-dir.")
        if holder and holder.get("host") != socket.gethostname():
            raise UserError(
                f"{folder} was left locked by {name}, which cannot be asked from here: if that run is over, "
                f"delete {path} and start again."
            )
        if holder:
            log.warning("taking over %s, left by %s, which is no more", path, name)
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _flock(fd: int, folder: Path) -> bool:
    """Whether the lock is ours; false if a living process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        log.warning("%s cannot be locked (%s): a second run would not be noticed", folder, error.strerror)
    return True


def _holder(fd: int) -> dict[str, Any]:
    """Pid and host written in the lock, {} when it was released in good order or never held."""
    try:
        found = loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _release(fd: int) -> None:
    os.ftruncate(fd, 0)  # an empty lock file says: released in good order
    os.close(fd)


def _probe(folder: Path) -> None:
    """Write, sync and remove a small file: a folder that cannot be used is found before training."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(b"\0" * PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- helpers


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable (a renamed file is only safe after this)."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader, or a crash at any moment, sees the old bytes or the new ones."""
    temporary = path.parent / f".{path.name}.tmp"  # with_name refuses "." by a ValueError
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as UTF-8 JSON by `write_atomic`. Raises `OSError`, and `TypeError` for what JSON lacks."""
    write_atomic(Path(path), (json.dumps(obj, indent=1, ensure_ascii=False) + "\n").encode())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file that have a step, in its order; [] without the file.

    Raises:
      UserError: it cannot be read.
    """
    return [row for _, row in _lines_of(path) if row is not None and _step(row) is not None]


def _step(row: Any) -> int | None:
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _lines_of(path: Path) -> list[tuple[bytes, Any]]:
    """Each line that is not blank with its value, None where it is no JSON."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file; move it away.")
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away or restore it.") from error
    found = []
    for line in lines:
        try:
            found.append((line, loads(line)))
        except ValueError as reason:
            log.warning("%s: dropped a torn line of %d bytes (%s)", path, len(line), reason)
            found.append((line, None))
    return found


def tidy_jsonl(path: str | os.PathLike[str], step: int) -> int:
    """Leave in a metrics file the rows up to `step`, each step once (its last row), in order; how many lines went.

    What was written beyond `step` is written again by a resumed run. Torn lines go; rows without a step stay, in
    front. A missing file has nothing to drop. Raises `OSError`, or `UserError` if the file cannot be read.
    """
    path = Path(path)
    lines = _lines_of(path)
    rows: dict[int, bytes] = {}
    others = []
    for line, row in lines:
        at = _step(row)
        if at is None and isinstance(row, dict) and "step" not in row:
            others.append(line)
        elif at is None:
            if row is not None:
                log.warning("%s: dropped a row without a whole number as its step: %s", path, shown(row))
        elif at <= step:
            if at in rows:
                log.warning("%s: step %d is there twice; the later row stays", path, at)
            rows[at] = line
    kept = others + [rows[at] for at in sorted(rows)]
    if kept != [line for line, _ in lines] or (lines and not path.read_bytes().endswith(b"\n")):
        write_atomic(path, b"".join(line + b"\n" for line in kept))
    return len(lines) - len(kept)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a run computes; "none" where one is absent."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def environment() -> dict[str, Any]:
    """Where and with what this process runs, JSON-able. Starts the JAX backend (it lists the devices)."""
    import jax

    return {
        "git": _git(),
        "python": platform.python_version(),
        "versions": versions(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "argv": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The model of the CPU, for which XLA compiles."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def result_environment() -> dict[str, Any]:
    """`environment` for files that are committed: without the machine's name and paths."""
    return {k: v for k, v in environment().items() if k not in ("argv", "host", "flags")}


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this file lies in; None where there is none."""

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    status = ask("status", "--porcelain")
    return {"commit": commit, "dirty": None if commit is None or status is None else bool(status)}
