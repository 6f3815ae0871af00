"""Clients that are slow, silent or many: deadlines end what they hold, and the others are answered meanwhile."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from jaxattn.text import load
from tests.generate.helpers import byte_run
from tests.serve.over_http import alone, idle, post, server

OK = {"prompt": "a", "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(byte_run(tmp_path_factory.mktemp("connections")))


@contextlib.contextmanager
def sockets(url, count, *, small=False):
    """Raw connections to the server."""
    place = urlsplit(url)
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            if small:  # hardly anything fits between the two ends
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(30)
            one.connect((place.hostname, place.port))
            found.append(one)
        yield found


def gone(one):
    """Whether the server has hung up."""
    if not select.select([one], [], [], 0)[0]:
        return False
    try:
        return one.recv(1, socket.MSG_PEEK) == b""
    except ConnectionResetError:
        return True


def answered(one):
    """A whole answer of JSON on a connection that stays."""
    found = b""
    while not found.endswith(b"}}"):
        part = one.recv(1 << 16)
        assert part, found
        found += part
    return found


def rest(one):
    """All that the server sends until it hangs up."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def request(body, length=None):
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(raw)}\r\n\r\n"
    return head.encode() + raw


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HT", request(OK)])
def test_a_connection_without_a_whole_request_is_dropped(loaded, sent):
    """A silent one, one with half a head, and one that was answered and then sends half a head."""
    with server(loaded, patience=1.0) as (url, _), sockets(url, 3) as held:
        for one in held:
            one.sendall(sent)
        assert post(url, OK).status_code == 200
        for one in held if sent.startswith(request(OK)) else ():
            assert one.recv(8, socket.MSG_PEEK) == b"HTTP/1.1"
            one.sendall(b"POST /v1")
        answers = [rest(one) for one in held]
        assert all(answer.startswith(b"HTTP/1.1 200") == sent.startswith(request(OK)) for answer in answers)


def test_a_body_that_does_not_come_is_408(loaded):
    with server(loaded, patience=1.0) as (url, _), sockets(url, 3) as held:
        for one in held:
            one.sendall(request(OK, length=1000))
        assert post(url, OK).status_code == 200
        for one in held:
            head, body = rest(one).split(b"\r\n\r\n", 1)
            assert head.startswith(b"HTTP/1.1 408")
            assert json.loads(body)["error"]["message"] == "the body did not arrive in 1 seconds; send it faster."


def test_a_request_that_is_answered_for_longer_than_the_patience_is_not_dropped(loaded):
    with server(loaded, patience=0.3, context=4000) as (url, _):
        body = {"prompt": "a", "max_tokens": 3000, "temperature": 0}
        start = time.monotonic()
        while time.monotonic() - start < 0.5:
            assert post(url, body).status_code == 200


def test_beyond_the_limit_the_silent_give_way_and_the_busy_do_not(loaded):
    with server(loaded, connections=4, context=4000) as (url, engine):
        with contextlib.ExitStack() as stack:
            held = []
            for _ in range(9):  # one after another, as the server knows once it has answered: connecting does not tell
                (one,) = stack.enter_context(sockets(url, 1))
                one.sendall(request(OK))
                assert answered(one).startswith(b"HTTP/1.1 200")
                held.append(one)
            assert post(url, OK).status_code == 200
            assert [gone(one) for one in held] == [True] * 6 + [False] * 3
        body = {"prompt": "a", "max_tokens": 3900, "temperature": 0, "stream": True}
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60))
            with sockets(url, 1) as (one,):
                answer = rest(one)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"4 connections are open" in answer
        idle(engine)
        assert post(url, OK).status_code == 200


def test_a_reader_that_does_not_read_holds_up_nobody_and_is_dropped(loaded):
    """Its stream is far larger than what lies between the two ends."""
    with (
        server(loaded, patience=1.0, buffer=4096, context=4000, slots=2) as (url, engine),
        sockets(url, 1, small=True) as (one,),
    ):
        one.sendall(request({"prompt": "a", "max_tokens": 3900, "temperature": 0, "stream": True}))
        deadline = time.monotonic() + 60
        text = alone(loaded, loaded.encode("a"), 2)
        asked = 0
        while engine.load()["busy"] or not asked:
            assert time.monotonic() < deadline
            assert post(url, OK).json()["choices"][0]["text"] == text
            asked += 1
        time.sleep(1.5)
        assert not rest(one).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
