"""Files in stores that fsspec knows (s3://, gs://, hf://, ...), with every store's own errors made ours."""

import io
import os
from typing import Any

from mm_gpt.datasets.reading.http_files import ReadError
from mm_gpt.datasets.samples import optional_import
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name


def store_of(location: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Raises MMGPTError, as when the package of the store is missing."""
    fsspec = optional_import("fsspec")
    try:
        fs, path = fsspec.core.url_to_fs(location)
    except ImportError as error:
        raise MMGPTError(f"{source_name(location)}: needs another package: {reason_of(error)}") from None
    except Exception as error:  # each store has errors of its own
        raise MMGPTError(f"{source_name(location)}: {reason_of(error)}") from None
    return fs, path


class store_errors:
    """A `with` that turns whatever a store raises into an MMGPTError naming the location."""

    def __init__(self, location: str, kind: type[MMGPTError] = MMGPTError) -> None:
        self._location, self._kind = location, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise self._kind(f"{source_name(self._location)}: no such file") from None
        if isinstance(error, Exception) and not isinstance(error, MMGPTError):
            raise self._kind(f"{source_name(self._location)}: {reason_of(error)}") from None


class StoreFile(io.RawIOBase):
    """A file of a store, opened when made. `size` in bytes (None: not told), `tag` its version ("": none)."""

    def __init__(self, location: str) -> None:
        self._location = self.name = location
        fs, path = store_of(location)
        with store_errors(location):
            info = fs.info(path)
            if info.get("type") == "directory":
                raise MMGPTError(f"{source_name(location)}: is a folder, not a file")
            self.size: int | None = info.get("size")
            stamps = (info.get(key) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "blob_id"))
            self.tag = next((str(stamp) for stamp in stamps if stamp), "")
            self._file = fs.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with store_errors(self._location, ReadError):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        with store_errors(self._location, ReadError):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


def reason_of(error: Exception) -> str:
    """What an error says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:300]
