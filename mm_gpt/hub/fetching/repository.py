"""Fetch a model repository of the Hugging Face hub by its name: only what a model needs, never code or pickles.

The hub lists the files of a repository with sizes and checksums; the ones wanted here are taken by name, and a file is
used only when its checksum is the listed one (sha256, or git's own sha1 for small files). They go into the cache that
`huggingface_hub` and the tools built on it share, in its published layout, so nothing on the disk is fetched again:

    models--owner--name/blobs/CHECKSUM, snapshots/COMMIT/FILE -> ../../blobs/CHECKSUM, refs/REVISION (holds the commit)

`huggingface_hub` gives the login and its settings. Its own download function throws the part of an
interrupted file away, compares no checksums, and tells the hub which libraries are installed. So the transfer is ours,
plain HTTP: an interrupted file stays as `blobs/CHECKSUM.partial` and is continued by the next call.

Environment: `HF_HOME`, `HF_HUB_CACHE` (cache folder), `HF_ENDPOINT` (mirror), `HF_TOKEN` (login), `MM_GPT_OFFLINE` or
`HF_HUB_OFFLINE` (no network at all), `HF_HUB_DOWNLOAD_TIMEOUT` (seconds for an answer, and for each piece of a file;
10), and what `mm_gpt.network.client` reads (proxies, certificates).
"""

