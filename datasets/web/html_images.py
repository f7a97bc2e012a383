"""Which file an `<img>` shows: lazy loading, `srcset`, `<picture>`, `data:` URLs; and what is no picture at all."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mm_gpt.datasets.samples import BadRecordError
from mm_gpt.datasets.web.html_tree import join_url
from mm_gpt.image_headers import IMAGE_SUFFIXES, OTHER_SUFFIXES
from mm_gpt.network.urls import data_url_bytes

# Where scripts find the picture that `src` only holds a place for, commonest first.
LAZY_SETS = ("data-srcset", "data-lazy-srcset", "srcset")
LAZY_SOURCES = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-orig-file",
    "data-full-src",
    "data-hi-res-src",
    "data-url",
    "data-echo",
    "data-image",
)
MAX_DATA_URL_BYTES = 16 * 2**20
_MIN_DATA_URL_BYTES = 200  # below that it is a placeholder: one transparent or grey pixel


_MEDIA_TYPES = frozenset(f"image/{name}" for name in (*IMAGE_SUFFIXES, "pjpeg", "x-png", "x-ms-bmp", "x-bmp", "*"))

_TOKEN = re.compile(r"[^\s,]\S*")

LocalImage = Callable[[str], "Path | bytes | None"]
"""An image that lies beside a page, by its address as the page writes it; None when there is none."""


def image_source(element: Any, base: str, local: LocalImage | None = None) -> bytes | Path | str:
    """The source of an `<img>` or `<amp-img>`: image bytes of a data: URL, a local file, or an absolute http(s) URL.

    Largest candidate first, but a file that lies beside the page goes before any URL. Raises BadRecordError with the
    reason why it shows nothing.
    """
    if _is_hidden(element):
        raise BadRecordError("hidden")
    if _is_pixel(element):
        raise BadRecordError("tracking pixel")
    candidates: dict[str, str] = {}
    for address, media_type in _candidates(element):
        candidates.setdefault(address, media_type)
    readable = [address for address, media_type in candidates.items() if _is_readable(address, media_type)]
    reason = "kind of image that is not read" if len(readable) < len(candidates) else "no address"
    if local is not None:
        for address in readable:
            found = local(address)
            if found is not None:
                return found
    for address in readable:
        if address[:5].lower() == "data:":
            try:
                return _data_bytes(address)
            except BadRecordError as error:
                reason = str(error)
            continue
        if joined := join_url(base, address):
            return joined
        reason = "address leads nowhere"
    raise BadRecordError(reason)


def _is_readable(address: str, media_type: str) -> bool:
    """Whether an image is of a kind that is read, as far as its address and its `type` tell."""
    if address[:5].lower() == "data:":
        return address[5:].partition(",")[0].partition(";")[0].strip().lower() in _MEDIA_TYPES
    path = address.partition("?")[0].partition("#")[0].lower()
    suffix = path.rpartition("/")[2].rpartition(".")[2]
    named = media_type.partition(";")[0].strip().lower()
    return suffix not in OTHER_SUFFIXES and (not named or named in _MEDIA_TYPES)


def _candidates(element: Any) -> Iterator[tuple[str, str]]:
    """(address as written, its media type or "") of each, best first."""
    sized: list[tuple[float, str, str]] = []
    parent = element.getparent()
    if parent is not None and parent.tag == "source":  # libxml2 does not know that <source> has no content
        parent = next((a for a in element.iterancestors("picture")), parent)
    sources = parent.iter("source") if parent is not None and parent.tag == "picture" else ()
    for source, media_type in (*((source, source.get("type") or "") for source in sources), (element, "")):
        for name in LAZY_SETS:
            sized += [(size, address, media_type) for size, address in srcset_candidates(source.get(name) or "")]
    # sorted() is stable: among equals the browser's first choice stays first
    yield from ((address, media_type) for _, address, media_type in sorted(sized, key=lambda one: -one[0]))
    for name in (*LAZY_SOURCES, "src"):
        if (value := (element.get(name) or "").strip()) and not value.startswith(("{", "[")):
            yield value, ""


def srcset_candidates(value: str) -> list[tuple[float, str]]:
    """(size, address) of each candidate: width in pixels, or density times 1000 so that `2x` goes before `1x`.

    Addresses may hold commas (`w_300,h_200/a.jpg`, `data:...;base64,...`): a candidate ends at a comma followed by
    white space, or at one that follows its descriptor.
    """
    found, position = [], 0
    while token := _TOKEN.search(value, position):
        address, position = token[0], token.end()
        size, unit = 1.0, "x"
        if address.endswith(","):
            address = address.rstrip(",")
        else:
            end = value.find(",", position)
            words = value[position : end if end >= 0 else len(value)].split()
            position = end + 1 if end >= 0 else len(value)
            if words and re.fullmatch(r"\d{1,9}(\.\d{1,9})?[wx]", words[0]):
                size, unit = float(words[0][:-1]), words[0][-1]
        found.append((size if unit == "w" else size * 1000, address))
    return found


def _data_bytes(address: str) -> bytes:
    try:
        data = data_url_bytes(address, MAX_DATA_URL_BYTES)
    except ValueError as error:
        raise BadRecordError("data: URL too large" if "limit" in str(error) else "broken data: URL") from None
    if len(data) < _MIN_DATA_URL_BYTES:
        raise BadRecordError("placeholder")
    return data


def _is_pixel(element: Any) -> bool:
    style = (element.get("style") or "").replace(" ", "").lower()
    for name in ("width", "height"):
        value = (element.get(name) or "").strip().lower().removesuffix("px")
        styled = re.search(rf"(?:^|;){name}:([\d.]+)px", style)
        if value in ("0", "1") or (styled and float(re.match(r"\d*", styled[1])[0] or 0) <= 1):  # type: ignore[index]
            return True
    return False


def _is_hidden(element: Any) -> bool:
    for one in (element, *element.iterancestors()):
        style = one.get("style")
        if one.get("hidden") is not None or (style and re.search(r"display\s*:\s*none", style, re.I)):
            # lazy loaders hide what they will show
            return not any(element.get(name) for name in (*LAZY_SOURCES, "data-srcset"))
        if one.tag == "noscript":
            return False
    return False
