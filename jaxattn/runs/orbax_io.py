"""Reading what Orbax and Grain wrote, with every failure as one clear error in all processes."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxattn.errors import CheckpointError, Corrupt, Mismatch, Unsupported
from jaxattn.runs import manifest as mf
from jaxattn.runs.rundir import versions


def context(part: bool = False) -> Any:
    """Orbax's settings for every save and load here; `part` of what was saved may be loaded."""
    made = ocp.Context()
    made.pytree.loading.partial_load = part
    made.array.saving.use_compression = False
    made.memory.deepcopy_host_arrays = False  # `leaf_io.to_host` has copied
    made.asynchronous.create_directories_asynchronously = False  # a bad folder fails in save itself
    return made


class _Raised(logging.Filter):
    """Leaves out what Orbax logs with a traceback before it raises it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While something is saved: what fails is raised to us, so that tracebacks beside it say nothing new."""
    logger, told, before = logging.getLogger("absl"), _Raised(), sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":  # writers that end after the one that failed
            before(raised)

    logger.addFilter(told)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(told)


def load_state(folder: Path, targets: Any, *, verified: bool, part: bool = False) -> Any:
    """The state in `folder`; `verified` says that its bytes are known to be those that were saved.

    part: `targets` may lack branches of it, which are not read.

    Raises:
      Corrupt: unreadable, and not verified.
      Unsupported: unreadable although verified: another Orbax wrote it.
    """
    try:
        with context(part):
            return ocp.load_checkpointables(str(folder), {"state": targets})["state"]
    except MemoryError:
        raise
    except Exception as error:  # Orbax raises bare Exception, KeyError, JSONDecodeError, ...
        reason = f"({type(error).__name__}: {mf.first_line(error)})"
        if not verified:
            raise Corrupt(f"{folder} cannot be read {reason}: restore another step.") from error
        raise Unsupported(
            f"{folder} has the bytes that were saved, yet orbax-checkpoint {versions()['orbax-checkpoint']} "
            f"cannot read it {reason}: use the version named in its {mf.NAME}."
        ) from error


def restore_iterator(folder: Path, iterator: Any) -> None:
    """Put the data iterator where it was when `folder` was saved.

    Raises:
      Mismatch: the position belongs to another pipeline.
    """
    try:
        with context():
            ocp.load_checkpointables(str(folder), {"data": iterator})
    except Exception as error:  # set_state of some data pipeline may raise anything
        raise Mismatch(
            f"the data position in {folder / 'data'} does not fit this data pipeline or number of processes "
            f"({type(error).__name__}: {mf.first_line(error)}): use the saved data configuration."
        ) from error


def check(folder: Path, content: bool) -> mf.Manifest:
    """Read the manifest and let process 0 compare the files with it; all processes end alike."""
    problem: CheckpointError | None = None
    found: mf.Manifest | None = None
    try:
        found = mf.read(folder)
        if jax.process_index() == 0:
            mf.verify_files(folder, found, content=content)
    except CheckpointError as error:
        problem = error
    agree(problem, folder)
    assert found is not None  # agree has raised otherwise
    return found


def agree(problem: CheckpointError | None, folder: Path) -> None:
    """Raise `problem`; over several processes, raise in all of them if there is one in any."""
    bad = problem is not None
    if jax.process_count() > 1:
        bad = bool(np.any(multihost_utils.process_allgather(np.array(bad))))
    if problem is not None:
        raise problem
    if bad:
        raise Corrupt(f"{folder} was found unusable by another process: see its log, restore another step.")
