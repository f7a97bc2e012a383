"""Large files behind http(s) URLs: guarded as images are, resumed when a connection breaks, never endless.

An `HttpFile` reads from where it stands over one connection and opens another with a Range header after a seek or a
break. Every connection passes the guard of `network`: public addresses only, redirects checked again.
"""

import http.client
import io
import logging
import os
import re
import socket
import ssl
import time
from dataclasses import dataclass, field

from mm_gpt.errors import ConfigError, MMGPTError, URLError
from mm_gpt.network.client import Deadline, open_url
from mm_gpt.network.urls import short_name

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 18
"""One wait on the network is for at most this many bytes; see `HttpLimits.stall_s`."""
_REFILL_BYTES = 64 << 20  # so much progress, and a file has all its retries again
_SKIP_BYTES = 1 << 20  # reading over a gap of this size is faster than a new connection
_IDLE_S = 10.0  # a server may hang up on a reader that paused so long: no fault that counts
_BUSY_STATUSES = (408, 425, 429, 500, 502, 503, 504)


def _private_by_environment() -> bool:
    return os.environ.get("MM_GPT_PRIVATE_ADDRESSES", "").lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """When reading from a server is given up."""

    max_bytes: int = 1 << 40
    """Of one file. Larger ones are refused when their size is announced, or when it is reached."""
    connect_s: float = 30.0
    """For connecting, TLS, redirects and the answer's headers together."""
    stall_s: float = 60.0
    """For every 256 KiB that follow: a server that drips slower is a broken one."""
    timeout_s: float = 6 * 3600.0
    """Of waiting on the network for one opened file, in all. The reader's own time does not count."""
    retries: int = 4
    """New attempts after a break. 64 MiB of progress give them back."""
    retry_delay_s: float = 0.5
    """Before the first new attempt; doubled for each one after it, up to 30 s."""
    allow_private_addresses: bool = field(default_factory=_private_by_environment)
    """Also read from localhost and the local network; `MM_GPT_PRIVATE_ADDRESSES=1` turns it on."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "connect_s", "stall_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("retries", "retry_delay_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, and is {getattr(self, name)}")


class ReadError(MMGPTError):
    """A file that was opened cannot be read to its end. What came before it is good."""


class _DroppedError(Exception):
    """Another attempt may succeed."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _PartError(_DroppedError):
    """The answer is complete and the file is not: the next request is no retry."""


