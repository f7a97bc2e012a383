"""`/v1/chat/completions` and `/v1/completions`: from a request's first byte to its answer's last."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from mm_gpt.document import Document
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.batcher import Ticket
from mm_gpt.processor import Example
from mm_gpt.serving.server import responses
from mm_gpt.serving.server.connection import read_body, send_events, send_json, while_connected
from mm_gpt.serving.server.errors import ClientGoneError, RequestError, from_model, internal_error
from mm_gpt.serving.server.jobs import Job, too_late
from mm_gpt.serving.server.messages import ImagePart
from mm_gpt.serving.server.requests import (
    ChatRequest,
    CompletionRequest,
    Request,
    read_chat,
    read_completion,
    read_json,
)
from mm_gpt.serving.server.responses import Choice, Completion, Writer
from mm_gpt.serving.server.service import Admission, Service, Waiting
from mm_gpt.serving.server.writers import ChatWriter, TextWriter

logger = logging.getLogger(__name__)
GONE = 499
"""What web servers write into their logs when a client left."""


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts are ready to be submitted."""

    request: Request
    job: Job
    waiting: Waiting
    writer: Writer


class Endpoint(ABC):
    """An ASGI application that answers one kind of request."""

    name = ""

    def __init__(self, service: Callable[[], Service]):
        """`service` raises RequestError while the model is loading."""
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service()
        status = 500
        try:
            with service.admitted() as admission:
                body = await read_body(scope, receive, admission)
                admission.received()
                await while_connected(receive, self._answer(admission, body, send))
            status = 200
        except RequestError as error:
            status = error.status
            raise
        except (ClientGoneError, ClientDisconnect):
            status = GONE
            service.metrics.abort()
        finally:
            service.metrics.request(self.name, status)

    @abstractmethod
    async def _prepare(self, admission: Admission, body: bytes, stack: AsyncExitStack) -> Prepared:
        """All that comes before the model. `stack` holds what is given back at the end. Raises RequestError."""

    async def _answer(self, admission: Admission, body: bytes, send: Send) -> None:
        """Raises RequestError as long as nothing was sent."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(admission.remaining_s):
                    prepared = await self._prepare(admission, body, stack)
            except TimeoutError:
                raise too_late(admission.service.config.timeout_s) from None
            await self._send(admission, prepared, send)

    async def _send(self, admission: Admission, prepared: Prepared, send: Send) -> None:
        """Run a job and send what comes of it."""
        request, job, waiting = prepared.request, prepared.job, prepared.waiting
        completion = Completion(prepared.writer, admission.service.served)
        try:
            await admission.start_job(job, waiting)
            if request.stream:
                await send_events(send, _events(admission, job, waiting, request, completion))
                return
            choices: dict[int, Choice] = {}
            async with aclosing(admission.pieces(job, waiting)) as pieces:
                async for found in pieces:
                    if found is not None:
                        choices.setdefault(found[0], Choice()).add(found[1])
            answers = [choices[index] for index in sorted(choices)]
            await send_json(
                send, completion.whole(answers, responses.usage(job.tickets, answers=request.wants_answers))
            )
        finally:
            job.cancel()


async def _events(
    admission: Admission, job: Job, waiting: Waiting, request: Request, completion: Completion
) -> AsyncGenerator[bytes, None]:
    """The stream of one response, up to its end; an error on the way is the last event."""
    nothing: dict[str, Any] = {"usage": None} if request.include_usage else {}
    try:
        for choice in completion.writer.opening():
            yield completion.chunk([choice], **nothing)
        async with aclosing(admission.pieces(job, waiting)) as pieces:
            async for found in pieces:
                if found is None:
                    yield responses.PING
                    continue
                for choice in completion.writer.deltas(*found):
                    yield completion.chunk([choice], **nothing)
        if request.include_usage:
            yield completion.chunk([], usage=responses.usage(job.tickets, answers=request.wants_answers))
        yield responses.DONE
    except RequestError as error:
        yield responses.event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield responses.event(internal_error().body())


class Chat(Endpoint):
    name = "chat.completions"

    async def _prepare(self, admission: Admission, body: bytes, stack: AsyncExitStack) -> Prepared:
        service = admission.service
        request = await service.prepare(lambda: read_chat(read_json(body), service.served, service.config))
        num_images = sum(isinstance(part, ImagePart) for message in request.messages for part in message.parts)
        run = service.prepare
        if num_images:
            await stack.enter_async_context(service.image_slots(num_images))
            run = service.fetch
        document = await run(partial(service.prompts.chat, request.messages, admission.hold))
        job = Job(service.batcher, request.generation, param="messages")
        waiting: Waiting = deque([partial(_submit_chat, service, job, document, request)])
        return Prepared(request, job, waiting, ChatWriter(request, service.served.end_ids))


def _submit_chat(service: Service, job: Job, document: Document, request: ChatRequest) -> Ticket:
    with _refusals(request, "messages"):
        return service.prompts.decoding(document, request.messages, lambda: job.submit(document))


class Completions(Endpoint):
    name = "completions"

    async def _prepare(self, admission: Admission, body: bytes, stack: AsyncExitStack) -> Prepared:
        service = admission.service
        request = await service.prepare(lambda: read_completion(read_json(body), service.served, service.config))
        named = request.echo and request.logprobs is not None
        read = partial(service.prompts.completion, named=named)
        prompts = await service.prepare(lambda: list(map(read, request.prompts)))
        job = Job(service.batcher, request.generation, param="prompt")
        waiting: Waiting = deque(partial(_submit_text, job, prompt.example, request) for prompt in prompts)
        return Prepared(request, job, waiting, TextWriter(request, prompts, job))


def _submit_text(job: Job, example: Example, request: CompletionRequest) -> Ticket:
    with _refusals(request, "prompt"):
        return job.submit(example)


@contextmanager
def _refusals(request: Request, param: str) -> Iterator[None]:
    """What the model refuses before anything runs, as the client's mistake."""
    try:
        yield
    except ConfigError as error:  # the other settings were checked: a schema that cannot be enforced
        raise from_model(error, request.constraint_field or param) from error
    except MMGPTError as error:
        raise from_model(error, param) from error