import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_gpt.errors import CheckpointError, DownloadError, MMGPTError, URLError
from mm_gpt.hub.fetching.download import RETRY_DELAYS, _mismatch, _offline
from mm_gpt.network.client import (
    BUSY_STATUSES,
    NETWORK_ERRORS,
    BrokenConnectionError,
    Deadline,
    basic_login,
    open_url,
    read_body,
    read_pieces,
    reason_of,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "processor.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "README.md",
)
"""Taken where the repository has them, before the weights: complete weights in the cache mean a complete model."""
VOCABULARY_FILES = ("tokenizer.json", "vocab.json")
"""A tokenizer has one of them."""
PROGRESS_BYTES = 1 << 20
"""A connection that brought this much before it broke has earned its retries anew."""

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@(\w[\w./-]{{0,200}}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors")
MAX_LISTING_BYTES = 64 << 20


class _DroppedError(Exception):
    """The hub went away or never answered: a copy in the cache may help."""


class _BusyError(_DroppedError):
    """The hub says that it is busy: worth another attempt."""


@dataclass(frozen=True)
class _Repository:
    """A repository at a revision, and its folder in the cache."""

    name: str
    """`owner/name`"""
    revision: str
    folder: Path

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit


@dataclass(frozen=True)
class _File:
    """A file as the hub lists it."""

    name: str
    size: int
    checksum: str
    """sha256 of a large file, the sha1 that git calls it by otherwise; also its name in the cache."""

    def problem(self, path: Path) -> str | None:
        """None if `path` holds this file, else one line: expected and actual."""
        if len(self.checksum) == 64:
            return _mismatch(path, self.size, self.checksum)
        if wrong_size := _mismatch(path, self.size, None):
            return wrong_size
        content = b"blob %d\0" % self.size + path.read_bytes()
        actual = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return None if actual == self.checksum else f"expected git sha1 {self.checksum}, got {actual}"


def is_repository_name(text: str) -> bool:
    """Whether `text` reads "owner/name" or "owner/name@revision" and is no path that exists here."""
    return _parse(text) is not None and not os.path.exists(text)


def fetch_repository(
    name: str,
    *,
    progress: bool | None = None,
    weights: bool = True,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """The local folder of the hub repository "owner/name" or "owner/name@revision"; downloads what is missing.

    `weights` False leaves the weights out, for a repository whose tokenizer alone is wanted. `check` is called with the
    folder when the small files are there, before any weights are fetched; what it raises ends the call.
    `progress`: True shows a bar on stderr, False does not, None shows it when stderr is a terminal. When the hub is out
    of reach, a complete copy in the cache is used. Raises MMGPTError for a name that cannot be one, DownloadError when
    files cannot be had, and CheckpointError when the repository is no model that can be read safely.
    """
    parsed = _parse(name)
    if parsed is None:
        raise MMGPTError(f"{name!r} is not the name of a hub repository: write owner/name or owner/name@revision")
    repo_name, revision = parsed
    repository = _Repository(repo_name, revision, _cache_folder() / f"models--{repo_name.replace('/', '--')}")
    if _offline():
        if (cached := _cached(repository, weights)) is None:
            raise DownloadError(
                f"offline mode is on (MM_GPT_OFFLINE or HF_HUB_OFFLINE), and {repository} is not, or not completely, "
                f"in {repository.folder}; {_by_hand(repository)}"
            )
        return cached
    hub = _Hub(repository)
    try:
        commit, files = hub.list_files()
    except _DroppedError as error:
        if (cached := _cached(repository, weights)) is None:
            raise DownloadError(f"cannot fetch {repository}: {error}; {_by_hand(repository)}") from None
        logger.warning("%s; using the copy of %s in the cache", error, repository)
        return cached
    return _fetch_files(hub, commit, files, progress, weights, check)


def _parse(text: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match[1] or match[1].endswith(".git"):
        return None
    revision = match[2] or "main"
    return None if re.search(r"/(/|\.|$)", revision) else (match[1], revision)


def _cache_folder() -> Path:
    # Read at every call: the library keeps what it saw when the first package imported it.
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return Path(os.path.expandvars(folder)).expanduser().absolute()
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser().absolute() / "hub"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser().absolute() if xdg else Path.home() / ".cache") / "huggingface" / "hub"


def _by_hand(repository: _Repository) -> str:
    revision = "" if repository.revision == "main" else f" --revision {repository.revision}"
    command = f'hf download {repository.name}{revision} --exclude "*/*" --exclude "*.bin" --local-dir FOLDER'
    return f"on a machine with access run: {command}, copy the folder here, and give it: --model FOLDER"


def _cached(repository: _Repository, weights: bool) -> Path | None:
    """The snapshot in the cache if it has everything that a model, or a tokenizer alone, cannot do without."""
    commit = repository.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (repository.folder / "refs" / repository.revision).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    folder = repository.snapshot(commit)
    if not weights:
        return folder if any(os.path.isfile(folder / name) for name in VOCABULARY_FILES) else None
    needed = [CONFIG_FILE, WEIGHTS_FILE]
    if not os.path.isfile(folder / WEIGHTS_FILE) and os.path.isfile(folder / INDEX_FILE):
        needed = [CONFIG_FILE, *_shards(folder / INDEX_FILE)]
    return folder if all(os.path.isfile(folder / name) for name in needed) else None


def _shards(index: Path) -> list[str]:
    """The weight files that an index names. Raises CheckpointError for one that is not in the same folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of weight files ({reason_of(error)})") from None
    wrong = [name for name in names if not (isinstance(name, str) and _SHARD.fullmatch(name))]
    if wrong or not names:
        what = f"names {wrong[0]!r}, which is not a safetensors file beside it" if wrong else "names no file"
        raise CheckpointError(f"{index} {what}")
    return sorted(names)


class _Hub:
    """The hub's answers about one repository, with the login of `huggingface_hub`."""

    def __init__(self, repository: _Repository) -> None:
        from huggingface_hub import constants, get_token

        self.repository = repository
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.site = _site(endpoint)
        parts = urllib.parse.urlsplit(endpoint)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        self.endpoint = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self.wait_seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        self.login = basic_login(user, password) if user else f"Bearer {token}" if token else ""

    def list_files(self) -> tuple[str, dict[str, Any]]:
        """The commit of the revision, and what the hub says about each file. Raises _DroppedError when out of reach."""
        revision = urllib.parse.quote(self.repository.revision, safe="")
        for delay in (*RETRY_DELAYS, None):
            try:
                path = f"api/models/{self.repository.name}/revision/{revision}?blobs=true"
                with self._get(path) as (answer, deadline):
                    deadline.extend(self.wait_seconds)
                    body = read_body(answer, MAX_LISTING_BYTES)
                break
            except (URLError, *NETWORK_ERRORS) as error:
                raise _DroppedError(f"no connection to {self.site} ({reason_of(error)})") from None
            except _BusyError:
                if delay is None:
                    raise
                time.sleep(delay)
        try:
            values = json.loads(body)
            commit, listing = values["sha"], {entry["rfilename"]: entry for entry in values["siblings"]}
            if not _COMMIT.fullmatch(commit):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise DownloadError(f"{self.site} does not answer like a model hub; check HF_ENDPOINT") from None
        return commit, listing

    def download(self, commit: str, file: _File, partial: Path, bar: Any) -> None:
        """Download into `partial`, continuing what is there, and check size and checksum. Raises DownloadError."""
        start, continued, attempts = bar.n, _size(partial) > 0, iter(RETRY_DELAYS)
        while True:
            before = _size(partial)
            try:
                self._download_once(commit, file, partial, bar, start)
            except _DroppedError as error:
                if _size(partial) >= before + PROGRESS_BYTES:
                    attempts = iter(RETRY_DELAYS)
                if (delay := next(attempts, None)) is None:
                    raise DownloadError(
                        f"cannot fetch {file.name} of {self.repository}: {error}; the next call continues it, or "
                        f"{_by_hand(self.repository)}"
                    ) from None
                logger.info("%s: %s; continuing in %.1f s", file.name, error, delay)
                time.sleep(delay)
                continue
            problem = file.problem(partial)
            if problem is None:
                return _move_bar(bar, start + file.size)
            partial.unlink()
            if not continued:
                raise DownloadError(f"{self.site} sent a wrong {file.name} of {self.repository}: {problem}")
            # The part from an earlier call may have been broken: one fresh start settles it.
            continued = False

    def _download_once(self, commit: str, file: _File, partial: Path, bar: Any, start: int) -> None:
        offset = _size(partial)
        if offset >= file.size > 0:
            return  # complete, or too long: the check that follows decides
        path = f"{self.repository.name}/resolve/{commit}/{urllib.parse.quote(file.name)}"
        with self._get(path, {"Range": f"bytes={offset}-"} if offset else {}) as (answer, deadline):
            if offset and answer.status == 200:
                offset = 0  # the range was ignored, and everything is sent
            elif offset and not answer.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                partial.unlink()
                raise _DroppedError(f"{self.site} cannot continue at byte {offset}")
            _move_bar(bar, start + offset)
            with _disk_errors(partial), partial.open("r+b" if offset else "wb") as out:
                out.seek(offset)
                try:
                    for chunk in read_pieces(answer, deadline, self.wait_seconds):
                        if out.tell() + len(chunk) > file.size:
                            raise DownloadError(f"{self.site} sent more than the {file.size} bytes of {file.name}")
                        out.write(chunk)
                        bar.update(len(chunk))
                except BrokenConnectionError as error:
                    raise _DroppedError(f"no connection to {self.site} ({error})") from None
        if _size(partial) < file.size:
            raise _DroppedError(f"{self.site} sent {_size(partial)} of {file.size} bytes")

    @contextmanager
    def _get(
        self, path: str, headers: dict[str, str] | None = None
    ) -> Iterator[tuple[http.client.HTTPResponse, Deadline]]:
        """The answer, still to be read, and within what. Raises DownloadError for a refusal, else _DroppedError."""
        deadline = Deadline(self.wait_seconds)
        # Not compressed: sizes must add up.
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        try:
            answer = open_url(f"{self.endpoint}/{path}", deadline, trusted=True, headers=headers, login=self.login)
        except URLError as error:
            is_late = isinstance(error.__cause__, TimeoutError)
            reason = f"no answer within {self.wait_seconds:g} s" if is_late else reason_of(error)
            raise _DroppedError(f"no connection to {self.site} ({reason})") from None
        with answer:
            if answer.status in BUSY_STATUSES:
                raise _BusyError(f"{self.site} answers HTTP {answer.status}")
            if answer.status not in (200, 206, 416):  # 416: there is nothing at that range
                raise DownloadError(self._refusal(answer))
            yield answer, deadline

    def _refusal(self, answer: Any) -> str:
        code, message = (answer.headers.get(f"X-Error-{key}", "") for key in ("Code", "Message"))
        status, name = answer.status, self.repository.name
        if code == "GatedRepo":
            return f"{name} is gated: accept its terms at {self.site}/{name}, then set HF_TOKEN (or run: hf auth login)"
        if code == "RevisionNotFound":
            return f"{name} has no revision {self.repository.revision!r} (a branch, a tag or a full commit)"
        if status == 401 and "credentials" in message.lower():
            return f"{self.site} refuses the login (HF_TOKEN, or what hf auth login has stored)"
        if code == "RepoNotFound" or (status in (401, 404) and not code):
            return (
                f"{self.site} has no repository {name!r}, or it is private (then set HF_TOKEN); "
                "there is no folder of that name here either"
            )
        details = " ".join((message or code).split())
        return f"{self.site} refuses {name}: HTTP {status}{f' ({details})' if details else ''}"


def _site(endpoint: str) -> str:
    """The host, without the login that a mirror's address may carry: this goes into messages."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname:
            return f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError:
        pass
    raise DownloadError("HF_ENDPOINT is not an http(s) address")


def _fetch_files(
    hub: _Hub,
    commit: str,
    listing: dict[str, Any],
    progress: bool | None,
    weights: bool,
    check: Callable[[Path], None] | None,
) -> Path:
    repository, folder = hub.repository, hub.repository.snapshot(commit)
    if weights and CONFIG_FILE not in listing:
        raise CheckpointError(f"{repository} has no {CONFIG_FILE}: it is no model that can be loaded")
    small = [_listed(repository, listing, name) for name in SMALL_FILES if name in listing]
    if not weights:
        large = []
    elif WEIGHTS_FILE in listing:
        large = [_listed(repository, listing, WEIGHTS_FILE)]
    elif INDEX_FILE in listing:
        index = _listed(repository, listing, INDEX_FILE)
        _store(hub, commit, [index], progress=False)
        shards = _shards(folder / INDEX_FILE)
        large = [_listed(repository, listing, name) for name in shards]
    else:
        found = [name for name in listing if name.endswith(_OTHER_WEIGHTS)]
        named = ", ".join(found[:4]) + (" ..." if len(found) > 4 else "") if found else "no weights at all"
        raise CheckpointError(
            f"{repository} has neither {WEIGHTS_FILE} nor {INDEX_FILE} (found: {named}); pickles (.bin, .pt, .pkl) are "
            "never read, because they can run any code"
        )
    if large and check is not None and not all(_is_stored(file, folder / file.name) for file in large):
        _store(hub, commit, small, progress=False)
        check(folder)
    _store(hub, commit, [*small, *large], progress)
    reference = repository.folder / "refs" / repository.revision
    # Without the weights, offline calls must not be led away from an earlier commit that has them.
    if repository.revision != commit and (weights or not reference.exists()):
        # Last: until all is there, offline calls go on with the earlier commit. A read-only cache still serves.
        with suppress(OSError):
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit, encoding="utf-8")
    return folder


def _listed(repository: _Repository, listing: dict[str, Any], name: str) -> _File:
    if name not in listing:
        raise CheckpointError(f"{repository}: {INDEX_FILE} names {name}, which the repository does not have")
    entry = listing[name]
    try:
        large = entry.get("lfs")
        size, checksum = (large["size"], large["sha256"]) if large else (entry["size"], entry["blobId"])
        # The checksum becomes a file name in the cache.
        if not isinstance(size, int) or not _CHECKSUM.fullmatch(checksum):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DownloadError(f"the hub lists {name} of {repository} without a size and a checksum") from None
    return _File(name, size, checksum)


def _store(hub: _Hub, commit: str, files: list[_File], progress: bool | None) -> None:
    """Bring the files into the cache, except those that are there."""
    repository, snapshot = hub.repository, hub.repository.snapshot(commit)
    if all(_is_stored(file, snapshot / file.name) for file in files):
        return
    from huggingface_hub.utils import WeakFileLock

    blobs = repository.folder / "blobs"
    lock = repository.folder.parent / ".locks" / repository.folder.name / "mm-gpt.lock"
    with _disk_errors(repository.folder):
        for folder in (blobs, snapshot, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # Only now: another process may have fetched them while this one waited.
            missing = [file for file in files if not _is_stored(file, snapshot / file.name)]
            to_fetch = [file for file in missing if not _is_stored(file, blobs / file.checksum)]
            _download_all(hub, commit, to_fetch, progress)
            for file in missing:
                (snapshot / file.name).unlink(missing_ok=True)
                (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.checksum))


def _download_all(hub: _Hub, commit: str, files: list[_File], progress: bool | None) -> None:
    blobs = hub.repository.folder / "blobs"
    partials = [blobs / f"{file.checksum}.partial" for file in files]
    needed = sum(file.size - _size(partial) for file, partial in zip(files, partials, strict=True))
    if needed > (free := shutil.disk_usage(blobs).free):
        raise DownloadError(
            f"the disk is full: {hub.repository} needs {needed / 1e6:.0f} MB in {blobs}, {free / 1e6:.0f} MB are free; "
            "free some space or set HF_HOME"
        )
    # disable=None: tqdm shows the bar only on a terminal.
    silent = None if progress is None else not progress
    total = sum(file.size for file in files)
    style: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "file": sys.stderr}
    with tqdm(desc=hub.repository.name, total=total, disable=silent, **style) as bar:
        for file, partial in zip(files, partials, strict=True):
            hub.download(commit, file, partial, bar)
            os.replace(partial, blobs / file.checksum)
        bar.leave = bar.n > 0


def _is_stored(file: _File, path: Path) -> bool:
    return os.path.isfile(path) and _size(path) == file.size


def _size(path: Path) -> int:
    return path.stat().st_size if os.path.isfile(path) else 0  # False, too, for a folder that we may not enter


def _move_bar(bar: Any, position: int) -> None:
    bar.n = bar.last_print_n = position
    bar.refresh()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Says what is wrong with our own disk. Network errors are caught before they get here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk is full: {path}; free some space or set HF_HOME") from None
        raise DownloadError(f"cannot write to the cache: {path} ({reason_of(error)}); set HF_HOME") from None
