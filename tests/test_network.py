"""The HTTP client and its guard, against a local server with bad habits and a pretend internet."""

import base64
import http.server
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mm_gpt.errors import URLError
from mm_gpt.images import ImageLimits, image_bytes, load_image
from mm_gpt.network import client
from mm_gpt.network.addresses import is_public_address
from mm_gpt.network.urls import data_url_bytes

LOCAL = ImageLimits(timeout_s=5, allow_private_addresses=True)


def encoded() -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((40, 24)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = encoded()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        route = getattr(self, "do_" + self.path.split("?")[0].strip("/").split(".")[0].replace("-", "_"), None)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif route:
            route()
        else:
            self.send_error(404)

    def body(self, data, **headers):
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_photo(self):
        self.body(PHOTO, Content_Length=str(len(PHOTO)))

    def do_unsized(self):
        self.body(PHOTO)

    def do_chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.body(b"%x\r\n%s\r\n0\r\n\r\n" % (len(PHOTO), PHOTO), Transfer_Encoding="chunked")

    def do_announced_large(self):
        self.body(b"", Content_Length="10000000000")

    def do_endless(self):
        self.body(b"")
        try:
            for _ in range(2000):
                self.wfile.write(b"x" * 10_000)
        except OSError:
            self.server.hung_up.set()

    def do_cut_off(self):
        self.body(PHOTO[:-20], Content_Length=str(len(PHOTO)))

    def do_drip(self):
        self.drip(b"HTTP/1.0 200 OK\r\n\r\n", PHOTO * 100)

    def do_drip_header(self):
        self.drip(b"HTTP/1.0 200 OK\r\nX: ", b"x" * 10_000)

    def drip(self, start, slow):
        self.wfile.write(start)
        try:
            for byte in slow:
                self.wfile.write(bytes([byte]))
                time.sleep(0.03)
        except OSError:
            self.server.hung_up.set()

    def do_loop(self):
        self.send_response(301)
        self.send_header("Location", "/loop")
        self.end_headers()


def start_server(tls: ssl.SSLContext | None = None) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    server.seen, server.hung_up = [], threading.Event()
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = start_server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def internet(monkeypatch, server):
    """A pretend internet: names resolve by a table, and every public address leads to the local server."""
    names = {"photos.test": ["93.184.215.14"]}
    log = {"resolved": [], "connected": []}
    connect = client._connect

    def fake_resolve(host, port):
        log["resolved"].append(host)
        answer = names.get(host, [host])
        return answer.pop(0) if isinstance(answer[0], list) else answer

    def fake_connect(address, port, timeout_s):
        log["connected"].append(address)
        return connect("127.0.0.1", server.server_port, timeout_s)

    monkeypatch.setattr(client, "_resolve", fake_resolve)
    monkeypatch.setattr(client, "_connect", fake_connect)
    return names, log


@pytest.mark.parametrize("path", ["/photo", "/unsized", "/chunked", "/to?/photo", "/to?photo", "/to?/to?/to?/photo"])
def test_fetch(url, path):
    assert image_bytes(url + path, limits=LOCAL) == PHOTO
    assert load_image(url + path, limits=LOCAL).size == (40, 24)


def test_unusual_characters_in_the_path(server, url):
    with pytest.raises(URLError, match="404"):
        image_bytes(url + "/ein bild ü%20.png?a=b c#part", limits=LOCAL)
    assert server.seen[0][0] == "/ein%20bild%20%C3%BC%20.png?a=b%20c"


def test_private_addresses_are_refused_before_connecting(server):
    # Stops: SSRF by every spelling of a private address. Nothing may reach the server.
    hosts = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "0", "0.0.0.0"]
    hosts += [
        "127.0.0.1.",
        "１２７.０.０.１",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
    ]
    for host in hosts:
        for path in ("/photo", ":80@127.0.0.1/photo"):
            with pytest.raises(URLError) as caught:
                load_image(f"http://{host}:{server.server_port}{path}")
            assert "http://" in str(caught.value)
    assert server.seen == []


@pytest.mark.parametrize("host", ["169.254.169.254", "10.1.2.3", "192.168.1.1", "[fd00:ec2::254]", "[64:ff9b::a00:1]"])
def test_private_networks_are_refused(host, monkeypatch):
    monkeypatch.setattr(client, "_connect", lambda *a: pytest.fail("connected"))
    for scheme in ("http", "https"):
        with pytest.raises(URLError, match="not a public address"):
            load_image(f"{scheme}://{host}/latest/meta-data/")


