"""A web page to chat with the model about pictures, made with Gradio.

It listens on this machine only unless told otherwise, sends nothing anywhere, and loads nothing from the internet.
What a visitor types is text and never a path: pictures come from the page's own upload folder.
Importing this module without Gradio raises MMGPTError.
"""

import html
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm_gpt.errors import ContextOverflowError, ImageError, MMGPTError, not_installed

try:  # before torch, which takes seconds
    import gradio as gr
except ImportError as missing:
    raise MMGPTError(not_installed("Gradio", "demo")) from missing

from mm_gpt.document import Image, Message, check_text
from mm_gpt.hub.choice import chosen_model
from mm_gpt.images import load_image, source_name
from mm_gpt.inference.assistant import Assistant, GenerationOptions, load
from mm_gpt.inference.hints import Hints
from mm_gpt.serving.remote import RemoteAssistant
from mm_gpt.templates.prompts import CAPTION_PROMPT

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).resolve().parent / "samples"
"""Photos to try, free for any use; LICENCES.txt there says where they are from."""
EXAMPLES = {
    "cat.jpg": "What animal is it?",
    "coffee.jpg": "What is this?",
    "astronaut.jpg": "Is there a person in the picture?",
    "rocket.jpg": "Is this indoors or outdoors?",
}
"""Questions that the shipped model answers right."""
MAX_FILE_SIZE = "20mb"
MAX_IMAGES = 16
"""Pictures in one message. No shipped model has room for more, and each one is decoded."""
_SECONDS_BETWEEN_UPDATES = 0.05  # the whole chat travels through Gradio each time; the eye wants no more than this
_UPLOADS_LIVE_S = 24 * 3600
_CSS = """
.gradio-container { max-width: 900px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#title { text-align: center; }
#title h1 { margin: 0; }
#title p { margin: 0; color: var(--neutral-500); }
#chat .message-content span { white-space: pre-wrap; }
#chat .message img { max-height: 220px; width: auto; border-radius: var(--radius-md); }
#chat button[aria-label="Share"] { display: none; }
#chat .icon-button-wrapper:not(:has(button:not([aria-label="Share"]))) { display: none; }
#chat .examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); width: 100%; }
#chat .example { padding: 8px; }
#chat .example-image-container, #chat .example-image { width: 100%; height: 110px; object-fit: cover; }
#chat .example-text { font-size: 14px; }
@media (max-height: 720px) { #chat .example-image-container, #chat .example-image { height: 70px; } }
#box .submit-button { background: var(--primary-600); color: white; }
"""

# The page alone knows of a file that it did not upload, too large or no image: it shows a notice, and tells no server.
_WATCH_LOST_FILES = """
() => {
    let seen = "";
    new MutationObserver(() => {
        const notices = Array.from(document.querySelectorAll(".toast-body.error"), notice => notice.innerText).join();
        if (notices.length > seen.length) window.lostFile = true;
        seen = notices;
    }).observe(document.body, {childList: true, characterData: true, subtree: true});
}
"""
_TELL_LOST_FILE = "(entry, _) => { const lost = window.lostFile; window.lostFile = false; return [entry, !!lost]; }"


