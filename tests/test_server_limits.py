"""The server at its limits: keys, sizes, queues, time, clients that leave, engines that fail, and what is streamed."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from conftest import make_tokenizer
from running_server import HTTP, ScriptedBatcher, running, serving, token

from mm_gpt.errors import MMGPTError
from mm_gpt.inference.generation import Piece
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.serving.server.app import App
from mm_gpt.serving.server.config import Served, ServerConfig
from mm_gpt.serving.server.prompts import Prompts
from mm_gpt.serving.server.run import listen
from mm_gpt.serving.server.service import Service

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
KEY = "sk-secret"
DONE = [Piece(0, "Hi", (token("Hi"),)), Piece(0, "", (token("<|end|>", id=2),), "stop")]


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = make_tokenizer()
    return Processor(tokenizer, ProcessorConfig(max_length=200), vocab_size=tokenizer.vocab_size)


def make_service(processor: Processor, batcher: ScriptedBatcher, config: ServerConfig) -> Service:
    served = Served(
        name="m",
        context=200,
        vocab_size=processor.vocab_size,
        end_ids=(2,),
        takes_images=False,
        no_repeat_ngram_size=8,
        fingerprint="fp_1",
    )
    return Service(served, batcher, Prompts(processor, config), config)  # type: ignore[arg-type]


@pytest.fixture
def start(processor: Processor) -> Iterator[Callable[..., tuple[str, App]]]:
    """A function that starts a server on a scripted batcher; they end with the test."""
    open_servers: list[Any] = []

    def begin(batcher: ScriptedBatcher, **config: Any) -> tuple[str, App]:
        open_servers.append(serving(lambda settings: make_service(processor, batcher, settings), **config))
        found: tuple[str, App] = open_servers[-1].__enter__()
        return found

    yield begin
    for server in open_servers:
        server.__exit__(None, None, None)


def post(address: str, body: Any = ASK, **options: Any) -> httpx.Response:
    return HTTP.post(f"{address}/v1/chat/completions", json=body, **options)


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


# ---- what is streamed ----


def test_text_and_reason_never_share_a_chunk(start: Callable[..., Any]) -> None:
    """The last token comes with its reason; clients that read one of the two lost the other."""
    address, _ = start(ScriptedBatcher([Piece(0, "Hi", (token("Hi"),)), Piece(0, " you", (token(" you"),), "length")]))
    chunks = events(post(address, ASK | {"stream": True, "logprobs": True}).text)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [choice["delta"].get("content") for choice in choices] == ["", "Hi", " you", None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert [len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]] == [1, 1]
    assert chunks[-1] == "[DONE]"


def test_half_characters_and_stop_texts(start: Callable[..., Any]) -> None:
    """Tokens whose text is held back come with their log-probabilities when it is certain; an end mark never."""
    half = [token("👩", id=7), token("\N{ZERO WIDTH JOINER}🚀", id=8)]
    pieces = [Piece(0, "", ()), Piece(0, "👩\N{ZERO WIDTH JOINER}🚀", tuple(half)), DONE[1]]
    address, _ = start(ScriptedBatcher(pieces))
    body = ASK | {"logprobs": True}
    whole = post(address, body).json()["choices"][0]
    streamed = [chunk["choices"][0] for chunk in events(post(address, body | {"stream": True}).text)[:-1]]
    assert whole["message"]["content"] == "👩\N{ZERO WIDTH JOINER}🚀"
    assert bytes(b for t in whole["logprobs"]["content"] for b in t["bytes"]).decode() == whole["message"]["content"]
    assert [c["logprobs"]["content"] for c in streamed if c["logprobs"]] == [whole["logprobs"]["content"]]


def test_tokens_of_a_stop_text_are_no_content(start: Callable[..., Any]) -> None:
    pieces = [Piece(0, "", (token("Yes"),)), Piece(0, "Yes", (token(" END"),), "stop")]
    address, _ = start(ScriptedBatcher(pieces))
    choice = post(address, ASK | {"logprobs": True, "stop": " END"}).json()["choices"][0]
    assert choice["message"]["content"] == "Yes"
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["Yes"]


def test_a_log_probability_of_minus_infinity(start: Callable[..., Any]) -> None:
    address, _ = start(ScriptedBatcher([Piece(0, "x", (token("x", logprob=-float("inf")),), "length")]))
    choice = post(address, ASK | {"logprobs": True}).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


def test_silence_is_filled_with_comments(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE, held=0)
    address, _ = start(batcher, ping_s=0.05)
    with HTTP.stream("POST", f"{address}/v1/chat/completions", json=ASK | {"stream": True}) as stream:
        lines = stream.iter_lines()
        wait_until(lambda: next(lines) == ": still working")
        batcher.go.set()
        text = "\n".join(lines)
    assert '"content":"Hi"' in text
    batcher.go.clear()
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    chunks = client.chat.completions.create(**ASK, stream=True)
    assert next(chunks).choices[0].delta.role == "assistant"
    threading.Timer(0.2, batcher.go.set).start()
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hi", None]


def test_an_error_in_a_stream_is_an_event(start: Callable[..., Any]) -> None:
    pieces = [DONE[0], Piece(0, error=RuntimeError("secret"))]
    address, _ = start(ScriptedBatcher(pieces))
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    stream = client.chat.completions.create(**ASK, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Hi"]
    with pytest.raises(openai.APIError, match="The server failed; its log says more") as caught:
        next(stream)
    assert caught.value.type == "server_error"
    assert "secret" not in post(address, ASK | {"stream": True}).text
    answer = post(address)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert events(post(start(ScriptedBatcher([Piece(0, error=MMGPTError("no"))]))[0]).text) == []


# ---- clients that leave ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(start: Callable[..., Any], stream: bool) -> None:
    batcher = ScriptedBatcher([DONE[0], *DONE], held=1)
    address, app = start(batcher)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(ASK | {"stream": stream, "n": 2}).encode()
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert b"200 OK" in sock.recv(100)
        wait_until(lambda: len(batcher.tickets) == 1)
        assert app.service is not None
        assert app.service.active == 1
    assert batcher.tickets[0].cancelled.wait(20)
    wait_until(lambda: app.service is not None and app.service.active == 0)
    text = HTTP.get(f"{address}/metrics").text
    assert "mm_gpt_aborts_total 1.0" in text
    assert 'mm_gpt_requests_total{endpoint="chat.completions",status="499"} 1.0' in text
    assert app.service is not None
    assert app.service.held.bytes == 0


def test_a_client_that_leaves_while_its_prompt_is_prepared(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ticket that comes when nobody waits any more is given back."""
    batcher, go, there = ScriptedBatcher(DONE), threading.Event(), threading.Event()
    submit = batcher.submit

    def slow(*arguments: Any) -> Any:
        there.set()
        go.wait(20)
        return submit(*arguments)

    monkeypatch.setattr(batcher, "submit", slow)
    address, app = start(batcher)
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{address}/v1/chat/completions", json=ASK, timeout=0.1)
    assert there.wait(20)
    wait_until(lambda: app.service is not None and app.service.active == 0)
    go.set()
    wait_until(lambda: len(batcher.tickets) == 1)
    assert batcher.tickets[0].cancelled.wait(20)


