"""Web pages as they were found, and folders of them as browsers save them. WARC files are read in `warc`.

`read_pages` yields Documents. To spread the work, take the raw pages of `folder_pages` instead and give each to
`page_document`, in any process: a `Page` can be pickled.

Images are the files beside a page; what is not there stays an http(s) URL. Opt-outs are those of a page and of an image
themselves, in their HTML and headers; a site's `robots.txt`, `tdmrep.json` and `ai.txt` are not read (see `html_tree`).
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mm_gpt.datasets.reading.files import (
    is_folder,
    is_remote,
    list_files,
    local_path,
    open_file,
    resolve,
    scheme_of,
)
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.web.extract import DEFAULT, ExtractConfig, extract
from mm_gpt.document import Document
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


def page_documents(
    pages: Iterator[Page], errors: ErrorCounter, config: ExtractConfig, removed: Counter[str] | None
) -> Iterator[Document]:
    """The documents of pages. Those without main text or with an opt-out are counted in `errors`."""
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
    return page_documents(folder_pages(location, errors, images=images), errors, config, removed)


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
    return page_documents(_folder_pages(location.rstrip("/"), pages, errors, images), errors, config, removed)


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
