"""Public conversation datasets as Conversations: LLaVA, ShareGPT, chat messages, The Cauldron and FineVision.

One reader for all of them, since every row says by its own keys what it is. `content` is a list of strings and Images;
nothing is decoded. A row whose images and image markers disagree is counted and skipped: which picture a question is
about would be a guess.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mm_gpt.datasets.reading.files import base_name, folder_of, list_files, suffix_of
from mm_gpt.datasets.reading.rows import ROW_SUFFIXES, find_image, first_value, plain_text, plain_values, read_rows
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter
from mm_gpt.document import Image, Message
from mm_gpt.errors import ConfigError, ImageError, MMGPTError
from mm_gpt.images import image_bytes, is_url, source_name
from mm_gpt.templates.chat_template import ROLES

MARKER = "<image>"
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
"""What FineVision rates each turn for, from 1 to 5."""

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
}
_NOT_METADATA = (
    "id",
    "image",
    "images",
    "file_name",
    "file_names",
    "video",
    "conversations",
    "messages",
    "texts",
    *(f"{name}_ratings" for name in RATINGS),
)


def read_conversations(
    location: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    image_first: bool = False,
    min_rating: int | Mapping[str, int] = 0,
) -> Iterator[Conversation]:
    """The rows of a JSON list, of JSON lines or of parquet files (a folder or glob of them as well), which hold

    - `conversations`: turns `{"from": "human" | "gpt" | "system", "value": ...}` (LLaVA, ShareGPT). `image` is a file
      name, a list of them, or absent; each `<image>` in the turns stands for the next one, and the newlines around it
      go. What comes before the first question is dropped, as LLaVA does with an answer that was cut off from it
    - `messages`: turns `{"role", "content"}`. Content parts are text, `{"type": "text", "text"}` and
      `{"type": "image", "path" | "url" | "image"}` (`image_url` as well). Where the row has `images`, parts without
      a source stand for the next one or, in a row that has none of those, each `<image>`; elsewhere `<image>` is text.
      An answer with `"weight": 0` is read and not learned
    - `texts`: `{"user", "assistant"}` (The Cauldron, FineVision). The `images` come first in the first question.

    `images` is the folder or URL prefix of named images, by default the one that holds the file; a local image that is
    not there is counted. `image_first` moves the image of a turn before its text, as LLaVA-1.5 was trained.
    `min_rating` drops turns of FineVision that are rated lower, for any of `RATINGS` or for those that it names.
    metadata: the row's own plain values, such as `model`.

    Raises MMGPTError when the file cannot be opened or is not JSON or parquet.
    """
    least = dict.fromkeys(RATINGS, min_rating) if isinstance(min_rating, int) else dict(min_rating)
    if unknown := set(least) - set(RATINGS):
        raise ConfigError(f"min_rating: no ratings {', '.join(sorted(unknown))}; there are {', '.join(RATINGS)}")
    return _read(location, errors, images, image_first, {name: rating for name, rating in least.items() if rating})


def _read(
    location: str, errors: ErrorCounter, images: str | None, image_first: bool, least: Mapping[str, int]
) -> Iterator[Conversation]:
    named = list_files(location)
    files = named if len(named) == 1 else [f for f in named if suffix_of(f) in ROW_SUFFIXES]
    if not files:
        raise MMGPTError(f"{source_name(location)}: holds no {', '.join(ROW_SUFFIXES)}")
    for file in files:
        folder = images if images is not None else folder_of(file)
        name = base_name(file)
        for number, row in read_rows(file, errors):
            place = f"{name}:{number}"
            try:
                yield conversation_of(row, place, errors, folder, image_first=image_first, min_ratings=least)
            except BadRecordError as error:
                errors.add(str(error), place)


def conversation_of(
    row: Mapping[str, Any],
    place: str,
    errors: ErrorCounter,
    folder: str,
    *,
    image_first: bool = False,
    min_ratings: Mapping[str, int] | None = None,
) -> Conversation:
    """One row as `read_conversations` reads it; `place` (`folder/file.jsonl:3`) names it where it has no `id`.

    Raises BadRecordError.
    """
    messages = _messages(row, folder, min_ratings or {}, errors, place)
    if image_first:
        messages = [_image_first(message) for message in messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("no answer")
    key = row.get("id")
    key = str(key) if isinstance(key, int | str) and key != "" else place
    return Conversation(key, tuple(messages), base_name(place).partition(".")[0].partition(":")[0], _metadata(row))


def _messages(
    row: Mapping[str, Any], folder: str, least: Mapping[str, int], errors: ErrorCounter, place: str
) -> list[Message]:
    if row.get("video"):
        raise BadRecordError("a video")
    if isinstance(row.get("conversations"), list):
        return speaker_turns(row["conversations"], RowImages(row, folder))
    if isinstance(row.get("messages"), list):
        return message_turns(row["messages"], RowImages(row, folder))
    if isinstance(row.get("texts"), list):
        return _from_texts(row, RowImages(row, folder), least, errors, place)
    raise BadRecordError("no conversations, messages or texts")


def speaker_turns(turns: Sequence[Any], images: "RowImages") -> list[Message]:
    """LLaVA's turns as messages that begin with a question. Raises BadRecordError, also for an image left over."""
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise BadRecordError("a turn without a speaker")
        role = _SPEAKERS.get(turn["from"].lower())
        if role is None:
            raise BadRecordError("unknown speaker")
        messages.append({"role": role, "content": images.fill(plain_text(turn.get("value")))})
    spoken = [number for number, message in enumerate(messages) if message["role"] == "user"]
    cut_off = messages[: spoken[0]] if spoken else []
    if any(isinstance(part, Image) for message in cut_off for part in message["content"]):
        raise BadRecordError("an image before the first question")
    system = [message for message in cut_off if message["role"] == "system"]
    messages = [*system[:1], *messages[len(cut_off) :]]
    images.check()
    for number, message in enumerate(messages[len(system[:1]) :]):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise BadRecordError("turns that do not alternate")
        if not message["content"]:
            raise BadRecordError("an empty turn")
    return messages