def test_a_client_that_leaves_in_the_middle_of_its_body(start: Callable[..., Any]) -> None:
    address, app = start(ScriptedBatcher(DONE))
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b'{"model"')
        wait_until(lambda: app.service is not None and app.service.held.bytes > 0)
    wait_until(lambda: app.service is not None and app.service.active == app.service.held.bytes == 0)


# ---- limits ----


def test_a_full_queue(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE)
    batcher.is_full = True
    address, _ = start(batcher)
    for stream in (False, True):
        answer = post(address, ASK | {"stream": stream})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**ASK)


def test_more_requests_than_places(start: Callable[..., Any]) -> None:
    """They are turned away before their bodies are read."""
    batcher = ScriptedBatcher(DONE, held=0)
    address, app = start(batcher, max_rows=1, max_waiting=1)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(post(address).status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: app.service is not None and app.service.active == 2)
    assert post(address).status_code == 429
    assert HTTP.get(f"{address}/health").status_code == 200
    batcher.go.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(start: Callable[..., Any], stream: bool) -> None:
    batcher = ScriptedBatcher([DONE[0], *DONE], held=1)
    address, _ = start(batcher, timeout_s=0.2)
    answer = post(address, ASK | {"stream": stream})
    error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
    assert error["code"] == "timeout"
    assert answer.status_code == (200 if stream else 504)
    assert stream or answer.headers["x-should-retry"] == "false"
    assert batcher.tickets[0].cancelled.wait(20)


def test_preparing_counts_as_time(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    address, app = start(ScriptedBatcher(DONE), timeout_s=0.1, body_s=0.2)
    go = threading.Event()
    assert app.service is not None
    monkeypatch.setattr(app.service.prompts, "chat", lambda *_: go.wait(20))
    answer = post(address)
    go.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b'{"model"')
        assert b"408 Request Timeout" in sock.recv(1000)


def test_a_text_that_cannot_fit_is_not_cut_into_tokens(start: Callable[..., Any]) -> None:
    address, app = start(ScriptedBatcher(DONE))
    assert app.service is not None
    app.service.prompts.processor = SimpleNamespace(config=SimpleNamespace(max_length=200))  # type: ignore[assignment]
    body = {"model": "m", "messages": [{"role": "user", "content": "a " * 100_000}]}
    answers = [post(address, body), HTTP.post(f"{address}/v1/completions", json={"model": "m", "prompt": "a" * 10**5})]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_bodies_are_counted_while_they_come(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE)
    address, app = start(batcher, max_body_bytes=1000)
    long = json.dumps(ASK | {"user": "x" * 1000}).encode()
    types = {"Content-Type": "application/json"}
    url = f"{address}/v1/chat/completions"
    for content in (long, iter([long[:500], long[500:]])):  # with its length said before, and without
        answer = HTTP.post(url, content=content, headers=types)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert post(address).status_code == 200
    assert app.service is not None
    held = app.service.held
    wait_until(lambda: held.bytes == 0)  # the answer is out a moment before its body is let go
    held.take(3800)
    answer = post(address, ASK | {"user": "x" * 500})
    assert answer.status_code == 429
    assert app.service.held.bytes == 3800


