"""What a request may say: every wrong field by its path, and nothing that brings the server down."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.serving.server.config import Served, ServerConfig
from mm_gpt.serving.server.errors import RequestError
from mm_gpt.serving.server.requests import ChatRequest, CompletionRequest, read_chat, read_completion, read_json

SERVED = Served(
    name="m",
    context=100,
    vocab_size=50,
    end_ids=(0,),
    takes_images=True,
    no_repeat_ngram_size=8,
    fingerprint="fp_1",
)
CONFIG = ServerConfig(max_images=2, max_rows=4)
URL = {"url": "https://example.org/a.png"}
IMAGE = {"type": "image_url", "image_url": URL}
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def chat(**fields: Any) -> ChatRequest:
    return read_chat(read_json(json.dumps(HELLO | fields).encode()), SERVED, CONFIG)


def completion(**fields: Any) -> CompletionRequest:
    return read_completion(read_json(json.dumps(TEXT | fields).encode()), SERVED, CONFIG)


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def content(*parts: Any, role: str = "user") -> dict[str, Any]:
    return said({"role": role, "content": list(parts)})


def test_defaults() -> None:
    request = chat()
    assert (request.generation.temperature, request.generation.top_p, request.generation.n) == (1, 1, 1)
    assert request.generation.max_new_tokens == 100
    assert request.generation.no_repeat_ngram_size == 8
    assert not request.stream
    assert chat().generation.seed != request.generation.seed
    assert completion().generation.max_new_tokens == 16
    assert completion().generation.no_repeat_ngram_size == 0


def test_null_is_what_is_not_there() -> None:
    """Clients fill in what their caller left out."""
    nothing = dict.fromkeys(["n", "stop", "seed", "temperature", "tools", "stream_options", "response_format", "user"])
    assert chat(**nothing).generation.n == 1
    for name in ("no_such_field", "max_token"):
        with pytest.raises(RequestError, match=f"Unknown field '{name}'"):
            chat(**{name: None})
    with pytest.raises(RequestError, match="Did you mean 'max_tokens'"):
        chat(max_token=3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 51}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 1.0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"50": 1}}, "logit_bias.50"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": None}, "messages"),
        (said("Hello"), "messages[0]"),
        (said({"role": "user"}), "messages[0].content"),
        (said({"content": "a"}), "messages[0].role"),
        (said({"role": "tool", "content": "a", "tool_call_id": "b"}), "messages[0].role"),
        (said({"role": "bot", "content": "a"}), "messages[0].role"),
        (said({"role": "user", "content": "a", "name": "b"}), "messages[0].name"),
        (
            said(HELLO["messages"][0], {"role": "assistant", "tool_calls": [1], "content": "a"}),
            "messages[1].tool_calls",
        ),
        (content(), "messages[0].content"),
        (content({"type": "text"}), "messages[0].content[0].text"),
        (content({"type": "text", "text": "a", "more": 1}), "messages[0].content[0].more"),
        (content({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type"),
        (content({"text": "a"}), "messages[0].content[0].type"),
        (content({"type": "image_url"}), "messages[0].content[0].image_url"),
        (content({"type": "image_url", "image_url": "https://a"}), "messages[0].content[0].image_url"),
        (content(IMAGE, {"type": "image_url", "image_url": {}}), "messages[0].content[1].image_url.url"),
        (content({**IMAGE, "uuid": "a"}), "messages[0].content[0].uuid"),
        (
            content({"type": "image_url", "image_url": URL | {"detail": "max"}}),
            "messages[0].content[0].image_url.detail",
        ),
        (content(IMAGE, role="assistant"), "messages[0].content[0].type"),
        (content(IMAGE, IMAGE, IMAGE), "messages[0].content[2].image_url.url"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    error = caught.value
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert error.code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", [50]]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "a"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_wrong_with_a_completion(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_model_of_text_alone() -> None:
    served = Served(**{**vars(SERVED), "takes_images": False})
    with pytest.raises(RequestError, match="'m' reads text alone") as caught:
        read_chat(read_json(json.dumps(HELLO | content(IMAGE)).encode()), served, CONFIG)
    assert caught.value.param == "messages[0].content[0].type"


def status_of(read: Callable[[], Any]) -> int:
    try:
        read()
    except RequestError as error:
        json.dumps(error.body()).encode()
        return error.status
    return 200


NAMES = sorted({*HELLO, *TEXT, "n", "stop", "seed", "logit_bias", "stream", "stream_options", "temperature", "top_p"})
NAMES += [
    "response_format",
    "structured_outputs",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "echo",
    "metadata",
    "tools",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "regex", "json"]), inner
        )
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_object_is_a_request_or_is_refused(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    for read in (read_chat, read_completion):
        assert status_of(lambda read=read: read(read_json(body), SERVED, CONFIG)) in (200, 400)  # type: ignore[misc]


@settings(max_examples=100)
@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_are_refused(body: bytes) -> None:
    assert status_of(lambda: read_json(body)) in (200, 400)