PRIVATE = """
    127.0.0.1 127.255.1.1 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 100.64.0.1
    100.100.100.200 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1 240.0.0.1
    255.255.255.255 168.63.129.16 192.88.99.1
    :: ::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::8.8.8.8 ::ffff:0:8.8.8.8 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1
    100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 2002:7f00:1:: 2002:808:808::1 3fff::1 fc00::1
    fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1 ff0e::1 5f00::1 localhost 127.1
"""
PUBLIC = "8.8.8.8 1.1.1.1 93.184.215.14 172.32.0.1 2606:4700:4700::1111 2a00:1450::1 64:ff9b::808:808"


def test_public_addresses():
    assert [a for a in PRIVATE.split() if is_public_address(a)] == []
    assert [a for a in PUBLIC.split() if not is_public_address(a)] == []


@given(st.ip_addresses(v=4))
def test_no_ipv6_spelling_makes_a_private_address_public(ip):
    for spelling in (f"::ffff:{ip}", f"::{ip}", f"64:ff9b::{ip}", f"2002:{int(ip) >> 16:x}:{int(ip) & 0xFFFF:x}::1"):
        assert is_public_address(str(ip)) or not is_public_address(spelling)


def test_redirect_to_a_private_address(internet, server):
    # Stops: a check of the first URL only.
    names, log = internet
    names["intranet.test"] = ["10.0.0.5"]
    for target in (
        "http://169.254.169.254/latest/",
        "http://127.0.0.1/photo",
        "//intranet.test/photo",
        "http://[::1]/",
    ):
        with pytest.raises(URLError, match="not a public address") as caught:
            load_image(f"http://photos.test/to?{target}")
        assert "http://photos.test/to?" in str(caught.value)
        assert "redirected to http" in str(caught.value)
    assert set(log["connected"]) == {"93.184.215.14"}
    assert load_image("http://photos.test/to?http://photos.test/photo").size == (40, 24)


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://photos.test/a", "data:image/png;base64,AAAA", "gopher://x"]
)
def test_redirect_to_another_scheme(internet, target):
    with pytest.raises(URLError, match="only http and https"):
        load_image(f"http://photos.test/to?{target}")


def test_dns_rebinding(internet):
    # Stops: resolving once for the check and once more for the connection.
    names, log = internet
    names["rebind.test"] = [["93.184.215.14"], ["127.0.0.1"]]
    assert load_image("http://rebind.test/photo").size == (40, 24)
    assert log == {"resolved": ["rebind.test"], "connected": ["93.184.215.14"]}
    with pytest.raises(URLError, match=r"127\.0\.0\.1"):
        load_image("http://rebind.test/photo")


def test_one_private_answer_among_public_ones(internet):
    names, log = internet
    names["mixed.test"] = ["93.184.215.14", "10.0.0.1"]
    with pytest.raises(URLError, match=r"10\.0\.0\.1"):
        load_image("http://mixed.test/photo")
    assert log["connected"] == []


def test_a_dead_address_is_followed_by_the_next(internet, monkeypatch):
    names, _ = internet
    names["two.test"] = ["2606:4700::1", "93.184.215.14"]
    connect = client._connect

    def first_is_dead(address, port, timeout_s):
        if ":" in address:
            raise OSError("no route")
        return connect(address, port, timeout_s)

    monkeypatch.setattr(client, "_connect", first_is_dead)
    assert load_image("http://two.test/photo").size == (40, 24)


def test_host_header_names_the_host(internet, server):
    load_image("http://photos.test/photo")
    load_image("http://photos.test:8080/photo")
    names, _ = internet
    names["xn--bcher-kva.test"] = ["93.184.215.14"]
    load_image("http://bücher.test/photo")
    assert [host for _, host in server.seen] == ["photos.test", "photos.test:8080", "xn--bcher-kva.test"]


