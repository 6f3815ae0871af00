"""HTTP connections that nobody can hold for nothing: deadlines for sending a request and for taking its answer."""

from __future__ import annotations

import functools
import json
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxattn.serving.request_fields import ApiError

PATIENCE = 30.0  # seconds
CONNECTIONS, SPARE = 1024, 64  # at most, and files that are kept for all else


class Connection(H11Protocol):
    """A connection that is dropped where for `patience` seconds it has no request, or does not take its answer.

    Beyond `most` connections the one that has been without a request for longest gives way; if all have one, the new
    connection is refused.
    """

    def __init__(self, *args: Any, patience: float, most: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._patience, self._most = patience, most
        self._idle: Any = None  # timers, of whichever loop runs
        self._stuck: Any = None

    @property
    def idle_until(self) -> float | None:
        """When it is dropped, by the loop's clock, unless a request comes; None while one is answered."""
        return self._idle.when() if self._idle else None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            others = [c for c in self.connections if isinstance(c, Connection) and c.idle_until is not None]
            if not others:
                self._refuse()
                return
            min(others, key=lambda c: c.idle_until or 0.0).drop()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle, self._stuck = _cancelled(self._idle), _cancelled(self._stuck)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle = _cancelled(self._idle)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next request was there already
            self._idle = _cancelled(self._idle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self._stuck or self.loop.call_later(self._patience, self.drop)

    def resume_writing(self) -> None:
        self._stuck = _cancelled(self._stuck)
        super().resume_writing()

    def drop(self) -> None:
        """End it at once, whatever is still to be sent."""
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self) -> None:
        self._idle = self._idle or self.loop.call_later(self._patience, self.drop)

    def _refuse(self) -> None:
        error = ApiError(503, f"{self._most} connections are open, which are the most; try again later.", "overloaded")
        body = json.dumps(error.body()).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self.transport.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        self.connections.discard(self)
        self.transport.close()


def _cancelled(timer: Any) -> None:
    if timer is not None:
        timer.cancel()


def protocol(patience: float = PATIENCE, most: int | None = None) -> Any:
    """What `uvicorn.Config` takes as `http`; as many connections as the process may have files, at most `most`."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = CONNECTIONS if files == resource.RLIM_INFINITY else max(8, files - SPARE)
    return functools.partial(Connection, patience=patience, most=min(most or CONNECTIONS, files))
