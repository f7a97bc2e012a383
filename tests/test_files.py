"""Files from anywhere: what is opened, what is refused, and that nothing a server does makes it endless."""

import bz2
import contextlib
import errno
import gzip
import http.server
import io
import json
import multiprocessing
import os
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_gpt.datasets.reading import files, http_files, unpacked
from mm_gpt.datasets.reading.files import is_remote, list_files, local_copy, open_file, resolve
from mm_gpt.datasets.reading.http_files import HttpLimits, ReadError
from mm_gpt.datasets.reading.unpacked import open_unpacked, read_lines
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.datasets.sources import read_samples
from mm_gpt.errors import ConfigError, MMGPTError, URLError
from mm_gpt.network import client

DATA = bytes(range(256)) * 12_000  # 3 MB, so that a break can come in its middle
LOCAL = HttpLimits(allow_private_addresses=True, retry_delay_s=0.01, stall_s=2, connect_s=2)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/")
        self.server.seen.append((name, self.headers["Range"]))
        route = getattr(self, f"do_{name.split('.')[0].replace('-', '_')}", None)
        if route:
            with contextlib.suppress(OSError):
                route()
        elif name in self.server.files:
            self.send(self.server.files[name])
        else:
            self.send_error(404)

    def send(self, data: bytes, *, until: int | None = None, tag: str = '"1"', ranges: bool = True) -> None:
        start = int(self.headers["Range"][6:-1]) if ranges and self.headers["Range"] else 0
        if start and start >= len(data):
            return self.send_error(416)
        self.send_response(206 if ranges else 200)
        if ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(data[start : None if until is None else start + until])
        return None

    def do_dying(self) -> None:
        """A third at a time, then the connection breaks."""
        self.send(DATA, until=1_000_000)

    def do_dying_without_ranges(self) -> None:
        self.send(DATA, until=1_000_000 * len(self.server.seen), ranges=False)

    def do_dead(self) -> None:
        self.send(gzip.compress(DATA, 0)[: len(DATA)], until=1000 if len(self.server.seen) == 1 else 0)

    def do_parts(self) -> None:
        """At most 300 kB an answer, as some stores do."""
        start = int(self.headers["Range"][6:-1])
        part = DATA[start : start + 300_000]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_plain(self) -> None:
        self.send(DATA, ranges=False)

    def do_empty(self) -> None:
        self.send_error(416)

    def do_unsized(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(DATA)

    def do_busy(self) -> None:
        if len(self.server.seen) < 3:
            return self.send_error(503)
        return self.send(DATA)

    def do_changing(self) -> None:
        self.send(DATA, until=1_000_000, tag=f'"{len(self.server.seen)}"')

    def do_huge(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10" + "0" * 12)
        self.end_headers()

    def do_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b"x" * 100_000)

    def do_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"x")
            time.sleep(0.02)

    def do_wrong_range(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 7-9/10")
        self.end_headers()

    def do_squeezed(self) -> None:
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(b"x"))

    def do_away(self) -> None:
        self.send_response(302)
        self.send_header("Location", "http://169.254.169.254/latest/")
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    server.seen, server.files = [], {"data.bin": DATA}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MM_GPT_OFFLINE", "MM_GPT_PRIVATE_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path / "cache"))


def fetch(url: str, **changes: Any) -> bytes:
    limits = HttpLimits(**{**{f: getattr(LOCAL, f) for f in LOCAL.__dataclass_fields__}, **changes})
    with open_file(url, limits=limits) as file:
        return file.read()


# ---- http(s) ----


@pytest.mark.parametrize("path", ["data.bin", "plain", "unsized", "busy", "dying", "dying-without-ranges", "parts"])
def test_every_server_that_can_be_read_is(url: str, path: str) -> None:
    """Stops: a break in the middle of a shard that costs or repeats bytes."""
    assert fetch(f"{url}/{path}") == DATA


