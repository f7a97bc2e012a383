"""Files wherever they are: local paths, http(s) and fsspec URLs (s3://, gs://, hf://, ...), opened, listed, copied.

A location is a path or a URL, never a command: `pipe:` is refused. http(s) goes through the guard against private
addresses (see `http_files`), other URLs through fsspec and the package of their store. Nothing is unpacked here.

Environment: `MM_GPT_OFFLINE` (no network at all), `MM_GPT_PRIVATE_ADDRESSES` (read from the local network as well),
`MM_GPT_CACHE` and `XDG_CACHE_HOME` (where `local_copy` keeps what it fetched).
"""

import glob
import hashlib
import io
import itertools
import json
import logging
import os
import posixpath
import re
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from mm_gpt.datasets.reading.http_files import PIECE_BYTES, HttpFile, HttpLimits
from mm_gpt.datasets.reading.store_files import StoreFile, reason_of, store_errors, store_of
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name
from mm_gpt.system.locks import exclusive

logger = logging.getLogger(__name__)

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "sftp", "memory")
"""What fsspec may open. Not its chains (`simplecache::`, `zip://...::`) nor its own http, which has no guard."""
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst")
MAX_LISTED = 1_000_000


def scheme_of(location: str) -> str:
    """`"http"` of `http://...`, lower case; "" for a local path (`file://` ones as well).

    Raises MMGPTError for a command (`pipe:...`), a chain (`simplecache::s3://...`) and a scheme that is not read.
    """
    if re.match(r"(?i)\s*pipe:", location):
        raise MMGPTError(f"{source_name(location)}: commands are not run; name a file or URL")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    scheme = found[1].lower() if found else ""
    if "://" in location and "::" in location and scheme not in ("http", "https"):
        raise MMGPTError(f"{source_name(location)}: chained URLs are not read")
    if scheme in ("file", "local"):
        return ""
    if scheme not in ("", "http", "https", *STORES):
        known = ", ".join(f"{name}://" for name in ("file", "http", "https", *STORES))
        raise MMGPTError(f"{source_name(location)}: {scheme}:// is not read; these are: {known}")
    return scheme


def is_remote(location: str) -> bool:
    """Whether `location` is a URL to somewhere else. Raises MMGPTError for what is never read (see `scheme_of`)."""
    return scheme_of(os.fspath(location)) != ""


def local_path(location: str) -> Path:
    """The path behind a local location, `file://` ones included."""
    found = re.match(r"(?i)(file|local)://(localhost(?=/))?", location)
    return Path(urllib.parse.unquote(location[found.end() :]) if found else location)


def base_name(location: str) -> str:
    """`shard.tar` of `https://host/a/shard.tar?v=2`: what errors call a file, and what its suffix is taken from."""
    return posixpath.basename(_url_path(location).rstrip("/")) or location


def suffix_of(location: str) -> str:
    """The suffix in lower case, `.gz` and its like taken off: `.jsonl` of `docs.jsonl.gz`; "" without one."""
    name = base_name(location).lower()
    for compressed in COMPRESSED_SUFFIXES:
        name = name.removesuffix(compressed)
    return os.path.splitext(name)[1]


def _url_path(location: str) -> str:
    return location.partition("#")[0].partition("?")[0] if scheme_of(location) in ("http", "https") else location


