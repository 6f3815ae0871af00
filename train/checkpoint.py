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

import errno
import fnmatch
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxattn.errors import CheckpointError, Corrupt, Incomplete, Mismatch, Unsupported, UserError
from train import manifest as mf
from train.rundir import fsync_dir, versions

log = logging.getLogger("jaxattn")

STEP = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"step_\d{8,}\.(partial|partial\.orbax-checkpoint-tmp.*|dropped)")
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FULL_TEXT = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "quota exceeded")


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

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def check_config(self, current: Mapping[str, Any], *, ignore: Iterable[str] = (), step: int | None = None) -> None:
        """Raises `Mismatch` naming each field in which `current` differs from the saved configuration.

        Looks at `step`, or else at the newest step with a sound manifest; with no step it has no opinion.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                saved = mf.read(self.path(candidate)).config
            except (Corrupt, Incomplete):
                if step is not None:
                    raise
                continue
            if differences := mf.diff_config(saved, current, ignore=ignore):
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
        host = _to_host(state)
        leaves = _named(host)
        self._refuse_nonfinite(step, leaves)
        items = {"state": host} if data_iterator is None else {"state": host, "data": data_iterator}
        size = sum(leaf.nbytes for leaf in leaves.values())
        partial = self.path(step).with_suffix(".partial")
        try:
            with _context():
                response = ocp.save_checkpointables_async(str(partial), items)
        except Exception as error:  # Orbax raises bare Exception, among others
            self._discard(partial)
            raise self._save_error(step, size, error) from error
        _crash_point("data")
        self._thread = threading.Thread(
            target=self._finish,
            args=(step, leaves, data_iterator is not None, response, size),
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
            if not _finite(leaf):
                raise Corrupt(
                    f"tensor {name!r} has non-finite values at step {step}, so no checkpoint was written: "
                    f"expected finite numbers; restore an older step from {self.directory}, or name the "
                    "tensor in allow_nonfinite if inf belongs there."
                )

    def _finish(self, step: int, leaves: dict[str, Any], has_data: bool, response: Any, size: int) -> None:
        """Background: hash, wait for Orbax, write the manifest, rename, drop old steps."""
        final = self.path(step)
        partial = final.with_suffix(".partial")
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
            self._error = self._save_error(step, size, error)
            self._error.__cause__ = error
            log.error("%s", self._error)
            return
        self._done.add(step)
        if jax.process_index() == 0:
            self._prune()

    def _save_error(self, step: int, size: int, error: Exception) -> UserError:
        where = f"checkpoint of step {step} in {self.directory}"
        if getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXT):
            try:
                free = f"{shutil.disk_usage(self.directory).free:,}"
            except OSError:
                free = "an unknown number of"
            return UserError(
                f"no room for the {where}: it needs {size:,} bytes, {free} are free (or a quota or file size "
                "limit is lower); free some space and save again, older steps are intact."
            )
        return UserError(
            f"the {where} could not be written ({type(error).__name__}: {mf.first_line(error)}): "
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
        _agree(None, self.directory)  # over several processes: the rename by process 0 has happened
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

    def _restore_one(self, step: int, abstract: Any, data: Any, verify: bool, allow_cast: bool) -> Any:
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise Incomplete(f"{folder} does not exist: the finished steps are {known}.")
        manifest = _check(folder, verify)
        wanted = _named(jax.tree.map(_abstract, abstract))
        mf.compare_leaves(folder, manifest, wanted, allow_cast=allow_cast)
        if data is not None and not manifest.has_data:
            raise Mismatch(f"{folder} holds no data position, expected one: pass data_iterator=None.")
        targets = jax.tree_util.tree_map_with_path(
            lambda path, x: _target(x, manifest.leaves[_name(path)].dtype), abstract
        )
        loaded, problem = None, None
        try:
            loaded = _load(folder, targets, verified=verify)
            if verify:
                mf.verify_arrays(folder, manifest, _named(loaded))
        except CheckpointError as error:
            problem = error
        _agree(problem, folder)
        state = jax.tree.map(_place, abstract, loaded)
        if data is not None:
            _restore_iterator(folder, data)
        return state


# ------------------------------------------------------------------------------- leaves, host and device


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {_name(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise UserError("two leaves of the state have the same name: use keys without '/'.")
    return named


def _whole(leaf: Any) -> bool:
    """Whether this process can hold all of the leaf on the host; else Orbax moves it shard by shard."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or sharding.is_fully_addressable


