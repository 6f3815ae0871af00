"""The scheduler: requests wait in a queue, take a free slot when there is one, and decode beside the others.

One thread owns the device. A turn of it reads at most one chunk of a new prompt and then decodes a block of tokens in
every slot, so a long prompt does not stall those who are reading their answers.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn._generate import Cursor, prefill_chunks, room_for
from jaxattn.errors import ConfigError, UserError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import decoding_variables
from jaxattn.reader import most_padding
from jaxattn.sampling import Sampling
from jaxattn.serving import slots as device

log = logging.getLogger("jaxattn")

BLOCK = 8  # tokens decoded between two looks at the queue
READ = 128  # tokens of a prompt that are read between two turns of the others

Deliver = Callable[[list[int], str | None], None]
"""Called from the engine's thread with new tokens, and at the end with "stop", "length" or "error"."""


class QueueFull(UserError):
    """As many requests wait as may."""


class Stopped(UserError):
    """The engine does not run (any more)."""


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way."""

    ids: Sequence[int]
    most: int
    how: Sampling
    seed: int
    stop: frozenset[int]
    deliver: Deliver
    made: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for the rest: its slot is free at the engine's next turn."""
        self.cancelled = True


class Engine:
    """Continuous batching over `slots` sequences of up to `context` tokens, prompt and answer together."""

    def __init__(self, model: ModelConfig, params: Any, *, slots: int, context: int, queue: int, block: int = BLOCK):
        for name, value in (("slots", slots), ("context", context), ("queue", queue), ("block", block)):
            if value < 1:
                raise ConfigError(f"{name} is {value} but must be at least 1.")
        if model.position_limit and context > model.position_limit:
            raise ConfigError(f"context is {context} but the model knows {model.position_limit} positions; lower it.")
        self.context, self.limit = context, queue
        self._model, self._variables, self._block = model, decoding_variables(model, params), block
        self._room = room_for(context + most_padding(model, context, READ) + block)
        self._slots = device.empty(model, slots, self._room, self._variables)
        self._owners: list[Ticket | None] = [None] * slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._reading: tuple[Ticket, Iterator[Cursor | None]] | None = None
        self._changed = threading.Condition()
        self._stop, self.failure = False, ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --------------------------------------------------------------------------------------- the callers' side

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop at the end of the current turn; requests that are not done end with "error"."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self, ids: Sequence[int], most: int, how: Sampling, seed: int, stop: Sequence[int], deliver: Deliver
    ) -> Ticket:
        """Queue a prompt of token ids that asks for at most `most` new ones.

        Raises:
          ConfigError: an empty prompt, or more tokens than the context holds.
          QueueFull: too many wait already.
          Stopped: the engine has ended.
        """
        if not ids or most < 1:
            raise ConfigError(f"{len(ids)} prompt tokens and {most} new ones are asked for; both must be at least 1.")
        if len(ids) + most > self.context:
            raise ConfigError(
                f"{len(ids)} prompt tokens and {most} new ones exceed the context of {self.context} tokens; "
                "shorten the prompt or ask for fewer."
            )
        ticket = Ticket(tuple(ids), most, how, seed, frozenset(stop), deliver)
        with self._changed:
            if self._stop or self.failure:
                raise Stopped(f"the engine has stopped{f' ({self.failure})' if self.failure else ''}.")
            self._forget_cancelled()
            if len(self._waiting) >= self.limit:
                raise QueueFull(f"{self.limit} requests are waiting already; try again later.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def load(self) -> dict[str, int]:
        """How many requests wait, and how many slots are taken."""
        with self._changed:
            busy = sum(owner is not None for owner in self._owners) + (self._reading is not None)
            return {"waiting": len(self._waiting), "busy": busy, "slots": len(self._owners)}

    # ------------------------------------------------------------------------------------------ the one thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._read()
                self._decode()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            log.exception("the engine stopped")
        finally:
            with self._changed:
                self._stop = True
                left = [t for t in (*self._owners, *self._waiting, self._reading and self._reading[0]) if t]
                self._waiting.clear()
                self._owners = [None for _ in self._owners]
                self._reading = None
            for ticket in left:
                self._tell(ticket, [], "error")

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        idle = lambda: not (self._waiting or self._reading or any(self._owners))
        with self._changed:
            while idle() and not self._stop:
                self._changed.wait()
            return not self._stop

    def _read(self) -> None:
        """Free the slots nobody waits for; one chunk of the next prompt; at its end, into a slot with it."""
        self._owners = [None if owner and owner.cancelled else owner for owner in self._owners]
        if self._reading and self._reading[0].cancelled:
            self._reading = None
        if self._reading is None and None in self._owners:
            with self._changed:
                self._forget_cancelled()
                if self._waiting:
                    ticket = self._waiting.popleft()
                    self._reading = (ticket, self._prompt(ticket))
        if self._reading is None:
            return
        ticket, chunks = self._reading
        if (cursor := next(chunks)) is not None:
            slot = self._owners.index(None)
            how = {name: jnp.asarray(x) for name, x in device.knobs(ticket.how).items()}
            self._slots = device.insert(self._slots, jnp.int32(slot), cursor, how)
            self._owners[slot], self._reading = ticket, None

    def _forget_cancelled(self) -> None:
        self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def _prompt(self, ticket: Ticket) -> Iterator[Cursor | None]:
        tokens, length = np.asarray(ticket.ids, np.int32)[None], np.array([len(ticket.ids)])
        keys = jax.random.split(jax.random.key(ticket.seed), 1)
        return prefill_chunks(self._model, self._variables, tokens, length, self._room, keys, READ)

    def _decode(self) -> None:
        owners = list(self._owners)
        if not any(owners):
            return
        live = jnp.asarray([owner is not None for owner in owners])
        tokens, self._slots = device.decode(self._model, self._block, self._variables, self._slots, live)
        for slot, (owner, row) in enumerate(zip(owners, np.asarray(tokens).tolist(), strict=True)):
            if owner is None:
                continue
            row = row[: owner.most - owner.made]
            end = next((i + 1 for i, token in enumerate(row) if token in owner.stop), None)
            row = row[:end]
            owner.made += len(row)
            reason = "stop" if end else "length" if owner.made == owner.most else None
            if not owner.cancelled:
                self._tell(owner, row, reason)
            if reason:
                self._owners[slot] = None

    def _tell(self, ticket: Ticket, tokens: list[int], reason: str | None) -> None:
        try:
            ticket.deliver(tokens, reason)
        except RuntimeError:  # the caller's event loop is closed: it has gone
            ticket.cancel()
