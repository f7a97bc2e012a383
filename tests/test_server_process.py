"""`mm-gpt serve` as a process: what it says, what signals do, and curl."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mm_gpt.commands.serve import _is_loopback, _name

KEY = "sk-secret"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 1}


class Process:
    """A server of the tiny model, started and not yet ready."""

    def __init__(self, folder: Path, *options: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = ["serve", "--model", str(folder), "--name", "tiny", "--device", "cpu", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mm_gpt", *command, *options],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"MM_GPT_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers = {"Authorization": f"Bearer {KEY}"}

    def wait(self, status: int) -> httpx.Response:
        """/health when it answers so."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                answer = httpx.get(f"{self.url}/health")
                if answer.status_code == status:
                    return answer
            except httpx.TransportError:
                assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            time.sleep(0.02)
        raise AssertionError("the server did not get there")

    def ends(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def start(tiny_model_folder: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*options: str) -> Process:
        started.append(Process(tiny_model_folder, *options))
        return started[-1]

    yield begin
    for process in started:
        process.process.kill()
        process.process.wait()


def curl(server: Process, path: str, *options: str) -> tuple[int, str]:
    command = ["curl", "-sS", "-w", "\n%{http_code}", f"{server.url}{path}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_a_server_is_started_used_and_ended(start: Callable[..., Process]) -> None:
    """The first SIGTERM: nobody new is let in, and who is in gets the whole answer."""
    server = start()
    assert server.wait(200).json() == {"status": "ok"}
    key = ("-H", f"Authorization: Bearer {KEY}")
    asked = ("-H", "Content-Type: application/json", "-d", json.dumps(HELLO | {"max_tokens": 3}))
    status, body = curl(server, "/v1/chat/completions", *key, *asked)
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 3)
    status, body = curl(server, "/v1/chat/completions", *asked)
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    status, body = curl(server, "/v1/chat/completions", *key, "-d", json.dumps(HELLO))
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")
    assert curl(server, "/v1/models", *key)[0] == 200

    body_of_stream: Any = HELLO | {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body_of_stream, headers=server.headers, timeout=60
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        text = "\n".join(lines)
    assert text.rstrip().endswith("data: [DONE]")
    assert text.count('"finish_reason":"') == 4
    code, said = server.ends()
    assert code == 0
    first, *rest = said.splitlines()
    assert first == f"mm-gpt: tiny is served at {server.url}/v1"
    assert rest == ["mm-gpt: stopping when all answers are complete (again to stop at once)"]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start: Callable[..., Process]) -> None:
    """A client that does not send its body to the end holds up the first."""
    server = start()
    server.wait(200)
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
        httpx.get(f"{server.url}/metrics", headers=server.headers)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        assert "is served" in server.process.stderr.readline()
        assert "again to stop at once" in server.process.stderr.readline()
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        code, said = server.ends()
    assert (code, said) == (130, "mm-gpt: stopped\n")


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    server = Process(tmp_path / "nothing")
    code, said = server.ends()
    assert code == 1
    assert said.startswith("mm-gpt: error: ")
    assert said.count("\n") == 1


def test_names_and_hosts(tmp_path: Path) -> None:
    """The name tells no folders of the machine."""
    (tmp_path / "runs").mkdir()
    assert _name(str(tmp_path / "runs")) == "runs"
    assert _name("owner/name") == "owner/name"
    assert [_is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "a.example")] == [
        *[True] * 3,
        *[False] * 3,
    ]