class HttpFile(io.RawIOBase):
    """The body behind `url`, opened when made. Wrap it in `io.BufferedReader`.

    `size` in bytes is None where the server does not tell, `tag` is the server's name for this version ("": none),
    `seekable()` says whether it gives ranges. Raises MMGPTError (URLError for refused addresses) naming the URL, and
    ReadError when it breaks later.
    """

    def __init__(self, url: str, limits: HttpLimits | None = None) -> None:
        self.name = short_name(url)
        self.size: int | None = None
        self.tag = ""
        self._url, self._limits = url, limits or HttpLimits()
        self._ranges = False
        self._position = self._reached = self._began = 0
        self._response: http.client.HTTPResponse | None = None
        self._deadline = Deadline(self._limits.connect_s)
        self._waited_s, self._last_read = 0.0, time.monotonic()
        self._failures, self._refill_at = 0, _REFILL_BYTES
        self._opened = False
        while not self._opened:
            try:
                self._connect()
                self._opened = True
            except _DroppedError as error:
                self._pause(error)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._ranges and self.size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation(f"{self.name}: the server gives no ranges")
        assert self.size is not None
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        target = max(0, start + offset)
        gap = target - self._position
        if gap and not (0 < gap <= _SKIP_BYTES and self._response is not None and self._skip(gap)):
            self._hang_up()
            self._position = target
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = memoryview(buffer).cast("B")[:PIECE_BYTES]
        idle = time.monotonic() - self._last_read > _IDLE_S
        while not (len(piece) == 0 or (self.size is not None and self._position >= self.size)):
            try:
                if self._response is None:
                    self._connect()
                got = self._receive(piece)
            except _DroppedError as error:
                if not idle and not isinstance(error, _PartError):
                    self._pause(error)
                idle = False
                self._hang_up()
                continue
            self._last_read = time.monotonic()
            self._position += got
            self._reached = max(self._reached, self._position)
            if self._position > self._limits.max_bytes:
                raise ReadError(f"{self.name}: larger than the limit of {self._limits.max_bytes:,} bytes")
            if self._reached >= self._refill_at:
                self._failures, self._refill_at = 0, self._reached + _REFILL_BYTES
            return got
        return 0

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _receive(self, piece: memoryview) -> int:
        """At least one byte, or 0 at the end of a body of unknown length."""
        assert self._response is not None
        started = time.monotonic()
        self._deadline.extend(min(self._limits.stall_s, self._left_s()))
        try:
            got = self._response.readinto(piece)
        except TimeoutError:
            raise _DroppedError(f"no {len(piece):,} bytes within {self._deadline.seconds:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _DroppedError(_reason(error)) from error
        finally:
            self._waited_s += time.monotonic() - started
        if got == 0 and self.size is not None:
            if self._response.length == 0 and self._position - self._began >= PIECE_BYTES:
                raise _PartError("a part of the file, as some servers send it")
            raise _DroppedError(f"the connection closed after {self._position:,} of {self.size:,} bytes")
        return got

    def _connect(self) -> None:
        """Open the body at the position. Raises _DroppedError where another attempt may succeed."""
        started = time.monotonic()
        self._deadline.extend(min(self._limits.connect_s, self._left_s()))
        try:
            response = open_url(
                self._url,
                self._deadline,
                allow_private_addresses=self._limits.allow_private_addresses,
                # identity: a compressed answer could not be continued in its middle
                headers={"Accept": "*/*", "Accept-Encoding": "identity", "Range": f"bytes={self._position}-"},
            )
        except URLError as error:
            cause = error.__cause__
            lasting = isinstance(cause, ssl.SSLCertVerificationError) or (
                isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
            )
            if lasting or not isinstance(cause, OSError | http.client.HTTPException):
                raise
            raise _DroppedError(str(error).removeprefix(f"{self.name}: ")) from error
        finally:
            self._waited_s += time.monotonic() - started
        try:
            self._take(response)
        except BaseException:
            response.close()
            self._response = None
            raise

    def _take(self, response: http.client.HTTPResponse) -> None:
        status, headers = response.status, response.headers
        if status in _BUSY_STATUSES:
            wait = headers.get("Retry-After", "")
            raise _DroppedError(f"the server answered {status}", float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)
        if status == 416 and not self._opened:  # a range of an empty file
            response.close()
            self.size, self._ranges = 0, True
            return
        if status not in (200, 206):
            raise self._error(f"the server answered {status}")
        length, start = headers.get("Content-Length", ""), 0
        size = int(length) if re.fullmatch(r"\d{1,18}", length) and response.chunked is False else None
        if status == 206:
            span = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("Content-Range", ""))
            if span is None or int(span[1]) != self._position:
                raise self._error(f"the server sent the range {headers.get('Content-Range')!r:.80}")
            start, size = self._position, int(span[2]) + 1 if span[3] == "*" else int(span[3])
        tag = headers.get("ETag", "")
        tag = "" if tag.startswith("W/") else tag
        if self._opened and (size != self.size or tag != self.tag):
            raise self._error("it changed on the server while it was read")
        if size is not None and size > self._limits.max_bytes:
            raise self._error(f"{size:,} bytes, more than the limit of {self._limits.max_bytes:,} bytes")
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        # Some servers announce a .gz file as a compressed answer. Its bytes are the file all the same.
        if encoding not in ("", "identity") and not self._url.partition("?")[0].endswith((".gz", ".zst", ".bz2")):
            raise self._error(f"the server sent it compressed ({encoding!r:.40}) though asked not to")
        self.size, self.tag, self._ranges, self._response = size, tag, status == 206, response
        self._began = start
        target, self._position = self._position, start
        if target != start and not self._skip(target - start):  # a server without ranges starts again
            self._position = target
            raise _DroppedError("the connection closed")

    def _skip(self, count: int) -> bool:
        """Read over `count` bytes; False when the connection broke."""
        scrap = memoryview(bytearray(min(count, PIECE_BYTES)))
        while count:
            try:
                got = self._receive(scrap[:count])
            except _DroppedError:
                got = 0
            if got == 0:
                return False
            count -= got
            self._position += got
        return True

    def _pause(self, error: _DroppedError) -> None:
        """Wait before another attempt. Raises when there have been enough."""
        if self._failures >= self._limits.retries:
            raise self._error(str(error)) from error.__cause__
        delay = max(self._limits.retry_delay_s * 2**self._failures, error.wait_s)
        self._failures += 1
        logger.info("%s: %s; trying again", self.name, error)
        time.sleep(min(delay, 30.0, self._left_s()))

    def _left_s(self) -> float:
        left = self._limits.timeout_s - self._waited_s
        if left <= 0:
            raise self._error(f"not complete within {self._limits.timeout_s:g} s")
        return left

    def _error(self, reason: str) -> MMGPTError:
        text = f"{self.name}: {reason}"
        return ReadError(text) if self._opened else MMGPTError(text)

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:200]
