"""Web pages that somebody saved: folders as browsers save them, and WARC files of crawlers (Common Crawl, wget, ...).

`read_pages` and `read_warc` yield Documents. To spread the work, take the raw pages of `folder_pages` or `warc_pages`
instead and give each to `page_document`, in any process: a `Page` can be pickled.

    pool.imap(page_document, warc_pages("CC-MAIN-....warc.gz", errors))

Images are the files beside a page, or the image responses in the same WARC; what is in neither stays an http(s) URL.
Opt-outs are those of a page and of an image themselves, in their HTML and headers; a site's `robots.txt`,
`tdmrep.json` and `ai.txt` are not read (see `html_tree`).
"""

import dataclasses
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import unquote

from mm_gpt.datasets.reading.files import (
    base_name,
    is_folder,
    is_remote,
    list_files,
    local_copy,
    local_path,
    open_file,
    resolve,
    scheme_of,
)
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, optional_import
from mm_gpt.datasets.web.extract import DEFAULT, IMAGE_OPT_OUTS, PAGE_OPT_OUTS, ExtractConfig, extract
from mm_gpt.datasets.web.html_tree import header_opt_outs, join_url
from mm_gpt.datasets.web.http_body import decode_body
from mm_gpt.document import Document, Image, Segment
from mm_gpt.errors import MMGPTError

PAGE_SUFFIXES = (".html", ".htm", ".xhtml")
MAX_RECORD_BYTES = 32 * 2**20
_SAVED_WITH = re.compile(r"(?<=[^/])(?:_files|\.files|-Dateien|_fichiers|_archivos)/")
"""The folders that browsers save beside a page."""
_SAVED_FROM = re.compile(rb"<!--\s*saved from url=\(\d+\)\s*(https?://[^\s>]{3,2000}?)\s*-->", re.I)
_CANONICAL = re.compile(rb"<link\b[^>]{0,200}?rel\s*=\s*[\"']?canonical\b[^>]{0,2000}>", re.I)
_HREF = re.compile(rb"href\s*=\s*[\"']?(https?://[^\s\"'>]+)", re.I)


@dataclass(frozen=True)
class Page:
    """A page as it was found: bytes and HTTP headers."""

    url: str
    """Its address on the web; "" when nobody knows."""
    html: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case; a header that came several times has several lines."""
    name: str = ""
    """What errors call it."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""
    """The folder that its images may lie in; "" for none."""
    folder: str = ""
    """The page's own folder inside of `root`."""


def page_document(page: Page, config: ExtractConfig = DEFAULT, removed: Counter[str] | None = None) -> Document | None:
    """`extract` for a Page: its images from beside it where they are there, its metadata besides the page's own."""
    local = _local_images(page) if page.root else None
    document = extract(page.html, page.url, config, headers=page.headers, local=local, removed=removed)
    if document is None:
        return None
    return dataclasses.replace(document, id=page.url or page.name, metadata={**document.metadata, **page.metadata})


def _documents(
    pages: Iterator[Page], errors: ErrorCounter, config: ExtractConfig, removed: Counter[str] | None
) -> Iterator[Document]:
    for page in pages:
        why: Counter[str] = Counter()
        document = page_document(page, config, why)
        if removed is not None:
            removed.update(why)
        if document is not None:
            yield document
        else:
            reason = next((name for name in why if not name.startswith(("image: ", "text: "))), "no main text")
            errors.add(reason, page.name)


# ---- Folders ----


def read_pages(
    location: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    config: ExtractConfig = DEFAULT,
    removed: Counter[str] | None = None,
) -> Iterator[Document]:
    """The documents of a folder of saved pages (or of one page), sorted by name. See `folder_pages`.

    Pages without main text or with an opt-out are counted in `errors`; `removed` also counts images (see `extract`).
    """
    return _documents(folder_pages(location, errors, images=images), errors, config, removed)


def folder_pages(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Page]:
    """The .html, .htm and .xhtml files of a folder and those in it, but for frames that a browser saved with a page.

    Images are found under `images`, or beside the pages and nowhere outside of `location`. The page's address is what
    the browser wrote into it (`saved from url`), else its canonical link. Raises MMGPTError when nothing is there.
    """
    return _folder_pages(location.rstrip("/"), page_files(location), errors, images)


def page_files(location: str) -> list[str]:
    """The pages of a folder, sorted, without the frames that a browser saved with one. Raises MMGPTError for none."""
    files = [name for name in list_files(location) if name.lower().endswith(PAGE_SUFFIXES)]
    if not files:
        raise MMGPTError(f"{location}: no page ({', '.join(PAGE_SUFFIXES)})")
    stems = {name.rpartition(".")[0] for name in files}
    return [path for path in files if not any(stem in stems for stem in _SAVED_WITH.split(path)[:-1])]


def read_page_files(
    location: str,
    pages: Sequence[str],
    errors: ErrorCounter,
    *,
    images: str | None = None,
    config: ExtractConfig = DEFAULT,
    removed: Counter[str] | None = None,
) -> Iterator[Document]:
    """`read_pages` for some of the pages of a folder: each process takes its part of `page_files`."""
    return _documents(_folder_pages(location.rstrip("/"), pages, errors, images), errors, config, removed)


