"""Captions for many images, into a file that survives being killed.

Inputs are files, folders, globs, WebDataset tars and URLs; each image becomes one row with its caption or its error.
Rows are appended and synced batch by batch. The next run reads what is there, cuts off a torn last row and goes on.
"""

import csv
import errno
import fcntl
import glob
import io
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image as PILImage

from mm_gpt.datasets.reading.archives import TAR_ERRORS, Tar
from mm_gpt.errors import ImageError, MMGPTError, unknown_name
from mm_gpt.images import DEFAULT_LIMITS, is_url, load_image, source_name
from mm_gpt.templates.prompts import CAPTION_PROMPT

if TYPE_CHECKING:
    from mm_gpt.inference.assistant import Assistant, GenerationOptions

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""What is picked out of folders, globs and tars. A file that is named directly is tried whatever it is called."""
LOADER_THREADS = 4


# ---- What there is to caption ----


@dataclass(frozen=True)
class TarSlice:
    """A member of an uncompressed tar: `size` bytes from `offset`."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises ImageError, which does not name the member."""
        if self.size > DEFAULT_LIMITS.max_bytes:
            raise ImageError(f"larger than the limit of {DEFAULT_LIMITS.max_bytes:,} bytes")
        try:
            with open(self.tar, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise ImageError(f"cannot read the tar ({error.strerror})") from None
        if len(data) < self.size:
            raise ImageError(f"the tar ends after {len(data):,} of its {self.size:,} bytes")
        return data


@dataclass(frozen=True)
class ImageItem:
    """One image to caption. `name` is what its row calls it: path, URL, or tar path + "/" + member name."""

    name: str
    source: Path | str | TarSlice | ImageError
    """A Path, a URL, a slice of a tar, or why it is already known to be unreadable."""

    def load(self) -> PILImage.Image:
        """Raises ImageError without the name in front, since the row has it."""
        if isinstance(self.source, ImageError):
            raise self.source
        source = self.source.read() if isinstance(self.source, TarSlice) else self.source
        try:
            return load_image(source)
        except ImageError as error:
            raise ImageError(str(error).removeprefix(f"{source_name(source)}: ")) from error


def find_images(inputs: Sequence[str | Path]) -> list[ImageItem]:
    """Every image that the inputs lead to, once, in an order that never changes.

    Folders are searched to the bottom, hidden names left out, in natural order (img2 before img10); a tar in its own.
    Raises MMGPTError naming an input that does not exist or holds no image. A broken tar is an item with an error.
    """
    items: dict[str, ImageItem] = {}
    for given in [os.fspath(i) for i in inputs]:
        found = False
        for item in _expand(given):
            found = True
            items.setdefault(identity(item.name), item)
        if not found:
            raise MMGPTError(f"{source_name(given)}: holds no image ({' '.join(IMAGE_SUFFIXES)}) and no tar of images")
    return list(items.values())


def identity(name: str) -> str:
    """The same for all spellings of one image's name: relative and absolute paths meet.

    Only leading ".." are resolved: later ones can only be a tar member's own name, which must not leave its tar.
    """
    if is_url(name):
        return name
    folder = os.getcwd()
    while name.startswith("../"):
        folder, name = os.path.dirname(folder), name[3:]
    return os.path.join(folder, name)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers inside names by value; `name` itself decides between 01 and 1."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _expand(given: str) -> Iterator[ImageItem]:
    if given.lower().startswith(("http://", "https://")):
        yield ImageItem(given, given)
    elif os.path.isdir(given):
        yield from _folder(given)
    elif os.path.lexists(given):
        yield from _file(given)
    elif glob.has_magic(given):
        matches = sorted(glob.iglob(given, recursive=True), key=natural_key)
        if not matches:
            raise MMGPTError(f"{source_name(given)}: no file matches")
        for match in matches:
            if os.path.isdir(match):
                yield from _folder(match)
            elif _is_wanted(match, (*IMAGE_SUFFIXES, ".tar")):
                yield from _file(match)
    else:
        raise MMGPTError(f"{source_name(given)}: no such file or folder")


def _folder(folder: str) -> Iterator[ImageItem]:
    problems: list[OSError] = []
    for root, folders, files in os.walk(folder, onerror=problems.append):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(files, key=natural_key):
            if _is_wanted(name, (*IMAGE_SUFFIXES, ".tar")):
                yield from _file(os.path.join(root, name))
    for problem in problems:
        yield ImageItem(os.path.normpath(problem.filename), ImageError(f"cannot read the folder ({problem.strerror})"))


def _file(path: str) -> Iterator[ImageItem]:
    if path.lower().endswith(".tar"):
        yield from _tar(path)
    else:
        yield ImageItem(os.path.normpath(path), Path(path))


def _tar(path: str) -> Iterator[ImageItem]:
    name = os.path.normpath(path)
    try:
        with open(path, "rb") as file, Tar(file, jumps=True) as tar:
            while (member := tar.next()) is not None:
                if not member.isreg() or not _is_wanted(member.name, IMAGE_SUFFIXES):
                    continue
                piece = TarSlice(path, member.offset_data, member.size)
                sparse = ImageError("a sparse tar member")  # small on disk, huge in memory
                yield ImageItem(f"{name}/{member.name}", sparse if member.issparse() else piece)
    except TAR_ERRORS as error:
        reason = " ".join(str(error).split())
        yield ImageItem(name, ImageError(f"not an uncompressed tar, or cut off; the rest is unread ({reason})"))


def _is_wanted(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes) and not os.path.basename(name).startswith(".")


# ---- Captions ----


@dataclass(frozen=True)
class Row:
    """One line of output: an image with its caption or its error."""

    image: str
    caption: str | None = None
    error: str | None = None


def caption_rows(
    assistant: "Assistant",
    items: Sequence[ImageItem],
    *,
    batch_size: int = 8,
    prompt: str = CAPTION_PROMPT,
    options: "GenerationOptions | None" = None,
) -> Iterator[list[Row]]:
    """The rows of each batch, in the order of `items`. While the model runs, threads load the next batch's images.

    Raises MMGPTError when the prompt does not fit or an option is impossible; a broken image is a row with its error.
    """
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="load-image")
    try:
        ahead = [pool.submit(_load, item) for item in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            loaded = [future.result() for future in ahead]
            ahead = [pool.submit(_load, item) for item in batches[number + 1]] if number + 1 < len(batches) else []
            images = [image for image in loaded if not isinstance(image, str)]
            captions = assistant.caption(images, batch_size=batch_size, prompt=prompt, **(options or {}))
            answers = iter(captions)
            yield [
                Row(item.name, error=image) if isinstance(image, str) else Row(item.name, caption=next(answers).text)
                for item, image in zip(batch, loaded, strict=True)
            ]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _load(item: ImageItem) -> PILImage.Image | str:
    """The image, or why there is none."""
    try:
        return item.load()
    except ImageError as error:
        return str(error)


@dataclass(frozen=True)
class Summary:
    total: int
    """Images that the inputs lead to."""
    before: int
    """Rows of those that were there already."""
    written: int
    """Rows that this run wrote, errors included."""
    errors: int
    """Rows of those images that hold an error, also from before."""
    stopped: bool
    """Ctrl-C or SIGTERM came before the end."""


def caption_images(
    load: "Callable[[], Assistant]",
    inputs: Sequence[str | Path],
    out: Path | BinaryIO,
    *,
    batch_size: int = 8,
    prompt: str = CAPTION_PROMPT,
    overwrite: bool = False,
    retry_errors: bool = False,
    progress: bool | None = None,
    options: "GenerationOptions | None" = None,
) -> Summary:
    """Caption all images of `inputs` into `out`: a `.jsonl` or `.csv` file, continued if it exists, or a binary stream.

    `load` is called when there is something to do. `retry_errors` redoes the rows with an error, `overwrite` all rows.
    Ctrl-C and SIGTERM finish and write the current batch. `progress` None shows a bar when stderr is a terminal.
    Raises MMGPTError for inputs without images, an output that cannot be continued, or one that is being written.
    """
    from tqdm import tqdm

    items = find_images(inputs)
    wanted = {identity(item.name): item for item in items}
    retry: Container[str] = wanted if retry_errors else ()
    output = CaptionFile(out, overwrite=overwrite, retry=retry) if isinstance(out, Path) else CaptionStream(out)
    with closing(output):
        pending = [item for key, item in wanted.items() if key not in output.done]
        before = len(items) - len(pending)
        errors = sum(output.done.get(key, False) for key in wanted)
        written, stopped = 0, False
        if pending:
            assistant = load()
            from mm_gpt.training.loop import Stopper

            bar = tqdm(
                total=len(items),
                initial=before,
                unit="image",
                disable=None if progress is None else not progress,
                dynamic_ncols=True,
            )
            rows_of = caption_rows(assistant, pending, batch_size=batch_size, prompt=prompt, options=options)
            with Stopper() as stopper, bar, closing(rows_of):  # type: ignore[type-var]
                for rows in rows_of:
                    # Rows on a terminal would be printed into the bar.
                    with nullcontext() if isinstance(output, CaptionFile) else tqdm.external_write_mode():
                        output.write(rows)
                    written += len(rows)
                    errors += sum(row.error is not None for row in rows)
                    bar.update(len(rows))
                    if stopper.requested and written < len(pending):
                        stopped = True
                        break
    return Summary(len(items), before, written, errors, stopped)


# ---- Where rows go ----


class _Jsonl:
    header = b""
    start = b'{"image": "'
    """How every record begins."""
    has_quotes = False

    @staticmethod
    def encode(row: Row) -> bytes:
        values = {"image": row.image, "caption": row.caption, "error": row.error}
        values = {key: value for key, value in values.items() if value is not None}
        try:
            return json.dumps(values, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # a file name that is not UTF-8; escaped, it comes back as it was
            return json.dumps(values).encode() + b"\n"

    @staticmethod
    def decode(record: bytes) -> Row:
        values = json.loads(record)
        return Row(values["image"], values.get("caption"), values.get("error"))


class _Csv:
    header = b"image,caption,error\n"
    start = b""
    has_quotes = True

    @staticmethod
    def encode(row: Row) -> bytes:
        fields = (row.image, row.caption or "", row.error or "")
        # Not csv.writer: before Python 3.13 it leaves a lone carriage return unquoted, and reading it then fails.
        quoted = ['"' + f.replace('"', '""') + '"' if re.search(r'[,"\r\n]', f) else f for f in fields]
        return ",".join(quoted).encode("utf-8", "surrogateescape") + b"\n"

    @staticmethod
    def decode(record: bytes) -> Row:
        text = io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")
        ((image, caption, error),) = csv.reader(text)
        return Row(image, None if error else caption, error or None)


FORMATS: dict[str, type[_Jsonl] | type[_Csv]] = {".jsonl": _Jsonl, ".csv": _Csv}


class CaptionStream:
    """JSONL to a pipe or a terminal."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.done: dict[str, bool] = {}

    def write(self, rows: Sequence[Row]) -> None:
        self.stream.write(b"".join(map(_Jsonl.encode, rows)))
        self.stream.flush()

    def close(self) -> None:
        """The stream belongs to the caller."""


class CaptionFile:
    """An output file of one process at a time, continued after the last whole row."""

    def __init__(self, path: Path, *, overwrite: bool = False, retry: Container[str] = ()):
        """Open and lock `path`. Rows with an error whose identity is in `retry` are taken out.

        Raises MMGPTError when it is no .jsonl or .csv, cannot be written, is locked, or holds rows that are not ours.
        """
        self.path = path
        self.done: dict[str, bool] = {}
        """Identity of each image that has a row, and whether that row is an error."""
        if path.suffix.lower() not in FORMATS:
            raise MMGPTError(f"{path}: {unknown_name('output format', path.suffix, FORMATS)}")
        self.format = FORMATS[path.suffix.lower()]
        try:
            self._file = _open_locked(path, path)
            try:
                if overwrite:
                    self._file.truncate(0)
                else:
                    self._continue(retry)
                if self._file.seek(0, os.SEEK_END) == 0:
                    self._append(self.format.header)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise MMGPTError(f"{path}: cannot be written ({error.strerror})") from None

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows and wait until they are on the disk."""
        try:
            self._append(b"".join(map(self.format.encode, rows)))
        except OSError as error:
            raise MMGPTError(f"{self.path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _records(self) -> Iterator[bytes]:
        """Whole records: up to a line break, which in a CSV may also stand inside quotes."""
        self._file.seek(0)
        lines: list[bytes] = []
        num_quotes = 0
        for line in self._file:
            lines.append(line)
            num_quotes += line.count(b'"') if self.format.has_quotes else 0
            if line.endswith(b"\n") and num_quotes % 2 == 0:
                yield b"".join(lines)
                lines = []

    def _continue(self, retry: Container[str]) -> None:
        end, dropped = 0, set()
        for number, record in enumerate(self._records()):
            end += len(record)
            if number == 0 and self.format.header:
                if record != self.format.header:
                    raise MMGPTError(f"{self.path}: its first line is not {self.format.header.decode().strip()!r}")
                continue
            try:
                row = self.format.decode(record)
                key = identity(row.image)
            except (ValueError, TypeError, KeyError, AttributeError, csv.Error, RecursionError):
                raise MMGPTError(f"{self.path}: row {number + 1} is no caption; --overwrite starts anew") from None
            if row.error is not None and key in retry:
                dropped.add(number)
            else:
                self.done[key] = row.error is not None
        self._file.seek(end)
        start = self.format.start if end else self.format.header or self.format.start
        torn = self._file.read(len(start))
        if torn != start[: len(torn)]:  # whatever this is, a killed run did not leave it
            raise MMGPTError(f"{self.path}: its last line is no caption; --overwrite starts anew")
        if dropped:
            self._rewrite_without(dropped)
        else:
            self._file.truncate(end)

    def _rewrite_without(self, dropped: set[int]) -> None:
        """Replace the file by one without these records, at one moment, without letting go of the lock."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        new = _open_locked(partial, self.path)
        new.truncate(0)
        for number, record in enumerate(self._records()):
            if number not in dropped:
                new.write(record)
        new.flush()
        os.fsync(new.fileno())
        os.replace(partial, self.path)
        self._file.close()
        self._file = new


def _open_locked(path: Path, name: Path) -> BinaryIO:
    """`path` for reading and appending, with a lock that ends with the process, however it ends."""
    file = open(path, "a+b")  # noqa: SIM115 (the caller closes it)
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