def test_an_empty_file(url: str) -> None:
    assert fetch(f"{url}/empty") == b""


def test_a_break_is_continued_where_it_was(url: str, server: Any) -> None:
    fetch(f"{url}/dying")
    assert [int(wanted[6:-1]) for _, wanted in server.seen] == [0, 1_000_000, 2_000_000, 3_000_000]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "/missing: the server answered 404"),
        ("dead", "the connection closed after 1,000 of 3,072,000 bytes"),
        ("changing", "changed on the server"),
        ("huge", "more than the limit of"),
        ("endless", "larger than the limit of"),
        ("drip", r"no [\d,]+ bytes within 0\.3 s"),
        ("wrong-range", "sent the range"),
        ("squeezed", "sent it compressed"),
    ],
)
def test_servers_that_fail(url: str, path: str, message: str) -> None:
    """Stops: reading for ever, or taking half a file for a whole one."""
    started = time.monotonic()
    with pytest.raises(MMGPTError, match=message) as caught:
        fetch(f"{url}/{path}", max_bytes=5_000_000, stall_s=0.3, retries=2)
    assert f"{url}/{path}" in str(caught.value)
    assert time.monotonic() - started < 5


def test_total_time_is_bounded(url: str) -> None:
    with pytest.raises(MMGPTError, match="within"):
        fetch(f"{url}/drip", stall_s=60, timeout_s=0.3, retries=100)


