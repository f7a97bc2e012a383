"""The web demo: what it passes to the model, what it refuses, and the page itself in a real browser."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

pytest.importorskip("gradio", reason="the demo needs gradio")

from mm_gpt.document import Image
from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError
from mm_gpt.inference.assistant import Assistant
from mm_gpt.serving.gradio_demo import (
    EXAMPLES,
    SAMPLES,
    build,
    explain,
    last_images,
    launch,
    readable,
    serve,
    shown,
    user_message,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_INTERNET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Assistant], str]]:
    """A function that serves the demo of an assistant and returns its address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    demos: list[Any] = []

    def start(assistant: Assistant) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        demos.append(build(assistant))
        serve(demos[-1], port=port, block=False)
        return f"http://127.0.0.1:{port}"

    yield start
    for demo in demos:
        demo.close(verbose=False)


@pytest.fixture
def page() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--headless", "--disable-gpu", *NO_INTERNET]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


# ---- messages ----


def test_typed_text_is_never_an_image(picture_file: Path, tiny_assistant: Assistant) -> None:
    """A question that is a path or URL must not make the server read that file."""
    for text in (str(picture_file), "http://127.0.0.1/a.png", "<image>", "data:image/png;base64,AAAA"):
        message = user_message(text, [])
        document = tiny_assistant.processor.chat([message])
        assert document.images == []
        assert text in "".join(segment.text for segment in document.segments)  # type: ignore[union-attr]


