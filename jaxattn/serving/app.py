"""The HTTP side: routes, streams, limits. Every answer that is not 200 says in one sentence what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxattn.errors import UserError
from jaxattn.serving.asks import ApiError, Ask, parse
from jaxattn.serving.engine import Engine
from jaxattn.serving.ticket import QueueFull, Stopped
from jaxattn.text import Loaded
from jaxattn.text_stream import TextStream

Event = tuple[list[int], str | None]


def make_app(loaded: Loaded, engine: Engine, name: str, max_body: int) -> Starlette:
    """The application; it starts the engine and stops it when the server ends."""

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
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "jaxattn"}]})

    async def answer(request: Request, chat: bool) -> Response:
        body = await _body(request, max_body)
        ask = await asyncio.to_thread(parse, body, loaded, name, engine.context, chat=chat)
        talk = Talk(loaded, engine, ask, name, chat)
        talk.submit()
        if ask.stream:
            return StreamingResponse(
                talk.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        return await talk.whole(request)

    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ],
        exception_handlers={ApiError: _refused, HTTPException: _http},
        lifespan=lifespan,
    )


async def _body(request: Request, most: int) -> bytes:
    """The body, read no further than `most` bytes."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise ApiError(413, f"the body has more than {most} bytes; send less.", "request_too_large")
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(499, "the client has gone.") from error
    return b"".join(parts)


def _error(status: int, message: str, code: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    # Whoever sends too much is not listened to until the end.
    headers = {"Connection": "close"} if status == 413 else {}
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error.status, error.message, error.code)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}.", "not_found")


class Talk:
    """One request while it is answered: its tickets at the engine, and their tokens on the way to the client."""

    def __init__(self, loaded: Loaded, engine: Engine, ask: Ask, name: str, chat: bool) -> None:
        self._loaded, self._engine, self._ask, self._chat = loaded, engine, ask, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": self._id, "created": int(time.time()), "model": name}
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Any] = []
        self._texts = [TextStream(loaded.tokenizer, ask.stop, prompt_ids=prompt) for prompt in ask.prompts]
        self._made = [0] * len(ask.prompts)

    def submit(self) -> None:
        """Queue every prompt, or none.

        Raises:
          ApiError: 429 if the queue is full, 503 if the engine does not run.
        """
        loop = asyncio.get_running_loop()
        for index, prompt in enumerate(self._ask.prompts):

            def deliver(tokens: list[int], reason: str | None, index: int = index) -> None:
                loop.call_soon_threadsafe(self._inbox.put_nowait, (index, (tokens, reason)))

            ask, stop = self._ask, self._loaded.stop_tokens
            try:
                ticket = self._engine.submit(prompt, ask.most, ask.how, ask.seed + index, stop, deliver)
            except UserError as error:
                self._cancel()
                status, code = 400, "invalid_request_error"
                if isinstance(error, QueueFull):
                    status, code = 429, "overloaded"
                elif isinstance(error, Stopped):
                    status, code = 503, "unavailable"
                raise ApiError(status, str(error), code) from error
            self._tickets.append(ticket)

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def _pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """Text of a choice as it becomes certain; with the reason when the choice ends."""
        left = set(range(len(self._ask.prompts)))
        while left:
            index, (tokens, reason) = await self._inbox.get()
            if index not in left:  # a stop string ended it already
                continue
            if reason == "error":
                raise ApiError(500, f"the engine has stopped ({self._engine.failure or 'shutdown'}).", "engine_error")
            self._made[index] += len(tokens)
            text = self._texts[index]
            own = [t for t in tokens if t not in self._loaded.stop_tokens]
            piece = text.add(own, last=reason is not None)
            if text.stopped:  # what the device made beyond it is not counted
                self._tickets[index].cancel()
                self._made[index], reason = text.used, text.reason
            if reason:
                left.discard(index)
            if piece or reason:
                yield index, piece, reason

    def _usage(self) -> dict[str, int]:
        read, made = sum(map(len, self._ask.prompts)), sum(self._made)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; a client that goes away cancels what is left."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        send = lambda **fields: f"data: {json.dumps({**self._head, 'object': kind, **fields}, ensure_ascii=False)}\n\n"
        begun: set[int] = set()
        try:
            async for index, piece, reason in self._pieces():
                if self._chat:
                    delta = {"content": piece} if index in begun else {"role": "assistant", "content": piece}
                    body: dict[str, Any] = {"delta": delta}
                else:
                    body = {"text": piece}
                begun.add(index)
                yield send(choices=[{"index": index, **body, "finish_reason": reason, "logprobs": None}])
            if self._ask.usage:
                yield send(choices=[], usage=self._usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status line has gone out already
            yield f"data: {json.dumps({'error': {'message': error.message, 'code': error.code}})}\n\n"
        finally:
            self._cancel()

    async def whole(self, request: Request) -> Response:
        """The finished answer in one piece, unless the client goes away first."""
        collect = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({collect, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collect.done():
                return Response(status_code=499)
            return JSONResponse(collect.result())
        finally:
            self._cancel()
            for task in (collect, gone):
                task.cancel()

    async def _collect(self) -> dict[str, Any]:
        texts, reasons = [""] * len(self._ask.prompts), [""] * len(self._ask.prompts)
        async for index, piece, reason in self._pieces():
            texts[index] += piece
            reasons[index] = reason or reasons[index]
        choices: list[dict[str, Any]] = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **body, "finish_reason": reason, "logprobs": None})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