def test_private_addresses_are_refused(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: SSRF by a shard list. Only the environment, which belongs to the user, opens the local network."""
    for location in (f"{url}/data.bin", "http://localhost:1/", "http://[::1]/a", "https://169.254.169.254/latest/"):
        with pytest.raises(URLError, match="not a public address"):
            open_file(location)
    assert server.seen == []
    monkeypatch.setenv("MM_GPT_PRIVATE_ADDRESSES", "1")
    with open_file(f"{url}/data.bin") as file:
        assert file.read() == DATA


def test_a_redirect_to_a_private_address(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops: a check of the first address only."""
    connect = client._connect
    monkeypatch.setattr(client, "_resolve", lambda host, port: ["93.184.215.14" if "test" in host else host])
    monkeypatch.setattr(client, "_connect", lambda a, p, timeout_s: connect("127.0.0.1", server.server_port, timeout_s))
    with pytest.raises(URLError, match=r"redirected to http://169.*not a public address"):
        open_file("http://shards.test/away")
    with open_file("http://shards.test/data.bin") as file:
        assert file.read() == DATA


def test_seeking(url: str, server: Any) -> None:
    with open_file(f"{url}/data.bin", seekable=True, limits=LOCAL) as file:
        for offset, whence, size in [(2_000_000, 0, 100), (-50, 2, 50), (10, 0, 700_000), (300, 1, 20), (0, 2, 5)]:
            position = file.seek(offset, whence)
            assert file.read(size) == DATA[position : position + size]
            assert file.tell() == min(position + size, len(DATA))


@pytest.mark.parametrize("path", ["plain", "data.zip"])
def test_archives_over_http(url: str, server: Any, path: str) -> None:
    """Stops: a zip or parquet that cannot be read from a server without ranges."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "hello")
    server.files["data.zip"] = packed.getvalue()
    location = f"{url}/{path}"
    with open_file(location, seekable=True, limits=LOCAL) as file:
        if path == "plain":
            file.seek(-10, os.SEEK_END)
            assert file.read() == DATA[-10:]
        else:
            assert zipfile.ZipFile(file).read("a.txt") == b"hello"


def test_a_pause_of_the_reader_is_no_fault_of_the_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_files, "_IDLE_S", -1.0)
    assert fetch(f"{url}/dying", retries=0) == DATA


def test_limits_are_checked() -> None:
    for wrong in ({"max_bytes": 0}, {"stall_s": -1.0}, {"retries": -1}, {"timeout_s": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HttpLimits(**wrong)  # type: ignore[arg-type]


# ---- Locations ----


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:cat /etc/passwd", "commands are not run"),
        ("PIPE:ls", "commands are not run"),
        ("simplecache::http://127.0.0.1/a", "chained"),
        ("zip://a.txt::http://127.0.0.1/a.zip", "chained"),
        ("memory://a::http://127.0.0.1/a", "chained"),
        ("ssh://host/a", "ssh:// is not read"),
        ("reference://a", "is not read"),
        ("ftp://host/a", "is not read"),
    ],
)
def test_what_is_no_location(location: str, message: str) -> None:
    """Stops: shells behind `pipe:`, and fsspec's own http, which has no guard."""
    for use in (open_file, list_files, is_remote, local_copy, open_unpacked):
        with pytest.raises(MMGPTError, match=message):
            use(location)


def test_local_files_only_of_the_regular_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for location, message in [
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing", "No such file"),
        ("a\0b", "null"),
    ]:
        with pytest.raises(MMGPTError, match=message):
            open_file(str(location))
    (tmp_path / "ä b.txt").write_text("x")
    for location in (tmp_path / "ä b.txt", f"file://{tmp_path}/%C3%A4%20b.txt"):
        with open_file(str(location)) as file:
            assert file.read() == b"x"


def test_listing(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "deep/c.tar", ".hidden", "deep/.git/d", "x{1,2}.tar", "s-008.tar", "s-010.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(pattern: str) -> list[str]:
        return [str(Path(p).relative_to(tmp_path)) for p in list_files(f"{tmp_path}/{pattern}")]

    assert names("") == ["a.tar", "b.tar", "deep/c.tar", "s-008.tar", "s-010.tar", "x{1,2}.tar"]
    assert names("*.tar") == ["a.tar", "b.tar", "s-008.tar", "s-010.tar", "x{1,2}.tar"]
    assert names("**/c.tar") == ["deep/c.tar"]
    assert names("{b,a}.tar") == ["a.tar", "b.tar"]
    assert names("x{1,2}.tar") == ["x{1,2}.tar"]
    with pytest.raises(MMGPTError, match=r"s-009.tar: no such file"):
        names("s-{008..010}.tar")
    for nothing in ("*.zip", "none"):
        with pytest.raises(MMGPTError, match="no such file"):
            names(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MMGPTError, match="empty folder"):
        names("empty")


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    """Stops: shards behind a link that go missing in silence, and a link to itself that never ends."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere" / "a.tar").write_bytes(b"x")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling.tar").symlink_to(tmp_path / "gone.tar")
    found = list_files(str(tmp_path / "data"))
    assert [os.path.relpath(name, tmp_path / "data") for name in found] == ["dangling.tar", "linked/a.tar"]


def test_samples_over_http(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: braces, detection, a parquet read by ranges, packed lines."""
    monkeypatch.setenv("MM_GPT_PRIVATE_ADDRESSES", "1")
    row = {"images": ["https://e/a.jpg", None], "texts": [None, "A text."], "metadata": "[]"}
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row] * 100), table)
    server.files |= {"0.parquet": table.getvalue(), "1.parquet": table.getvalue()}
    server.files["a.jsonl.gz"] = gzip.compress(b'{"text": "A text."}')
    for location, count in [("{0..1}.parquet?v=1", 200), ("a.jsonl.gz", 1)]:
        errors = ErrorCounter()
        assert len(list(read_samples(f"{url}/{location}", errors))) == count
        assert errors.total == 0
    errors = ErrorCounter()
    assert len(list(read_samples(f"{url}/{{0..2}}.parquet", errors))) == 200
    assert errors.counts == {"unreadable file": 1}


