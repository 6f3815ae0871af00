"""What a save refuses and how it says that it failed: non-finite values, a full disk, all else."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxattn.errors import FULL, Corrupt, UserError
from jaxattn.runs import leaf_io
from jaxattn.runs import manifest as mf

FREE_SOME = "free some space and save again or resume, older steps are intact"
FULL_TEXT = ("RESOURCE_EXHAUSTED", "No space left", "File too large", "quota exceeded")


@dataclass(frozen=True)
class Room:
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


def save_error(step: int, directory: Path, room: Room, error: Exception) -> UserError:
    """The sentence for a save that failed by `error`."""
    name = f"the checkpoint of step {step} in {directory}"
    if getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXT):
        why = "when the save began, so another program, a quota or a limit of the file size is in the way"
        return UserError(f"no room for {name}: {room} {why}; {FREE_SOME}.")
    return UserError(
        f"{name} could not be written ({type(error).__name__}: {mf.first_line(error)}): "
        "check the folder and save again, older steps are intact."
    )


def no_room(step: int, directory: Path, room: Room) -> UserError:
    """The sentence for a save that is not begun."""
    return UserError(f"no room for the checkpoint of step {step} in {directory}: {room}; {FREE_SOME}.")


def refuse_nonfinite(step: int, directory: Path, leaves: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuse a leaf with inf or NaN, unless its name fits one of the fnmatch patterns `allowed`.

    Raises `Corrupt`.
    """
    patterns = tuple(allowed)
    for name, leaf in leaves.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if not leaf_io.is_finite(leaf):
            raise Corrupt(
                f"tensor {name!r} has non-finite values at step {step}, so no checkpoint was written: "
                f"expected finite numbers; restore an older step from {directory}, or name the "
                "tensor in allow_nonfinite if inf belongs there."
            )
