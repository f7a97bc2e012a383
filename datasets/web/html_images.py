"""Which file an `<img>` shows: lazy loading, `srcset`, `<picture>`, `data:` URLs; and what is no picture at all."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from mm_gpt.datasets.samples import BadRecordError
from mm_gpt.datasets.web.html_tree import join_url

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
_UNREADABLE = (".svg", ".svgz", ".pdf", ".mp4", ".webm")

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
    candidates = list(dict.fromkeys(_candidates(element)))
    if local is not None:
        for address in candidates:
            found = local(address)
            if found is not None:
                return found
    reason = "no address"
    for address in candidates:
        if address[:5].lower() == "data:":
            try:
                return _data_bytes(address)
            except BadRecordError as error:
                reason = str(error)
            continue
        joined = join_url(base, address)
        if not joined:
            reason = "address leads nowhere"
        elif joined.partition("?")[0].partition("#")[0].lower().endswith(_UNREADABLE):
            reason = "vector graphic or video"
        else:
            return joined
    raise BadRecordError(reason)


def _candidates(element: Any) -> Iterator[str]:
    """Addresses as written, best first."""
    sets: list[str] = []
    parent = element.getparent()
    if parent is not None and parent.tag == "source":  # libxml2 does not know that <source> has no content
        parent = next((a for a in element.iterancestors("picture")), parent)
    if parent is not None and parent.tag == "picture":
        for source in parent.iter("source"):
            if "svg" not in (source.get("type") or ""):
                sets += [source.get(name) or "" for name in LAZY_SETS]
    sets += [element.get(name) or "" for name in LAZY_SETS]
    sized = [pair for value in sets if value for pair in srcset_candidates(value)]
    # sorted() is stable: among equals the browser's first choice stays first
    yield from (address for _, address in sorted(sized, key=lambda pair: -pair[0]))
    for name in (*LAZY_SOURCES, "src"):
        if (value := (element.get(name) or "").strip()) and not value.startswith(("{", "[")):
            yield value


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
    header, _, payload = address.partition(",")
    if not re.match(r"data:image/(png|jpe?g|webp|gif|bmp|avif)\b", header, re.I):
        raise BadRecordError("vector graphic or video" if "svg" in header.lower() else "address leads nowhere")
    if len(payload) > MAX_DATA_URL_BYTES * 4 // 3:
        raise BadRecordError("data: URL too large")
    raw = unquote_to_bytes(payload)
    if header.lower().rstrip().endswith(";base64"):
        try:
            raw = base64.b64decode(b"".join(raw.split()), validate=True)
        except (binascii.Error, ValueError):
            raise BadRecordError("broken data: URL") from None
    if len(raw) < _MIN_DATA_URL_BYTES:
        raise BadRecordError("placeholder")
    return raw


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