def test_pictures_come_before_the_question_in_their_order(picture_file: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.png"
    shutil.copy(picture_file, second)
    content = user_message("Which is larger?", [str(picture_file), str(second)])["content"]
    assert content == [Image(picture_file), Image(second), {"type": "text", "text": "Which is larger?"}]


def test_broken_picture_is_named_without_the_servers_folder(tmp_path: Path, picture_file: Path) -> None:
    broken = tmp_path / "holiday.jpg"
    broken.write_bytes(b"garbage")
    with pytest.raises(ImageError, match=r"^holiday\.jpg: not a JPEG") as caught:
        user_message("What is it?", [str(broken)])
    assert str(tmp_path) not in explain(caught.value)
    assert readable([str(broken), str(picture_file)]) == [str(picture_file)]


def test_nothing_to_send_and_too_many_pictures(picture_file: Path) -> None:
    with pytest.raises(MMGPTError, match="Type a question"):
        user_message("Describe it.", [], needs_image=True)
    with pytest.raises(MMGPTError, match="17 pictures"):
        user_message("Describe them.", [str(picture_file)] * 17)


def test_later_turns_still_hold_the_pictures(picture_file: Path, tiny_assistant: Assistant) -> None:
    """A follow-up question without its picture would be answered blindly."""
    history = [
        user_message("What animal is it?", [str(picture_file)]),
        {"role": "assistant", "content": "A cat."},
        user_message("What colour is it?", []),
    ]
    assert len(tiny_assistant.processor.chat(history).images) == 1
    assert last_images(history) == [Image(picture_file)]
    assert shown(history) == [
        {"role": "user", "content": {"path": str(picture_file)}},
        {"role": "user", "content": "What animal is it?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "What colour is it?"},
    ]


def test_text_is_shown_as_written() -> None:
    """Without escaping the page would run the markup that a user or the model writes."""
    history = [user_message("<b>1 < 2</b>", []), {"role": "assistant", "content": "<img src=x>it's"}]
    assert [bubble["content"] for bubble in shown(history)] == ["&lt;b&gt;1 &lt; 2&lt;/b&gt;", "&lt;img src=x&gt;it's"]


def test_errors_are_explained_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert "Start a new chat" in explain(ContextOverflowError("the prompt has 300 tokens; the context holds 256"))
    assert "secret" not in explain(RuntimeError("secret"))
    assert "secret" in caplog.text


def test_samples_are_small_photos_with_a_licence() -> None:
    licences = (SAMPLES / "LICENCES.txt").read_text()
    assert sorted(path.name for path in SAMPLES.glob("*.jpg")) == sorted(EXAMPLES)
    for name in EXAMPLES:
        assert name in licences
        assert (SAMPLES / name).stat().st_size < 80_000
        assert max(PILImage.open(SAMPLES / name).size) <= 512


def test_gradio_is_imported_by_the_demo_only() -> None:
    code = """
import sys
sys.modules["gradio"] = None  # as if it were not installed
import mm_gpt
try:
    import mm_gpt.serving.gradio_demo
except mm_gpt.MMGPTError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'Gradio is not installed; in the folder of the checkout: pip install -e ".[demo]"\n'


# ---- the server ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_no_picture_stays_behind_whatever_signal_ends_it(
    number: signal.Signals, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default of both ends the process on the spot, with the visitors' pictures on the disk."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pictures: list[Path] = []

    def upload_and_end(demo: Any, **options: Any) -> None:
        pictures.append(Path(os.environ["GRADIO_TEMP_DIR"], "visitor.png"))
        pictures[0].write_bytes(b"a picture")
        signal.raise_signal(number)

    monkeypatch.setattr("mm_gpt.serving.gradio_demo.serve", upload_and_end)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        launch(str(tiny_model_folder), port=0, device="cpu")
    assert stop.value.code == 128 + number
    assert not pictures[0].parent.exists()
    assert signal.getsignal(number) == before


def test_launch_keeps_uploads_in_a_private_folder_that_goes_away(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio's own place, /tmp/gradio, is shared by all users of the machine and never emptied."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    served: list[Any] = []

    def record(demo: Any, *, host: str, port: int) -> None:
        uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        served.append((host, port, os.environ["GRADIO_ANALYTICS_ENABLED"], uploads, uploads.stat().st_mode & 0o777))

    monkeypatch.setattr("mm_gpt.serving.gradio_demo.serve", record)
    launch(str(tiny_model_folder), port=0, device="cpu")
    ((host, port, analytics, uploads, mode),) = served
    assert (host, port, analytics, mode) == ("127.0.0.1", 0, "False", 0o700)
    assert not uploads.exists()


def test_port_in_use_is_one_line(tiny_assistant: Assistant) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MMGPTError, match=f"127.0.0.1 port {port}"):
            serve(build(tiny_assistant), port=port, block=False)


def test_a_request_cannot_name_files_of_the_server(
    tmp_path: Path, picture_file: Path, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    """A hand-made request that gives a path instead of an upload must not make the server open it."""
    address = serving(tiny_assistant)
    sample = str(SAMPLES / "cat.jpg")
    for number, path in enumerate(["", str(picture_file), "/etc/passwd", sample]):
        files = [{"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}] if path else []
        body = {
            "data": [{"text": "What is it?", "files": files}, False],
            "fn_index": 0,
            "session_hash": f"forged{number}",
        }
        request = urllib.request.Request(
            f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).read()
        events = urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=forged{number}", timeout=60)
        replies = [json.loads(line[6:]) for line in events.read().decode().splitlines() if line.startswith("data: ")]
        completed = [reply for reply in replies if reply["msg"] == "process_completed"]
        assert [reply["success"] for reply in completed] == [path == ""]  # without a file the same request is fine
        if path in ("", sample):
            continue
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=60)


# ---- the page ----


def bot(page: Any) -> Any:
    return page.locator("#chat [data-testid=bot] .message-content")


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def send(page: Any, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#box input[type=file]", [str(file) for file in files])
        page.wait_for_selector("#box .thumbnail-item")
    page.fill("#box textarea", text)
    page.click("#box .submit-button")


def test_conversation_in_a_browser(
    page: Any, tmp_path: Path, picture_file: Path, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    """The whole way: upload, ask, caption, a broken file, a prompt too long, a second turn, a new chat."""
    conversations: list[int] = []
    chat = tiny_assistant.chat
    tiny_assistant.chat = lambda messages, **options: conversations.append(len(messages)) or chat(messages, **options)  # type: ignore
    address = serving(tiny_assistant)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("#box textarea")
    assert page.title() == "mm-gpt"
    assert page.locator("#chat .example").count() == len(EXAMPLES)
    assert not page.locator("#settings input").first.is_visible()

    page.click("#settings button")
    number, slider = (page.get_by_label(f"{kind} for Longest answer") for kind in ("number input", "range slider"))
    # four turns must fit into 256 tokens; again, because the page takes no input in the moment after opening
    wait_until(lambda: number.fill("20") or slider.input_value() == "20")
    page.keyboard.press("Tab")
    page.click("#settings button")

    send(page, "What <b>is</b> it?", picture_file)
    wait_until(lambda: bot(page).count() == 1 and page.locator("#box .submit-button").count() == 1)
    expected = chat([user_message("What <b>is</b> it?", [str(picture_file)])], max_new_tokens=20)
    assert bot(page).inner_text().split() == (str(expected) or "(no answer)").split()
    assert "What <b>is</b> it?" in page.locator("#chat").inner_text()
    assert page.locator("#chat .user img").count() == 1
    page.screenshot(path=tmp_path / "answer.png")

    page.click("#caption")
    wait_until(lambda: bot(page).count() == 2 and page.locator("#box .submit-button").count() == 1)
    assert bot(page).nth(1).inner_text().split() == str(tiny_assistant.caption(picture_file)).split()
    assert page.locator("#chat .user img").count() == 1  # about the picture that is already there

    broken = tmp_path / "broken<i>.jpg"
    broken.write_bytes(b"garbage")
    send(page, "And this?", broken)
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "not a JPEG, PNG, WEBP, GIF, BMP, TIFF or AVIF image" in toast.inner_text()
    assert bot(page).count() == 2
    wait_until(lambda: page.input_value("#box textarea") == "And this?")
    page.click(".toast-close")
    toast.wait_for(state="detached")

    send(page, "long " * 300)
    toast.wait_for()
    assert "too long for the model" in toast.inner_text()
    wait_until(lambda: page.input_value("#box textarea").startswith("long"))  # it comes back, before what is typed next
    assert bot(page).count() == 2

    assert conversations == [1, 5]  # the overflow got the history, the broken file never came so far
    send(page, "?")
    wait_until(lambda: bot(page).count() == 3 and page.locator("#box .submit-button").count() == 1)
    page.screenshot(path=tmp_path / "end.png")

    page.click("#new")
    page.wait_for_selector("#chat .example")
    page.click("#chat .example >> nth=0")
    page.wait_for_selector("#box .thumbnail-item")
    assert page.input_value("#box textarea") == EXAMPLES["cat.jpg"]
    page.click("#caption")
    wait_until(lambda: bot(page).count() == 1)
    assert "Traceback" not in page.content()
    # fonts, scripts, telemetry: nothing from the internet
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def test_answer_streams_and_can_be_stopped(
    page: Any, tmp_path: Path, picture_file: Path, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    """After Stop the model must not go on, what it said stays, and the next turn works."""
    said: list[str] = []

    class Slow:
        """A stream of words without end."""

        answer = "never reached"

        def __iter__(self) -> Iterator[str]:
            while True:
                said.append(f"word{len(said)} ")
                yield said[-1]
                time.sleep(0.1)

    chat = tiny_assistant.chat
    tiny_assistant.chat = lambda *args, **options: Slow()  # type: ignore
    page.goto(serving(tiny_assistant))
    page.wait_for_selector("#box textarea")
    send(page, "Go on", picture_file)
    wait_until(lambda: bot(page).count() == 1 and "word3" in bot(page).inner_text())
    page.click("#box .stop-button")
    page.wait_for_selector("#box .submit-button")

    def is_silent() -> bool:
        before = len(said)
        time.sleep(0.5)
        return len(said) == before

    wait_until(is_silent)
    assert "word3" in bot(page).inner_text()

    histories: list[Any] = []
    tiny_assistant.chat = lambda messages, **options: histories.append(messages) or chat(messages, **options)  # type: ignore
    send(page, "And now?")
    wait_until(lambda: bot(page).count() == 2)
    assert "word3" in histories[0][1]["content"]
    page.screenshot(path=tmp_path / "stopped.png")


def test_a_refused_file_does_not_end_in_an_answer_without_it(
    page: Any, tmp_path: Path, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    """The browser refuses what is too large or no image, and tells nobody; the question is still in the box."""
    large = tmp_path / "large.png"
    with large.open("wb") as sparse:
        sparse.truncate(21_000_000)
    page.goto(serving(tiny_assistant))
    page.wait_for_selector("#box textarea")
    page.set_input_files("#box input[type=file]", str(large))
    page.locator(".toast-body.error").wait_for()
    page.fill("#box textarea", "What?")
    page.click("#box .submit-button")
    page.locator(".toast-body.warning").wait_for()
    assert "A file was refused, so nothing was sent" in page.locator(".toast-body.warning").inner_text()
    wait_until(lambda: page.input_value("#box textarea") == "What?")
    assert bot(page).count() == 0
    page.click("#box .submit-button")  # once more, knowingly
    wait_until(lambda: bot(page).count() == 1)


def test_text_typed_while_the_model_works_stays(
    page: Any, picture_file: Path, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    """Also when the message is refused in the end and comes back."""
    chat, go_on = tiny_assistant.chat, threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        go_on.wait(60)
        return chat(*args, **options)

    tiny_assistant.chat = slow  # type: ignore
    page.goto(serving(tiny_assistant))
    page.wait_for_selector("#box textarea")
    send(page, "First", picture_file)
    wait_until(lambda: page.input_value("#box textarea") == "")
    page.fill("#box textarea", "Second")
    go_on.set()
    wait_until(lambda: bot(page).count() == 1 and page.locator("#box .submit-button").count() == 1)
    assert page.input_value("#box textarea") == "Second"
    go_on.clear()
    page.fill("#box textarea", "long " * 300)
    page.click("#box .submit-button")
    wait_until(lambda: page.input_value("#box textarea") == "")
    page.fill("#box textarea", "Third")
    go_on.set()
    page.locator(".toast-body").wait_for()
    wait_until(lambda: page.input_value("#box textarea") == "long " * 300 + " Third")


@pytest.mark.parametrize("size", [(390, 844), (375, 667)])
def test_the_phone_view_starts_at_the_top(
    size: tuple[int, int], page: Any, tiny_assistant: Assistant, serving: Callable[[Assistant], str]
) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(serving(tiny_assistant))
    page.wait_for_selector("#chat .example")
    page.wait_for_timeout(1000)  # for the page to scroll, as it did
    scrolled = "[...document.querySelectorAll('*')].filter(e => e.scrollTop > 0).length + window.scrollY"
    assert page.evaluate(scrolled) == 0
    card = page.locator("#chat .example").first.bounding_box()
    assert 0 < card["y"] < size[1]


def test_half_a_character_is_explained(tiny_assistant: Assistant) -> None:
    demo = build(tiny_assistant)
    answer = next(function.fn for function in demo.fns.values() if function.name == "answer")
    entry = {"text": "caf\udce9", "files": [], "lost_file": False}
    with pytest.warns(UserWarning, match="half a character"):
        ((*_, history, back),) = answer(entry, [], 0, 1, 0, 4, 0)
    assert (history, back["text"]) == ([], "caf\udce9")
