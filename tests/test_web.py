"""Saved pages and WARC files: what crawlers and browsers write, and what is broken in it."""

import gzip
import json
import os
import pickle
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("trafilatura")
pytest.importorskip("fastwarc")

from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.datasets.web.http_response import decode_body
from mm_gpt.datasets.web.pages import (
    MAX_RECORD_BYTES,
    Page,
    folder_pages,
    page_document,
    read_pages,
)
from mm_gpt.datasets.web.warc import read_warc, warc_pages
from mm_gpt.document import Document
from mm_gpt.errors import MMGPTError

TEXT = "The harbour of the town was built on wooden piles some eight hundred years ago, of oak from up the river. " * 3
JPEG = b"\xff\xd8 not decoded here"


def html(image: str = "", head: str = "") -> str:
    img = f"<img src='{image}'>" if image else ""
    body = f"<article><p>{TEXT}</p>{img}<p>{TEXT} End.</p></article>"
    return f"<!DOCTYPE html><html><head>{head}</head><body>{body}</body></html>"


def sources(document: Document) -> list[object]:
    return [image.source for image in document.images]


# ---- Folders ----


def test_saved_page_with_its_files(tmp_path: Path) -> None:
    """As Chrome saves it: files beside the page, and frames among them that are no pages."""
    saved = "<!-- saved from url=(0027)https://example.com/a/b.html -->"
    files = tmp_path / "sub" / "My page_files"
    files.mkdir(parents=True)
    (files / "a b.jpg").write_bytes(JPEG)
    (files / "saved_resource.html").write_text(html())
    (tmp_path / "sub" / "My page.html").write_text(saved + html("./My%20page_files/a%20b.jpg?x=1"))
    (tmp_path / "z.HTM").write_text(html("photos/far.jpg", "<link href='https://example.org/z' rel='canonical'>"))
    (tmp_path / "notes.txt").write_text("no page")
    errors = ErrorCounter()
    first, second = read_pages(str(tmp_path), errors)
    assert errors.total == 0
    assert sources(first) == [files / "a b.jpg"]
    assert (first.id, first.metadata["source"]) == ("https://example.com/a/b.html", "sub/My page.html")
    assert sources(second) == ["https://example.org/photos/far.jpg"]


def test_images_stay_inside_the_folder(tmp_path: Path) -> None:
    """No page reads a file elsewhere on the disk: not by .., an absolute path, file://, or a link in the folder."""
    folder = tmp_path / "pages"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (folder / "in.jpg").write_bytes(JPEG)
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    outside = [
        "../../secret.jpg",
        str(tmp_path / "secret.jpg"),
        f"file://{tmp_path}/secret.jpg",
        "..%2f..%2fsecret.jpg",
    ]
    for number, name in enumerate([*outside, "../link.jpg", "../in.jpg", "/in.jpg"]):
        (folder / "sub" / f"{number}.html").write_text(html(name))
    found = [sources(document) for document in read_pages(str(folder), ErrorCounter())]
    assert found == [[]] * 5 + [[folder / "in.jpg"]] * 2


