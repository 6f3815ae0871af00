"""A server of this process on a real socket, requests to it, and the answer that a request gets alone."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx
import numpy as np
import uvicorn

import jaxattn
from jaxattn.serving.app import make_app
from jaxattn.serving.connection import PATIENCE, protocol
from jaxattn.serving.engine import Engine
from jaxattn.text import TextStream

CLIENT = httpx.Client(timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@contextlib.contextmanager
def server(loaded, patience=PATIENCE, connections=None, buffer=None, **more):
    engine = Engine(loaded.model, loaded.params, **({"slots": 6, "context": 128, "queue": 80, "block": 4} | more))
    app = make_app(loaded, engine, "tiny", max_body=2000, patience=patience)
    listener = socket.socket()
    if buffer:  # bytes of an answer that the system holds for a client who does not read
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    listener.bind(("127.0.0.1", 0))
    running = uvicorn.Server(
        uvicorn.Config(app, http=protocol(patience, connections), ws="none", log_level="critical", lifespan="on")
    )
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        listener.close()


def post(url, body, path="/v1/completions", **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return CLIENT.post(url + path, content=content, **more)


def alone(loaded, ids, most):
    """The text of a single greedy request."""
    found = jaxattn.generate(
        loaded.model, loaded.params, np.asarray([ids]), max_new_tokens=most, stop_tokens=loaded.stop_tokens
    )
    own = [int(t) for t in found.tokens[0][: int(found.lengths[0])] if int(t) not in loaded.stop_tokens]
    return TextStream(loaded.tokenizer).add(own, last=True)


def chunks(lines):
    """The JSON of a stream's events; it has to end in order."""
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]", events[-1]
    return [json.loads(event) for event in events[:-1]]


def idle(engine):
    deadline = time.monotonic() + 30
    while (load := engine.load())["busy"] or load["waiting"]:
        assert time.monotonic() < deadline, load
        time.sleep(0.02)
