"""Checkpoints: a step is whole and proven, or it does not exist.

One Orbax v1 checkpoint per step holds the state and the position of the data iterator. It is written
in `step_NNNNNNNN.partial`, gets its manifest (`jaxattn.runs.manifest`), and is then renamed: a directory with
a final name is complete. Orbax writes and sha256 runs in the background; `save` itself blocks for the
copy from the device and a look for NaN. Local and network file systems only, no object stores.

The host copy made by `save` is what is hashed and what Orbax writes, so the digests speak of the state
in memory, not of what came back from the disk. No compression: zstd makes float checkpoints 8 % smaller
and 2 to 8 times slower to write.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxattn.errors import CheckpointError, Corrupt, Incomplete, Mismatch, UserError, free_bytes
from jaxattn.runs import leaf_io, orbax_io
from jaxattn.runs import manifest as mf
from jaxattn.runs.rundir import fsync_dir
from jaxattn.runs.save_faults import Room, no_room, refuse_nonfinite, save_error
from jaxattn.runs.step_folders import StepFolders

log = logging.getLogger("jaxattn")


@dataclass(frozen=True)
class Restored:
    """`step` was restored; `skipped` lists newer steps that failed verification, with the reason."""

    step: int
    state: Any
    skipped: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of one run, in one directory. Close it (or use `with`) to finish the last save.

    `config` goes into each manifest. `keep` newest steps stay. `allow_nonfinite` holds fnmatch patterns
    of leaf names that may contain inf or NaN (`optax.contrib.reduce_on_plateau` starts from inf).
    `read_only` is for a process that looks at the run of another one: it neither creates nor removes.

    Raises `UserError` if the directory cannot be created or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        config: Mapping[str, Any],
        async_save: bool = True,
        allow_nonfinite: Iterable[str] = (),
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}: at least 1 checkpoint must be kept.")
        if "://" in os.fspath(directory):
            raise UserError(f"{directory} is not a local path: mount the bucket, or use a shared file system.")
        try:
            os.fspath(directory).encode()
        except UnicodeEncodeError as error:  # bytes of another locale, which TensorStore cannot take
            raise UserError(f"{os.fspath(directory)!a} is not UTF-8 text: set PYTHONUTF8=1.") from error
        self.directory = Path(os.path.abspath(os.fspath(directory)))
        self._folders = StepFolders(self.directory)
        self._keep, self._async, self._read_only = keep, async_save, read_only
        self._config = mf.plain(config)
        self._allow_nonfinite = tuple(allow_nonfinite)
        self._done: set[int] = set()  # steps committed by this object
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        if not read_only and jax.process_index() == 0:
            self._folders.prepare()

    # ------------------------------------------------------------------------------------- what is there

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return self._folders.steps()

    def latest(self) -> int | None:
        """Newest committed step (not yet verified), None if there is none."""
        return self._folders.latest()

    def path(self, step: int) -> Path:
        return self._folders.path(step)

    def leaves(self, step: int | None = None) -> dict[str, mf.Leaf]:
        """`StepFolders.leaves`: names, dtypes and shapes of what a step holds."""
        return self._folders.leaves(step)

    def check_config(
        self,
        current: Mapping[str, Any],
        *,
        ignore: Iterable[str] = (),
        step: int | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """`StepFolders.check_config`: raises `Mismatch` where the saved configuration is another one."""
        self._folders.check_config(current, ignore=ignore, step=step, complete=complete)

    # ---------------------------------------------------------------------------------------------- save

    def save(self, step: int, state: Any, data_iterator: Any = None) -> None:
        """Save `state` (a pytree of arrays, ints and floats) and the iterator's position as `step`.

        Waits for the save before it, copies to the host, and returns; `state` may then be donated. Steps
        newer than `step` (corrupt ones that a restore skipped, or a branch that was left) are renamed to
        `aside-...`. A step already saved by this object is left alone.

        Raises `Corrupt` for a non-finite value (nothing is written), `UserError` for a leaf that cannot
        be saved, and the error of the save before if that one failed (this one is then not begun).
        """
        self.wait()
        if self._read_only:
            raise UserError(f"{self.directory} was opened read-only: open it with read_only=False to save.")
        if step in self._done:
            return
        host = leaf_io.to_host(state)
        leaves = leaf_io.named(host)
        refuse_nonfinite(step, self.directory, leaves, self._allow_nonfinite)
        items = {"state": host} if data_iterator is None else {"state": host, "data": data_iterator}
        room = Room(sum(leaf.nbytes for leaf in leaves.values()), len(leaves), free_bytes(self.directory))
        if room.free < room.needed and jax.process_index() == 0:
            raise no_room(step, self.directory, room)
        partial = self.path(step).with_suffix(".partial")
        try:
            with orbax_io.context(), orbax_io.quiet():
                response = ocp.save_checkpointables_async(str(partial), items)
        except Exception as error:  # Orbax raises bare Exception, among others
            self._folders.discard(partial)
            raise save_error(step, self.directory, room, error) from error
        _crash_point("data")
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, leaves, data_iterator is not None, response, room),
            name="checkpoint",
        )
        self._thread.start()
        if not self._async:
            self.wait()

    def wait(self) -> None:
        """Wait until the save in progress is committed. Raises `UserError` if it failed, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def poll(self) -> None:
        """Like `wait`, but only where the save has ended: a failure is known at the next step, not at the next save."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def close(self) -> None:
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # do not hide the error that is already on its way

    def _finish(self, step: int, leaves: dict[str, Any], has_data: bool, response: Any, room: Room) -> None:
        """Background: hash, wait for Orbax, write the manifest, rename, drop old steps."""
        final = self.path(step)
        partial = final.with_suffix(".partial")
        with orbax_io.quiet():
            try:
                described = mf.describe_all(leaves)  # while Orbax writes
                response.result()
                _crash_point("manifest")
                if jax.process_index() == 0:
                    files = mf.hash_files(partial)
                    mf.write(partial, mf.Manifest(step, described, files, has_data, self._config))
                    for folder in (p for p in partial.rglob("*") if p.is_dir()):
                        fsync_dir(folder)
                    self._folders.set_aside_from(step)
                    partial.rename(final)
                    fsync_dir(self.directory)
            except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to: wait() raises it
                self._folders.discard(partial)
                self._error = save_error(step, self.directory, room, error)
                self._error.__cause__ = error
                return
        self._done.add(step)
        if jax.process_index() == 0:
            self._folders.prune(self._keep)

    # ------------------------------------------------------------------------------------------- restore

    def restore(
        self,
        abstract_state: Any,
        data_iterator: Any = None,
        step: int | None = None,
        *,
        verify: bool = True,
        allow_cast: bool = False,
        only: str | None = None,
    ) -> Restored:
        """Restore `step`, or the newest step that verifies, onto the shardings of `abstract_state`.

        `abstract_state` has the structure of the saved state with `jax.ShapeDtypeStruct` leaves (or arrays;
        ints and floats as themselves). The position of `data_iterator` is set in place, last. Without `step`
        a corrupt step is skipped with a warning. `verify=False` looks at the file sizes only.
        `only` reads the leaves below that name of the state alone.

        Raises `Incomplete` or `Corrupt` if no step can be used (naming each), `Mismatch` if a leaf or the
        data iterator does not fit, `Unsupported` for a newer format.
        """
        self.wait()
        orbax_io.agree(None, self.directory)  # over several processes: the rename by process 0 has happened
        candidates = [step] if step is not None else sorted(self.steps(), reverse=True)
        if not candidates:
            raise Incomplete(f"{self.directory} holds no finished checkpoint: start without --resume.")
        skipped: list[tuple[int, str]] = []
        for candidate in candidates:
            try:
                state = self._restore_one(candidate, abstract_state, data_iterator, verify, allow_cast, only)
            except (Corrupt, Incomplete) as error:
                if step is not None:
                    raise
                skipped.append((candidate, str(error)))
                continue
            self._done.clear()  # the state may be older than what this object has saved
            for bad, reason in skipped:
                log.warning("skipped step %d and restored step %d instead: %s", bad, candidate, reason)
            return Restored(candidate, state, tuple(skipped))
        reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in skipped)
        raise Corrupt(f"no checkpoint in {self.directory} can be used ({reasons})")

    def _restore_one(
        self, step: int, abstract: Any, data: Any, verify: bool, allow_cast: bool, only: str | None
    ) -> Any:
        folder = self._folders.existing(step)
        manifest = orbax_io.check(folder, verify)
        wanted = leaf_io.named(jax.tree.map(leaf_io.abstract, abstract))
        mf.compare_leaves(folder, manifest, wanted, allow_cast=allow_cast, only=only)
        if data is not None and not manifest.has_data:
            raise Mismatch(f"{folder} holds no data position, expected one: pass data_iterator=None.")
        targets = jax.tree_util.tree_map_with_path(
            lambda path, x: leaf_io.target(x, manifest.leaves[leaf_io.name_of(path)].dtype), abstract
        )
        loaded, problem = None, None
        try:
            loaded = orbax_io.load_state(folder, targets, verified=verify, part=only is not None)
            if verify:
                mf.verify_arrays(folder, manifest, leaf_io.named(loaded))
        except CheckpointError as error:
            problem = error
        orbax_io.agree(problem, folder)
        state = jax.tree.map(leaf_io.place, abstract, loaded)
        if data is not None:
            orbax_io.restore_iterator(folder, data)
        return state


def _crash_point(name: str) -> None:
    """Fault injection for tests: die as `kill -9` does."""
    if os.environ.get("JAXATTN_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