def open_file(location: str, *, seekable: bool = False, limits: HttpLimits | None = None) -> BinaryIO:
    """The bytes of `location`, not unpacked; use it in a `with`. Folders, pipes and devices are refused.

    `seekable`: read in any order (parquet, zip). A server that gives no ranges is then copied to a temporary file.
    Raises MMGPTError when it cannot be opened, ReadError (an MMGPTError) when it breaks later.
    """
    location = os.fspath(location)
    scheme = scheme_of(location)
    if scheme in ("http", "https"):
        _check_online(location)
        file = HttpFile(location, limits)
        if seekable and not file.seekable():
            with file:
                return _spooled(file)
        return io.BufferedReader(file, PIECE_BYTES)
    if scheme:
        _check_online(location)
        return io.BufferedReader(StoreFile(location), PIECE_BYTES)
    path = local_path(location)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise MMGPTError(f"{path}: is a folder, not a file")
        if not stat.S_ISREG(mode):  # opening a pipe or a device could block, or never end
            raise MMGPTError(f"{path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise MMGPTError(f"{source_name(path)}: {error.strerror or error}") from None
    except MMGPTError:
        raise
    except ValueError as error:  # a zero byte inside the path
        raise MMGPTError(f"{source_name(path)}: {error}") from None


def exists(location: str) -> bool:
    """Whether there is such a file or folder; always true of http(s), which is not asked."""
    scheme = scheme_of(os.fspath(location))
    if scheme in ("http", "https"):
        return True
    if scheme:
        fs, path = store_of(location)
        with store_errors(location):
            return bool(fs.exists(path))
    return os.path.exists(local_path(location))


def is_folder(location: str) -> bool:
    """Whether `location` is a folder; never true of http(s)."""
    scheme = scheme_of(os.fspath(location))
    if scheme in ("http", "https"):
        return False
    if scheme:
        fs, path = store_of(location)
        with store_errors(location):
            return bool(fs.isdir(path))
    return os.path.isdir(local_path(location))


def list_files(location: str) -> list[str]:
    """The files behind a location, sorted: of a folder (and the folders in it), a glob, `{000..010}` or `{a,b}`.

    Hidden files are left out. Braces work in any location, globs and folders not over http(s), which has no listing.
    Raises MMGPTError when there is none.
    """
    location = os.fspath(location)
    found: list[str] = []
    for one in _expand_braces(location):
        found += _list_one(one)
        if len(found) > MAX_LISTED:
            raise MMGPTError(f"{source_name(location)}: more than {MAX_LISTED:,} files")
    if not found:
        raise MMGPTError(f"{source_name(location)}: no such file, or an empty folder")
    return sorted(dict.fromkeys(found))


def _list_one(location: str) -> list[str]:
    scheme = scheme_of(location)
    if scheme in ("http", "https"):
        return [location]
    if scheme:
        fs, path = store_of(location)
        with store_errors(location):
            if fs.isfile(path):
                return [location]
            if fs.isdir(path):
                names = fs.find(path)
            elif _is_glob(path):
                names = [name for name, info in fs.glob(path, detail=True).items() if info.get("type") != "directory"]
            else:
                raise FileNotFoundError
            return [fs.unstrip_protocol(name) for name in names if not is_hidden(_inside(str(name), path))]
    local = local_path(location)
    if local.is_dir():
        return list(_walk(local))
    if os.path.exists(local):
        return [str(local)]
    if not _is_glob(str(local)):  # one of many in braces must not go missing in silence
        raise MMGPTError(f"{source_name(local)}: no such file or folder")
    named = "__MACOSX" in str(local)  # what begins with a dot is left out by glob itself
    found = (name for name in glob.glob(str(local), recursive=True) if named or "/__MACOSX/" not in name)
    return [name for name in found if os.path.isfile(name)]


def _walk(top: Path) -> Iterator[str]:
    """The files below `top`. Linked folders are entered, each once; a link to nothing is listed: its reader tells."""

    def fail(error: OSError) -> None:
        raise MMGPTError(f"{source_name(error.filename or top)}: {reason_of(error)}") from None

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=fail):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        paths = (os.path.join(folder, name) for name in names if not is_hidden(name))
        yield from (path for path in paths if os.path.isfile(path) or os.path.islink(path))


def _is_glob(path: str) -> bool:
    return re.search(r"[*?\[]", path) is not None


