"""Writing that a kill, a power cut or a full disk cannot spoil: what has its final name is whole.

A folder is written beside its place under a hidden name, then put there:

.tmp-NAME      being written, or written and not yet in place
.old-NAME      what NAME was before, for the moment in between
.removed-NAME  being deleted

`recover` tidies up what a kill left of these.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mm_gpt.errors import MMGPTError


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what a full disk or a missing right raises into one line that names the file."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or path).replace("/.tmp-", "/")  # the name that it would have had
        # numpy's has no number, but two counts of what was to be written.
        reason = error.strerror or f"is the disk full? {error}"
        raise MMGPTError(f"{where}: cannot be written ({reason})") from None
    except SafetensorError as error:
        reason = " ".join(str(error).split()).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        where = str(path).replace("/.tmp-", "/")
        raise MMGPTError(f"{where}: cannot be written ({reason})") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what is to be called `path`: it takes the place of what was there at one moment, when it is whole.

    Raises MMGPTError naming the file when it cannot be written; nothing of it is left then.
    """
    temporary = _hidden("tmp", path)
    try:
        with naming(path):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Raises what `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` at the end; that of before stays until then.

    Raises MMGPTError naming `folder` when it cannot be written; what was there is then untouched.
    """
    temporary = begin_folder(folder)
    with naming(folder):
        try:
            yield temporary
            put_folder(folder)
        except BaseException:
            drop_folder(folder)
            raise


def begin_folder(folder: Path) -> Path:
    """The empty folder that `put_folder` puts in place of `folder`, or `drop_folder` deletes. Raises MMGPTError."""
    temporary = hidden_folder(folder)
    with naming(folder):
        _remove(temporary)
        temporary.mkdir(parents=True)
    return temporary


def put_folder(folder: Path) -> None:
    """Ends what `begin_folder` began: once this returns, `folder` is what was written and stays it. Raises MMGPTError,
    and `folder` is then what it was."""
    temporary, old = hidden_folder(folder), _hidden("old", folder)
    with naming(folder):
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if not folder.exists():
            temporary.rename(folder)
        elif _exchange(temporary, folder):
            _remove(temporary)
        else:
            folder.rename(old)
            temporary.rename(folder)
            _remove(old)
        _sync(folder.parent)


def drop_folder(folder: Path) -> None:
    """Deletes what `begin_folder` began, if anything."""
    shutil.rmtree(hidden_folder(folder), ignore_errors=True)


def hidden_folder(folder: Path) -> Path:
    """Where a folder is while it is written."""
    return _hidden("tmp", folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder, which is whole or gone at any moment."""
    with naming(folder):
        removed = _hidden("removed", folder)
        _remove(removed)
        folder.rename(removed)
        _remove(removed)


def recover(parent: Path) -> None:
    """Put back what was about to be replaced, and delete what was not finished. Nobody else may be writing there."""
    for old in parent.glob(".old-*"):
        folder = parent / old.name.removeprefix(".old-")
        if not folder.exists():
            old.rename(folder)
    for kind in ("old", "tmp", "removed"):
        for path in parent.glob(f".{kind}-*"):
            if path.is_dir():
                _remove(path)
            else:
                path.unlink()


def _hidden(kind: str, folder: Path) -> Path:
    return folder.with_name(f".{kind}-{folder.name}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders at one moment; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None)
    first, second = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(first, second, 2) == 0  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return libc.renameat2(here, first, here, second, 2) == 0  # RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False
