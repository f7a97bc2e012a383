"""An HTTP response as a crawler stored it: its head, and its body turned into the bytes that it stands for.

Crawlers keep bodies as they were sent, or decoded under the headers of what was sent, so both are read: a header may
say gzip, and the bytes decide. What unfolds to more than a limit is refused while it unfolds.
"""

import re
import zlib
from collections.abc import Mapping

from mm_gpt.datasets.samples import BadRecordError, optional_import
from mm_gpt.images import image_format

MAX_HEAD_BYTES = 2**16
_PIECE_BYTES = 2**12  # what stands behind a gzip member is copied: of many tiny members, that often
_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})(?!\d)", re.I)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,1000}?-->\s*)?<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)


def parse_head(block: bytes) -> tuple[int, dict[str, str], int]:
    """Status, headers and where the body begins, of the beginning of a response. Raises BadRecordError.

    Names in lower case; a header that came several times has several lines. Lines may end in LF alone.
    """
    status, end = _STATUS.match(block), _HEAD_END.search(block, 0, MAX_HEAD_BYTES)
    if status is None or end is None:
        raise BadRecordError("broken HTTP head")
    headers: dict[str, str] = {}
    name = ""
    for line in block[: end.start()].decode("utf-8", "replace").split("\n")[1:]:
        if line[:1] in (" ", "\t") and name:  # a folded line
            headers[name] += f" {line.strip()}"
            continue
        before, colon, value = line.partition(":")
        name, value = before.strip().lower() if colon else "", value.strip()
        if name:
            headers[name] = f"{headers[name]}\n{value}" if name in headers else value
    return int(status[1]), headers, end.end()


def media_type(content_type: str, body: bytes) -> str:
    """`text/html` of a Content-Type header, the first where there are several; "" when nothing tells.

    Without a header the body's first bytes tell, of HTML and images.
    """
    if found := _MEDIA_TYPE.search(content_type):
        return found[0].lower()
    if _HTML.match(body):
        return "text/html"
    return f"image/{kind}" if (kind := image_format(body)) else ""


def decode_body(body: bytes, headers: Mapping[str, str], max_bytes: int) -> bytes:
    """Undo `Transfer-Encoding: chunked` and `Content-Encoding` gzip, deflate, br. Raises BadRecordError.

    Header names in lower case. A body that is cut off is decoded as far as it goes.
    """
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    encodings = [e.strip().lower() for e in headers.get("content-encoding", "").replace("\n", ",").split(",")]
    for encoding in reversed(encodings):
        if encoding in ("gzip", "x-gzip"):
            if body.startswith(b"\x1f\x8b"):
                body = _gunzipped(body, max_bytes)
        elif encoding == "deflate":
            body = _deflated(body, max_bytes)
        elif encoding == "br":
            body = _brotli(body, max_bytes)
        elif encoding not in ("", "identity", "utf-8", "none"):
            raise BadRecordError("unknown content encoding")
    if len(body) > max_bytes:
        raise BadRecordError("record too large")
    return body


def _unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    position = 0
    while position < len(body):
        end = body.find(b"\r\n", position, position + 200)
        try:
            size = int(body[position:end].partition(b";")[0].strip() or b"x", 16) if end >= 0 else -1
        except ValueError:
            size = -1
        if size < 0:
            # not in chunks after all, or broken further down
            return b"".join(parts) if parts else body
        if size == 0:
            break
        parts.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
    return b"".join(parts)


def _gunzipped(body: bytes, max_bytes: int) -> bytes:
    """All members, one behind the other; what follows the last one is left out, as browsers do."""
    data, position = bytearray(), 0
    while body.startswith(b"\x1f\x8b", position):
        stream = zlib.decompressobj(31)
        while position < len(body) and not stream.eof:
            piece = body[position : position + _PIECE_BYTES]
            try:
                data += stream.decompress(piece, max_bytes + 1 - len(data))
            except zlib.error:
                raise BadRecordError("broken content encoding") from None
            if len(data) > max_bytes:
                raise BadRecordError("record too large")
            position += len(piece) - len(stream.unconsumed_tail) - len(stream.unused_data)
    return bytes(data)


def _inflated(body: bytes, window: int, max_bytes: int) -> bytes:
    stream = zlib.decompressobj(window)
    try:
        data = stream.decompress(body, max_bytes + 1)
    except zlib.error:
        raise BadRecordError("broken content encoding") from None
    if len(data) > max_bytes:
        raise BadRecordError("record too large")
    return data


def _deflated(body: bytes, max_bytes: int) -> bytes:
    """With the zlib header that the standard asks for, without it as some servers send it, or not deflated at all."""
    if _is_plain(body):
        return body
    try:
        return _inflated(body, 15, max_bytes)
    except BadRecordError as error:
        if "large" in str(error):
            raise
        return _inflated(body, -15, max_bytes)


def _is_plain(body: bytes) -> bool:
    return body.lstrip()[:1] == b"<" or image_format(body) != ""


def _brotli(body: bytes, max_bytes: int) -> bytes:
    if _is_plain(body):
        return body
    brotli = optional_import("brotli")
    stream, data = brotli.Decompressor(), bytearray()
    try:
        # the limit is what keeps a bomb of a few kB from 500 MB; what it gives at once may be less
        while part := stream.process(b"" if data else body, output_buffer_limit=max_bytes + 1):
            data += part
            if len(data) > max_bytes:
                raise BadRecordError("record too large")
    except brotli.error:
        if not data:
            raise BadRecordError("broken content encoding") from None
    return bytes(data)