def is_hidden(name: str) -> bool:
    """Whether a file or member of an archive is hidden or in a hidden folder: `.git/config`, and what macOS writes
    beside each file, `._photo.jpg` or `__MACOSX/photo.jpg`.
    """
    return any(part == "__MACOSX" or part.startswith(".") for part in name.split("/") if part not in (".", ".."))


def _inside(name: str, base: str) -> str:
    return name.removeprefix(base) if name.startswith(base) else posixpath.basename(name)


def _expand_braces(location: str) -> Iterable[str]:
    """`a{01..12}.tar` and `{train,val}.jsonl`, from left to right. A local file of that very name is meant itself."""
    if scheme_of(location) == "" and os.path.lexists(local_path(location)):
        return [location]
    pieces = re.split(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}", location)
    choices: list[list[str]] = []
    total = 1
    for number, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", piece)
        if number % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = int(span[1]), int(span[2])
            total *= abs(last - first) + 1
            if total > MAX_LISTED:
                raise MMGPTError(f"{source_name(location)}: names more than {MAX_LISTED:,} files")
            step = 1 if last >= first else -1
            width = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 0
            choices.append([f"{n:0{width}d}" for n in range(first, last + step, step)])
        else:
            choices.append(piece.split(","))
            total *= len(choices[-1])
    if total > MAX_LISTED:
        raise MMGPTError(f"{source_name(location)}: names more than {MAX_LISTED:,} files")
    return ("".join(parts) for parts in itertools.product(*choices))


def resolve(base: str, name: str) -> str:
    """`name`, as a record spells it, inside the folder or URL prefix `base`.

    Only names matter: a link that somebody made inside `base` is followed. Raises MMGPTError for a name that is empty,
    absolute, a URL, or leads outside of `base` by `..`.
    """
    base = os.fspath(base)
    plain = name.replace("\\", "/")
    joined = posixpath.normpath(plain)
    if (
        not plain
        or plain.startswith("/")
        or re.match(r"(?i)[a-z][a-z0-9+.-]*://|[a-z]:|(pipe|data):", plain)
        or any(ord(c) < 32 for c in plain)
        or joined in (".", "..")
        or joined.startswith("../")
    ):
        raise MMGPTError(f"{source_name(name)}: leads outside of {source_name(base)}")
    if not is_remote(base):
        return str(local_path(base) / joined)
    if scheme_of(base) in ("http", "https"):
        head, mark, query = base.partition("?")
        return f"{head.rstrip('/')}/{urllib.parse.quote(joined)}{mark}{query}"
    return f"{base.rstrip('/')}/{joined}"


def folder_of(location: str) -> str:
    """The folder or URL prefix that holds a file: where the images that it names are looked for."""
    if not is_remote(location):
        return str(local_path(location).parent)
    head = _url_path(location).rstrip("/")
    return head[: head.rindex("/")]


# ---- Copies ----


def local_copy(
    location: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    max_cache_bytes: int = 64 << 30,
    limits: HttpLimits | None = None,
) -> Path:
    """A local file with the bytes of `location`: itself when it is local, otherwise a copy in the cache `folder`.

    Several processes may ask for the same file: one fetches it, the others wait. A copy is used again while the file
    has the same size and version where it came from; when that cannot be asked, with a warning. The copies used
    longest ago go when all together would exceed `max_cache_bytes`; not those of the last minute, so open it at once.
    Raises MMGPTError when it cannot be fetched or is too large.
    """
    location = os.fspath(location)
    if not is_remote(location):
        open_file(location).close()
        return local_path(location)
    home = Path(folder) if folder is not None else cache_folder() / "files"
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", base_name(location))[-80:].lstrip(".")
    target = home / f"{hashlib.sha256(location.encode()).hexdigest()[:24]}-{plain}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with exclusive(home / f".{target.name}.lock"):
            return _fresh_copy(location, target, max_cache_bytes, limits)
    except MMGPTError:
        raise
    except OSError as error:
        raise MMGPTError(f"{source_name(location)}: cannot be kept in {home} ({reason_of(error)})") from None


