"""The HTTP side: bodies in, answers out, and faults in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from train.model.export.processing import HearkenProcessor, Row
from train.serving import protocol
from train.serving.batcher import Batcher, Job
from train.serving.faults import Fault
from train.serving.limits import Limits
from train.serving.wording import Wording

log = logging.getLogger(__name__)

# A body that is too large is read on and dropped, up to so many times the limit: most clients look
# for the reason only when they have sent all of it.
_READ_ON = 8


@dataclass
class Served:
    """What a server offers: a model under a name, behind its queue."""

    name: str
    processor: HearkenProcessor
    batcher: Batcher
    limits: Limits
    created: int
    in_hand: int = 0

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "hearken"}


def make_app(served: Served) -> FastAPI:
    """The routes."""
    app = FastAPI(title="Hearken", docs_url=None, redoc_url=None, openapi_url=None)
    # Recordings are decoded beside the model, but not more of them at once than there are cores.
    decoders = asyncio.Semaphore(os.cpu_count() or 1)

    @app.exception_handler(Fault)
    async def say(_: Request, fault: Fault) -> JSONResponse:
        return JSONResponse(fault.body(), fault.status, fault.headers)

    @app.exception_handler(HTTPException)
    async def say_route(request: Request, e: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {e.detail}"
        return JSONResponse(Fault(e.status_code, said).body(), e.status_code, e.headers)

    @app.exception_handler(Exception)
    async def say_ours(_: Request, e: Exception) -> JSONResponse:
        log.exception("a request failed", exc_info=e)
        return JSONResponse(Fault(500, "a fault of the server; see its log").body(), 500)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        largest = max(served.batcher.batches, default=0)
        return {"status": "ok", "in_hand": served.in_hand, "largest_batch": largest}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        known(served, name)
        return served.card()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        deadline = time.monotonic() + served.limits.seconds
        if served.in_hand >= served.limits.queue:
            raise Fault(
                429,
                f"{served.in_hand} requests are in hand already; try again later",
                code="queue_full",
                retry_after=1,
            )
        served.in_hand += 1
        job = None
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + left(deadline)):
                asked = protocol.parse(await body_of(request, served.limits), served.limits)
                known(served, asked.model)
                async with decoders:
                    row = await asyncio.to_thread(prepare, served, asked)
            job = Job(
                row,
                asked.answer_tokens,
                asked.temperature,
                secrets.randbits(63) if asked.seed is None else asked.seed,
                deadline,
                asyncio.get_running_loop(),
            )
            served.batcher.submit(job)
            answer = _Answer(served, asked, job)
            if not asked.stream:
                return JSONResponse(await unless_gone(request, answer.whole()))
            pieces = answer.pieces()
            # A fault before the first piece is a status, not a line in a stream.
            first = await unless_gone(request, anext(pieces))
            streamed = _Stream(first, pieces, served, job)
            job = None
            return streamed
        except TimeoutError:
            raise too_late(served) from None
        finally:
            served.in_hand -= 1
            if job is not None:
                job.cancelled = True

    return app


def known(served: Served, name: str) -> None:
    """Raise a `Fault` on another model's name."""
    if name != served.name:
        raise Fault(
            404,
            f"no model {name!r}; this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


async def body_of(request: Request, limits: Limits) -> bytes:
    """A request's body.

    Raises:
        Fault: 413 on more bytes than are allowed; 415 on another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Fault(415, f"Content-Type must be application/json, found {kind or 'none'}")
    body, size = bytearray(), 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > _READ_ON * limits.body_bytes:
                break
            if size <= limits.body_bytes:
                body += piece
    except ClientDisconnect:
        raise Fault(499, "the client hung up") from None
    if size > limits.body_bytes:
        raise Fault(413, f"the body must be at most {limits.body_bytes} bytes")
    return bytes(body)


def prepare(served: Served, asked: protocol.Request) -> Row:
    """Recordings decoded, text tokenised; raises a `Fault`, 400, on what cannot be."""
    processor, limits = served.processor, served.limits
    talk, languages = protocol.conversation(asked, limits, processor.max_seconds)
    try:
        row = processor.read(talk, languages=languages if processor.languages else ())
    except (ValueError, TemplateError) as e:
        raise Fault(400, str(e), param="messages") from None
    if len(row.ids) > limits.positions:
        raise Fault(
            400,
            f"the prompt takes {len(row.ids)} positions, at most {limits.positions} are allowed",
            param="messages",
            code="context_length_exceeded",
        )
    return row


def left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def too_late(served: Served) -> Fault:
    return Fault(504, f"not done within {served.limits.seconds:g} s", code="timeout")


class _Answer:
    """A job's events as OpenAI's objects."""

    def __init__(self, served: Served, asked: protocol.Request, job: Job):
        self._served, self._asked, self._job = served, asked, job
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._words = Wording(served.processor.tokenizer)

    async def whole(self) -> dict[str, Any]:
        text = ""
        async for piece, reason in self._said():
            text += piece
            if reason:
                return protocol.completion(
                    self._served.name, self._id, text, reason, *self._counts()
                )
        raise AssertionError("an answer ends with a reason")

    async def pieces(self) -> AsyncIterator[str]:
        """Lines of server-sent events."""
        begun = False
        async for piece, reason in self._said():
            if not begun:
                yield self._line({"role": "assistant", "content": ""})
                begun = True
            if piece:
                yield self._line({"content": piece})
            if reason:
                yield self._line({}, reason)
        if self._asked.stream_options.include_usage:
            last = protocol.chunk(self._served.name, self._id, self._created, {})
            yield event(last | {"choices": [], "usage": protocol.usage(*self._counts())})
        yield "data: [DONE]\n\n"

    async def _said(self) -> AsyncIterator[tuple[str, str | None]]:
        """Pieces of text, the last with the reason why it ended; raises a `Fault`."""
        while True:
            try:
                found = await asyncio.wait_for(self._job.events.get(), left(self._job.deadline))
            except TimeoutError:
                raise too_late(self._served) from None
            if isinstance(found, Fault):
                raise found
            if isinstance(found, str):
                yield self._words.rest(), found
                return
            yield self._words.add(found), None

    def _line(self, delta: dict[str, str], reason: str | None = None) -> str:
        return event(protocol.chunk(self._served.name, self._id, self._created, delta, reason))

    def _counts(self) -> tuple[int, int, int]:
        ids = self._job.row.ids
        return len(ids), sum(i < 0 for i in ids), len(self._words.ids)


def event(tree: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(tree, ensure_ascii=False)}\n\n"


class _Stream(StreamingResponse):
    """An answer in pieces, of which the first is there; in hand until it has ended."""

    def __init__(self, first: str, pieces: AsyncIterator[str], served: Served, job: Job):
        super().__init__(_from(first, pieces), media_type="text/event-stream")
        self._served, self._job = served, job
        served.in_hand += 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._served.in_hand -= 1
            self._job.cancelled = True


async def _from(first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """All pieces; a fault becomes the last, since the status is sent."""
    yield first
    try:
        async for piece in pieces:
            yield piece
    except Fault as fault:
        yield event(fault.body())


async def unless_gone(request: Request, answer: Any) -> Any:
    """The answer, unless the client hangs up before it is there."""
    asked = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Fault(499, "the client hung up")
        return asked.result()
    finally:
        asked.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
