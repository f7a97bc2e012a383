"""Samples as members of a tar, and back: what stands in a shard of a corpus.

`json` is `{"segments": [{"text": ...}, {"image": "0.jpg", "alt": ...}], ...}` for a Document, `{"messages": ...}` for a
Conversation, `{"captions": ..., "qa": ...}` for a Record; images are members of their own, which it names. A Record of
which only the concepts are known has those in place of an image.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_gpt.datasets.formats.captioned import MAX_MEMBER_BYTES, concepts_of, make_record
from mm_gpt.datasets.samples import (
    IMAGE_SUFFIXES,
    BadRecordError,
    Conversation,
    QuestionAnswer,
    Record,
    Sample,
)
from mm_gpt.document import Concepts, Document, Image, Message, Segment, Text
from mm_gpt.images import STORED_FORMATS, image_format, load_image, to_file


def to_members(sample: Sample, *, refer: bool = False) -> dict[str, bytes]:
    """Member suffix -> bytes. Images must be bytes or local files by now: a shard holds nothing that must be fetched.

    `refer`: images in files of their own and behind URLs stay where they are, and are named: for shards that nobody but
    this program writes and reads.

    Raises BadRecordError for an image file of a kind that is not read, and for what JSON cannot hold.
    """
    members: dict[str, bytes] = {}

    def stored(image: Any) -> str | dict[str, str]:
        source = image.source if isinstance(image, Image) else image
        if refer and isinstance(source, os.PathLike):
            return {"path": os.path.abspath(source)}
        if refer and isinstance(source, str):
            return {"url": source}
        if refer and not isinstance(source, bytes):  # a PIL image, as Hugging Face's data sets give them
            source = to_file(load_image(source))
        data = _file_bytes(Path(source)) if isinstance(source, os.PathLike) else source
        if not isinstance(data, bytes):
            raise BadRecordError("an image that is not fetched yet")
        suffix = image_format(data)
        if suffix not in (IMAGE_SUFFIXES if refer else STORED_FORMATS):
            raise BadRecordError(f"an image of format {suffix or 'unknown'}")
        name = f"{len(members)}.{suffix}"
        members[name] = data
        return name

    def segment(part: Segment) -> dict[str, Any]:
        if isinstance(part, Image):
            return {"image": stored(part)} | ({"alt": part.alt} if part.alt else {})
        return {"text": part.text} | ({} if part.is_target else {"is_target": False})

    def content(parts: Any) -> str | list[dict[str, Any]]:
        return parts if isinstance(parts, str) else [segment(_message_part(part)) for part in parts or ()]

    values: dict[str, Any]
    match sample:
        case Document():
            if sample.branches:
                raise BadRecordError("a document with branches: store a Record")
            values = {"id": sample.id, "segments": [segment(part) for part in sample.segments]}
        case Conversation():
            turns = [{**turn, "content": content(turn.get("content"))} for turn in sample.messages]
            values = {"id": sample.key, "messages": turns, "source": sample.source}
        case Record():
            pairs = [{"question": q.question, "answer": q.answer, "answers": list(q.answers)} for q in sample.questions]
            values = {"id": sample.key, "captions": list(sample.captions), "qa": pairs}
            if isinstance(sample.image, Concepts):
                values["concepts"] = dict(sample.image.scores)
            else:
                values["image"] = stored(sample.image)
            values["source"] = sample.source
    if sample.metadata:
        values["metadata"] = dict(sample.metadata)
    try:
        return {"json": json.dumps(values, ensure_ascii=False, allow_nan=False).encode(), **members}
    except UnicodeEncodeError:
        raise BadRecordError("text is not Unicode") from None
    except (TypeError, ValueError, RecursionError):
        raise BadRecordError("metadata is not JSON") from None


def from_members(key: str, members: Mapping[str, bytes], source: str = "", *, refer: bool = False) -> Sample:
    """The sample that `to_members` took apart, or a Record of any tar of captioned images. Raises BadRecordError.

    `refer`: follow the names of files and URLs. Never for a shard that somebody else may have written.
    """
    values = _json(members["json"]) if "json" in members else {}

    def image(part: Mapping[str, Any]) -> Image:
        name = part["image"]
        if refer and isinstance(name, dict):
            place = name.get("path")
            return Image(str(name.get("url")) if place is None else Path(place), alt=str(part.get("alt", "")))
        if not isinstance(name, str) or name not in members or name.rpartition(".")[2] not in IMAGE_SUFFIXES:
            raise BadRecordError("missing image")
        return Image(members[name], alt=str(part.get("alt", "")))

    def segment(part: Any) -> Segment:
        if not isinstance(part, dict) or ("image" in part) == ("text" in part):
            raise BadRecordError("a segment that is neither text nor image")
        if "image" in part:
            return image(part)
        if not isinstance(part["text"], str):
            raise BadRecordError("a text that is no text")
        return Text(part["text"], is_target=part.get("is_target") is not False)

    def message(turn: Any) -> Message:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise BadRecordError("a message without a role")
        content = turn.get("content")
        if not isinstance(content, str | list):
            raise BadRecordError("a message without content")
        parts = (
            content if isinstance(content, str) else [_plain(p if isinstance(p, str) else segment(p)) for p in content]
        )
        return {**turn, "content": parts}

    metadata = values.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = _string(values.get("id")) or key
    source = _string(values.get("source")) or source
    if isinstance(values.get("segments"), list):
        return Document(tuple(map(segment, values["segments"])), id=name, metadata=metadata)
    if isinstance(values.get("messages"), list):
        return Conversation(name, tuple(map(message, values["messages"])), source, metadata)
    named = values.get("image")
    is_named = _string(named) in members or (refer and isinstance(named, dict))
    if "qa" in values and (is_named or ("concepts" in values and not set(members) & set(IMAGE_SUFFIXES))):
        captions = values.get("captions") or []
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise BadRecordError("captions are not text")
        try:
            pairs = tuple(
                QuestionAnswer(str(q["question"]), str(q["answer"]), tuple(map(str, q.get("answers", ()))))
                for q in values["qa"]
            )
        except (TypeError, KeyError, AttributeError, RecursionError):
            raise BadRecordError("question without text or answer") from None
        shown: Any = image(values).source if is_named else concepts_of(values["concepts"])
        return Record(name, shown, tuple(captions), pairs, source, metadata)
    return make_record(key, dict(members), source)


def _message_part(part: Any) -> Segment:
    """A content part of a message as a segment. Raises BadRecordError for one that names a file or URL."""
    if isinstance(part, Text | Image):
        return part
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(text, str):
        return Text(text)
    if isinstance(part, dict) and isinstance(part.get("image"), Image | bytes | Path):
        return part["image"] if isinstance(part["image"], Image) else Image(part["image"])
    raise BadRecordError("a part of a message that is neither text nor an image that is here")


def _plain(part: Segment | str) -> Segment | str:
    return part.text if isinstance(part, Text) else part


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _file_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise BadRecordError("sample too large")
        return path.read_bytes()
    except (OSError, ValueError):  # ValueError: a zero byte inside the path
        raise BadRecordError("unreadable image file") from None


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8-sig"))
        if b"\\u" in data:  # half of a surrogate pair is a string to Python, and nothing that a tokenizer takes
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise BadRecordError("bad JSON") from None
    if not isinstance(values, dict):
        raise BadRecordError("JSON is not an object")
    return values