def test_braces_of_urls() -> None:
    assert list_files("https://h/{08..10}-{a,b}.tar?x={1}") == [
        f"https://h/{n}-{c}.tar?x={{1}}" for n in ("08", "09", "10") for c in "ab"
    ]
    assert list_files("https://h/{9..11}") == ["https://h/10", "https://h/11", "https://h/9"]
    with pytest.raises(MMGPTError, match="more than 1,000,000"):
        list_files("https://h/{0..999999999}")
    with pytest.raises(MMGPTError, match="more than 1,000,000"):
        list_files("https://h/" + "{a,b}" * 64)


def test_stores() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden"):
        fs.pipe(f"/bucket/{name}", DATA)
    every = [f"memory:///bucket/{n}" for n in ("a.jsonl", "b.jsonl", "deep/c.jsonl")]
    assert [re.sub("memory:/+", "memory:///", n) for n in list_files("memory://bucket")] == every
    assert len(list_files("memory://bucket/*.jsonl")) == 2
    assert len(list_files("memory://bucket/{a,b}.jsonl")) == 2
    with open_file("memory://bucket/a.jsonl", seekable=True) as file:
        assert file.read() == DATA
        file.seek(-3, os.SEEK_END)
        assert file.read() == DATA[-3:]
    for location, message in [("memory://bucket/no", "no such file"), ("memory://bucket/deep", "is a folder")]:
        with pytest.raises(MMGPTError, match=message):
            open_file(location)
    assert files.is_folder("memory://bucket/deep")
    assert not files.exists("memory://bucket/no")
    fs.rm("/bucket", recursive=True)


def test_a_store_without_its_package() -> None:
    with pytest.raises(MMGPTError, match=r"abfs://bucket/a: .*adlfs"):
        open_file("abfs://bucket/a")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "/etc/passwd",
        "http://h/a",
        "pipe:ls",
        "C:\\a",
        "..\\a",
        "a\0",
        "a\nb",
        "//h/a",
    ],
)
@pytest.mark.parametrize("base", ["/data/images", "https://host/images?key=1", "s3://bucket/images"])
def test_names_that_lead_outside(base: str, name: str) -> None:
    with pytest.raises(MMGPTError, match="leads outside"):
        resolve(base, name)


def test_names_that_stay_inside() -> None:
    assert resolve("/data", "a/./b/../c.jpg") == "/data/a/c.jpg"
    assert resolve("file:///data", "a.jpg") == "/data/a.jpg"
    assert resolve("https://h/images/?k=1", "ä b#1.jpg") == "https://h/images/%C3%A4%20b%231.jpg?k=1"
    assert resolve("s3://b/images/", "..a/x.jpg") == "s3://b/images/..a/x.jpg"
    assert files.folder_of("https://h/x/list.json?k=1") == "https://h/x"
    assert files.folder_of("/data/list.json") == "/data"
    assert files.suffix_of("https://h/x/Docs.JSONL.gz?k=1.tar") == ".jsonl"


@given(st.text(st.sampled_from("./\\ab:~"), max_size=12))
def test_no_name_leads_outside(name: str) -> None:
    with contextlib.suppress(MMGPTError):
        inside = resolve("/data/images", name)
        assert os.path.normpath(inside).startswith("/data/images/")


def test_offline(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_GPT_OFFLINE", "1")
    for location in (f"{url}/data.bin", "s3://bucket/a"):
        with pytest.raises(MMGPTError, match="MM_GPT_OFFLINE"):
            open_file(location)
    assert server.seen == []


# ---- Unpacking ----


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_lines_of_packed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](b"one\r\n\n  \ntwo\n") + PACKERS[suffix](b"three"))
    errors = ErrorCounter()
    assert list(read_lines(str(path), errors)) == [(1, b"one"), (4, b"two"), (5, b"three")]
    assert errors.total == 0
    with open_file(str(path)) as file:
        assert file.read() == path.read_bytes()


