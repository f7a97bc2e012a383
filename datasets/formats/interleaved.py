"""Interleaved web documents as others publish them: OBELICS, MMC4 (and OpenFlamingo's shards of it), M4's tars.

Every reader takes one file, a folder, a glob or braces, and yields Documents in a fixed order: paragraphs as `Text`,
images where they stood, undecoded: URLs as the datasets have them, bytes where a shard carries them, files of the
folder `images` where one is given. A bad row is counted and skipped, a bad image counted and left out.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

from mm_gpt.datasets.reading.archives import ARCHIVE_SUFFIXES, read_archive
from mm_gpt.datasets.reading.files import base_name, list_files, suffix_of
from mm_gpt.datasets.reading.http_files import ReadError
from mm_gpt.datasets.reading.rows import decode_text, find_image, parse_json, plain_text, read_rows
from mm_gpt.datasets.reading.unpacked import MAX_LINE_BYTES, lines_of
from mm_gpt.datasets.samples import IMAGE_SUFFIXES, AnySample, BadRecordError, ErrorCounter, optional_import
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import ConfigError, MMGPTError

MAX_MEMBER_BYTES = 64 * 2**20
MAX_DOCUMENT_BYTES = 512 * 2**20
NEW_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
"""What OBELICS leaves in a text where a page goes on with another article (its `more-link` nodes)."""


def read_obelics(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Document]:
    """OBELICS rows (parquet or JSON): `images` and `texts` of equal length, one of the two set at each place.

    A row becomes two documents where `NEW_DOCUMENT` stands in it. Alternative texts come from `metadata`, the page's
    address from `general_metadata`; both are JSON in a string. With `images`, what is no URL is a file in that folder.
    """

    def read_one(file: str) -> Iterator[Document]:
        for number, row in read_rows(file, errors):
            name = f"{base_name(file)}:{number}"
            try:
                yield from obelics_documents(row, document_id(file, number), name, errors, images=images)
            except BadRecordError as error:
                errors.add(str(error), name)

    return each_file(location, errors, read_one)


def obelics_documents(
    row: Mapping[str, Any], id: str, name: str, errors: ErrorCounter, *, images: str | None = None
) -> list[Document]:
    """The documents of one OBELICS row; `name` is what errors call it. Raises BadRecordError."""
    sources, texts = row.get("images"), row.get("texts")
    if not isinstance(sources, list) or not isinstance(texts, list):
        raise BadRecordError("images or texts are no list")
    if len(sources) != len(texts):
        raise BadRecordError("images and texts of unequal length")
    notes = _json_member(row, "metadata", list)
    general = _json_member(row, "general_metadata", dict)
    parts: list[list[Segment]] = [[]]
    for at, (source, text) in enumerate(zip(sources, texts, strict=True)):
        if source and text:
            raise BadRecordError("an image and a text in one place")
        if text:
            for paragraph in paragraphs(plain_text(text)):
                if paragraph == NEW_DOCUMENT:
                    parts.append([])
                else:
                    parts[-1].append(Text(paragraph))
        elif source:
            note = notes[at] if at < len(notes) and isinstance(notes[at], dict) else {}
            alt = note.get("alt_text")
            _add_image(parts[-1], source, images, errors, name, alt=alt if isinstance(alt, str) else "")
    kept = [part for part in parts if part]
    if not kept:
        raise BadRecordError("empty document")
    wanted = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
    metadata = {"source": "obelics", **{key: general[key] for key in wanted if general.get(key) is not None}}
    return [Document(tuple(p), id=id if n == 0 else f"{id}#{n}", metadata=metadata) for n, p in enumerate(kept)]


def read_mmc4(
    location: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    assign: Literal["matched", "one-to-one"] = "matched",
    min_similarity: float | None = None,
) -> Iterator[Document]:
    """MMC4 rows: .jsonl (packed or not), or in a .zip or .tar as published; tars of a .json each, as OpenFlamingo has.

    An image stands before the sentence that it is assigned to: `matched_text_index`, or, with `assign="one-to-one"`,
    by the assignment of largest total similarity in which no sentence has two images (the Hungarian algorithm over
    `similarity_matrix`, as OpenFlamingo trains). Images below `min_similarity` (CLIP's cosine) are left out.
    An image is the `image_base64` of the shard, `image_name` in the folder `images`, or else its `raw_url`.
    """
    if assign not in ("matched", "one-to-one"):
        raise ConfigError(f"assign must be 'matched' or 'one-to-one', not {assign!r}")

    def read_one(file: str) -> Iterator[Document]:
        for number, (name, row) in enumerate(_mmc4_rows(file, errors), start=1):
            try:
                yield mmc4_document(
                    row,
                    document_id(file, number),
                    name,
                    errors,
                    images=images,
                    assign=assign,
                    min_similarity=min_similarity,
                )
            except BadRecordError as error:
                errors.add(str(error), name)

    return each_file(location, errors, read_one)


def mmc4_document(
    row: Mapping[str, Any],
    id: str,
    name: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    assign: Literal["matched", "one-to-one"] = "matched",
    min_similarity: float | None = None,
) -> Document:
    """One MMC4 row. Raises BadRecordError. Sentences between two images become one `Text`."""
    sentences, infos = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not sentences or not isinstance(infos, list):
        raise BadRecordError("no text_list or image_info")
    texts = [plain_text(sentence) for sentence in sentences]
    infos = [info if isinstance(info, dict) else {} for info in infos]
    places = _matched(infos) if assign == "matched" else _one_to_one(infos, row, len(texts))
    before: dict[int, list[dict[str, Any]]] = {}
    for info, (place, similarity) in zip(infos, places, strict=True):
        if min_similarity is not None and (similarity is None or similarity < min_similarity):
            continue
        if place is None or not 0 <= place < len(texts):
            errors.add("image: no sentence of that number", name)
        else:
            before.setdefault(place, []).append(info)
    segments: list[Segment] = []
    waiting: list[str] = []
    for at, text in enumerate(texts):
        found: list[Segment] = []
        for info in before.get(at, ()):
            _add_image(found, _mmc4_source(info, images), images, errors, name)
        if found:
            segments += [*([Text(" ".join(waiting))] if waiting else []), *found]
            waiting = []
        if text:
            waiting.append(text)
    if waiting:
        segments.append(Text(" ".join(waiting)))
    if not segments:
        raise BadRecordError("empty document")
    url = row.get("url")
    return Document(tuple(segments), id=id, metadata={"source": "mmc4", **({"url": url} if url else {})})


def _matched(infos: list[dict[str, Any]]) -> list[tuple[int | None, float | None]]:
    return [(_number(info.get("matched_text_index"), int), _number(info.get("matched_sim"), float)) for info in infos]


def _one_to_one(
    infos: list[dict[str, Any]], row: Mapping[str, Any], num_texts: int
) -> list[tuple[int | None, float | None]]:
    """(sentence, similarity) of each image; (None, None) for those that get no sentence, when there are too few."""
    import numpy as np

    if not infos:
        return []
    try:
        matrix = np.asarray(row.get("similarity_matrix"), dtype=np.float64)  # (images, sentences)
    except (TypeError, ValueError):
        raise BadRecordError("no similarity_matrix") from None
    if matrix.shape != (len(infos), num_texts) or not np.isfinite(matrix).all():
        raise BadRecordError("similarity_matrix of another shape")
    rows, columns = optional_import("scipy.optimize").linear_sum_assignment(matrix, maximize=True)
    found = {int(r): (int(c), float(matrix[r, c])) for r, c in zip(rows, columns, strict=True)}
    return [found.get(at, (None, None)) for at in range(len(infos))]


def _number(value: Any, kind: type) -> Any:
    return kind(value) if isinstance(value, int | kind) and not isinstance(value, bool) else None


def _mmc4_source(info: Mapping[str, Any], images: str | None) -> Any:
    if encoded := info.get("image_base64"):
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError, TypeError):
            return None
    return (info.get("image_name") if images is not None else None) or info.get("raw_url")


def _mmc4_rows(file: str, errors: ErrorCounter) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, row); the rows of an archive are the lines of its .jsonl members, and each .json member as a whole."""
    if suffix_of(file) not in ARCHIVE_SUFFIXES:
        yield from ((f"{base_name(file)}:{number}", row) for number, row in read_rows(file, errors))
        return
    for member, size, stream in read_archive(file, errors):
        name = f"{base_name(file)}:{member}"
        lines: Iterator[tuple[int, bytes]]
        if member.endswith(".jsonl"):
            lines = lines_of(stream, name, errors)
        elif member.endswith(".json") and size <= MAX_LINE_BYTES:
            lines = _whole(stream, name, errors)
        elif member.endswith(".json"):
            errors.add("member too large", name)
            continue
        else:
            continue
        for number, line in lines:
            try:
                row = parse_json(line)
            except BadRecordError as error:
                errors.add(str(error), f"{name}:{number}")
                continue
            if isinstance(row, dict):
                yield f"{name}:{number}", row
            else:
                errors.add("JSON is not an object", f"{name}:{number}")


def _whole(stream: BinaryIO, name: str, errors: ErrorCounter) -> Iterator[tuple[int, bytes]]:
    try:
        yield 1, stream.read()
    except ReadError as error:
        errors.add("broken file, rest of it unread", str(error))


def read_interleaved_tars(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Document]:
    """Tars of M4 (IDEFICS): `{doc}.{place}.text.txt` and `{doc}.{place}.image.jpg`, with `{doc}.metadata.txt`.

    The metadata names each member of the document, one a line: a document that lacks one, because a copy was cut off,
    is counted and skipped. `images` has no meaning here: the tars carry them.
    """
    del images
    return each_file(location, errors, lambda file: _read_interleaved_tar(file, errors))


_PLACED = re.compile(rf"(.+)\.(\d{{1,6}})\.(?:(text)\.txt|image\.(?:{'|'.join(IMAGE_SUFFIXES)}))", re.IGNORECASE)


def _read_interleaved_tar(file: str, errors: ErrorCounter) -> Iterator[Document]:
    key, members, problem = "", dict[str, bytes](), ""

    def finished() -> Iterator[Document]:
        try:
            if problem:
                raise BadRecordError(problem)
            if key:
                yield _tar_document(key, members)
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(file)}:{key}")

    for member, size, stream in read_archive(file, errors):
        name = member.removeprefix("./")
        placed = _PLACED.fullmatch(name)
        if placed is None and not name.endswith(".metadata.txt"):
            continue
        owner = placed[1] if placed else name.removesuffix(".metadata.txt")
        if owner != key:
            yield from finished()
            key, members, problem = owner, {}, ""
        if name in members:
            problem = problem or "duplicate member"
        elif size > MAX_MEMBER_BYTES or sum(map(len, members.values())) + size > MAX_DOCUMENT_BYTES:
            problem = problem or "member too large"
        elif not problem:
            try:
                members[name] = stream.read()
            except ReadError:
                problem = "broken archive, rest of it unread"
    yield from finished()


