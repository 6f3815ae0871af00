"""Checkpoints: a step is whole and proven, or it does not exist.

One Orbax v1 checkpoint per step holds the state and the position of the data iterator. It is written
in `step_NNNNNNNN.partial`, gets its manifest (`train.manifest`), and is then renamed: a directory with
a final name is complete. Orbax writes and sha256 runs in the background; `save` itself blocks for the
copy from the device and a look for NaN. Local and network file systems only, no object stores.

The host copy made by `save` is what is hashed and what Orbax writes, so the digests speak of the state
in memory, not of what came back from the disk. No compression: zstd makes float checkpoints 8 % smaller
and 2 to 8 times slower to write.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxattn.errors import FULL, CheckpointError, Corrupt, Incomplete, Mismatch, UserError, free_bytes
from train import leaf_io, orbax_io
from train import manifest as mf
from train.rundir import fsync_dir

log = logging.getLogger("jaxattn")

STEP = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"step_\d{8,}\.(partial|partial\.orbax-checkpoint-tmp.*|dropped)")
FREE_SOME = "free some space and save again or resume, older steps are intact"
FULL_TEXT = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "quota exceeded")


@dataclass(frozen=True)
class Restored:
    """`step` was restored; `skipped` lists newer steps that failed verification, with the reason."""

    step: int
    state: Any
    skipped: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Room:
    """Bytes of a step's arrays, how many arrays there are, and bytes that were free when its save began."""

    arrays: int
    count: int
    free: int

    @property
    def needed(self) -> int:
        """About what a step takes, names, digests and half-filled blocks included (measured)."""
        return self.arrays + (64 << 10) + (self.count << 10)

    def __str__(self) -> str:
        return f"it needs about {self.needed:,} bytes ({self.arrays:,} of them arrays) and {self.free:,} were free"


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
        self._keep, self._async, self._read_only = keep, async_save, read_only
        self._config = mf.plain(config)
        self._allow_nonfinite = tuple(allow_nonfinite)
        self._done: set[int] = set()  # steps committed by this object
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        if not read_only and jax.process_index() == 0:
            self._prepare()

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot hold checkpoints: {error.strerror}; choose another folder."
            ) from error
        for path in sorted(self.directory.iterdir()):
            if LEFTOVER.fullmatch(path.name):
                log.warning("removing %s, left by an interrupted save", path)
                shutil.rmtree(path, ignore_errors=True)
            elif STEP.fullmatch(path.name) and not (path / mf.NAME).is_file():
                log.warning("removing %s, which has no %s and so was never finished", path, mf.NAME)
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------------------------- what is there

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        if not self.directory.is_dir():
            return []
        found = ((STEP.fullmatch(path.name), path) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match, path in found if match and (path / mf.NAME).is_file())

    def latest(self) -> int | None:
        """Newest committed step (not yet verified), None if there is none."""
        return max(self.steps(), default=None)

    def leaves(self, step: int | None = None) -> dict[str, mf.Leaf]:
        """Names, dtypes and shapes of what `step` holds, or the newest step with a sound manifest.

        Raises `CheckpointError` if there is none.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                return mf.read(self._existing(candidate)).leaves
            except (Corrupt, Incomplete):
                if step is not None:
                    raise
        raise Incomplete(f"{self.directory} holds no step with a sound manifest; restore a copy.")

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def check_config(
        self,
        current: Mapping[str, Any],
        *,
        ignore: Iterable[str] = (),
        step: int | None = None,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Raises `Mismatch` naming each field in which `current` differs from the saved configuration.

        complete: gives a saved configuration the fields that its version did not have. Looks at `step`, or else at
        the newest step with a sound manifest; with no step it has no opinion.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                saved = mf.read(self.path(candidate)).config
            except (Corrupt, Incomplete):
                if step is not None:
                    raise
                continue
            if differences := mf.diff_config(complete(saved), current, ignore=ignore):
                raise Mismatch(
                    f"{self.path(candidate)} was made with another configuration ({'; '.join(differences)}): "
                    "use the saved values or another --run-dir."
                )
            return

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
        self._refuse_nonfinite(step, leaves)
        items = {"state": host} if data_iterator is None else {"state": host, "data": data_iterator}
        room = _Room(sum(leaf.nbytes for leaf in leaves.values()), len(leaves), free_bytes(self.directory))
        if room.free < room.needed and jax.process_index() == 0:
            raise UserError(f"no room for {self._name(step)}: {room}; {FREE_SOME}.")
        partial = self.path(step).with_suffix(".partial")
        try:
            with orbax_io.context(), orbax_io.quiet():
                response = ocp.save_checkpointables_async(str(partial), items)
        except Exception as error:  # Orbax raises bare Exception, among others
            self._discard(partial)
            raise self._save_error(step, room, error) from error
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

    def _refuse_nonfinite(self, step: int, leaves: Mapping[str, Any]) -> None:
        for name, leaf in leaves.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allow_nonfinite):
                continue
            if not leaf_io.is_finite(leaf):
                raise Corrupt(
                    f"tensor {name!r} has non-finite values at step {step}, so no checkpoint was written: "
                    f"expected finite numbers; restore an older step from {self.directory}, or name the "
                    "tensor in allow_nonfinite if inf belongs there."
                )

    def _finish(self, step: int, leaves: dict[str, Any], has_data: bool, response: Any, room: _Room) -> None:
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
                    self._set_aside_from(step)
                    partial.rename(final)
                    fsync_dir(self.directory)
            except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to: wait() raises it
                self._discard(partial)
                self._error = self._save_error(step, room, error)
                self._error.__cause__ = error
                return
        self._done.add(step)
        if jax.process_index() == 0:
            self._prune()

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self.directory}"

    def _save_error(self, step: int, room: _Room, error: Exception) -> UserError:
        if getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXT):
            why = "when the save began, so another program, a quota or a limit of the file size is in the way"
            return UserError(f"no room for {self._name(step)}: {room} {why}; {FREE_SOME}.")
        return UserError(
            f"{self._name(step)} could not be written ({type(error).__name__}: {mf.first_line(error)}): "
            "check the folder and save again, older steps are intact."
        )

    def _discard(self, partial: Path) -> None:
        """Remove what a failed save has written, under both of the names Orbax uses."""
        if jax.process_index() != 0:
            return
        for _ in range(5):  # Orbax reports the first failure while its other writers still make files
            if not (paths := list(self.directory.glob(f"{partial.name}*"))):
                return
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _set_aside_from(self, step: int) -> None:
        """One directory is one line of training: what lies at or after the new step is of another one."""
        for newer in (s for s in self.steps() if s >= step):
            number = 1
            while (aside := self.directory / f"aside-{newer:08d}-{number}").exists():
                number += 1
            self.path(newer).rename(aside)
            log.warning(
                "step %d is being saved, so step %d, found in %s, is not of this run any more: moved to %s; "
                "delete that when it is not needed",
                step, newer, self.directory, aside,
            )  # fmt: skip

    def _prune(self) -> None:
        for old in self.steps()[: -self._keep]:
            dropped = self.path(old).with_suffix(".dropped")  # invisible before the first file goes
            try:
                self.path(old).rename(dropped)
                shutil.rmtree(dropped)
            except OSError as error:
                log.warning("the old step %s could not be removed: %s", self.path(old), error.strerror)
                return

    # ------------------------------------------------------------------------------------------- restore

    def restore(
        self,
        abstract_state: Any,
        data_iterator: Any = None,
        step: int | None = None,
        *,
        verify: bool = True,
        allow_cast: bool = False,
    ) -> Restored:
        """Restore `step`, or the newest step that verifies, onto the shardings of `abstract_state`.

        `abstract_state` has the structure of the saved state with `jax.ShapeDtypeStruct` leaves (or arrays;
        ints and floats as themselves). The position of `data_iterator` is set in place, last. Without `step`
        a corrupt step is skipped with a warning. `verify=False` looks at the file sizes only.

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
                state = self._restore_one(candidate, abstract_state, data_iterator, verify, allow_cast)
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

    def _existing(self, step: int) -> Path:
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise Incomplete(f"{folder} does not exist: the finished steps are {known}.")
        return folder

    def _restore_one(self, step: int, abstract: Any, data: Any, verify: bool, allow_cast: bool) -> Any:
        folder = self._existing(step)
        manifest = orbax_io.check(folder, verify)
        wanted = leaf_io.named(jax.tree.map(leaf_io.abstract, abstract))
        mf.compare_leaves(folder, manifest, wanted, allow_cast=allow_cast)
        if data is not None and not manifest.has_data:
            raise Mismatch(f"{folder} holds no data position, expected one: pass data_iterator=None.")
        targets = jax.tree_util.tree_map_with_path(
            lambda path, x: leaf_io.target(x, manifest.leaves[leaf_io.name_of(path)].dtype), abstract
        )
        loaded, problem = None, None
        try:
            loaded = orbax_io.load_state(folder, targets, verified=verify)
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