def message_turns(turns: Sequence[Any], images: "RowImages") -> list[Message]:
    """Turns `{"role", "content"}` with `content` as a list of strings and Images. Raises BadRecordError, also for an
    image left over."""
    images.has_places = images.has_places or any(map(_is_place, _all_parts(turns)))
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise BadRecordError("a message without a known role")
        content = turn.get("content")
        parts: list[str | Image] = []
        # parquet fills what a message lacks with null
        kept = {name: value for name, value in turn.items() if value is not None}
        for part in content if isinstance(content, list) else [content] if content is not None else []:
            parts += _part(part, images)
        if not parts and not kept.get("tool_calls"):
            raise BadRecordError("an empty turn")
        messages.append({**kept, "content": parts})
    images.check()
    return messages


def _all_parts(turns: Sequence[Any]) -> Iterator[Any]:
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        yield from content if isinstance(content, list) else ()


def _is_place(part: Any) -> bool:
    """Whether a part stands for the next image that the row lists."""
    return isinstance(part, dict) and part.get("type") in ("image", "image_url") and _source_of(part) is None


def _source_of(part: Mapping[str, Any]) -> Any:
    return next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)


def _part(part: Any, images: "RowImages") -> list[str | Image]:
    """What one content part of a message holds."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise BadRecordError("a content part that is neither text nor image")
    match part.get("type"):
        case "text":
            if images.listed and not images.has_places:
                return images.fill(plain_text(part.get("text")))
            plain_text(part.get("text"))  # kept as it is: an answer may begin with a space that means something
            return [part["text"]] if part["text"] else []
        case "image" | "image_url":
            source = _source_of(part)
            if isinstance(source, dict) and isinstance(source.get("url"), str):
                source = source["url"]
            return [images.next() if source is None else images.open(source)]
    raise BadRecordError("a content part that is neither text nor image")


def _from_texts(
    row: Mapping[str, Any], images: "RowImages", least: Mapping[str, int], errors: ErrorCounter, place: str
) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(row["texts"]):
        if not isinstance(turn, dict):
            raise BadRecordError("a turn without user and assistant")
        texts = [plain_text(turn.get(role)) for role in ("user", "assistant")]
        if images.listed:  # the images come first, so a marker left in the text stands for nothing
            texts = [text.replace(MARKER, "").strip() for text in texts]
        if not all(texts):
            raise BadRecordError("an empty turn")
        if _is_rated_low(row, number, least):
            errors.add("turn below min_rating", f"{place}:{number + 1}")
            continue
        messages += [{"role": r, "content": [text]} for r, text in zip(("user", "assistant"), texts, strict=True)]
    if not messages:
        raise BadRecordError("no turns")
    messages[0]["content"] = [*images.rest(), *messages[0]["content"]]
    return messages


def _is_rated_low(row: Mapping[str, Any], number: int, least: Mapping[str, int]) -> bool:
    """A turn without a rating is kept."""
    for name, rating in least.items():
        ratings = row.get(f"{name}_ratings")
        given = ratings[number] if isinstance(ratings, list) and number < len(ratings) else None
        if isinstance(given, int | float) and given < rating:
            return True
    return False


class RowImages:
    """The images that a row lists, handed out in order."""

    def __init__(self, row: Mapping[str, Any], folder: str) -> None:
        value = first_value(row, ("images", "image", "file_names", "file_name"))
        self.listed: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        self._folder, self._used = folder, 0
        self.has_places = False
        """Parts of their own say where the images stand: `<image>` in a text is text then."""

    def next(self) -> Image:
        if self._used == len(self.listed):
            raise BadRecordError("more image markers than images")
        self._used += 1
        return self.open(self.listed[self._used - 1])

    def rest(self) -> list[Image]:
        return [self.next() for _ in self.listed[self._used :]]

    def check(self) -> None:
        if self._used != len(self.listed):
            raise BadRecordError("more images than image markers")

    def fill(self, text: str) -> list[str | Image]:
        """`text` with the next image at each marker, the newlines around it left out."""
        pieces = text.split(MARKER)
        parts: list[str | Image] = []
        for number, piece in enumerate(pieces):
            if number:
                parts.append(self.next())
                start = piece.lstrip()
                piece = start if "\n" in piece[: len(piece) - len(start)] else piece
            if number < len(pieces) - 1:
                end = piece.rstrip()
                piece = end if "\n" in piece[len(end) :] else piece
            parts.append(piece)
        return [part for part in parts if isinstance(part, Image) or part.strip()]

    def open(self, source: Any) -> Image:
        """Of file bytes, `{"bytes", "path"}` as parquet has it, a URL, or a name in the folder."""
        if isinstance(source, dict):
            source = next((source[name] for name in ("bytes", "path", "url") if source.get(name)), None)
        if isinstance(source, bytes | str) and source:
            if isinstance(source, bytes):
                return Image(source)
            if is_url(source):
                return Image(self._data(source) if source[:5].lower() == "data:" else source)
            found = find_image(self._folder, [source])
            if found is not None:
                return Image(found)
        raise BadRecordError("no image")

    def _data(self, url: str) -> bytes:
        try:
            return image_bytes(url)
        except ImageError:
            raise BadRecordError("broken data URL") from None


def _image_first(message: Message) -> Message:
    images = [part for part in message["content"] if isinstance(part, Image)]
    text = "".join(part for part in message["content"] if isinstance(part, str)).strip()
    return {**message, "content": [*images, *([text] if text else [])]} if images else message


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    values = plain_values(row, without=_NOT_METADATA)
    first = row["texts"][0] if isinstance(row.get("texts"), list) and row["texts"] else None
    if isinstance(first, dict) and isinstance(first.get("source"), str):  # The Cauldron names the source of each turn
        values.setdefault("source", first["source"])
    return values
