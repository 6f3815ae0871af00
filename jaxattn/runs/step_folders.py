"""The folders of a run's checkpoints: which steps are there, and what becomes of those that are not wanted.

A folder with a final name, `step_NNNNNNNN`, and a manifest is a finished step. What a save has not finished has
another name and goes when the next process opens the directory to write.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxattn.errors import Corrupt, Incomplete, Mismatch, UserError
from jaxattn.runs import manifest as mf

log = logging.getLogger("jaxattn")

STEP = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(r"step_\d{8,}\.(partial|partial\.orbax-checkpoint-tmp.*|dropped)")


@dataclass(frozen=True)
class StepFolders:
    """The steps in one directory, by their folders and manifests; no array is read."""

    directory: Path

    def prepare(self) -> None:
        """Make the directory, prove that it can be written, and remove what interrupted saves have left.

        Raises `UserError` if it cannot be.
        """
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

    def existing(self, step: int) -> Path:
        """The folder of a step. Raises `Incomplete`, naming the steps that are there, if it is not."""
        folder = self.path(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise Incomplete(f"{folder} does not exist: the finished steps are {known}.")
        return folder

    def leaves(self, step: int | None = None) -> dict[str, mf.Leaf]:
        """Names, dtypes and shapes of what `step` holds, or the newest step with a sound manifest.

        Raises `CheckpointError` if there is none.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                return mf.read(self.existing(candidate)).leaves
            except (Corrupt, Incomplete):
                if step is not None:
                    raise
        raise Incomplete(f"{self.directory} holds no step with a sound manifest; restore a copy.")

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

    def set_aside_from(self, step: int) -> None:
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

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest steps."""
        for old in self.steps()[:-keep]:
            dropped = self.path(old).with_suffix(".dropped")  # invisible before the first file goes
            try:
                self.path(old).rename(dropped)
                shutil.rmtree(dropped)
            except OSError as error:
                log.warning("the old step %s could not be removed: %s", self.path(old), error.strerror)
                return

    def discard(self, partial: Path) -> None:
        """Remove what a failed save has written, under both of the names Orbax uses."""
        if jax.process_index() != 0:
            return
        for _ in range(5):  # Orbax reports the first failure while its other writers still make files
            if not (paths := list(self.directory.glob(f"{partial.name}*"))):
                return
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)