def _tar_document(key: str, members: dict[str, bytes]) -> Document:
    listing = members.pop(f"{key}.metadata.txt", None)
    if not listing:
        raise BadRecordError("incomplete document")
    wanted = {line.strip().removeprefix("./") for line in decode_text(listing).split("\n") if line.strip()}
    if not wanted <= {*members, f"{key}.metadata.txt"}:
        raise BadRecordError("incomplete document")
    segments: dict[int, list[Segment]] = {}
    for name, data in members.items():
        placed = _PLACED.fullmatch(name)
        assert placed is not None  # nothing else was kept
        place = segments.setdefault(int(placed[2]), [])
        if place:
            raise BadRecordError("an image and a text in one place")
        if placed[3]:
            place += [Text(paragraph) for paragraph in paragraphs(plain_text(decode_text(data)))]
        elif data:
            place.append(Image(data))
        else:
            raise BadRecordError("empty image")
    ordered = tuple(segment for place in sorted(segments) for segment in segments[place])
    if not ordered:
        raise BadRecordError("empty document")
    return Document(ordered, id=key, metadata={"source": "m4"})


# ---- What these and other readers of rows share ----


def each_file(
    location: str, errors: ErrorCounter, read_one: Callable[[str], Iterator[AnySample]]
) -> Iterator[AnySample]:
    """What `read_one` yields of each file behind `location`. A file that cannot be read is counted.

    Raises MMGPTError when there is no file, or none that can be read.
    """
    return each_of(list_files(location), errors, read_one)  # no file: raises when called, not at the first record


