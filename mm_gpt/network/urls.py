"""URLs as text: their names in messages, and the data that a data URL holds."""

import re


def one_line(text: object) -> str:
    """`text` on one line, what cannot be printed replaced."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def short_name(text: str) -> str:
    """A path or URL as messages show it: on one line, without a password, the middle of a long one left out."""
    name = one_line(re.sub(r"//[^/?#]*@", "//***@", text) if "://" in text else text)
    return name if len(name) <= 300 else f"{name[:200]}...{name[-60:]}"
