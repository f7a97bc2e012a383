"""The server with a real model behind it and the client that everybody uses in front of it."""

import asyncio
import base64
import http.server
import io
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import make_picture, make_tiny
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from PIL import Image as PILImage
from running_server import HTTP, serving

from mm_gpt.document import Document, Image, Text
from mm_gpt.inference.assistant import Assistant
from mm_gpt.serving.server.app import App
from mm_gpt.serving.server.service import Service

ROOT = Path(__file__).resolve().parent.parent
ASK = [{"role": "user", "content": "Describe the image."}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*make_tiny())


@pytest.fixture(scope="module")
def running_server(assistant: Assistant) -> Iterator[tuple[str, App]]:
    with serving(lambda config: Service.of(assistant, "tiny", config), max_images=3, max_rows=4) as found:
        yield found


@pytest.fixture(scope="module")
def address(running_server: tuple[str, App]) -> str:
    return running_server[0]


@pytest.fixture(scope="module")
def server_app(running_server: tuple[str, App]) -> App:
    return running_server[1]


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def data_url(picture: PILImage.Image, format: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image_part(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text_of(stream: Any) -> list[str]:
    """The text of each choice of a stream of chunks."""
    texts: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            added = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (added or "")
    return [texts[index] for index in sorted(texts)]


# ---- chats ----


def test_a_chat_is_answered_as_in_python(client: Any, assistant: Assistant) -> None:
    answer = client.chat.completions.create(messages=ASK, max_completion_tokens=12, **GREEDY)
    expected = assistant.chat(ASK, max_new_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content.strip() == expected.text
    assert (choice.message.role, choice.finish_reason) == ("assistant", expected.finish_reason)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    used = answer.usage
    assert (used.prompt_tokens, used.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    assert used.prompt_tokens_details.text_tokens == used.prompt_tokens
    assert used.prompt_tokens_details.image_tokens == 0


def test_several_images_stand_where_they_were_put(client: Any, assistant: Assistant) -> None:
    first, second = make_picture(1), make_picture(2)
    parts = ["Left: ", first, " right: ", second, " Which?"]
    content = [{"type": "text", "text": p} if isinstance(p, str) else image_part(data_url(p)) for p in parts]
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": content}], max_completion_tokens=12, **GREEDY
    )
    wanted = [{"role": "user", "content": [p if isinstance(p, str) else Image(p) for p in parts]}]
    expected = assistant.chat(wanted, max_new_tokens=12)
    assert answer.choices[0].message.content.strip() == expected.text
    details = answer.usage.prompt_tokens_details
    assert details.image_tokens == expected.image_tokens == 2 * (assistant.processor.config.tokens_per_image + 2)
    assert details.text_tokens + details.image_tokens == answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_conversation_with_every_role(client: Any, assistant: Assistant) -> None:
    """A developer's message is a system message; what the client gives back of an answer is taken as it came."""
    answer = client.chat.completions.create(messages=ASK, max_completion_tokens=4, **GREEDY).choices[0].message
    said = answer.model_dump()
    messages = [{"role": "developer", "content": "Be brief."}, *ASK, said, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(messages=messages, max_completion_tokens=8, **GREEDY)
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": "And?"},
    ]
    assert second.choices[0].message.content.strip() == assistant.chat(messages, max_new_tokens=8).text


def test_low_detail_is_a_small_image(client: Any, assistant: Assistant) -> None:
    picture = make_picture(3, (1000, 700)).resize((1000, 700), PILImage.Resampling.BICUBIC)
    small = picture.copy()
    small.thumbnail((512, 512), PILImage.Resampling.BICUBIC)

    def answer(url: str, **detail: str) -> Any:
        content = [image_part(url, **detail), {"type": "text", "text": "What?"}]
        choice = client.chat.completions.create(
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=8,
            logprobs=True,
            **GREEDY,
        ).choices[0]
        return [token.logprob for token in choice.logprobs.content]

    low, high = answer(data_url(picture), detail="low"), answer(data_url(picture), detail="high")
    assert low == pytest.approx(answer(data_url(small)), abs=1e-5)
    assert high == pytest.approx(answer(data_url(picture), detail="auto"), abs=1e-5)
    assert low != pytest.approx(high, abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="must be 'auto' or 'low' or 'high', not 'original'"):
        answer(data_url(picture), detail="original")


def test_an_image_is_read_once(client: Any) -> None:
    """What was read is kept: the second question about a picture says how much of it."""
    first = [image_part(data_url(make_picture(9))), {"type": "text", "text": "Describe the image in one sentence."}]
    messages = [{"role": "user", "content": first}]
    before = client.chat.completions.create(messages=messages, max_completion_tokens=4, **GREEDY)
    assert before.usage.prompt_tokens_details.cached_tokens == 0
    after = client.chat.completions.create(messages=messages, max_completion_tokens=4, **GREEDY)
    assert 0 < after.usage.prompt_tokens_details.cached_tokens < after.usage.prompt_tokens
    assert after.choices[0].message.content == before.choices[0].message.content


def test_seeds_repeat_and_choices_differ(client: Any) -> None:
    def sample(**options: Any) -> list[str]:
        answer = client.chat.completions.create(
            model="tiny", messages=ASK, max_completion_tokens=8, **{"temperature": 1.5, **options}
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    four = sample(n=4, seed=7)
    assert len(set(four)) == 4
    assert sample(n=4, seed=7) == four
    assert sample() != sample()  # OpenAI's default is another seed each time
    defaults = client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=8, seed=7)
    assert [defaults.choices[0].message.content] == sample(temperature=1, top_p=1, seed=7)


def test_a_stream_is_what_the_whole_is(client: Any) -> None:
    """Byte for byte, wherever it is cut: stop texts across tokens, their beginnings, half characters at the limit."""
    whole = client.chat.completions.create(
        model="tiny", messages=ASK, max_completion_tokens=40, temperature=1.2, seed=5
    ).choices[0]
    text = whole.message.content
    stops = [text[9:10], text[8:14], [text[12:15], text[12:18]], text[7:9] + "never", None]
    for options in (
        *({"stop": stop} for stop in stops),
        *({"max_completion_tokens": n} for n in (1, 2, 5, 9)),
        {"n": 3},
    ):
        settings = {"max_completion_tokens": 40, "temperature": 1.2, "seed": 5, **options}
        settings = {key: value for key, value in settings.items() if value is not None}
        answer = client.chat.completions.create(model="tiny", messages=ASK, **settings)
        stream = client.chat.completions.create(model="tiny", messages=ASK, stream=True, **settings)
        assert text_of(stream) == [choice.message.content for choice in answer.choices], options


def test_the_order_of_a_stream(address: str) -> None:
    """A role, texts, an empty delta with the reason, usage with no choices, the end; usage is null before."""
    body = {**GREEDY, "messages": ASK, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    answer = HTTP.post(f"{address}/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    first, *middle, last, used = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(list(chunk["choices"][0]["delta"]) == ["content"] for chunk in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert used["choices"] == []
    assert used["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in (first, *middle, last, used)}) == 1
    answer = HTTP.post(f"{address}/v1/chat/completions", json={k: v for k, v in body.items() if k != "stream_options"})
    assert "usage" not in answer.text


def test_the_async_client(address: str, client: Any) -> None:
    async def ask() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="any") as other:
            settings: Any = {"messages": ASK, "max_completion_tokens": 6, **GREEDY}
            answers = await asyncio.gather(*(other.chat.completions.create(**settings) for _ in range(6)))
            stream = await other.chat.completions.create(stream=True, **settings)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [answer.choices[0].message.content for answer in answers], "".join(pieces)

    expected = (
        client.chat.completions.create(messages=ASK, max_completion_tokens=6, **GREEDY).choices[0].message.content
    )
    assert asyncio.run(ask()) == ([expected] * 6, expected)


def test_logprobs_of_a_chat(client: Any, assistant: Assistant) -> None:
    settings: Any = {"messages": ASK, "max_completion_tokens": 10, "logprobs": True, "top_logprobs": 3, **GREEDY}
    settings["extra_body"] = {"no_repeat_ngram_size": 0}  # which may keep the likeliest token from being taken
    choice = client.chat.completions.create(**settings).choices[0]
    tokens = choice.logprobs.content
    text = choice.message.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode(errors="replace") == text
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert values[0] == token.logprob  # greedy
    prompt = assistant.processor.chat(ASK)
    ids = [token_id(assistant, token.bytes) for token in tokens]
    scored = _scores(assistant, prompt, ids)
    assert [token.logprob for token in tokens] == pytest.approx(scored, abs=1e-4)
    streamed = [
        token.logprob
        for chunk in client.chat.completions.create(stream=True, **settings)
        for each in chunk.choices
        if each.logprobs
        for token in each.logprobs.content
    ]
    assert streamed == [token.logprob for token in tokens]


def token_id(assistant: Assistant, written: list[int]) -> int:
    tokens = assistant.engine.tokens
    return next(id for id in range(assistant.processor.vocab_size) if tokens(id) == bytes(written))


def _scores(assistant: Assistant, prompt: Document, ids: list[int]) -> list[float]:
    """Log-probabilities of `ids` behind a prompt, by a forward of the whole."""
    import torch

    from mm_gpt.processor import collate

    example = assistant.processor(Document((*prompt.segments, Text("", ids=tuple(ids)))))
    batch = collate([[example]], assistant.processor.pixels([example]))
    with torch.inference_mode():
        logits = assistant.model.decoder.logits(assistant.model(batch)[0])[-len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


# ---- completions ----


def test_prompts_in_every_form(client: Any, assistant: Assistant) -> None:
    texts = ["A red circle", "Describe the"]
    ids = [assistant.processor.tokenizer.encode(text) for text in texts]
    settings: Any = {"max_tokens": 6, "echo": True, **GREEDY}
    answers = [
        [choice.text for choice in client.completions.create(prompt=prompt, **settings).choices]
        for prompt in (texts, ids)
    ]
    assert answers[0] == answers[1]
    assert all(answer.startswith(text) for answer, text in zip(answers[0], texts, strict=True))
    single = [client.completions.create(prompt=prompt, **settings).choices[0].text for prompt in (texts[1], ids[1])]
    assert single == [answers[0][1]] * 2
    assert answers[0][0][len(texts[0]) :].strip() == assistant.complete(texts[0], max_new_tokens=6).text
    many = client.completions.create(prompt=[texts[0]] * 9, n=2, max_tokens=2, model="tiny", seed=1)
    assert [choice.index for choice in many.choices] == list(range(18))  # more prompts than rows
    assert len({tuple(choice.text for choice in many.choices[at : at + 2]) for at in range(0, 18, 2)}) == 1
    assert many.usage.completion_tokens == 36
    assert text_of(client.completions.create(prompt=texts, stream=True, **settings)) == answers[0]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_text_is_scored(client: Any, assistant: Assistant, max_tokens: int) -> None:
    """What evaluation harnesses do: echo with log-probabilities, and nothing, or one token, behind it."""
    text = "A red circle on a blue ground."
    answer = client.completions.create(prompt=text, max_tokens=max_tokens, echo=True, logprobs=2, **GREEDY)
    (choice,) = answer.choices
    found = choice.logprobs
    ids = assistant.processor.tokenizer.encode(text)
    expected = _scores(assistant, Document((Text("", ids=(ids[0],)),)), ids[1:])
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + max_tokens
    assert answer.usage.completion_tokens == max_tokens
    assert "".join(found.tokens[: len(ids)]) == text
    assert [text[at] for at in found.text_offset[: len(ids)]] == [token[0] for token in found.tokens[: len(ids)]]
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    if max_tokens == 0:
        assert choice.text == text


def test_an_end_mark_may_be_a_prompt(client: Any, assistant: Assistant) -> None:
    """Harnesses score a text behind it. Written as text it is no mark."""
    end = assistant.processor.tokenizer.end_ids[0]
    settings: Any = {"max_tokens": 0, "echo": True, "logprobs": 0, **GREEDY}
    marked = client.completions.create(prompt=[end, *assistant.processor.tokenizer.encode("A red")], **settings)
    assert marked.choices[0].logprobs.tokens[0] == "<|endoftext|>"
    written = client.completions.create(prompt="<|endoftext|>A red", **settings)
    assert len(written.choices[0].logprobs.tokens) > len(marked.choices[0].logprobs.tokens)
    with pytest.raises(openai.BadRequestError, match="no token id"):
        client.completions.create(prompt=[assistant.processor.image_patch_id], **settings)


# ---- every field ----

SUPPORTED = {
    "model": "tiny",
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"17": 5, "18": -100},
    "max_tokens": 3,
    "n": 2,
    "seed": 11,
    "stop": ["never seen", "x" * 50],
    "temperature": 0.7,
    "top_p": 0.9,
    "user": "somebody",
}
IN_CHATS = {
    "messages": ASK,
    "logprobs": True,
    "max_completion_tokens": 3,
    "metadata": {"run": "1"},
    "modalities": ["text"],
    "prompt_cache_key": "a",
    "response_format": {"type": "text"},
    "safety_identifier": "b",
    "service_tier": "auto",
    "store": False,
    "top_logprobs": 2,
}
IN_COMPLETIONS = {"prompt": "A red", "echo": False, "logprobs": 2}
SPECIAL = {"stream", "stream_options"}  # tested by themselves
EXTENSIONS = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_all_supported_fields_at_once(client: Any, kind: str) -> None:
    if kind == "chat":
        answer = client.chat.completions.create(**SUPPORTED, **IN_CHATS, extra_body=EXTENSIONS)
        assert all(len(choice.logprobs.content[0].top_logprobs) == 2 for choice in answer.choices)
    else:
        answer = client.completions.create(**SUPPORTED, **IN_COMPLETIONS, extra_body=EXTENSIONS)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens <= 6


def test_every_other_field_of_the_protocol_is_refused_by_name(client: Any) -> None:
    """Whatever the client's next version knows: nothing is ignored."""
    chat = chat_create_params.CompletionCreateParamsBase.__annotations__.keys() - SUPPORTED.keys() - IN_CHATS.keys()
    text = completion_create_params.CompletionCreateParamsBase.__annotations__.keys()
    refused = [(client.chat.completions, {"messages": ASK}, name) for name in sorted(chat - SPECIAL - {"tool_choice"})]
    more = text - SUPPORTED.keys() - IN_COMPLETIONS.keys() - SPECIAL
    refused += [(client.completions, {"prompt": "A"}, name) for name in sorted(more)]
    assert len(refused) >= 12
    for endpoint, prompt, name in [*refused, (client.chat.completions, {"messages": ASK}, "no_such_field")]:
        with pytest.raises(openai.BadRequestError) as caught:
            endpoint.create(model="tiny", **prompt, extra_body={name: [] if name == "tools" else "x"})
        assert caught.value.param == name, name
        assert name in caught.value.message
        assert caught.value.type == "invalid_request_error"
        assert caught.value.code in ("unsupported_parameter", "unknown_parameter")


def test_greedy_with_a_bias_takes_what_it_favours(client: Any) -> None:
    answer = client.completions.create(
        prompt="A", max_tokens=4, logprobs=0, logit_bias={"65": 100}, model="tiny", temperature=0
    )
    assert len(set(answer.choices[0].logprobs.tokens)) == 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("data:image/png;base64,AAAA", "invalid_image", "not a JPEG"),
        ("data:image/png;base64,!!!", "invalid_image", "not in base64"),
        ("data:text/plain,hello", "invalid_image_url", "must be a data:image/ or http"),
        ("file:///etc/passwd", "invalid_image_url", "must be a data:image/ or http"),
        ("/etc/passwd", "invalid_image_url", "must be a data:image/ or http"),
        ("http://127.0.0.1:1/a.png", "invalid_image", "127.0.0.1, which is not a public address"),
        ("http://169.254.169.254/latest", "invalid_image", "not a public address"),
        ("http://[::1]/a.png", "invalid_image", "not a public address"),
        ("http://2130706433/a.png", "invalid_image", "not a public address"),
    ],
)
def test_what_is_no_image_is_named(client: Any, url: str, code: str, said: str) -> None:
    content = [{"type": "text", "text": "What?"}, image_part(data_url(make_picture())), image_part(url)]
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)
    assert (caught.value.param, caught.value.code) == ("messages[0].content[2].image_url.url", code)


def test_images_are_fetched(client: Any, server_app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an address that passes for a public one, and not from one that it sends on to; nothing stays held."""
    make_picture(6).save(tmp_path / "picture.png")
    (tmp_path / "large.png").write_bytes(bytes(2**20))
    monkeypatch.setattr("mm_gpt.network.client.is_public_address", lambda address: address == "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/away.png":
                self.send_response(302)
                self.send_header("Location", "http://127.0.0.2/secret.png")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{files.server_port}"

        def ask(url: str) -> str:
            messages = [{"role": "user", "content": [image_part(url), {"type": "text", "text": "What?"}]}]
            answer = client.chat.completions.create(messages=messages, max_completion_tokens=6, **GREEDY)
            text: str = answer.choices[0].message.content
            return text

        assert ask(f"{base}/picture.png") == ask(data_url(make_picture(6)))
        for name, reason in (("away", "127.0.0.2, which is not a public"), ("none", "404"), ("large", "not a JPEG")):
            with pytest.raises(openai.BadRequestError, match=reason) as caught:
                ask(f"{base}/{name}.png")
            assert caught.value.param == "messages[0].content[0].image_url.url"
        files.shutdown()
    assert server_app.service is not None
    assert server_app.service.held.bytes == server_app.service.active == 0


def test_a_broken_image_is_named_before_anything_runs(client: Any) -> None:
    """The header is fine, and what follows is not."""
    buffer = io.BytesIO()
    make_picture(4, (200, 100)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    good, cut = (f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in (whole, whole[:700]))
    content = [image_part(good), image_part(cut)]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="broken image") as caught:
            client.chat.completions.create(messages=[{"role": "user", "content": content}], stream=stream, **GREEDY)
        assert caught.value.param == "messages[0].content[1].image_url.url"


def test_images_of_every_sort(client: Any) -> None:
    """CMYK, 16 bits, an animation, a palette, a bomb: an answer or a refusal, and the server goes on."""
    deep = PILImage.new("I;16", (20, 20), 40_000)
    frames = [make_picture(seed) for seed in (1, 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    animated = f"data:image/gif;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    urls = [data_url(make_picture().convert("CMYK"), "JPEG"), data_url(deep), animated]
    for url in (*urls, data_url(make_picture().convert("P"))):
        content = [image_part(url)]
        answer = client.chat.completions.create(
            messages=[{"role": "user", "content": content}], max_completion_tokens=1, **GREEDY
        )
        assert answer.usage.prompt_tokens_details.image_tokens > 0
    bomb = data_url(PILImage.new("1", (8001, 8000)))
    with pytest.raises(openai.BadRequestError, match="over the limit"):
        client.chat.completions.create(messages=[{"role": "user", "content": [image_part(bomb)]}], **GREEDY)


def test_a_prompt_longer_than_the_context(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="the context holds 256") as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "long " * 300}], **GREEDY)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt=["short", [40] * 256], max_tokens=1, **GREEDY)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="from 1 to 256"):
        client.chat.completions.create(messages=ASK, max_completion_tokens=257, **GREEDY)


def test_models(client: Any, address: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "mm-gpt")
    assert client.models.retrieve("tiny").input_modalities == ["text", "image"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("owner/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' does not exist here; 'tiny' does"):
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"messages": ASK}, cast_to=object)
    assert caught.value.param == "model"


def test_other_routes_and_methods_answer_in_the_same_form(client: Any, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no /v1/embeddings here"):
        client.embeddings.create(model="tiny", input="a")
    answer = HTTP.get(f"{address}/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_metrics_count(client: Any, address: str) -> None:
    def read() -> dict[str, float]:
        lines = HTTP.get(f"{address}/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}

    before = read()
    content = [image_part(data_url(make_picture(20))), {"type": "text", "text": "What?"}]
    for _ in range(2):
        used = client.chat.completions.create(
            messages=[{"role": "user", "content": content}], max_completion_tokens=3, **GREEDY
        ).usage
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['mm_gpt_requests_total{endpoint="chat.completions",status="200"}'] == 2
    assert grown["mm_gpt_images_total"] == 2
    assert grown["mm_gpt_prompt_tokens_total"] == 2 * used.prompt_tokens
    assert grown['vllm:generation_tokens_total{model_name="tiny"}'] == grown["mm_gpt_generation_tokens_total"] == 6
    assert grown['vllm:prefix_cache_hits_total{model_name="tiny"}'] == used.prompt_tokens_details.cached_tokens > 0
    assert grown["mm_gpt_time_to_first_token_seconds_count"] == 2
    assert grown['vllm:e2e_request_latency_seconds_count{model_name="tiny"}'] == 2
    assert after["mm_gpt_prompts_running"] == after['vllm:num_requests_waiting{model_name="tiny"}'] == 0


# ---- the form of answers ----

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def in_form(client: Any, **form: Any) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=1.5, seed=3, max_completion_tokens=120, extra_body=form
    )
    assert answer.choices[0].finish_reason == "stop"
    text: str = answer.choices[0].message.content
    return text


def test_answers_have_the_form_that_was_asked_for(client: Any) -> None:
    schema = {"name": "person", "strict": True, "schema": PERSON}
    person = json.loads(in_form(client, response_format={"type": "json_schema", "json_schema": schema}))
    assert sorted(person) == ["age", "name"]
    assert json.loads(in_form(client, structured_outputs={"json": PERSON})).keys() == person.keys()
    assert re.fullmatch(r"[A-C]{3}-\d", in_form(client, structured_outputs={"regex": r"[A-C]{3}-\d"}))
    assert in_form(client, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    words = client.completions.create(
        model="tiny", prompt="A", max_tokens=40, extra_body={"structured_outputs": {"choice": ["a b", "c"]}}
    )
    assert words.choices[0].text in ("a b", "c")


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused_before_the_first_token(client: Any, form: Any, param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=ASK, stream=stream, extra_body=form)
        assert caught.value.param == param
    assert client.chat.completions.create(messages=ASK, max_completion_tokens=1, **GREEDY).choices


# ---- the page about it ----


def test_the_examples_of_the_page_run(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/server.md").read_text().replace("http://127.0.0.1:8000", address)
    monkeypatch.chdir(ROOT)
    code = "\n".join(re.findall(r"```py\n(.*?)```", page, re.S)).replace('model="default"', 'model="tiny"')
    assert code.count('model="tiny"') == 3
    exec(compile(code, "server.md", "exec"), {})
    (command,) = re.findall(r"```sh\n(curl .*?)```", page, re.S)
    done = subprocess.run(["sh", "-c", command.replace('"default"', '"tiny"')], capture_output=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
