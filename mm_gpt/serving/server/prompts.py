"""Checked requests into Documents: images fetched, their headers read. For worker threads: it waits and computes."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image as PILImage

from mm_gpt.document import Document, Image, Message, Text
from mm_gpt.errors import ImageError, MMGPTError
from mm_gpt.images import BYTES_PER_PIXEL, DEFAULT_LIMITS, ByteBudget, ImageLimits, image_bytes, image_size, load_image
from mm_gpt.inference.detokenizer import TokenBytes
from mm_gpt.processor import Example, Processor
from mm_gpt.serving.server.config import ServerConfig
from mm_gpt.serving.server.errors import RequestError, busy, from_model, invalid
from mm_gpt.serving.server.messages import ChatMessage, ImagePart

T = TypeVar("T")
LOW_DETAIL = 512
"""`detail: low`: the model sees the image as far as it fits into so many pixels square."""
DECODE_BYTES = 1 << 30
"""Memory of all decoders that run at once."""


class Held:
    """Bytes of bodies and images that all requests hold together. Whoever needs more than is left has to come back."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> None:
        """Raises RequestError (429) when there is not so much left."""
        with self._lock:
            if self.bytes + num_bytes > self.max_bytes:
                raise busy("The server holds as many images as it can; try again later.")
            self.bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes -= num_bytes


@dataclass(frozen=True)
class TextPrompt:
    text: str
    example: Example
    tokens: list[tuple[str, bytes]]
    """Its tokens' names and what each adds to the text; empty where nobody wants to know."""


class Prompts:
    """Makes Documents for one model."""

    def __init__(self, processor: Processor, config: ServerConfig):
        self.processor, self.config = processor, config
        self._decoding = ByteBudget(DECODE_BYTES)
        self._tokens = TokenBytes(processor.tokenizer)
        self._longest_token = max(map(len, processor.tokenizer.backend.get_vocab()))

    def chat(self, messages: Sequence[ChatMessage], hold: Callable[[int], None]) -> Document:
        """Fetch the images of a chat and render it. `hold(bytes)` is told what they take. Raises RequestError."""
        left, deadline = self.config.max_body_bytes, time.monotonic() + self.config.fetch_s
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        self._check_length(sum(map(len, texts)), "messages")
        rendered: list[Message] = []
        for message in messages:
            parts: list[Text | Image] = []
            for part in message.parts:
                if isinstance(part, str):
                    parts.append(Text(part, is_target=False))
                    continue
                data = self._image(part, left, deadline - time.monotonic())
                if part.url[:5].lower() != "data:":
                    hold(len(data))
                    left -= len(data)
                parts.append(self._reduced(data, part))
            content: Any = message.parts[0] if message.is_text else parts
            rendered.append({"role": message.role, "content": content})
        try:
            return self.processor.chat(rendered)
        except MMGPTError as error:
            raise from_model(error, "messages") from error

    def completion(self, prompt: str | list[int], *, named: bool = False) -> "TextPrompt":
        """A prompt as it is: a text, or tokens. `named`: with the names of its tokens. Raises RequestError."""
        text = self._text(prompt)
        self._check_length(len(text.text), "prompt")
        try:
            example = self.processor(Document((text,)))
        except MMGPTError as error:
            raise from_model(error, "prompt") from error
        ids = example.input_ids.tolist() if named else []
        return TextPrompt(text.text, example, list(map(self._shown, ids)))

    def _check_length(self, length: int, param: str) -> None:
        """What cannot fit, whatever its tokens are, is refused before it is cut into tokens, which may take long."""
        context = self.processor.config.max_length
        if length > context * self._longest_token:
            message = f"The prompt has {length:,} characters; the context holds {context:,} tokens."
            raise RequestError(message, param=param, code="context_length_exceeded")

    def _shown(self, id: int) -> tuple[str, bytes]:
        name = self._tokens.name(id)
        return name, self._tokens(id) or name.encode()

    def _text(self, prompt: str | list[int]) -> Text:
        if isinstance(prompt, str):
            return Text(prompt, is_target=False)
        if any(map(self.processor.is_image, prompt)):
            raise invalid("prompt has the token of an image; images go through /v1/chat/completions.", "prompt")
        text = self.processor.tokenizer.decode(prompt, keep_special=True)
        return Text(text, is_target=False, ids=tuple(prompt))

    def decode_cost(self, document: Document) -> int:
        """Bytes that decoding the largest of its images takes: they are decoded one after the other."""
        sizes = [image.size() for image in document.images]
        return max((BYTES_PER_PIXEL * height * width for height, width in sizes), default=0)

    def decoding(self, document: Document, messages: Sequence[ChatMessage], work: Callable[[], T]) -> T:
        """`work()`, which decodes the images of `document`, when there is memory for it.

        Raises RequestError naming the image that is broken."""
        try:
            with self._decoding.take(self.decode_cost(document)):
                return work()
        except ImageError as error:
            parts = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
            for image, part in zip(document.images, parts, strict=True):
                try:
                    image.load()
                except ImageError as broken:
                    raise from_model(broken, part.path) from error
            raise

    def _image(self, part: ImagePart, max_bytes: int, seconds: float) -> bytes:
        """The file behind a URL, its header checked."""
        limits = dataclasses.replace(DEFAULT_LIMITS, max_bytes=max_bytes, timeout_s=max(0.0, seconds))
        try:
            data = image_bytes(part.url, limits=limits)
            image_size(data, limits=limits)
        except ImageError as error:
            raise RequestError(f"{part.path}: {error}", param=part.path, code="invalid_image") from error
        return data

    def _reduced(self, data: bytes, part: ImagePart) -> Image:
        if part.detail != "low":
            return Image(data)
        height, width = image_size(data)
        try:
            with self._decoding.take(BYTES_PER_PIXEL * height * width):
                image = load_image(data, limits=ImageLimits())
                image.thumbnail((LOW_DETAIL, LOW_DETAIL), PILImage.Resampling.BICUBIC)
        except ImageError as error:
            raise RequestError(f"{part.path}: {error}", param=part.path, code="invalid_image") from error
        return Image(image)
