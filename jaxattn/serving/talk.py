"""One request while it is answered: from its tickets at the engine to the client, as a stream or in one piece."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxattn.errors import UserError
from jaxattn.serving.asks import Ask
from jaxattn.serving.engine import Engine
from jaxattn.serving.request_fields import ApiError
from jaxattn.serving.ticket import QueueFull, Stopped, Ticket
from jaxattn.text import Loaded
from jaxattn.text_stream import TextStream

Event = tuple[list[int], str | None]


class Talk:
    """One request while it is answered: its tickets at the engine, and their tokens on the way to the client."""

    def __init__(self, loaded: Loaded, engine: Engine, ask: Ask, name: str, chat: bool) -> None:
        self._loaded, self._engine, self._ask, self._chat = loaded, engine, ask, chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": self._id, "created": int(time.time()), "model": name}
        self._inbox: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
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
            seed = (ask.seed + index + (1 << 63)) % (1 << 64) - (1 << 63)
            try:
                ticket = self._engine.submit(prompt, ask.most, ask.how, seed, stop, deliver)
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
                raise self._failed(self._tickets[index])
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

    def _failed(self, ticket: Ticket) -> ApiError:
        if self._engine.running:
            return ApiError(500, f"the answer could not be computed: {ticket.failure}.", "engine_error")
        return ApiError(503, f"{ticket.failure}; try again later.", "unavailable")

    def _usage(self) -> dict[str, int]:
        read, made = sum(map(len, self._ask.prompts)), sum(self._made)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; a client that goes away cancels what is left."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        send = lambda **fields: f"data: {json.dumps({**self._head, 'object': kind, **fields}, ensure_ascii=False)}\n\n"
        rest: dict[str, Any] = {"usage": None} if self._ask.usage else {}
        begun: set[int] = set()
        try:
            async for index, piece, reason in self._pieces():
                if self._chat:
                    delta = {"content": piece} if index in begun else {"role": "assistant", "content": piece}
                    body: dict[str, Any] = {"delta": delta}
                else:
                    body = {"text": piece}
                begun.add(index)
                yield send(choices=[{"index": index, **body, "finish_reason": reason, "logprobs": None}], **rest)
            if self._ask.usage:
                yield send(choices=[], usage=self._usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status line has gone out already
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self._cancel()

    async def in_one_answer(self, request: Request) -> Response:
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