@pytest.mark.parametrize(
    ("content", "type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_type"),
        (b'{"temperature": NaN}', "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (json.dumps(ASK).encode(), "text/plain", 415, "unsupported_media_type"),
        (json.dumps(ASK).encode(), "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ],
)
def test_what_is_no_json(start: Callable[..., Any], content: bytes, type: str, status: int, code: str) -> None:
    address, _ = start(ScriptedBatcher(DONE))
    answer = HTTP.post(f"{address}/v1/chat/completions", content=content, headers={"Content-Type": type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert len(answer.json()["error"]["message"]) < 300


def test_half_a_character_is_refused(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE)
    address, _ = start(batcher)
    for body in (r'{"role": "user", "content": "\ud83d"}', r'{"role": "\ud83d", "content": "a"}'):
        content = f'{{"model": "m", "messages": [{body}]}}'
        answer = HTTP.post(
            f"{address}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, answer.text
    assert batcher.tickets == []


# ---- who may use it ----


def test_a_key(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE)
    address, _ = start(batcher, api_key=KEY)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "é"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            answer = HTTP.get(f"{address}{path}", headers=encoded)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert post(address, headers=encoded).status_code == 401
    assert HTTP.get(f"{address}/health").status_code == HTTP.get(f"{address}/v1/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").chat.completions.create(**ASK)
    assert openai.OpenAI(base_url=f"{address}/v1", api_key=KEY).chat.completions.create(**ASK).choices
    assert len(batcher.tickets) == 1


def test_pages_of_other_sites_may_not_use_it(start: Callable[..., Any]) -> None:
    """A browser's visitor must not lend their local server to whatever page they open."""
    batcher = ScriptedBatcher(DONE)
    address, _ = start(batcher)
    answer = post(address, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert HTTP.options(f"{address}/v1/chat/completions", headers=preflight).status_code == 403
    address, _ = start(batcher, allow_origins=("https://mine.example",), api_key=KEY)
    mine = {"Origin": "https://mine.example", "Authorization": f"Bearer {KEY}"}
    answer = post(address, headers=mine)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://mine.example")
    preflight = {"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"}
    preflight |= {"Access-Control-Request-Headers": "authorization,content-type"}
    assert HTTP.options(f"{address}/v1/chat/completions", headers=preflight).status_code == 200
    assert post(address, headers=mine | {"Origin": "https://evil.example"}).status_code == 403


# ---- the engine ----


def test_what_has_not_ended_in_time_is_told_so(processor: Processor) -> None:
    """At the end of the grace that a signal leaves."""
    batcher = ScriptedBatcher(DONE, held=1)
    app = App(ServerConfig())
    app.service = make_service(processor, batcher, app.config)
    texts: list[str] = []
    with running(app, grace_s=0.2) as address:
        bodies = [ASK, ASK | {"stream": True}]
        threads = [threading.Thread(target=lambda b=body: texts.append(post(address, b).text)) for body in bodies]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(batcher.tickets) == 2)
    for thread in threads:
        thread.join()
    assert len(texts) == 2
    assert all("The server is being stopped." in text for text in texts)


def test_while_the_model_is_loading() -> None:
    with running(App(ServerConfig())) as address:
        for answer in (HTTP.get(f"{address}/health"), HTTP.get(f"{address}/v1/models"), post(address)):
            assert answer.status_code == 503
            assert answer.json()["error"] == {
                "message": "Loading the model.",
                "type": "unavailable_error",
                "param": None,
                "code": "unavailable",
            }


def test_an_engine_that_has_died(start: Callable[..., Any]) -> None:
    batcher = ScriptedBatcher(DONE)
    address, _ = start(batcher)
    batcher.is_alive = False
    for answer in (HTTP.get(f"{address}/health"), post(address), HTTP.get(f"{address}/v1/models")):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable_error")


def test_small_events_do_not_wait_for_each_other() -> None:
    """Nagle's algorithm holds a second small packet back until the first is confirmed: 40 ms for each token."""
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.recv(1) == b""


def test_health_is_quick_while_others_wait(start: Callable[..., Any]) -> None:
    """Whatever is prepared or waits for its answer, the event loop is free."""
    batcher = ScriptedBatcher(DONE, held=0)
    address, app = start(batcher)
    threads = [threading.Thread(target=post, args=(address,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: app.service is not None and app.service.active == 8)
    assert HTTP.get(f"{address}/health", timeout=2).json() == {"status": "ok"}
    batcher.go.set()
    for thread in threads:
        thread.join()


def test_settings_are_checked() -> None:
    for settings in ({"max_rows": 0}, {"timeout_s": 0}, {"max_waiting": 0}, {"max_body_bytes": 0}, {"api_key": "ключ"}):
        with pytest.raises(MMGPTError, match=next(iter(settings)).replace("api_key", "API key")):
            ServerConfig(**settings)  # type: ignore[arg-type]
