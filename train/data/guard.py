"""The outermost iterator: restores only what belongs to it, and names a worker that died."""

from __future__ import annotations

import contextlib
import multiprocessing
from typing import Any

import grain

from jaxattn.errors import DataError, Mismatch
from train.data.worker import shielded


class Guarded(grain.IterDataset):
    """Wraps a data set; `identity` (JSON-able) is stored in every state and compared on restore."""

    def __init__(self, parent: grain.IterDataset, identity: dict[str, Any]):
        super().__init__(parent)
        self._identity = identity

    def __iter__(self) -> GuardedIterator:
        return GuardedIterator(iter(self._parent), self._identity)

    def __str__(self) -> str:
        return f"Guarded({self._identity})"


class GuardedIterator(grain.DatasetIterator):
    """A Grain iterator whose state is plain JSON."""

    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, Any]):
        super().__init__(parent)
        self._identity = identity
        self._processes: list = []

    def __next__(self) -> Any:
        """The next batch.

        Raises:
          DataError: a worker process died (Grain polls once a second); names it.
        """
        workers = self._identity["workers"]
        try:
            with shielded() if len(self._processes) < workers else contextlib.nullcontext():
                batch = next(self._parent)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            dead = [f"pid {p.pid} (exit code {p.exitcode})" for p in self._processes if p.exitcode]
            raise DataError(
                f"a data worker died, {' and '.join(dead) or str(error).rstrip('.')}: resume from the "
                "last checkpoint, with fewer --data.workers if memory ran out (exit code -9)."
            ) from error
        if len(self._processes) < workers:
            self._processes = [p for p in multiprocessing.active_children() if p.name.startswith("grain-")]
        return batch

    def get_state(self) -> dict[str, Any]:
        """{"identity", "stream"}; the stream part is Grain's own state."""
        return {"identity": self._identity, "stream": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken.

        Raises:
          Mismatch: the state belongs to other data or another way of cutting it.
        """
        found = state.get("identity", {})
        for name in sorted(self._identity.keys() | found.keys()):
            ours = self._identity.get(name)
            if found.get(name) != ours:
                raise Mismatch(
                    f"the saved data position has {name}={found.get(name)!r} but this run has {ours!r}: "
                    "resume with the data settings of the saved run, or start the data anew."
                )
        self._parent.set_state(state["stream"])

    def close(self) -> None:
        """Stops the workers."""
        self._parent.close()
        super().close()
