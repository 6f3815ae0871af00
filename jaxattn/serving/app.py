"""The HTTP side: routes and limits. Every answer that is not 200 says in one sentence what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxattn.errors import shown
from jaxattn.serving.asks import parse
from jaxattn.serving.connection import PATIENCE
from jaxattn.serving.engine import Engine
from jaxattn.serving.request_fields import ApiError
from jaxattn.serving.talk import Talk
from jaxattn.serving.ticket import sentence
from jaxattn.text import Loaded

log = logging.getLogger("jaxattn")


def make_app(loaded: Loaded, engine: Engine, name: str, max_body: int, patience: float = PATIENCE) -> Starlette:
    """The application; it starts the engine and stops it when the server ends.

    Args:
      name: the model's in requests.
      max_body: bytes of a request's body.
      patience: seconds in which a body has to arrive.
    """
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "jaxattn"}

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.close)

    async def health(_: Request) -> Response:
        status = 503 if engine.failure else 200
        return JSONResponse({"status": engine.failure or "ok", **engine.load()}, status)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        asked = request.path_params["name"]
        if asked != name:
            raise ApiError(404, f"model {shown(asked)} is not served here; use {name!r}.", "model_not_found", "model")
        return JSONResponse(model)

    async def answer(request: Request, chat: bool) -> Response:
        for query in request.query_params:
            raise ApiError(400, f"the query parameter {shown(query)} is not known; leave it out.", param=query)
        body = await _body(request, max_body, patience)
        ask = await asyncio.to_thread(parse, body, loaded, name, engine.context, chat=chat)
        talk = Talk(loaded, engine, ask, name, chat)
        talk.submit()
        if ask.stream:
            return StreamingResponse(
                talk.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await talk.in_one_answer(request)

    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _http, Exception: _failed},
        lifespan=lifespan,
    )


async def _body(request: Request, most: int, patience: float) -> bytes:
    """The body, read no further than `most` bytes and no longer than `patience` seconds."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(patience):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, f"the body has more than {most} bytes; send less.", "request_too_large")
                parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(499, "the client has gone.") from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive in {patience:g} seconds; send it faster.", "timeout") from error
    return b"".join(parts)


def _answer(error: ApiError) -> Response:
    # Whoever sends too much or too slowly is not listened to until the end.
    headers = {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body(), error.status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "invalid_request_error"
    return _answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.", code))


async def _failed(_: Request, error: Exception) -> Response:
    """A fault of ours; the server's log has the rest."""
    return _answer(ApiError(500, f"the server failed ({sentence(error)}); report this.", "server_error"))