@pytest.mark.parametrize("suffix", PACKERS)
def test_cut_off_files_keep_what_came_before(tmp_path: Path, suffix: str) -> None:
    """Stops: a download that broke and fails a whole run, or passes for complete."""
    lines = [json.dumps({"n": n, "x": os.urandom(300).hex()}).encode() for n in range(5000)]
    data = PACKERS[suffix](b"\n".join(lines))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    errors = ErrorCounter()
    got = [line for _, line in read_lines(str(path), errors)]
    assert got == lines[: len(got)]
    assert len(got) > 500
    assert errors.counts == {"broken file, rest of it unread": 1}


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_stands_behind_a_packed_file_is_counted_and_all_before_it_read(tmp_path: Path, suffix: str) -> None:
    """Stops: rows lost, the last one without a line end first, because of some bytes that a transfer added."""
    lines = [os.urandom(300).hex().encode() for _ in range(2000)]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(
        PACKERS[suffix](b"\n".join(lines[:900]) + b"\n") + PACKERS[suffix](b"\n".join(lines[900:])) + b"garbage!"
    )
    errors = ErrorCounter()
    assert [line for _, line in read_lines(str(path), errors)] == lines
    assert errors.counts == {"broken file, rest of it unread": 1}
    with open_unpacked(str(path)) as file:
        assert file.read() == b"\n".join(lines)