def test_bad_pages_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(html())
    (tmp_path / "b.html").write_text("<html></html>")
    (tmp_path / "c.html").write_text(html(head="<meta name=robots content=noai>"))
    (tmp_path / "d.html").write_bytes(b"x" * (MAX_RECORD_BYTES + 1))
    errors, removed = ErrorCounter(), Counter[str]()
    assert len(list(read_pages(str(tmp_path), errors, removed=removed))) == 1
    assert errors.counts == {"no main text": 1, "opt-out: noai": 1, "too large": 1}
    assert errors.examples["opt-out: noai"] == ["c.html"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no page")
    with pytest.raises(MMGPTError, match="no page"):
        folder_pages(str(tmp_path / "empty"), errors)


def test_one_page_and_another_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "p.html").write_text(html("x.jpg"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(JPEG)
    (document,) = read_pages(str(tmp_path / "p.html"), ErrorCounter(), images=str(tmp_path / "images"))
    assert sources(document) == [tmp_path / "images" / "x.jpg"]


# ---- WARC ----


def record(
    url: str, body: bytes, content_type: str = "text/html", *, kind: str = "response", status: int = 200, **headers: str
) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    block = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:0>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Target-URI: {url}\r\nContent-Type: application/http\r\nContent-Length: {len(block)}\r\n"
    )
    return head.encode() + b"\r\n" + block + b"\r\n\r\n"


def write(path: Path, records: list[bytes]) -> str:
    if path.suffix == ".gz":
        path.write_bytes(b"".join(gzip.compress(r) for r in records))
    elif path.suffix == ".zst":
        from fastwarc.stream_io import ZstdWriter

        with path.open("wb") as file:
            out = ZstdWriter(file)
            for one in records:
                out.write(one)
            out.close()
    else:
        path.write_bytes(b"".join(records))
    return str(path)


@pytest.mark.parametrize("suffix", ["warc", "warc.gz", "warc.zst"])
def test_pages_with_their_images(tmp_path: Path, suffix: str) -> None:
    """An image before or behind its page in the file, under http or https; what is not there stays a URL."""
    parts = [
        record("https://e.com/early.png", b"early", "image/png"),
        record("https://e.com/p", html("early.png").encode()),
        record("https://e.com/q", gzip.compress(html("/late.jpg#x").encode()), Content_Encoding="gzip"),
        record("https://e.com/r", html("gone.jpg").encode(), "application/xhtml+xml; charset=utf-8"),
        record("http://e.com/late.jpg", b"late", "image/jpeg"),
        record("https://e.com/gone.jpg", b"", "image/jpeg", status=404),
        record("https://e.com/404", html().encode(), status=404),
        record("https://e.com/data.json", b"{}", "application/json"),
    ]
    path = write(tmp_path / f"crawl.{suffix}", parts)
    errors = ErrorCounter()
    documents = list(read_warc(path, errors))
    assert [sources(d) for d in documents] == [[b"early"], [b"late"], ["https://e.com/gone.jpg"]]
    assert [d.id for d in documents] == ["https://e.com/p", "https://e.com/q", "https://e.com/r"]
    assert errors.total == 0
    assert documents[0].metadata["warc_filename"] == f"crawl.{suffix}"
    if suffix == "warc":
        assert documents[0].metadata["warc_record_offset"] == len(parts[0])
    json.dumps([dict(d.metadata) for d in documents])  # they end in JSON


def test_images_from_another_warc_and_their_opt_outs(tmp_path: Path) -> None:
    pages = write(tmp_path / "pages.warc", [record(f"https://e.com/{n}", html(f"{n}.jpg").encode()) for n in "abc"])
    images = [
        record("https://e.com/a.jpg", b"a", "image/jpeg"),
        record("https://e.com/b.jpg", b"b", "image/jpeg", X_Robots_Tag="noai, noimageai"),
    ]
    removed: Counter[str] = Counter()
    documents = list(
        read_warc(pages, ErrorCounter(), images=write(tmp_path / "images.warc.gz", images), removed=removed)
    )
    assert [sources(d) for d in documents] == [[b"a"], [], ["https://e.com/c.jpg"]]
    assert removed == {"image: opt-out: noai": 1}


def test_headers_reach_the_extraction(tmp_path: Path) -> None:
    russian = "Сваи стоят в устье реки уже восемьсот лет, и дуб за это время стал твёрдым, как камень на дне. " * 4
    page = f"<html><body><article><p>{russian}</p></article></body></html>".encode("cp1251")
    path = write(
        tmp_path / "a.warc",
        [
            record("https://e.com/ru", page, "text/html; charset=windows-1251"),
            record("https://e.com/no", html().encode(), X_Robots_Tag="noindex"),
        ],
    )
    errors = ErrorCounter()
    (document,) = read_warc(path, errors)
    assert russian.strip() in document.segments[0].text  # type: ignore[union-attr]
    assert errors.counts == {"opt-out: noindex": 1}


def test_broken_warcs_keep_what_came_before(tmp_path: Path) -> None:
    """Cut off, corrupt, empty, revisits, over the limit: counted, never raised, and the pages before them stay."""
    good = record("https://e.com/1", html().encode())
    big = record("https://e.com/big", b"x" * (MAX_RECORD_BYTES + 1))
    revisit = record("https://e.com/2", b"", kind="revisit")
    bad_gzip = record("https://e.com/3", b"\x1f\x8bnot", Content_Encoding="gzip")
    bomb = record("https://e.com/4", gzip.compress(bytes(MAX_RECORD_BYTES * 4)), Content_Encoding="gzip")
    packed = gzip.compress(good)
    cases: dict[str, tuple[bytes, int, str]] = {
        "cut.warc": (good + good[:-300], 2, "WARC ends inside a record, read up to there"),
        "cut.warc.gz": (packed + gzip.compress(good)[:-40], 2, "WARC ends inside a record, read up to there"),
        "corrupt.warc.gz": (packed + packed[:30] + b"XXXX" + packed[34:], 1, "broken WARC, rest of it unread"),
        "junk.warc": (good + b"junk\r\n\r\n" + good, 1, "broken WARC, rest of it unread"),
        "big.warc": (good + big + good, 2, "record too large"),
        "revisit.warc": (revisit + good, 1, "revisit without content"),
        "gzip.warc": (bad_gzip + good, 1, "broken content encoding"),
        "bomb.warc": (bomb + good, 1, "record too large"),
        "text.warc": (b"this is no WARC at all\r\n\r\n", 0, "broken WARC, rest of it unread"),
    }
    for name, (data, num_documents, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        errors = ErrorCounter()
        documents = list(read_warc(str(tmp_path / name), errors))
        assert (name, len(documents), dict(errors.counts)) == (name, num_documents, {reason: 1})
    (tmp_path / "empty.warc").write_bytes(b"")
    assert list(read_warc(str(tmp_path / "empty.warc"), ErrorCounter())) == []
    with pytest.raises(MMGPTError, match="missing"):
        read_warc(str(tmp_path / "missing.warc"), ErrorCounter())


HEADS = {
    "LF": b"HTTP/1.1 200 OK\nContent-Type: text/html\nX: 1\n\n",
    "small letters": b"http/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 \r\nContent-Type: text/html\r\n\r\n",
    "spaces before colons": b"HTTP/1.1 200 OK\r\nP3P : x\r\nContent-Type : text/html\r\n\r\n",
    "no type": b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
    "two types": b"HTTP/1.1 200 OK\r\nContent-Type: text/html, text/html; charset=utf-8\r\n\r\n",
    "type twice": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Type: text/html\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nContent-Type:\r\n text/html\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nnonsense\r\nContent-Type: text/html\r\n\r\n",
}


def with_head(head: bytes, body: bytes, warc: str = "WARC-Type: response\r\n") -> bytes:
    lines = f"WARC/1.0\r\n{warc}WARC-Target-URI: https://e.com/x\r\nContent-Type: application/http\r\n"
    return f"{lines}Content-Length: {len(head + body)}\r\n\r\n".encode() + head + body + b"\r\n\r\n"


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_http_as_crawlers_meet_them(tmp_path: Path, kind: str) -> None:
    """Stops: a page that is lost, and not counted, because its server writes HTTP in a way of its own."""
    page = b"<!doctype html>" + html().encode()
    errors = ErrorCounter()
    path = write(tmp_path / "a.warc.gz", [with_head(HEADS[kind], page)])
    assert [page.html for page in warc_pages(path, errors)] == [page]
    assert errors.total == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (with_head(b"\x16\x03\x01 no HTTP", b"<html>"), "broken HTTP head"),
        (with_head(b"HTTP/1.1 OK\r\nContent-Type: text/html\r\n\r\n", b"<html>"), "broken HTTP head"),
        (with_head(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", b""), "broken HTTP head"),
        (with_head(b"HTTP/1.1 200 OK\r\n\r\n", b"what is this"), "no content type"),
        (with_head(HEADS["LF"], b"<html>", ""), "WARC record of no known type"),
        (with_head(HEADS["LF"], b"<html>", "WARC-Type: strange\r\n"), "WARC record of no known type"),
    ],
)
def test_heads_that_do_not_parse_are_counted(tmp_path: Path, bad: bytes, reason: str) -> None:
    good = record("https://e.com/1", html().encode())
    errors = ErrorCounter()
    assert len(list(warc_pages(write(tmp_path / "a.warc", [good, bad, good]), errors))) == 2
    assert errors.counts == {reason: 1}


def test_a_record_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    """Stops: all that stands behind it lost without a word, or memory taken for what it claims."""
    good = record("https://e.com/1", html().encode())
    for kind in ("text/html", "image/png", "text/plain"):
        data = record("https://e.com/2", html().encode(), kind)
        claimed = re.sub(rb"(?<=Content-Length: )\d+", b"4611686018427387904", data, count=1)
        errors = ErrorCounter()
        assert len(list(warc_pages(write(tmp_path / "a.warc", [good, claimed, good]), errors))) == 1
        assert errors.counts["WARC ends inside a record, read up to there"] == 1


def test_pages_can_be_spread_over_processes(tmp_path: Path) -> None:
    """A Page travels by pickle, with all that is needed to find its images."""
    (tmp_path / "x.jpg").write_bytes(JPEG)
    (tmp_path / "p.html").write_text(html("x.jpg"))
    (page,) = folder_pages(str(tmp_path), ErrorCounter())
    page = pickle.loads(pickle.dumps(page))
    document = page_document(page)
    assert document is not None
    assert sources(document) == [tmp_path / "x.jpg"]
    (page,) = warc_pages(write(tmp_path / "a.warc", [record("https://e.com/", html("y.jpg").encode())]), ErrorCounter())
    assert isinstance(page, Page)
    assert sources(page_document(pickle.loads(pickle.dumps(page)))) == ["https://e.com/y.jpg"]  # type: ignore[arg-type]


# ---- HTTP bodies ----

BODY = b"<p>a body</p>" * 40


@pytest.mark.parametrize(
    ("sent", "headers"),
    [
        (BODY, {}),
        (gzip.compress(BODY), {"content-encoding": "gzip"}),
        (gzip.compress(BODY[:99]) + gzip.compress(BODY[99:]), {"content-encoding": "gzip"}),
        (gzip.compress(b"") + gzip.compress(BODY), {"content-encoding": "x-gzip"}),
        (gzip.compress(BODY) + b"\0\0 something else", {"content-encoding": "gzip"}),
        (BODY, {"content-encoding": "gzip"}),  # the crawler undid it and left the header
        (zlib.compress(BODY), {"content-encoding": "deflate"}),
        (zlib.compress(BODY)[2:-4], {"content-encoding": "deflate"}),  # raw, as some servers send it
        (b"5;x=y\r\n" + BODY[:5] + b"\r\n203\r\n" + BODY[5:] + b"\r\n0\r\n\r\n", {"transfer-encoding": "chunked"}),
        (BODY, {"transfer-encoding": "chunked"}),
    ],
    ids=[
        "plain",
        "gzip",
        "two members",
        "an empty member first",
        "something behind it",
        "gzip undone",
        "deflate",
        "raw deflate",
        "chunked",
        "chunked undone",
    ],
)
def test_body(sent: bytes, headers: dict[str, str]) -> None:
    assert decode_body(sent, headers, 10_000) == BODY


def test_members_of_a_body_are_limited_together() -> None:
    bomb = gzip.compress(bytes(6000)) * 2
    with pytest.raises(BadRecordError, match="too large"):
        decode_body(bomb, {"content-encoding": "gzip"}, 10_000)
    assert decode_body(gzip.compress(b"") * 20_000, {"content-encoding": "gzip"}, 10_000) == b""


def test_brotli_body_and_bomb() -> None:
    brotli = pytest.importorskip("brotli")
    headers = {"content-encoding": "br"}
    assert decode_body(brotli.compress(BODY), headers, 10_000) == BODY
    assert decode_body(brotli.compress(BODY * 9000), headers, 10_000_000) == BODY * 9000
    assert decode_body(BODY, headers, 10_000) == BODY
    with pytest.raises(BadRecordError, match="too large"):
        decode_body(brotli.compress(bytes(10**7)), headers, 10_000)
    with pytest.raises(BadRecordError, match="broken"):
        decode_body(b"\xff\xff\xff no brotli", headers, 10_000)