def test_proxies_of_the_environment_are_ignored(url, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert image_bytes(url + "/photo", limits=LOCAL) == PHOTO


def test_oversize_bodies(server, url):
    limits = ImageLimits(max_bytes=100_000, timeout_s=5, allow_private_addresses=True)
    for path in ("/announced-large", "/endless"):
        with pytest.raises(URLError, match="limit of 100,000 bytes"):
            image_bytes(url + path, limits=limits)
    assert server.hung_up.wait(5)


@pytest.mark.parametrize("path", ["/drip", "/drip-header"])
def test_slow_drip(server, url, path):
    # Stops: a timeout per read, which a byte now and then resets for ever.
    limits = ImageLimits(timeout_s=0.3, allow_private_addresses=True)
    with pytest.raises(URLError, match=r"within 0\.3 s"):
        image_bytes(url + path, limits=limits)
    assert server.hung_up.wait(5)


def test_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for scheme in ("http", "https"):
            with pytest.raises(URLError, match=r"within 0\.2 s"):
                image_bytes(
                    f"{scheme}://127.0.0.1:{port}/", limits=ImageLimits(timeout_s=0.2, allow_private_addresses=True)
                )


def test_redirect_loop(server, url):
    with pytest.raises(URLError, match="more than 5 redirects"):
        image_bytes(url + "/loop", limits=LOCAL)
    assert len(server.seen) == 6


def test_failures_name_the_url(url):
    with pytest.raises(URLError, match=r"/missing\.png: the server answered 404"):
        load_image(url + "/missing.png", limits=LOCAL)
    with pytest.raises(URLError, match="/cut-off: the connection closed after"):
        load_image(url + "/cut-off", limits=LOCAL)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(URLError, match=f":{port}/a.png: .*refused"):
        load_image(f"http://127.0.0.1:{port}/a.png", limits=LOCAL)


@pytest.mark.parametrize(
    "bad",
    [
        "http://",
        "http:///a.png",
        "http://a b/c",
        "http://a..b/",
        "http://[::1/",
        "http://[zz]/",
        "http://[fe80::1%25eth0]/",
        "http://host:99999/",
        "http://host:x/",
        "http://user@photos.test/photo",
        "http://user:secret@photos.test/photo",
        "http://host\\@evil/",
        "http://" + "a" * 300 + ".test/",
        "http://a%0d%0a.test/",
    ],
)
def test_malformed_urls(bad, internet):
    with pytest.raises(URLError) as caught:
        load_image(bad)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert internet[1]["connected"] == []


def test_line_breaks_cannot_add_headers(internet, server):
    with pytest.raises(URLError, match="404"):
        load_image("http://photos.test/a\r\nX-Evil: 1\r\n\r\nGET /b")
    assert len(server.seen) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_is_checked_by_name_though_connected_by_address(tmp_path, monkeypatch):
    # Stops: a pinned address that switches the certificate's name check off.
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=photos.test"
    command += f" -addext subjectAltName=DNS:photos.test -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    server, connect = start_server(server_side), client._connect
    monkeypatch.setattr(client, "_resolve", lambda host, port: ["93.184.215.14"])
    monkeypatch.setattr(client, "_connect", lambda a, p, timeout_s: connect("127.0.0.1", server.server_port, timeout_s))
    with pytest.raises(URLError, match="certificate verify failed"):
        load_image("https://photos.test/photo")  # unknown authority
    monkeypatch.setattr(client, "_tls_context", lambda: ssl.create_default_context(cafile=str(certificate)))
    assert load_image("https://photos.test/photo").size == (40, 24)
    with pytest.raises(URLError, match="certificate"):
        load_image("https://other.test/photo")
    server.shutdown()
    server.server_close()


# ---- Data URLs ----


@pytest.mark.parametrize("size", [998, 999, 1000])
def test_data_urls_as_programs_write_them(size):
    """Stops: an image refused for line ends, percent signs, the alphabet for URLs, or missing padding."""
    data = bytes(range(251)) * 4
    data = data[:size]
    plain = base64.b64encode(data).decode()
    for payload in (
        plain,
        base64.encodebytes(data).decode(),
        f" {plain[:50]}\r\n\t{plain[50:]} ",
        urllib.parse.quote(plain, safe=""),
        base64.urlsafe_b64encode(data).decode(),
        plain.rstrip("="),
    ):
        assert data_url_bytes(f"data:image/png;base64,{payload}", 1000) == data
        assert data_url_bytes(f"DATA:image/png;charset=utf-8; BASE64,{payload}", 1000) == data
    assert data_url_bytes(f"data:image/png,{urllib.parse.quote(data)}", 1000) == data


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,@@@", "base64"),
        ("data:image/png;base64,AAAAA", "base64"),
        ("data:image/png;base64,AAAAé", "base64"),
        ("data:image/png;base64", "form"),
        ("http://a/,b", "form"),
        ("data:image/png;base64," + "AAAA" * 34, "limit of 100 bytes"),
        ("data:image/png," + "A" * 101, "limit of 100 bytes"),
        ("data:image/png," + "A" * 100_000, "limit of 100 bytes"),
    ],
)
def test_bad_data_urls(url, reason):
    with pytest.raises(ValueError, match=reason):
        data_url_bytes(url, 100)