def cache_folder() -> Path:
    """`MM_GPT_CACHE`, else `XDG_CACHE_HOME/mm-gpt`, else `~/.cache/mm-gpt`. Not created here."""
    if own := os.environ.get("MM_GPT_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "mm-gpt"


def _fresh_copy(location: str, target: Path, max_cache_bytes: int, limits: HttpLimits | None) -> Path:
    note = target.with_name(f".{target.name}.json")
    known = _read_note(note)
    usable = target.is_file() and known.get("size") == target.stat().st_size and known.get("location") == location
    try:
        _check_online(location)
        http = scheme_of(location) in ("http", "https")
        source = HttpFile(location, limits) if http else StoreFile(location)
    except MMGPTError as error:
        if not usable:
            raise
        logger.warning("%s; using the copy of %s", error, time.ctime(target.stat().st_mtime))
        os.utime(target)
        return target
    with source:
        same = known.get("tag") == source.tag and source.size in (None, known.get("size"))
        if usable and same:
            os.utime(target)  # the time of last use, which decides what goes first
            return target
        if source.size is not None and source.size > max_cache_bytes:
            raise MMGPTError(f"{source_name(location)}: {source.size:,} bytes; the cache holds {max_cache_bytes:,}")
        target.unlink(missing_ok=True)
        _make_room(target.parent, max_cache_bytes - (source.size or 0))
        partial = target.with_name(f".{target.name}.partial")
        try:
            size = _write(source, partial, max_cache_bytes)
            if source.size is not None and size != source.size:
                raise MMGPTError(f"{source_name(location)}: got {size:,} of {source.size:,} bytes")
            note.write_text(json.dumps({"location": location, "size": size, "tag": source.tag}))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    _make_room(target.parent, max_cache_bytes)
    return target


def _write(source: HttpFile | StoreFile, path: Path, max_bytes: int) -> int:
    buffer, size = memoryview(bytearray(PIECE_BYTES)), 0
    with path.open("wb") as out:
        while count := source.readinto(buffer):
            size += count
            if size > max_bytes:
                raise MMGPTError(f"{source_name(source.name)}: larger than the cache of {max_bytes:,} bytes")
            out.write(buffer[:count])
    return size


def _read_note(path: Path) -> dict[str, object]:
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _make_room(folder: Path, max_bytes: int) -> None:
    """Remove the copies used longest ago until `max_bytes` hold the rest."""
    copies = []
    for path in folder.iterdir():
        try:
            if path.suffix not in (".json", ".lock"):
                copies.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:  # another process was faster
            continue
    total = sum(size for _, size, _ in copies)
    for used, size, path in sorted(copies):
        age = time.time() - used
        # what another process writes at this moment, or was just told the path of, is not ours to remove
        if total > max_bytes and age > (86_400 if path.suffix == ".partial" else 60):
            path.unlink(missing_ok=True)
            total -= size


def _spooled(file: HttpFile) -> BinaryIO:
    """A temporary copy of a file whose server gives no ranges; it goes when it is closed."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    buffer = memoryview(bytearray(PIECE_BYTES))
    try:
        while count := file.readinto(buffer):
            copy.write(buffer[:count])
    except OSError as error:
        copy.close()
        raise MMGPTError(f"{file.name}: cannot be copied to {tempfile.gettempdir()} ({reason_of(error)})") from None
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return cast(BinaryIO, copy)


def _check_online(location: str) -> None:
    if offline() and scheme_of(location) not in ("", "memory"):
        raise MMGPTError(f"{source_name(location)}: MM_GPT_OFFLINE is set, and it is not here")


def offline() -> bool:
    """Whether `MM_GPT_OFFLINE` forbids the network."""
    return os.environ.get("MM_GPT_OFFLINE", "").lower() in ("1", "true", "yes", "on")
