"""One HTTP exchange: a body within limits, an answer as JSON or as events, and whether the client is still there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from mm_gpt.serving.server.errors import ClientGoneError, RequestError
from mm_gpt.serving.server.responses import to_json
from mm_gpt.serving.server.service import Admission


async def read_body(scope: Scope, receive: Receive, admission: Admission) -> bytes:
    """All of a body, counted while it comes. Raises RequestError (408, 413, 415), and ClientDisconnect."""
    request = Request(scope, receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page may send to another site without asking first
        raise RequestError(
            f"The body must come as Content-Type: application/json, not {kind or 'without a type'}.",
            status=415,
            code="unsupported_media_type",
        )
    limit = admission.service.config.max_body_bytes
    too_large = RequestError(f"The body is larger than {limit:,} bytes.", status=413, code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(admission.service.config.body_s):
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    raise too_large
                admission.hold(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise RequestError("The body did not come in time.", status=408, code="timeout") from None
    return b"".join(pieces)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client leaves: then raises ClientGoneError.

    The body must have been read: what is received after it is the end of the connection.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def send_json(send: Send, value: Any, *, status: int = 200) -> None:
    body = to_json(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_events(send: Send, events: AsyncGenerator[bytes, None]) -> None:
    """Server-sent events, one after the other."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # proxies pass each event on as it comes
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async with aclosing(events) as stream:
        async for event in stream:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
