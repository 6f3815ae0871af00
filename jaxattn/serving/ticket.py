"""A request on its way through the engine, and what its owner is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxattn.errors import ConfigError, UserError
from jaxattn.sampling import Sampling

Deliver = Callable[[list[int], str | None], None]
"""Called from the engine's thread with new tokens, and at the end with "stop", "length" or "error"."""


class QueueFull(UserError):
    """As many requests wait as may."""


class Stopped(UserError):
    """The engine does not run (any more)."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A prompt of token ids that asks for at most `most` new ones, up to one of `stop`."""

    ids: tuple[int, ...]
    most: int
    knobs: dict[str, Any]
    key: Any
    stop: frozenset[int]
    deliver: Deliver
    made: int = 0
    cancelled: bool = False
    failure: str = ""
    """Why it ended with "error"."""

    def cancel(self) -> None:
        """Nobody waits for the rest: its slot is free at the engine's next turn."""
        self.cancelled = True

    def take(self, row: list[int], fine: list[bool]) -> bool:
        """Hand over a row of new tokens, each made from logits that were `fine`; whether they are the last."""
        row = row[: self.most - self.made]
        end = next((i + 1 for i, token in enumerate(row) if token in self.stop), None)
        row = row[:end]
        if not all(fine[: len(row)]):  # what is made beyond the end means nothing
            self.fail("the model's logits are no numbers (NaN or infinite): try another prompt, or dtype float32")
            return True
        self.made += len(row)
        reason = "stop" if end else "length" if self.made == self.most else None
        self._tell(row, reason)
        return reason is not None

    def fail(self, why: str) -> None:
        """End with "error"."""
        self.failure = why
        self._tell([], "error")

    def _tell(self, tokens: list[int], reason: str | None) -> None:
        if self.cancelled:
            return
        try:
            self.deliver(tokens, reason)
        except Exception:  # noqa: BLE001  whoever asked is broken, or has gone with its event loop
            self.cancel()


def key_of(seed: int) -> Any:
    """The PRNG key of a seed of 64 bits; from 0 to 2^32 - 1 it is `jax.random.key(seed)`.

    Raises:
      ConfigError: another seed.
    """
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"seed is {str(seed)[:40]} but must be an integer of 64 bits.")
    key = jax.random.key(seed % (1 << 32))
    return jax.random.fold_in(key, (seed >> 32) % (1 << 32)) if seed >> 32 else key


def arrays(how: Sampling) -> dict[str, Any]:
    """`Sampling.knobs` on the device."""
    return {name: jnp.asarray(x) for name, x in how.knobs().items()}


def sentence(error: BaseException) -> str:
    """An exception as one bounded line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
