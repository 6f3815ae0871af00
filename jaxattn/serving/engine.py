"""The scheduler: requests wait in a queue, take a free slot when there is one, and decode beside the others.

One thread owns the device. A turn of it reads some tokens of new prompts, which takes about as long as what follows: a
block of tokens of every sequence is decoded. So a long prompt does not stall those who are reading their answers, and
many short ones soon decode together.

Whatever goes wrong with a request ends that request: the thread lives as long as the server.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn._generate import Cursor, prefill_chunks
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import decoding_variables
from jaxattn.reader import any_piece, most_padding, piece_for
from jaxattn.sampling import Sampling
from jaxattn.serving import slots as device
from jaxattn.serving.memory import give_back
from jaxattn.serving.ticket import Deliver, QueueFull, Stopped, Ticket, arrays, key_of, sentence

log = logging.getLogger("jaxattn")

BLOCK = 8  # tokens decoded between two looks at the queue
SHORT, READ = 32, 128  # tokens of the pieces of a prompt
TURN = 256  # tokens of prompts that are read between two blocks
UNIT = 64  # the room of a slot is a multiple of this


def room_of(model: ModelConfig, context: int, block: int = BLOCK) -> int:
    """Tokens that a slot has room for."""
    return -(-(context + most_padding(model, context, READ) + block) // UNIT) * UNIT


class Engine:
    """Continuous batching over `slots` sequences of up to `context` tokens, prompt and answer together."""

    def __init__(self, model: ModelConfig, params: Any, *, slots: int, context: int, queue: int, block: int = BLOCK):
        for name, value in (("slots", slots), ("context", context), ("queue", queue), ("block", block)):
            if value < 1:
                raise ConfigError(f"{name} is {value} but must be at least 1.")
        limit = model.position_limit
        if limit and context > limit:
            raise ConfigError(f"context is {context} but the model knows {limit} positions; lower it.")
        self.context, self.limit = context, queue
        self._model, self._variables, self._block = model, decoding_variables(model, params), block
        self._room = room_of(model, context, block)
        self._owners: list[Ticket | None] = [None] * slots
        self._program = device.program(model, block, self._variables, slots, self._room)
        self._slots: device.Slots | None = None
        self._spare: Any = None  # states of a prompt that has its slot: the next is read in their memory
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
        else:
            self._end()

    def warm_up(self) -> None:
        """Compile and run the programs, so that nobody waits for that later; before `start`."""
        key, cursor = jax.random.key(0), None
        pieces = {self._piece(length): length for length in range(1, self.context + 1)}
        for length in (*pieces.values(), 1):  # the last in memory that was used before
            *_, cursor = self._prompt((0,) * length, key)
            assert cursor is not None
            self._spare = cursor.states
        give_back()  # what compiling needed, before the slots take their memory
        self._slots = device.insert(self._model, self._held(), jnp.int32(0), cursor, arrays(Sampling()))
        *_, self._slots = self._program(self._variables, self._slots, jnp.zeros(len(self._owners), bool))
        jax.block_until_ready(self._slots)

    def submit(
        self, ids: Sequence[int], most: int, how: Sampling, seed: int, stop: Sequence[int], deliver: Deliver
    ) -> Ticket:
        """Queue a prompt of token ids that asks for at most `most` new ones.

        Args:
          seed: 64 bits; from 0 to 2^32 - 1 a request draws what `jaxattn.generate` with `jax.random.key(seed)` does.

        Raises:
          ConfigError: an empty prompt, tokens that the model does not have, or more than the context holds.
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
        for token in ids:
            if not 0 <= token < self._model.vocab_size:
                raise ConfigError(f"token {token} of the prompt is not in 0..{self._model.vocab_size - 1}.")
        ticket = Ticket(tuple(ids), most, arrays(how), key_of(seed), frozenset(stop), deliver)
        with self._changed:
            if self._stop or self.failure:
                raise Stopped(f"the engine has stopped{f' ({self.failure})' if self.failure else ''}.")
            self._forget_cancelled()
            if len(self._waiting) >= self.limit:
                raise QueueFull(f"{self.limit} requests are waiting already; try again later.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    @property
    def running(self) -> bool:
        """Whether it serves; not before `start` and not when it has ended."""
        return self._thread.is_alive() and not self._stop

    def load(self) -> dict[str, int]:
        """How many requests wait, and how many slots are taken."""
        with self._changed:
            busy = sum(owner is not None for owner in self._owners)
            return {
                "waiting": len(self._waiting),
                "busy": busy + (self._reading is not None),
                "slots": len(self._owners),
            }

    # ------------------------------------------------------------------------------------------ the one thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._leave()
                self._read()
                self._decode()
        except Exception as error:  # nothing is left to serve with
            self.failure = sentence(error)
            log.exception("the engine stopped")
        finally:
            self._end()

    def _end(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._stop = True
            left = [owner for owner in (*self._owners, *self._waiting) if owner]
            left += [self._reading[0]] if self._reading else []
            self._waiting.clear()
            self._owners = [None for _ in self._owners]
            self._reading = None
        for ticket in left:
            ticket.fail(f"the engine has stopped ({self.failure or 'shutdown'})")

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        idle = lambda: not (self._waiting or self._reading or any(self._owners))
        with self._changed:
            while idle() and not self._stop:
                self._changed.wait()
            return not self._stop

    def _leave(self) -> None:
        """Free what nobody waits for."""
        self._owners = [None if owner and owner.cancelled else owner for owner in self._owners]
        if self._reading and self._reading[0].cancelled:
            self._reading = None

    def _read(self) -> None:
        """Pieces of the next prompts, as long as there are slots for them."""
        left = TURN
        while left > 0 and self._next_prompt():
            assert self._reading is not None
            ticket, pieces = self._reading
            left -= min(self._piece(len(ticket.ids)), len(ticket.ids))
            try:
                cursor = next(pieces)
            except Exception as error:  # whatever this prompt does to the model
                log.exception("a prompt could not be read")
                self._reading = None
                ticket.fail(f"the prompt could not be read ({sentence(error)})")
                continue
            if cursor is not None:
                self._reading = None
                self._seat(ticket, cursor)

    def _next_prompt(self) -> bool:
        """Whether one is being read, perhaps from now on."""
        if self._reading is None and None in self._owners:
            with self._changed:
                self._forget_cancelled()
                if self._waiting:
                    ticket = self._waiting.popleft()
                    self._reading = (ticket, self._prompt(ticket.ids, ticket.key))
        return self._reading is not None

    def _forget_cancelled(self) -> None:
        self._waiting = collections.deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def _prompt(self, ids: tuple[int, ...], key: Any) -> Iterator[Cursor | None]:
        tokens, length = np.asarray(ids, np.int32)[None], np.array([len(ids)])
        spare, self._spare = self._spare, None
        yield from prefill_chunks(
            self._model, self._variables, tokens, length, self._room, jax.random.split(key, 1), self._piece(len(ids)),
            spare,
        )  # fmt: skip

    def _piece(self, length: int) -> int:
        """Few sizes, since every one is a program; those of `generate` where the answer depends on them."""
        if not any_piece(self._model):
            return piece_for(self._model, length, READ)
        return max(SHORT, piece_for(self._model, length, READ))

    def _seat(self, ticket: Ticket, cursor: Cursor) -> None:
        """Into a free slot."""
        slot = self._owners.index(None)
        self._owners[slot] = ticket
        with self._anew():
            self._slots = device.insert(self._model, self._held(), jnp.int32(slot), cursor, ticket.knobs)
            self._spare = cursor.states

    def _decode(self) -> None:
        """A block of tokens for everybody."""
        if not any(self._owners):
            return
        live = jnp.asarray([owner is not None for owner in self._owners])
        with self._anew():
            tokens, fine, self._slots = self._program(self._variables, self._held(), live)
            for slot, found in enumerate(zip(np.asarray(tokens).tolist(), np.asarray(fine).tolist(), strict=True)):
                owner = self._owners[slot]
                if owner and owner.take(*found):
                    self._owners[slot] = None

    @contextlib.contextmanager
    def _anew(self) -> Iterator[None]:
        """Whatever fails in here may be anybody's fault and leaves the slots unknown: all who are in them end."""
        try:
            yield
        except Exception as error:
            log.exception("the slots are made anew")
            ended = [owner for owner in self._owners if owner]
            self._owners = [None] * len(self._owners)
            self._slots = self._spare = None
            for owner in ended:
                owner.fail(sentence(error))
            self._held()

    def _held(self) -> device.Slots:
        """The slots, made where there are none."""
        if self._slots is None:
            self._slots = device.empty(self._model, len(self._owners), self._room, self._variables)
        return self._slots