def build(assistant: Assistant | RemoteAssistant, hints: Hints | None = None) -> gr.Blocks:
    """The page, not yet served. What `hints` has to say about a question goes to stderr.

    What was entered leaves the box at once, before the model is free: what is typed meanwhile stays. A message that is
    refused comes back into the box.
    """

    def idle(**changes: Any) -> Any:
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **changes)

    def busy(**changes: Any) -> Any:
        return gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **changes)

    def take(entry: dict[str, Any], lost_file: bool) -> tuple[Any, ...]:
        return busy(value=None), {"text": entry["text"] or "", "files": entry["files"], "lost_file": lost_file}

    def take_pictures(entry: dict[str, Any], lost_file: bool) -> tuple[Any, ...]:
        sent = {"text": "", "files": entry["files"], "lost_file": lost_file}
        return busy(value={"text": entry["text"] or "", "files": []}), sent

    def put_back(entry: dict[str, Any], refused: dict[str, Any] | None) -> tuple[Any, ...]:
        """What was refused, before what was entered meanwhile."""
        if refused is None:
            return gr.skip(), None
        text = " ".join(part for part in (refused["text"], entry["text"] or "") if part)
        return gr.MultimodalTextbox(value={"text": text, "files": [*refused["files"], *entry["files"]]}), None

    def refused(error: Exception, entry: dict[str, Any], history: list[Message]) -> tuple[Any, ...]:
        """A notice, with the conversation as it was."""
        gr.Warning(html.escape(explain(error)))
        back = {"text": entry["text"], "files": readable(entry["files"])}
        return idle(), shown(history), history, back

    def answer(entry: dict[str, Any], history: list[Message], *sampling: Any) -> Iterator[tuple[Any, ...]]:
        text, paths = entry["text"], entry["files"]
        try:
            if entry["lost_file"] and not paths:
                raise MMGPTError("A file was refused, so nothing was sent. Add another one, or send again without it.")
            check_text(text, "Your message")
            message = user_message(text.strip() or CAPTION_PROMPT, paths, needs_image=not text.strip())
            if hints is not None and (hint := hints.about(text, len(paths))):
                print(hint, file=sys.stderr)
            stream = assistant.chat([*history, message], stream=True, **_options(*sampling))
            said = ""
            yield busy(), shown([*history, message]), [*history, message, _said("")], None
            updated = time.monotonic()
            for piece in stream:
                said += piece
                if said.strip() and time.monotonic() - updated >= _SECONDS_BETWEEN_UPDATES:
                    turns = [*history, message, _said(said.lstrip())]
                    yield gr.skip(), shown(turns), turns, None
                    updated = time.monotonic()
            turns = [*history, message, _said(stream.answer.text)]
            yield idle(), shown(turns), turns, None
        except Exception as error:
            yield refused(error, entry, history)

    def caption(entry: dict[str, Any], history: list[Message], *sampling: Any) -> Iterator[tuple[Any, ...]]:
        paths = entry["files"]
        try:
            if entry["lost_file"] and not paths:
                raise MMGPTError("The file was refused. Add another one, or press again for the picture before.")
            if paths:
                asked = [user_message(CAPTION_PROMPT, [path]) for path in paths[:MAX_IMAGES]]
                images = [part for message in asked for part in message["content"] if isinstance(part, Image)]
            else:
                asked = [user_message(CAPTION_PROMPT, [])]
                images = last_images(history)[-1:]
            if not images:
                raise MMGPTError("Add a picture first.")
            yield busy(), shown([*history, *asked]), history, None
            options = _options(*sampling)
            captions = assistant.caption(images, **(options if options["temperature"] > 0 else {}))
            turns = list(history)
            for message, written in zip(asked, captions, strict=True):
                turns += [message, _said(written.text)]
            yield idle(), shown(turns), turns, None
        except Exception as error:
            yield refused(error, entry, history)

    def new_chat() -> tuple[Any, ...]:
        return idle(value=None), [], [], None

    def try_example(event: gr.SelectData) -> dict[str, Any]:
        name = list(EXAMPLES)[event.index if isinstance(event.index, int) else event.index[0]]
        return {"text": EXAMPLES[name], "files": [str(SAMPLES / name)]}

    # Uploads older than a day are deleted, every hour.
    with gr.Blocks(
        title="mm-gpt", analytics_enabled=False, fill_height=True, delete_cache=(3600, _UPLOADS_LIVE_S)
    ) as demo:
        gr.Markdown("# mm-gpt\nAsk about your pictures. Answers can be wrong.", elem_id="title")
        # On the server: a browser can show another conversation, but not make the model read other files.
        history = gr.State([], time_to_live=_UPLOADS_LIVE_S)
        sent = gr.State(None, time_to_live=_UPLOADS_LIVE_S)
        back = gr.State(None, time_to_live=_UPLOADS_LIVE_S)
        lost_file = gr.Checkbox(False, visible=False)  # set by the page's script
        chat = gr.Chatbot(
            show_label=False,
            scale=1,
            min_height=360,
            buttons=["copy"],
            render_markdown=False,  # the model writes plain text, and must not place links or images into the page
            allow_tags=False,
            latex_delimiters=[],
            feedback_options=None,
            allow_file_downloads=False,
            elem_id="chat",
            placeholder="Add one picture or several and ask, or try one of these.",
            examples=[
                {"text": question, "icon": str(SAMPLES / name), "files": [str(SAMPLES / name)]}
                for name, question in EXAMPLES.items()
            ],
        )
        box = gr.MultimodalTextbox(
            show_label=False,
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask about a picture ...",
            max_plain_text_length=100_000,  # a longer text is pasted as a file
            autofocus=True,
            elem_id="box",
        )
        with gr.Row():
            caption_button = gr.Button("Caption the picture", size="md", elem_id="caption")
            new_button = gr.Button("New chat", size="md", elem_id="new")
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                temperature = gr.Slider(
                    0, 2, value=0, step=0.05, label="Temperature", info="0: always the likeliest word"
                )
                max_new_tokens = gr.Slider(1, 512, value=128, step=1, label="Longest answer", info="in tokens")
            with gr.Row():
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="1: keep all words")
                top_k = gr.Slider(0, 200, value=0, step=1, label="Top-k", info="0: keep all words")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed", info="of the sampling")
        # One call of the model at a time, whoever asks. The functions are for the page only, not an API.
        inputs = [sent, history, temperature, top_p, top_k, max_new_tokens, seed]
        outputs = [box, chat, history, back]
        model_call: dict[str, Any] = {
            "inputs": inputs,
            "outputs": outputs,
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        page_call: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        running: list[Any] = []
        for event, taking, work in ((box.submit, take, answer), (caption_button.click, take_pictures, caption)):
            taken = event(taking, inputs=[box, lost_file], outputs=[box, sent], js=_TELL_LOST_FILE, **page_call)
            running.append(taken.then(work, **model_call))
            running[-1].then(put_back, inputs=[box, back], outputs=[box, back], **page_call)
        box.stop(idle, outputs=box, cancels=running, **page_call)
        new_button.click(new_chat, outputs=outputs, cancels=running, **page_call)
        chat.clear(new_chat, outputs=outputs, cancels=running, **page_call)
        chat.example_select(try_example, outputs=box, **page_call)
    return demo


def serve(demo: gr.Blocks, *, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> None:
    """Serve a page from `build`. With `block` false it returns once the page answers; `demo.close()` ends it.

    Raises MMGPTError when the port is taken.
    """
    try:
        demo.queue(default_concurrency_limit=1, max_size=32, api_open=False).launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=not block,
            allowed_paths=[str(SAMPLES)],
            max_file_size=MAX_FILE_SIZE,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_CSS,
            js=_WATCH_LOST_FILES,
        )
    except OSError as error:
        raise MMGPTError(f"cannot listen on {host} port {port}: {error}") from error


def check_port(host: str, port: int) -> None:
    """Raises MMGPTError when nothing can listen there, before a model is loaded for it."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise MMGPTError(f"cannot listen on {host} port {port}: {error}") from error


def launch(
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    dtype: str = "auto",
    *,
    server: str | None = None,
    api_key: str = "",
) -> None:
    """Load a model (`mm_gpt.load` says which) and serve the page until interrupted.

    With `server`, the URL of one that is running, its model answers (the first, where none is named) and none is loaded
    here. `host` 0.0.0.0 opens it to the network: whoever reaches the port can use it. Raises MMGPTError when the model
    cannot be loaded, the server does not answer, or the port is taken.
    """
    check_port(host, port)
    # Uploads go into a folder that only this user can read, and are gone at the end, by whatever signal it comes.
    with _signals_raise(), tempfile.TemporaryDirectory(prefix="mm-gpt-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        if server is None:
            model = chosen_model() if model is None else model
            page = build(load(model, device=device, dtype=dtype), Hints(model))
        else:
            page = build(RemoteAssistant(server, api_key=api_key, model=model))
        serve(page, host=host, port=port)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the program, with the exit code that shells give, instead of ending it on the spot."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def user_message(text: str, paths: Sequence[str], *, needs_image: bool = False) -> Message:
    """A chat message: the uploaded pictures, then the text. Every picture is decoded once, to refuse it right away.

    Raises ImageError naming the file, MMGPTError when there is nothing to send or there are too many pictures.
    """
    if needs_image and not paths:
        raise MMGPTError("Type a question or add a picture.")
    if len(paths) > MAX_IMAGES:
        raise MMGPTError(f"{len(paths)} pictures in one message; at most {MAX_IMAGES} are taken.")
    for path in paths:
        load_upload(path)
    return {"role": "user", "content": [*(Image(Path(path)) for path in paths), {"type": "text", "text": text}]}


def load_upload(path: str) -> None:
    """Raises ImageError that names the file as its owner knows it, without our folder."""
    try:
        load_image(Path(path))
    except ImageError as error:
        raise ImageError(str(error).replace(source_name(path), source_name(Path(path).name))) from error


def readable(paths: Sequence[str]) -> list[str]:
    """Those of the uploaded files that are pictures."""
    good = []
    for path in paths[:MAX_IMAGES]:
        try:
            load_upload(path)
        except ImageError:
            continue
        good.append(path)
    return good


def last_images(history: Sequence[Message]) -> list[Image]:
    """The pictures of the latest message that has some."""
    for message in reversed(history):
        images = [part for part in message["content"] if isinstance(part, Image)]
        if images:
            return images
    return []


def shown(history: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages for the model as messages for Gradio's chat: one for each picture and each text."""
    bubbles: list[dict[str, Any]] = []
    for message in history:
        if message["role"] == "assistant":
            bubbles.append({"role": "assistant", "content": _escaped(message["content"] or "(no answer)")})
            continue
        for part in message["content"]:
            content = {"path": str(part.source)} if isinstance(part, Image) else _escaped(part["text"])
            bubbles.append({"role": "user", "content": content})
    return bubbles


def explain(error: Exception) -> str:
    """What the page says about an error. What is our fault goes to the log, with its traceback."""
    if isinstance(error, ContextOverflowError):
        return f"The conversation is too long for the model: {error}. Start a new chat, or send fewer pictures."
    if isinstance(error, MMGPTError):
        return str(error)
    logger.error("the demo failed", exc_info=error)
    return "Something went wrong; the terminal where mm-gpt runs has the details."


def _escaped(text: str) -> str:
    """Gradio shows a text without markdown as HTML."""
    return html.escape(text, quote=False)


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _options(temperature: float, top_p: float, top_k: int, max_new_tokens: int, seed: int) -> GenerationOptions:
    if seed is None:
        raise MMGPTError("The seed is empty; 0 will do.")
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": int(top_k),
        "max_new_tokens": int(max_new_tokens),
        "seed": int(seed),
    }
