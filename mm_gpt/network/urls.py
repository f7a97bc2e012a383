"""URLs as text: their names in messages, and the data that a data URL holds."""

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes


def one_line(text: object) -> str:
    """`text` on one line, what cannot be printed replaced."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def short_name(text: str) -> str:
    """A path or URL as messages show it: on one line, without a password, the middle of a long one left out."""
    name = one_line(re.sub(r"//[^/?#]*@", "//***@", text) if "://" in text else text)
    return name if len(name) <= 300 else f"{name[:200]}...{name[-60:]}"


def data_url_bytes(url: str, max_bytes: int) -> bytes:
    """What a data URL (RFC 2397) holds. Raises ValueError with the reason only.

    Base64 is read as browsers do (WHATWG, forgiving-base64 decode): percent-encoded, over several lines, without
    padding; and in the alphabet for URLs, as many programs write it.
    """
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().startswith("data:"):
        raise ValueError("not of the form data:type;base64,...")
    if len(payload) > 4 * max_bytes + 2**16:  # a percent sign makes three characters of one
        raise ValueError(f"larger than the limit of {max_bytes:,} bytes")
    data = unquote_to_bytes(payload)
    if header.replace(" ", "").lower().endswith(";base64"):
        data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not in base64, as it says") from None
    if len(data) > max_bytes:
        raise ValueError(f"larger than the limit of {max_bytes:,} bytes")
    return data