def test_zeros_behind_a_packed_file_are_padding(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.txt.gz", ErrorCounter()
    path.write_bytes(
        gzip.compress(b"one\n") + bytes(1000) + gzip.compress(b"") + gzip.compress(b"two") + bytes(100_000)
    )
    assert [line for _, line in read_lines(str(path), errors)] == [b"one", b"two"]
    assert errors.total == 0


@pytest.mark.parametrize("suffix", PACKERS)
def test_of_a_damaged_packed_file_comes_all_that_can_be_decoded(tmp_path: Path, suffix: str) -> None:
    """Stops: a decoder whose error throws away what it decoded in the same call."""
    data = os.urandom(1_300_000)
    parts = [PACKERS[suffix](data[at : at + 100_000]) for at in range(0, len(data), 100_000)]
    damaged = bytearray(parts[7])
    damaged[9:40] = b"\xff" * 31
    path, got = tmp_path / f"a{suffix}", bytearray()
    path.write_bytes(b"".join([*parts[:7], damaged, *parts[8:]]))
    with open_unpacked(str(path)) as file, pytest.raises(ReadError, match="broken after"):  # noqa: PT012
        while piece := file.read1(1 << 20):  # type: ignore[attr-defined]
            got += piece
        file.read1(1)  # type: ignore[attr-defined]
    assert len(got) >= 700_000
    assert data.startswith(got[:700_000])


@pytest.mark.parametrize("suffix", PACKERS)
def test_bombs(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_FREE_BYTES", 2**20)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKERS[suffix](bytes(30 * 2**20)))
    with open_unpacked(str(path)) as file, pytest.raises(ReadError, match="unfolds to more than 300 times"):
        file.read()


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_not_packed_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"<html>404</html>" * 100)
    errors = ErrorCounter()
    assert list(read_lines(str(path), errors)) == []
    assert errors.counts == {"broken file, rest of it unread": 1}


def test_a_packed_file_whose_server_dies(
    url: str, server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stops: a network error reported as a broken archive, or the other way round."""
    monkeypatch.setenv("MM_GPT_PRIVATE_ADDRESSES", "1")
    monkeypatch.setattr(HttpLimits, "__init__", lambda self, **_: self.__dict__.update(LOCAL.__dict__))
    server.files["a.jsonl.gz"] = gzip.compress(b"x\n" * 1000)
    errors = ErrorCounter()
    assert len(list(read_lines(f"{url}/a.jsonl.gz?v=1", errors))) == 1000
    server.seen.clear()
    assert list(read_lines(f"{url}/dead.gz", errors)) == []
    assert "the connection closed after 1,000 of" in errors.summary()


def test_long_lines_are_skipped_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"short\n" + b"x" * 3_000_000 + b"\nnext\n" + b"12345678\n" + b"y" * 9)
    errors = ErrorCounter()
    assert list(read_lines(str(path), errors, max_bytes=8)) == [(1, b"short"), (3, b"next"), (4, b"12345678")]
    assert errors.counts == {"line too long": 2}


# ---- Copies ----


def test_a_copy_is_made_once_and_checked(url: str, server: Any, tmp_path: Path) -> None:
    path = local_copy(f"{url}/data.bin", limits=LOCAL)
    assert path.read_bytes() == DATA
    assert path.name.endswith("-data.bin")
    assert tmp_path / "cache" in path.parents
    server.seen.clear()
    assert local_copy(f"{url}/data.bin", limits=LOCAL) == path
    assert len(server.seen) == 1  # asked for its size and version, not read
    path.write_bytes(DATA[:-1])  # a damaged copy
    assert local_copy(f"{url}/data.bin", limits=LOCAL).read_bytes() == DATA
    server.files["data.bin"] = b"new"
    assert local_copy(f"{url}/data.bin", limits=LOCAL).read_bytes() == b"new"
    local = tmp_path / "here"
    local.write_bytes(b"x")
    assert local_copy(str(local)) == local
    with pytest.raises(MMGPTError, match="No such file"):
        local_copy(str(tmp_path / "missing"))


def test_a_copy_serves_when_the_server_is_away(
    url: str, server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = local_copy(f"{url}/data.bin", limits=LOCAL)
    del server.files["data.bin"]
    assert local_copy(f"{url}/data.bin", limits=LOCAL) == path
    assert "using the copy" in caplog.text
    monkeypatch.setenv("MM_GPT_OFFLINE", "1")
    assert local_copy(f"{url}/data.bin") == path
    with pytest.raises(MMGPTError, match="MM_GPT_OFFLINE"):
        local_copy(f"{url}/other.bin")


def test_the_oldest_copies_go(url: str, server: Any, tmp_path: Path) -> None:
    paths = []
    for n in range(3):
        server.files[f"{n}.bin"] = bytes([n]) * 1000
        paths.append(local_copy(f"{url}/{n}.bin", folder=tmp_path / "c", limits=LOCAL, max_cache_bytes=3000))
        os.utime(paths[-1], (time.time() - 1000 + n,) * 2)
    local_copy(f"{url}/0.bin", folder=tmp_path / "c", limits=LOCAL, max_cache_bytes=3000)  # used again
    server.files["3.bin"] = b"3" * 1000
    local_copy(f"{url}/3.bin", folder=tmp_path / "c", limits=LOCAL, max_cache_bytes=3000)
    assert [path.exists() for path in paths] == [True, False, True]
    with pytest.raises(MMGPTError, match="the cache holds 2,000"):
        local_copy(f"{url}/data.bin", folder=tmp_path / "c", limits=LOCAL, max_cache_bytes=2000)
    with pytest.raises(MMGPTError, match="larger than the cache of 2,000"):
        local_copy(f"{url}/unsized", folder=tmp_path / "c", limits=LOCAL, max_cache_bytes=2000)


def _copy(url: str, folder: str) -> int:
    return len(local_copy(url, folder=folder, limits=LOCAL).read_bytes())


def test_several_processes_fetch_it_once(url: str, server: Any, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.starmap(_copy, [(f"{url}/data.bin", str(tmp_path / "c"))] * 3) == [len(DATA)] * 3
    assert [p.name for p in (tmp_path / "c").iterdir() if not p.name.startswith(".")] != []
    assert not list((tmp_path / "c").glob("*.partial"))


def test_a_failed_copy_leaves_nothing(url: str, tmp_path: Path) -> None:
    with pytest.raises(MMGPTError, match="connection closed"):
        local_copy(f"{url}/dead", folder=tmp_path / "c", limits=LOCAL)
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".lock"]


def test_a_full_disk_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(MMGPTError, match=r"cannot be kept in .*No space left"):
        local_copy(f"{url}/data.bin", folder=tmp_path / "c", limits=LOCAL)
