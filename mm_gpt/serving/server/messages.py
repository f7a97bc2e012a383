"""Messages of a chat request: roles, texts, and where images are."""

from dataclasses import dataclass
from typing import Any

from mm_gpt.images import is_url
from mm_gpt.serving.server.config import Served, ServerConfig
from mm_gpt.serving.server.errors import RequestError, invalid
from mm_gpt.serving.server.fields import Fields, kind

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's roles, and what models know them as: a developer's message is a system message under its new name."""
_TOOLS = "the models here call no tools"
_REFUSED = {
    "audio": "it reads text and images only",
    "function_call": _TOOLS,
    "name": "the chat templates here know no names",
    "refusal": "give what was said as content",
    "tool_call_id": _TOOLS,
    "tool_calls": _TOOLS,
}


@dataclass(frozen=True)
class ImagePart:
    """An image that has yet to be fetched and decoded."""

    url: str
    detail: str
    path: str
    """Of its URL in the request."""


@dataclass(frozen=True)
class ChatMessage:
    role: str
    parts: list[str | ImagePart]
    is_text: bool
    """Content was a string, not an array of parts. Some templates write the two in different ways."""


def read_messages(fields: Fields, served: Served, config: ServerConfig) -> list[ChatMessage]:
    """Raises RequestError naming the message and the part that is wrong."""
    value = fields.take("messages")
    if value is None:
        raise RequestError("The field messages is missing.", param="messages", code="missing_required_parameter")
    if not isinstance(value, list) or not value:
        given = "an empty one" if value == [] else kind(value)
        raise invalid(f"messages must be an array of messages, not {given}.", "messages", "invalid_type")
    messages = [_message(Fields(item, f"messages[{number}]"), served) for number, item in enumerate(value)]
    images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
    if len(images) > config.max_images:
        raise invalid(
            f"The request has {len(images)} images; this server takes at most {config.max_images}.",
            images[config.max_images].path,
            "too_many_images",
        )
    return messages


def _message(fields: Fields, served: Served) -> ChatMessage:
    role = fields.text("role")
    path = fields.at("role")
    if role in ("tool", "function"):
        raise RequestError(f"{path}: {_TOOLS}.", param=path, code="unsupported_value")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise invalid(f"{path} is missing." if role is None else f"{path} must be one of {known}, not {role!r}.", path)
    content = fields.take("content")
    if fields.take("annotations") not in (None, []):  # an answer that is sent back as it came
        raise invalid(f"{fields.at('annotations')} must be empty.", fields.at("annotations"))
    fields.done(_REFUSED)
    if isinstance(content, str):
        return ChatMessage(ROLES[role], [content], is_text=True)
    where = fields.at("content")
    if not isinstance(content, list) or not content:
        given = "an empty one" if content == [] else kind(content)
        raise invalid(f"{where} must be a string or an array of parts, not {given}.", where, "invalid_type")
    parts = [_part(Fields(part, f"{where}[{number}]"), role, served) for number, part in enumerate(content)]
    return ChatMessage(ROLES[role], parts, is_text=False)


def _part(fields: Fields, role: str, served: Served) -> str | ImagePart:
    type = fields.text("type")
    path = fields.at("type")
    if type in ("input_audio", "file", "refusal", "video_url"):
        raise RequestError(f"{path}: parts of type {type!r} are not supported.", param=path, code="unsupported_value")
    if type not in ("text", "image_url"):
        given = f"not {type!r}" if type else "and is missing"
        raise invalid(f"{path} must be 'text' or 'image_url', {given}.", path)
    if type == "text":
        text = fields.text("text")
        if text is None:
            raise invalid(f"{fields.at('text')} is missing.", fields.at("text"))
        fields.done()
        return text
    if role != "user":
        raise invalid(f"{path}: images belong into the user's messages.", path)
    if not served.takes_images:
        raise RequestError(
            f"{path}: {served.name!r} reads text alone, no images.", param=path, code="unsupported_value"
        )
    image = fields.inside("image_url")
    if image is None:
        raise invalid(f"{fields.at('image_url')} is missing.", fields.at("image_url"))
    url: Any = image.text("url")
    if not is_url(url):
        raise invalid(f"{image.at('url')} must be a data:image/ or http(s) URL.", image.at("url"), "invalid_image_url")
    detail = image.choice("detail", ("auto", "low", "high")) or "auto"
    image.done()
    fields.done()
    return ImagePart(url, detail, image.at("url"))
