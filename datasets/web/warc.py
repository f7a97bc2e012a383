"""WARC files of crawlers (Common Crawl, wget, ...): their pages, with the images that are in the same file.

`read_warc` yields Documents. To spread the work, take the raw pages of `warc_pages` instead and give each to
`page_document`, in any process:

    pool.imap(page_document, warc_pages("CC-MAIN-....warc.gz", errors))

An image that is not in the file stays an http(s) URL. Opt-outs are those of `pages`.
"""

import dataclasses
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Self

from mm_gpt.datasets.reading.files import base_name, list_files, local_copy, open_file
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, optional_import
from mm_gpt.datasets.web.extract import DEFAULT, IMAGE_OPT_OUTS, PAGE_OPT_OUTS, ExtractConfig
from mm_gpt.datasets.web.html_tree import header_opt_outs, join_url
from mm_gpt.datasets.web.http_response import MAX_HEAD_BYTES, decode_body, media_type, parse_head
from mm_gpt.datasets.web.pages import MAX_RECORD_BYTES, Page, page_documents
from mm_gpt.document import Document, Image, Segment

_SILENT_TYPES = ("warcinfo", "request", "metadata", "conversion", "continuation")
"""Records without a page: no fault."""


def read_warc(
    location: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    config: ExtractConfig = DEFAULT,
    removed: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of WARC files (.warc, .warc.gz, .warc.zst), with the image responses that are in the same file.

    `images` names other WARC files that hold the images. Each file is read twice, first for its images: they wait in a
    temporary file, and memory holds some 200 bytes of each. A remote file is copied first. An image whose own response
    carries an opt-out goes. Counting is as in `read_pages`.
    """
    counted: Counter[str] = Counter() if removed is None else removed
    return _read_warcs(list_files(location), list_files(images) if images else [], errors, config, counted)


def _read_warcs(
    files: list[str], images: list[str], errors: ErrorCounter, config: ExtractConfig, removed: Counter[str]
) -> Iterator[Document]:
    with ImageStore(config) as shared:
        for path in images:
            shared.add_warc(path)
        for path in files:
            local = str(local_copy(path))
            with ImageStore(config) as own:
                own.add_warc(local)
                for document in page_documents(_warc_pages(local, base_name(path), errors), errors, config, removed):
                    yield shared.attach(own.attach(document, removed), removed)


def warc_pages(location: str, errors: ErrorCounter) -> Iterator[Page]:
    """The HTML pages of WARC files: responses with status 200, and resources. Images are left as URLs.

    A record that is malformed, over `MAX_RECORD_BYTES` or a revisit without content is counted and skipped; a file
    that ends or breaks early is counted, and what came before stays. Metadata has `warc_filename` and
    `warc_record_offset`, in bytes.
    """
    files = list_files(location)
    return (page for path in files for page in _warc_pages(path, base_name(path), errors))


def _warc_pages(path: str, name: str, errors: ErrorCounter) -> Iterator[Page]:
    for response in _responses(path, name, errors):
        if response.media_type == "":
            errors.add("no content type", response.label)
        if response.media_type not in ("text/html", "application/xhtml+xml"):
            continue
        try:
            html = response.body()
        except BadRecordError as error:
            errors.add(str(error), response.label)
            continue
        metadata = {"source": name, "warc_filename": name, "warc_record_offset": response.offset}
        yield Page(response.url, html, response.headers, response.label, metadata)


@dataclass
class _Response:
    """A successful response, or a resource, whose body is not read yet."""

    record: Any
    label: str
    """What errors call it."""
    offset: int
    """Of its record in the file, in bytes."""
    url: str
    headers: Mapping[str, str]
    media_type: str
    start: bytes
    """The beginning of its body."""
    num_left: int
    """Bytes of the body that the record says it has behind `start`."""

    def body(self) -> bytes:
        """Transfer and content encodings undone. Raises BadRecordError."""
        if len(self.start) + self.num_left > MAX_RECORD_BYTES:
            raise BadRecordError("record too large")
        return decode_body(self.start + self.record.reader.read(self.num_left), self.headers, MAX_RECORD_BYTES)


def _responses(path: str, name: str, errors: ErrorCounter) -> Iterator[_Response]:
    """Successful responses and resources, until the file ends or breaks."""
    warc = optional_import("fastwarc.warc")
    position = 0
    with open_file(path) as file:
        try:
            records = warc.ArchiveIterator(
                file, record_types=warc.WarcRecordType.any_type, parse_http=False, fsspec_args=False
            )
            for record in records:
                position = record.stream_pos
                label = f"{name}:{position}"
                try:
                    if (response := _response(record, label)) is not None:
                        yield response
                except BadRecordError as error:
                    errors.add(str(error), label)
                record.reader.consume()
                if record.reader.tell() < record.content_length:
                    errors.add("WARC ends inside a record, read up to there", label)
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())[:100]
            errors.add("broken WARC, rest of it unread", f"{name}:{position} ({reason})")


def _response(record: Any, label: str) -> _Response | None:
    """None for what is no successful response or resource. Raises BadRecordError."""
    # not by fastwarc's own type: names of headers may be written in small letters
    kind = (record.headers.get("WARC-Type") or "").strip().lower()
    if kind == "revisit":
        raise BadRecordError("revisit without content")
    if kind in _SILENT_TYPES:
        return None
    if kind not in ("response", "resource"):
        raise BadRecordError("WARC record of no known type")
    url = (record.headers.get("WARC-Target-URI") or "").strip().strip("<>")
    if not url.lower().startswith(("http://", "https://")):  # crawlers also keep what DNS answers
        return None
    start = record.reader.read(min(record.content_length, MAX_HEAD_BYTES))
    num_left = record.content_length - len(start)
    headers: Mapping[str, str] = {}
    content_type = record.headers.get("Content-Type") or ""
    if kind == "response":
        status, headers, begin = parse_head(start)
        if status != 200:
            return None
        start, content_type = start[begin:], headers.get("content-type", "")
    return _Response(record, label, record.stream_pos, url, headers, media_type(content_type, start), start, num_left)


class ImageStore:
    """The images of WARC files in one temporary file, found by their address."""

    def __init__(self, config: ExtractConfig = DEFAULT) -> None:
        self._refused = {*config.image_opt_outs, *config.page_opt_outs} & {*IMAGE_OPT_OUTS, *PAGE_OPT_OUTS}
        self._places: dict[bytes, tuple[int, int] | str] = {}
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)

    def add_warc(self, location: str) -> None:
        """Take in the image responses of a file. What is broken there is counted when its pages are read."""
        for response in _responses(location, base_name(location), ErrorCounter(max_examples=0)):
            if not response.media_type.startswith("image/"):
                continue
            refused = sorted(self._refused & header_opt_outs(response.headers))
            key = _url_key(response.url)
            if refused:
                self._places[key] = f"opt-out: {refused[0]}"
                continue
            try:
                data = response.body()
            except BadRecordError:
                continue
            if data and key not in self._places:
                self._places[key] = (self._file.seek(0, 2), len(data))
                self._file.write(data)

    def attach(self, document: Document, removed: Counter[str]) -> Document:
        """The document with bytes instead of URLs where the store has them."""
        if not self._places:
            return document
        segments: list[Segment] = []
        for segment in document.segments:
            if isinstance(segment, Image) and isinstance(segment.source, str):
                place = self._places.get(_url_key(segment.source))
                if isinstance(place, str):
                    removed[f"image: {place}"] += 1
                    continue
                if place is not None:
                    self._file.seek(place[0])
                    segment = dataclasses.replace(segment, source=self._file.read(place[1]))
            segments.append(segment)
        return dataclasses.replace(document, segments=tuple(segments))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _url_key(url: str) -> bytes:
    """16 bytes; http and https are one, and so are the spellings that joining makes the same."""
    plain = (join_url(url, "") or url).partition("#")[0].partition("://")[2]
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()
