"""The demo with a server's model instead of one of its own."""

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

from conftest import make_picture, make_tiny
from running_server import HTTP, serving

from mm_gpt.document import Image
from mm_gpt.errors import ContextOverflowError, MMGPTError
from mm_gpt.inference.assistant import Assistant
from mm_gpt.serving.gradio_demo import SAMPLES, build, launch, serve, user_message
from mm_gpt.serving.remote import RemoteAssistant
from mm_gpt.serving.server.app import App
from mm_gpt.serving.server.run import listen
from mm_gpt.serving.server.service import Service

KEY = "sk-secret"


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*make_tiny())


@pytest.fixture(scope="module")
def server(assistant: Assistant) -> Iterator[tuple[str, App]]:
    with serving(lambda config: Service.of(assistant, "tiny", config), api_key=KEY) as found:
        yield found


def test_answers_are_those_of_the_model(server: tuple[str, App], assistant: Assistant, picture_file: Path) -> None:
    remote = RemoteAssistant(server[0], api_key=KEY)
    assert remote.model == "tiny"
    messages = [user_message("What is it?", [str(picture_file)]), {"role": "assistant", "content": "A cat."}]
    messages += [user_message("And now?", [str(SAMPLES / "cat.jpg")])]
    options: Any = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_new_tokens": 12, "seed": 4}
    stream = remote.chat(messages, **options)
    pieces = list(stream)
    assert stream.answer.text == "".join(pieces).strip() == assistant.chat(messages, **options).text
    images = [Image(picture_file), Image(make_picture(5))]
    expected = assistant.caption(images, num_beams=1, no_repeat_ngram_size=8)
    assert [caption.text for caption in remote.caption(images)] == [str(caption) for caption in expected]


def test_a_stream_that_is_closed_stops_the_server(server: tuple[str, App]) -> None:
    stream = RemoteAssistant(f"{server[0]}/v1", api_key=KEY).chat([user_message("Hello", [])], max_new_tokens=200)
    next(stream)
    stream.close()
    end = time.monotonic() + 20
    lines: list[str] = []
    while not {"mm_gpt_prompts_running 0.0", "mm_gpt_aborts_total 1.0"} <= set(lines):
        assert time.monotonic() < end, "the server goes on"
        lines = HTTP.get(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()


def test_what_the_server_refuses_is_one_line(server: tuple[str, App]) -> None:
    remote = RemoteAssistant(server[0], api_key=KEY)
    with pytest.raises(ContextOverflowError, match="the context holds 256"):
        list(remote.chat([user_message("long " * 300, [])]))
    with pytest.raises(MMGPTError, match=r"^the server answers 401: Incorrect API key\.$"):
        RemoteAssistant(server[0], api_key="wrong")
    with pytest.raises(MMGPTError, match="temperature must be from 0 to 2"):
        list(remote.chat([user_message("Hello", [])], temperature=3.0))
    with listen("127.0.0.1", 0) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(MMGPTError, match=rf"127\.0\.0\.1:{port}/v1/: no answer from the server"):
        launch(server=f"http://127.0.0.1:{port}", port=0)
    with pytest.raises(MMGPTError, match="begins with http"):
        RemoteAssistant("localhost:8000")


def test_the_page_asks_the_server(
    server: tuple[str, App], assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    page = build(RemoteAssistant(server[0], api_key=KEY))
    serve(page, port=port, block=False)
    try:
        said = [talk(f"http://127.0.0.1:{port}", 0, [{"text": "Hello", "files": []}, False])]
        said.append(talk(f"http://127.0.0.1:{port}", 1, [None, [], 0, 1, 0, 8, 0]))
    finally:
        page.close(verbose=False)
    expected = assistant.chat([user_message("Hello", [])], max_new_tokens=8).text
    assert json.dumps(expected)[1:-1] in said[1]


def talk(page: str, function: int, data: list[Any]) -> str:
    """What a function of the page answers, all of its events."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": "a"}).encode()
    request = urllib.request.Request(f"{page}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    events = urllib.request.urlopen(f"{page}/gradio_api/queue/data?session_hash=a", timeout=60)
    text: str = events.read().decode()
    return text
