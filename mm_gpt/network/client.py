"""The HTTP client that everything here is fetched with.

By default a URL is a stranger's: it is fetched from public addresses only, the very ones that were checked, and no
proxy is used, since a proxy would resolve the name again, where no check reaches. An address that the user configured
(a mirror, the hub) is `trusted`: it may be private, and the proxies of the environment are used.

Environment: `SSL_CERT_FILE`, `SSL_CERT_DIR`, `REQUESTS_CA_BUNDLE`, `PIP_CERT` (certificates); for trusted addresses
`http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`.
"""

import base64
import http.client
import io
import os
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from mm_gpt.errors import URLError
from mm_gpt.network.addresses import checked_host, is_public_address
from mm_gpt.network.urls import one_line, short_name

MAX_REDIRECTS = 5
BUSY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""What a server answers that may do better in a moment."""


class Deadline:
    """Until when a download may take; `extend` gives it more time, for a body that arrives in pieces."""

    def __init__(self, seconds: float) -> None:
        self.extend(seconds)

    def extend(self, seconds: float) -> None:
        """`seconds` from now, whatever was left."""
        self.seconds, self._at = seconds, time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds, more than 0. Raises TimeoutError when there are none."""
        seconds = self._at - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


def fetch_bytes(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    max_redirects: int = MAX_REDIRECTS,
    allow_private_addresses: bool = False,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """The whole body behind an http(s) URL, within `timeout_s` for everything. Raises URLError naming `url`."""
    deadline = Deadline(timeout_s)
    response = open_url(
        url,
        deadline,
        max_redirects=max_redirects,
        allow_private_addresses=allow_private_addresses,
        headers=headers,
    )
    try:
        if not 200 <= response.status < 300:
            raise URLError(f"the server answered {response.status} {one_line(response.reason)}".rstrip())
        return read_body(response, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _url_error(url, response.url, error, deadline) from error
    finally:
        response.close()


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """All of an answer's body. Raises URLError, with the reason only, when it is larger or ends early."""
    expected = response.length
    too_large = URLError(f"larger than the limit of {max_bytes:,} bytes")
    if expected is not None and expected > max_bytes:
        raise too_large
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise too_large
    if expected is not None and len(body) < expected:
        raise URLError(f"the connection closed after {len(body):,} of {expected:,} bytes")
    return body


def open_url(
    url: str,
    deadline: Deadline,
    *,
    max_redirects: int = MAX_REDIRECTS,
    allow_private_addresses: bool = False,
    trusted: bool = False,
    headers: Mapping[str, str] | None = None,
    login: str = "",
) -> http.client.HTTPResponse:
    """The answer to a GET of an http(s) URL, whatever its status. Close it.

    Each host is resolved once; unless `trusted` or `allow_private_addresses`, a URL is refused when any address of its
    host is not public. The connection goes to a checked address itself, so that a second DNS answer cannot change the
    goal. Redirects start over. `login` (an Authorization header) goes to the host and port of `url` and nowhere else.
    `deadline` holds for resolving, connecting, TLS and headers, and goes on for the body. `response.url` is where
    redirects led. Raises URLError naming `url`; its cause is an OSError or HTTPException where another attempt may
    succeed.
    """
    target = url
    try:
        for _ in range(max_redirects + 1):
            secret = {"Authorization": login} if login and _is_same_server(url, target) else {}
            response = _get(target, deadline, allow_private_addresses, trusted, {**(headers or {}), **secret})
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                response.url = target
                return response
            response.close()
            target = urljoin(target, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _url_error(url, target, error, deadline) from (error.__cause__ if isinstance(error, URLError) else error)
    raise URLError(f"{short_name(url)}: more than {max_redirects} redirects")


def _is_same_server(url: str, target: str) -> bool:
    """Whether a login for `url` may go to `target`: the same host and port, or the same host's TLS instead of none."""
    first, second = urlsplit(url), urlsplit(target)
    ports = {"http": 80, "https": 443}
    before, after = ((p.scheme, p.hostname, p.port or ports.get(p.scheme)) for p in (first, second))
    return before == after or (before, after) == (("http", first.hostname, 80), ("https", first.hostname, 443))


def _url_error(url: str, target: str, error: Exception, deadline: Deadline) -> URLError:
    """`error` with the URL's name. A URLError raised inside holds the reason only."""
    name = short_name(url)
    if isinstance(error, TimeoutError):
        return URLError(f"{name}: no complete answer within {deadline.seconds:g} s")
    via = f" (redirected to {short_name(target)})" if isinstance(error, URLError) and target != url else ""
    return URLError(f"{name}{via}: {one_line(error) or type(error).__name__}")


def _get(
    url: str, deadline: Deadline, allow_private_addresses: bool, trusted: bool, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    """One GET. URLError here holds the reason only."""
    parts = urlsplit(url)
    host, port = checked_host(parts)
    netloc = f"[{host}]" if ":" in host else host
    path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]")
    path += f"?{quote(parts.query, safe='/%:=&~+!$,;@()*[]?')}" if parts.query else ""
    fixed = {"Host": netloc if parts.port is None else f"{netloc}:{port}"}
    fixed |= {"User-Agent": "mm-gpt", "Connection": "close"}
    proxy = _proxy_of(parts.scheme, netloc, port) if trusted else None
    if proxy is not None:
        sock = _connect_to(str(proxy.hostname), proxy.port or 80, deadline, public_only=False)
    else:
        sock = _connect_to(host, port, deadline, public_only=not (trusted or allow_private_addresses))
    try:
        if proxy is not None and parts.scheme == "http":
            path = f"http://{fixed['Host']}{path}"
            fixed |= _proxy_login(proxy)
        elif proxy is not None:
            _open_tunnel(sock, f"{netloc}:{port}", proxy, deadline)
        if parts.scheme == "https":
            # the certificate is checked for the name in the URL, although the connection went to an address
            sock.settimeout(deadline.remaining())
            sock = _tls_context().wrap_socket(sock, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _DeadlineSocket(sock, deadline)
        connection.request("GET", path, headers={**headers, **fixed})
        return connection.getresponse()
    except BaseException:
        sock.close()
        raise


# ---- Connections ----


def _connect_to(host: str, port: int, deadline: Deadline, *, public_only: bool) -> socket.socket:
    addresses = _resolve_within(host, port, deadline)
    for address in addresses if public_only else ():
        if not is_public_address(address):
            raise URLError(f"{host} is at {address}, which is not a public address")
    for address in addresses[:-1]:  # half of what is left, so that one dead address does not use up the time
        try:
            return _connect(address, port, deadline.remaining() / 2)
        except OSError:
            continue
    return _connect(addresses[-1], port, deadline.remaining())


def _resolve_within(host: str, port: int, deadline: Deadline) -> list[str]:
    """`_resolve` with a limit: the system's resolver has none that could be set."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(_resolve(host, port))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.remaining())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _resolve(host: str, port: int) -> list[str]:
    """All addresses of `host`. The resolver also turns odd spellings (2130706433, 0x7f.1) into what they mean."""
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in answers))


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=timeout_s)


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
    for name in ("REQUESTS_CA_BUNDLE", "PIP_CERT"):
        if bundle := os.environ.get(name):
            try:
                if os.path.isdir(bundle):
                    context.load_verify_locations(capath=bundle)
                else:
                    context.load_verify_locations(cafile=bundle)
            except OSError as error:
                raise URLError(f"{name}={bundle}: cannot read the certificates ({error.strerror or error})") from None
    return context


class _DeadlineSocket(io.RawIOBase):
    """What http.client needs of a socket, with one deadline for everything.

    A socket's own timeout starts again with every byte, so a server that sends one now and then would never end.
    """

    def __init__(self, sock: socket.socket, deadline: Deadline, *, closes: bool = False) -> None:
        self._sock, self._deadline, self._closes = sock, deadline, closes

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._deadline.remaining())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        # http.client closes self before the body is read; the response's own file ends the connection
        return io.BufferedReader(_DeadlineSocket(self._sock, self._deadline, closes=True))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._sock.settimeout(self._deadline.remaining())
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        if self._closes:
            self._sock.close()
        super().close()


# ---- Proxies ----


def _proxy_of(scheme: str, host: str, port: int) -> SplitResult | None:
    """The proxy that the environment names for a host, or None."""
    from urllib.request import getproxies, proxy_bypass  # slow to import, and needed for trusted addresses only

    proxies = getproxies()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or proxy_bypass(f"{host}:{port}"):
        return None
    proxy = urlsplit(address if "://" in address else f"http://{address}")
    # As most programs do, an https:// proxy is spoken to in plain text, too; what goes through it is encrypted anyway
    if proxy.scheme not in ("http", "https") or not proxy.hostname:
        raise URLError(f"the proxy {short_name(address)} in the environment is no http proxy")
    return proxy


def _proxy_login(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    return {"Proxy-Authorization": basic_login(proxy.username, proxy.password or "")}


def basic_login(user: str, password: str) -> str:
    """An Authorization header of a user name and password as a URL spells them."""
    return f"Basic {base64.b64encode(f'{unquote(user)}:{unquote(password)}'.encode()).decode()}"


def _open_tunnel(sock: socket.socket, goal: str, proxy: SplitResult, deadline: Deadline) -> None:
    """Ask a proxy for a connection to `goal` (RFC 9110, CONNECT)."""
    stream = _DeadlineSocket(sock, deadline)
    headers = {"Host": goal, "User-Agent": "mm-gpt", **_proxy_login(proxy)}
    lines = [f"CONNECT {goal} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    stream.sendall("\r\n".join(lines).encode("ascii"))
    head, byte = bytearray(), bytearray(1)
    # one byte at a time: what follows the head belongs to the tunnel
    while not head.endswith((b"\r\n\r\n", b"\n\n")):
        if len(head) > 2**16 or stream.readinto(memoryview(byte)) == 0:
            raise ConnectionError("the proxy did not answer in HTTP")
        head += byte
    status = one_line(head.splitlines()[0].decode("latin-1"))[:100]
    if not re.match(r"HTTP/1\.\d 2\d\d\b", status):
        raise ConnectionError(f"the proxy answered {status}")
