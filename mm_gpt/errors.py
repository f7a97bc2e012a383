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
    """One line that names what is unknown, the right name if one is close, and what exists."""
    options = sorted(known)
    close = closest(name, options)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(options)})"


def not_installed(package: str, extra: str) -> str:
    """One line that tells how to install what an extra brings. From the checkout: no package index has this name."""
    return f'{package} is not installed; in the folder of the checkout: pip install -e ".[{extra}]"'


CLOSE = 0.66
"""Two of three letters alike, in order: `aks` is close to `ask`, `serve` is not close to `eval`."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was meant to be, if one is close: misspelt, in capitals, with _ for -, cut short."""

    def plain(text: str) -> str:
        return text.casefold().replace("_", "-").lstrip("-")

    options = {plain(option): option for option in known}
    close = difflib.get_close_matches(plain(name), options, n=1, cutoff=CLOSE)
    begun = [option for option in options if len(name) > 2 and option.startswith(plain(name))]
    found = close or (begun if len(begun) == 1 else [])
    return options[found[0]] if found else None
