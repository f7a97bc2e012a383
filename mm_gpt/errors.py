"""Errors that are the user's to fix.

Each message is one line that names the file, record or option. The command line prints it on stderr and exits with 1;
anything that is not an `MMGPTError` is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class MMGPTError(ValueError):
    """Something the user gave is missing, broken or refused."""


class ImageError(MMGPTError):
    """An image cannot be read, or is refused before it is decoded."""


class URLError(ImageError):
    """An image URL is malformed, unreachable, or leads to an address that is not public."""


class ConfigError(MMGPTError):
    """A configuration names an unknown key or holds an impossible value."""


class CheckpointError(MMGPTError):
    """A checkpoint folder or weight file is missing something, has something left over, or is corrupt."""


class DownloadError(MMGPTError):
    """Weights cannot be fetched or do not match their checksum."""


class ContextOverflowError(MMGPTError):
    """The prompt does not fit into the model's context."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line that names what is unknown, the closest right name, and what exists."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(options)})"
