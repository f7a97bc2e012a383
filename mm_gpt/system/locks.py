"""Files that one process at a time may write."""

import errno
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_gpt.errors import MMGPTError


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time, the others wait. The lock ends with the process; the file stays, another may wait on it.

    Raises OSError when the file cannot be opened.
    """
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def open_locked(path: Path, name: Path) -> io.FileIO:
    """`path` for reading and appending without a buffer, with a lock that ends with the process, however it ends.

    Raises MMGPTError that names `name` when another process holds the lock, OSError when the file cannot be opened.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock another process may have put a new file in the place of this one.
        is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
            raise MMGPTError(f"{name}: another process is writing it") from None
        raise
    if not is_current:
        file.close()
        raise MMGPTError(f"{name}: another process is writing it")
    return file
