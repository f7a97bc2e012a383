"""A model behind a server of OpenAI's protocol, with what the demo needs of an `Assistant`."""

import base64
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx

from mm_gpt.document import Image, Message
from mm_gpt.errors import ContextOverflowError, MMGPTError
from mm_gpt.images import image_bytes, image_format, to_file
from mm_gpt.network.client import BUSY_STATUSES
from mm_gpt.network.urls import one_line, short_name
from mm_gpt.templates.prompts import CAPTION_PROMPT

CONNECT_S, SILENCE_S = 10.0, 600.0
"""For a connection, and between two pieces of an answer."""
CAPTION_TOKENS = 40


class ServerError(MMGPTError):
    """A server refuses, breaks down or is silent; `status` is what it answers, None where it does not."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may succeed."""
        return self.status is None or self.status in BUSY_STATUSES


class RemoteAssistant:
    """Answers come from a server; every call is a request of its own."""

    def __init__(self, url: str, *, api_key: str = "", model: str | None = None, silence_s: float = SILENCE_S):
        """`url` with or without `/v1`; `model` None: the first that the server has.

        Raises MMGPTError when there is no such server."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise MMGPTError(f"{short_name(url)}: a server's address begins with http:// or https://")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1/"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(silence_s, connect=min(CONNECT_S, silence_s))
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        with self._errors():
            models = self._checked(self._client.get("models")).json().get("data") or [{}]
        self.model = model or models[0].get("id", "")

    def chat(self, messages: Sequence[Message], *, stream: bool = True, **options: Any) -> "RemoteStream":
        """The assistant's next turn, piece by piece. Options as those of `Assistant.chat`."""
        return RemoteStream(self._pieces(self._body(messages, options)))

    def caption(self, images: Sequence[Image], **options: Any) -> list[Any]:
        """One sentence about each image; greedy, for servers know no beams."""
        settings = {"temperature": 0.0, **options, "max_new_tokens": CAPTION_TOKENS}
        answers = []
        for image in images:
            content = [image, {"type": "text", "text": CAPTION_PROMPT}]
            stream = self.chat([{"role": "user", "content": content}], **settings)
            for _ in stream:
                pass
            answers.append(stream.answer)
        return answers

    def whole(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        """The assistant's next turn in one piece: the first choice as the server writes it. Raises ServerError."""
        body = self._body(messages, options) | {"stream": False}
        with self._errors():
            answer = self._checked(self._client.post("chat/completions", json=body)).json()
            choice = answer["choices"][0] if isinstance(answer, dict) and answer.get("choices") else None
            if not isinstance(choice, dict):
                raise ValueError("no choice in it")
            return choice

    def _body(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        names = {"max_new_tokens": "max_completion_tokens"}
        off = {"top_k": 0, "top_p": 1}  # not every server has them
        given = {names.get(name, name): value for name, value in options.items() if off.get(name) != value}
        written = [{"role": m["role"], "content": _content(m["content"])} for m in messages]
        return {"model": self.model, "messages": written, "stream": True, **given}

    def _pieces(self, body: dict[str, Any]) -> Generator[str, None, None]:
        with self._errors(), self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
            self._checked(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise MMGPTError(f"the server: {one_line(chunk['error'].get('message', ''))}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""

    def _checked(self, response: httpx.Response) -> httpx.Response:
        """Raises MMGPTError with what the server says."""
        if response.status_code == 200:
            return response
        try:
            error = response.json()["error"]
            message, code = one_line(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            message, code = one_line(response.text)[:300], None
        if code == "context_length_exceeded":
            raise ContextOverflowError(message)
        raise ServerError(f"the server answers {response.status_code}: {message}", response.status_code)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, ValueError, KeyError) as error:
            if isinstance(error, MMGPTError):
                raise
            reason = one_line(error) or type(error).__name__
            raise ServerError(f"{short_name(self.url)}: no answer from the server ({reason})") from error


class RemoteStream(Iterator[str]):
    """Pieces of text; `answer.text` is complete when they are used up."""

    def __init__(self, pieces: Generator[str, None, None]):
        self._pieces, self._text = pieces, ""

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text += piece
        return piece

    def close(self) -> None:
        """The server is told to stop."""
        self._pieces.close()

    @property
    def answer(self) -> Any:
        return SimpleNamespace(text=self._text.strip())


def _content(content: str | Sequence[Any]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, Image):
        return dict(part)
    is_file = isinstance(part.source, str | bytes | os.PathLike)
    data = image_bytes(part.source) if is_file else to_file(part.load())  # type: ignore[arg-type]
    suffix = image_format(data)
    kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}