def _folder_pages(location: str, files: Sequence[str], errors: ErrorCounter, images: str | None) -> Iterator[Page]:
    in_folder = is_folder(location)
    base = location if is_remote(location) else str(local_path(location))
    for path in files:
        folder, _, own = path.rpartition("/")
        name = path[len(base) + 1 :] if in_folder and path.startswith(f"{base}/") else own
        try:
            with open_file(path) as file:
                html = file.read(MAX_RECORD_BYTES + 1)
        except (MMGPTError, OSError) as error:
            errors.add("unreadable", f"{name} ({error})")
            continue
        if len(html) > MAX_RECORD_BYTES:
            errors.add("too large", name)
            continue
        inner = name.rpartition("/")[0] if in_folder else ""
        url = _saved_from(html) or (path if scheme_of(path) in ("http", "https") else "")
        root = images or (base if in_folder else folder or ".")
        yield Page(url, html, name=name, metadata={"source": name}, root=root, folder=inner)


def _saved_from(html: bytes) -> str:
    head = html[: 2**16]
    found = _SAVED_FROM.search(head)
    if found is None and (link := _CANONICAL.search(head)):
        found = _HREF.search(link[0])
    return found[1].decode("utf-8", "replace") if found else ""


def _local_images(page: Page) -> Callable[[str], Path | bytes | None]:
    remote = is_remote(page.root)

    def local(address: str) -> Path | bytes | None:
        name = unquote(re.split(r"[?#]", address.strip(), maxsplit=1)[0])
        if not name or name.lower().endswith((".svg", ".html", ".htm")) or scheme_of(page.root) in ("http", "https"):
            return None
        try:
            # from the page's folder; an absolute path, as mirrors have it, from the top
            inside = name.lstrip("/") if name.startswith("/") else f"{page.folder}/{name}".lstrip("/")
            path = resolve(page.root, inside)
            if remote:
                with open_file(path) as file:
                    data = file.read(MAX_RECORD_BYTES + 1)
                return data if 0 < len(data) <= MAX_RECORD_BYTES else None
            found = Path(path)
            is_inside = found.is_file() and found.resolve().is_relative_to(Path(page.root).resolve())
            return found if is_inside and found.stat().st_size > 0 else None
        except (MMGPTError, OSError, ValueError):  # a URL, a name that leads outside, or a file that is not there
            return None

    return local


# ---- WARC ----


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
                for document in _documents(_warc_pages(local, base_name(path), errors), errors, config, removed):
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
    for record in _records(path, name, errors):
        label = f"{name}:{record.stream_pos}"
        if str(record.record_type) == "revisit":
            errors.add("revisit without content", label)
            continue
        content_type = _content_type(record)
        if content_type not in ("text/html", "application/xhtml+xml") or not _is_success(record):
            continue
        try:
            html = _payload(record, errors, label)
        except BadRecordError as error:
            errors.add(str(error), label)
            continue
        metadata = {"source": name, "warc_filename": name, "warc_record_offset": record.stream_pos}
        yield Page(_target(record), html, _headers(record), label, metadata)


def _records(path: str, name: str, errors: ErrorCounter | None) -> Iterator[Any]:
    """Responses, resources and revisits, until the file ends or breaks. Not decoded."""
    warc = optional_import("fastwarc.warc")
    types = warc.WarcRecordType.response | warc.WarcRecordType.resource | warc.WarcRecordType.revisit
    position = 0
    with open_file(path) as file:
        try:
            records = warc.ArchiveIterator(file, record_types=types, parse_http=True, fsspec_args=False)
            for record in records:
                position = record.stream_pos
                yield record
        except (OSError, ValueError, EOFError) as error:
            if errors is not None:
                reason = " ".join(str(error).split())[:100]
                errors.add("broken WARC, rest of it unread", f"{name}:{position} ({reason})")


def _payload(record: Any, errors: ErrorCounter | None, label: str) -> bytes:
    """The body, transfer and content encodings undone. Raises BadRecordError."""
    expected = record.content_length
    if expected > MAX_RECORD_BYTES:
        raise BadRecordError("record too large")
    raw = record.reader.read(expected)
    if len(raw) < expected and errors is not None:
        errors.add("WARC ends inside a record, read up to there", label)
    return decode_body(raw, _headers(record), MAX_RECORD_BYTES)


def _headers(record: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    if record.http_headers is not None:
        for name, value in record.http_headers:
            name = name.lower()
            found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def _content_type(record: Any) -> str:
    value = record.http_content_type if record.http_headers is not None else record.headers.get("Content-Type", "")
    return (value or "").partition(";")[0].strip().lower()


def _is_success(record: Any) -> bool:
    return record.http_headers is None or record.http_headers.status_code == 200


def _target(record: Any) -> str:
    return (record.headers.get("WARC-Target-URI") or "").strip().strip("<>")


class ImageStore:
    """The images of WARC files in one temporary file, found by their address."""

    def __init__(self, config: ExtractConfig = DEFAULT) -> None:
        self._refused = {*config.image_opt_outs, *config.page_opt_outs} & {*IMAGE_OPT_OUTS, *PAGE_OPT_OUTS}
        self._places: dict[bytes, tuple[int, int] | str] = {}
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)

    def add_warc(self, location: str) -> None:
        """Take in the image responses of a file. What is broken there is counted when its pages are read."""
        for record in _records(location, base_name(location), None):
            if not _content_type(record).startswith("image/") or not _is_success(record):
                continue
            if str(record.record_type) == "revisit":
                continue
            refused = sorted(self._refused & header_opt_outs(_headers(record)))
            key = _url_key(_target(record))
            if refused:
                self._places[key] = f"opt-out: {refused[0]}"
                continue
            try:
                data = _payload(record, None, "")
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