def each_of(
    found: Sequence[str], errors: ErrorCounter, read_one: Callable[[str], Iterator[AnySample]]
) -> Iterator[AnySample]:
    """`each_file` of the files `found`."""
    num_failed = 0
    for file in found:
        try:
            yield from read_one(file)
        except MMGPTError as error:
            num_failed += 1
            if num_failed == len(found) or isinstance(error, ConfigError):  # not one could be read
                raise
            errors.add("unreadable file", str(error))


def document_id(file: str, number: int) -> str:
    """`folder/shard.parquet:12`: shards of the same name in two folders must not share their ids."""
    return f"{'/'.join(file.partition('?')[0].rstrip('/').split('/')[-2:])}:{number}"


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines, stripped, without the empty ones."""
    return [block.strip() for block in re.split(r"\n[^\S\n]*\n", text) if block.strip()]


def image_source(value: Any, images: str | None) -> Any:
    """What a row says of an image as a source for `Image`: bytes, a `{"bytes", "path"}` of Hugging Face's datasets, an
    http(s) or data URL, a file name in `images`, or a PIL image. Raises BadRecordError, also for a missing file.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes | bytearray):
        if not value:
            raise BadRecordError("empty image")
        return bytes(value)
    if isinstance(value, str) and re.match(r"(?i)https?://|data:image/", value):
        return value
    if isinstance(value, str) and value:
        if images is None:
            raise BadRecordError("an image that is no URL, and no folder of images")
        place = find_image(images, [value])
        if place is None:
            raise BadRecordError("no image file")
        return place
    if hasattr(value, "getexif"):  # a PIL image: PIL is not imported for the question
        return value
    raise BadRecordError("no image")


def _add_image(
    segments: list[Segment], source: Any, images: str | None, errors: ErrorCounter, name: str, *, alt: str = ""
) -> None:
    try:
        segments.append(Image(image_source(source, images), alt=alt.strip()))
    except BadRecordError as error:
        errors.add(f"image: {error}", name)


def _json_member(row: Mapping[str, Any], key: str, kind: type) -> Any:
    """A member that is JSON in a string, or the value itself; empty where it is missing or of another kind (`"[]"`)."""
    value = row.get(key)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecordError(f"{key} is not JSON") from None
    return value if isinstance(value, kind) else kind()
