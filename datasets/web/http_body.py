"""The body of an HTTP response as it was sent, to the bytes that it stands for. Crawlers keep either, so both are read.

A header may say gzip over a body that was decoded before it was stored: the bytes decide. What unfolds to more than a
limit is refused while it unfolds.
"""

import zlib
from collections.abc import Mapping

from mm_gpt.datasets.samples import BadRecordError, optional_import


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
                body = _inflated(body, 31, max_bytes)
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
    if body.lstrip()[:1] == b"<":
        return body
    try:
        return _inflated(body, 15, max_bytes)
    except BadRecordError as error:
        if "large" in str(error):
            raise
        return _inflated(body, -15, max_bytes)


def _brotli(body: bytes, max_bytes: int) -> bytes:
    if body.lstrip()[:1] == b"<":
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