def _to_host(state: Any) -> Any:
    """Host copies that neither donation nor the training loop can change."""
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and _whole(leaf):
            leaf.copy_to_host_async()  # all transfers at once, then collected one by one

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(f"state leaf {_name(path)!r} is a typed key: save jax.random.key_data of it.")
        if isinstance(leaf, jax.Array) and not _whole(leaf):
            return leaf
        # On the CPU this is a view, but one that JAX counts: a donated buffer under it is not reused.
        host = np.asarray(leaf) if isinstance(leaf, jax.Array) else np.array(leaf)
        if host.dtype.kind in "OUSM" or host.size == 0:
            raise UserError(
                f"state leaf {_name(path)!r} is {type(leaf).__name__} of dtype {host.dtype} and shape "
                f"{list(host.shape)}: only non-empty arrays, ints and floats can be saved."
            )
        return host

    return jax.tree_util.tree_map_with_path(convert, state)


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _finite(leaf: Any) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    if isinstance(leaf, jax.Array):
        return bool(_all_finite(leaf))
    with np.errstate(over="ignore", invalid="ignore"):  # a finite sum proves it at half the cost
        return bool(np.isfinite(leaf.sum()) or np.isfinite(leaf).all())


def _abstract(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, (bool, int, float)) else leaf


def _target(leaf: Any, dtype: str) -> Any:
    """What Orbax is asked for: host memory (hashed there, then placed) or, over processes, the shards."""
    leaf = _abstract(leaf)
    if not _whole(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=leaf.sharding)
    return np.broadcast_to(np.zeros((), jnp.dtype(dtype)), leaf.shape)  # a shape and a dtype, no memory


def _place(wanted: Any, loaded: Any) -> Any:
    if isinstance(wanted, (bool, int, float)):
        return type(wanted)(loaded.item())
    if isinstance(loaded, jax.Array):
        if loaded.dtype == wanted.dtype:
            return loaded
        return jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding)(loaded)
    cast = loaded.astype(wanted.dtype, copy=False)
    if isinstance(wanted, np.ndarray):
        return cast
    if getattr(wanted, "weak_type", False) and cast.ndim == 0:
        cast = jnp.asarray(cast.item())  # a strong scalar would promote differently from the saved one
    placed = jax.device_put(cast, getattr(wanted, "sharding", None))
    if placed.dtype != wanted.dtype:
        raise Mismatch(f"a leaf has dtype {wanted.dtype}, JAX makes {placed.dtype}: set jax_enable_x64.")
    return placed


# ---------------------------------------------------------------------------------------- Orbax and grain


def _context() -> Any:
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False  # `_to_host` has copied
    context.asynchronous.create_directories_asynchronously = False  # a bad folder fails in save itself
    return context


def _load(folder: Path, targets: Any, *, verified: bool) -> Any:
    try:
        with _context():
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


def _restore_iterator(folder: Path, iterator: Any) -> None:
    try:
        with _context():
            ocp.load_checkpointables(str(folder), {"data": iterator})
    except Exception as error:  # set_state of some data pipeline may raise anything
        raise Mismatch(
            f"the data position in {folder / 'data'} does not fit this data pipeline or number of processes "
            f"({type(error).__name__}: {mf.first_line(error)}): use the saved data configuration."
        ) from error


def _check(folder: Path, content: bool) -> mf.Manifest:
    """Read the manifest and let process 0 compare the files with it; all processes end alike."""
    problem: CheckpointError | None = None
    found: mf.Manifest | None = None
    try:
        found = mf.read(folder)
        if jax.process_index() == 0:
            mf.verify_files(folder, found, content=content)
    except CheckpointError as error:
        problem = error
    _agree(problem, folder)
    assert found is not None  # _agree has raised otherwise
    return found


def _agree(problem: CheckpointError | None, folder: Path) -> None:
    """Raise `problem`; over several processes, raise in all of them if there is one in any."""
    bad = problem is not None
    if jax.process_count() > 1:
        bad = bool(np.any(multihost_utils.process_allgather(np.array(bad))))
    if problem is not None:
        raise problem
    if bad:
        raise Corrupt(f"{folder} was found unusable by another process: see its log, restore another step.")


def _crash_point(name: str) -> None:
    """Fault injection for tests: die as `kill -9` does."""
    if os.environ.get("JAXATTN_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)
