"""Transformer-XL: relative positions and segment memory against the formulas, and conversations that go on for ever.

Comparisons are in float64, where two orders of the same additions differ by 1e-15 to 1e-14, and a key too many or too
few by 1e-2.
"""

import dataclasses
import itertools
import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny, make_tokenizer, tiny_config
from torch import Tensor

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError
from mm_gpt.inference import engine as engine_module
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.chat_session import ChatSession
from mm_gpt.inference.engine import Engine
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.model.cache import ForwardContext, KVCache
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.masks import attention_mask
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.relative import RelativeAttention, shift
from mm_gpt.processor import IGNORE_INDEX, Processor, ProcessorConfig, collate
from mm_gpt.templates.chat_template import ChatTemplate

ROOT = Path(__file__).resolve().parent.parent
D, H, C = 32, 4, 8


def xl_config(**changes: Any) -> DecoderConfig:
    values: dict[str, Any] = {
        "vocab_size": 50,
        "width": D,
        "num_layers": 2,
        "num_heads": H,
        "num_kv_heads": H,
        "head_size": C,
        "mlp_width": 48,
        "max_length": 64,
        "norm": "layer",
        "norm_place": "post",
        "activation": "relu",
        "gated_mlp": False,
        "mlp_bias": True,
        "positions": "relative",
        "memory_length": 64,
        "init": "normal",
    }
    return DecoderConfig(**(values | changes))


def make_decoder(**changes: Any) -> Decoder:
    """float64, with weights that are large enough for every key to count."""
    torch.manual_seed(0)
    decoder = Decoder(xl_config(**changes)).double().eval()
    init_weights(decoder)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(10 if "bias" not in name else 25)  # u and v would else hardly matter
    return decoder


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_segments(decoder: Decoder, x: Tensor, length: int) -> Tensor:
    """(B, T, D) read `length` tokens at a time, each with the memory that the one before left."""
    states, memory = [], None
    for start in range(0, x.shape[1], length):
        part = x[:, start : start + length]
        hidden, memory = decoder.forward_segment(part, torch.arange(part.shape[1])[None], memory)
        states.append(hidden)
    return torch.cat(states, dim=1)


def whole(decoder: Decoder, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return decoder(x, torch.arange(x.shape[1])[None], mask=mask)


def segment_mask(starts: Sequence[int], num_tokens: int, memory: int) -> Tensor:
    """(1, 1, T, T): causal, and back to `memory` tokens before the query's segment. `starts`: of the segments."""
    own = torch.tensor([max(start for start in starts if start <= i) for i in range(num_tokens)])
    i, j = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    return ((j <= i) & (j >= own[:, None] - memory))[None, None]


# ---- Attention with relative positions ----


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 7), (5, 5), (4, 9), (9, 30)])
def test_shift_is_a_gather(T: int, S: int) -> None:
    """Column j of query t is its score for distance S-1-j; key j stands t + S - T - j before it."""
    scores = noise(2, 3, T, S)
    shifted = shift(scores)
    for t, j in itertools.product(range(T), range(S)):
        distance = t + (S - T) - j
        if distance >= 0:  # what is ahead is masked
            assert torch.equal(shifted[..., t, j], scores[..., t, S - 1 - distance])


def naive_attention(attention: RelativeAttention, x: Tensor, memory: Tensor | None) -> Tensor:
    """The paper's formula, pair by pair: (a) q·k (b) q·W_r R (c) u·k (d) v·W_r R, over √d. x (T, D), memory (M, D)."""
    heads, kv_heads, size = attention.config.num_heads, attention.config.num_kv_heads, attention.config.head_size
    W_q, W_k, W_v = attention.qkv.weight.split([heads * size, kv_heads * size, kv_heads * size])
    source = x if memory is None else torch.cat([memory, x])
    before = len(source) - len(x)
    frequencies = [10_000 ** -(n / (D // 2 - 1)) for n in range(D // 2)]
    rows = []
    for i in range(len(x)):
        heads_out = []
        for head in range(heads):
            q = (W_q @ x[i]).view(heads, size)[head]
            u, v_bias = attention.content_bias[head], attention.position_bias[head]
            scores, values = [], []
            for j in range(before + i + 1):
                k = (W_k @ source[j]).view(kv_heads, size)[head // (heads // kv_heads)]
                distance = before + i - j
                angles = torch.tensor([distance * f for f in frequencies], dtype=torch.float64)
                R = torch.cat([angles.sin(), angles.cos()])
                r = (attention.distance.weight @ R).view(heads, size)[head]
                scores.append((q @ k + q @ r + u @ k + v_bias @ r) / math.sqrt(size))
                values.append((W_v @ source[j]).view(kv_heads, size)[head // (heads // kv_heads)])
            heads_out.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(attention.out.weight @ torch.cat(heads_out))
    return torch.stack(rows)


@pytest.mark.parametrize(("kv_heads", "memory"), [(4, 0), (4, 5), (2, 5)])
def test_attention_is_the_papers_formula(kv_heads: int, memory: int) -> None:
    attention = make_decoder(num_kv_heads=kv_heads).blocks[0].attention
    x, before = noise(4, D), noise(memory, D, seed=2) if memory else None
    found = attention(x[None], ForwardContext(), None if before is None else before[None])[0]
    torch.testing.assert_close(found, naive_attention(attention, x, before), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{"attention": ("local",), "window": 4}, {"qk_norm": True}, {"causal": False}])
def test_what_relative_positions_do_not_go_with(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="relative positions"):
        Decoder(xl_config(**changes))


def test_memory_needs_relative_positions() -> None:
    with pytest.raises(ConfigError, match="memory_length needs positions 'relative'"):
        xl_config(positions="rope")


# ---- Memory ----

SHAPES: list[dict[str, Any]] = [
    {},
    {"norm_place": "pre"},
    {"norm_place": "both", "norm": "rms", "gated_mlp": True},
    {"norm_place": "pre", "num_kv_heads": 2, "sub_norm": True},
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("length", [1, 5, 23])
def test_memory_of_all_is_full_attention(changes: dict[str, Any], length: int) -> None:
    """Memory must pass the same norms as what it is memory of."""
    decoder, x = make_decoder(**changes), noise(2, 23, D)
    torch.testing.assert_close(by_segments(decoder, x, length), whole(decoder, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("length", "memory"), [(4, 4), (4, 2), (6, 6), (3, 7), (5, 1)])
def test_bounded_memory_is_a_segment_aligned_mask(length: int, memory: int) -> None:
    """Each query sees its segment's past and `memory` tokens before the segment; a sliding window is something else."""
    decoder, x = make_decoder(memory_length=memory, num_layers=3), noise(2, 23, D)
    found = by_segments(decoder, x, length)
    mask = segment_mask(range(0, 23, length), 23, memory)
    torch.testing.assert_close(found, whole(decoder, x, mask), rtol=0, atol=5e-14)
    i, j = torch.arange(23)[:, None], torch.arange(23)
    window = ((j <= i) & (j > i - length - memory))[None, None]
    assert (found - whole(decoder, x, window)).abs().max() > 1e-2


@pytest.mark.parametrize(("length", "memory", "last"), [(4, 4, 11), (4, 2, 7), (6, 6, 17)])
def test_reach(length: int, memory: int, last: int) -> None:
    """Golden: how far what token 0 was is still felt, in two layers. Beyond it every bit is as it was."""
    decoder, x = make_decoder(memory_length=memory), noise(1, 30, D)
    other = x.clone()
    other[:, 0] = noise(D, seed=3)
    changed = (by_segments(decoder, x, length) != by_segments(decoder, other, length)).any(dim=-1)[0]
    assert int(changed.nonzero().max()) == last


def test_no_gradient_into_memory() -> None:
    """Keys of the memory are made anew with a gradient to W_k; what they are made of has none."""
    decoder = make_decoder()
    first, second = noise(1, 5, D).requires_grad_(), noise(1, 4, D, seed=2).requires_grad_()
    positions = torch.arange(5)[None]
    _, memory = decoder.forward_segment(first, positions, None)
    assert not any(layer.requires_grad for layer in memory)
    only_memory = torch.cat([torch.ones(4, 5), torch.zeros(4, 4)], dim=1).bool()[None, None]
    hidden, _ = decoder.forward_segment(second, positions[:, :4], memory, mask=only_memory)
    (hidden * noise(1, 4, D, seed=4)).sum().backward()
    assert first.grad is None
    assert second.grad is not None
    for block in decoder.blocks:  # with this mask, memory is all that keys are made of
        W_k = block.attention.qkv.weight.grad[D : 2 * D]
        assert (W_k.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("memory", [3, 6, 64])
def test_cache_of_keys_is_memory_of_states(memory: int) -> None:
    """Inference keeps keys and values, training the states they come from; and tokens one by one are a segment."""
    decoder, x = make_decoder(memory_length=memory), noise(2, 23, D)
    config = decoder.config
    cache = KVCache(config, 2, 64, dtype=torch.float64, device=torch.device("cpu"))
    states = []
    for start in range(0, 23, 5):
        cache.keep_last(memory)
        assert cache.length <= memory
        part = x[:, start : start + 5]
        for piece in part.split(1 if start == 10 else 5, dim=1):
            states.append(decoder(piece, torch.zeros(2, piece.shape[1], dtype=torch.long), cache=cache))
    found = torch.cat(states, dim=1)
    torch.testing.assert_close(found, by_segments(decoder, x, 5), rtol=0, atol=5e-14)


# ---- The model that is trained ----


def text_model(**changes: Any) -> tuple[MMGPT, Processor]:
    """A model of text, float64, whose segments are `memory_length`."""
    tokenizer = make_tokenizer()
    decoder = make_decoder(vocab_size=tokenizer.vocab_size, **changes)
    model = MMGPT(ModelConfig(decoder=decoder.config), decoder).eval()
    config = ProcessorConfig(max_length=decoder.config.max_length)
    return model, Processor(tokenizer, config, vocab_size=tokenizer.vocab_size)


def test_training_reads_rows_in_segments() -> None:
    """Packed documents, padding and a last, shorter segment: the mask of the row and the memory's together."""
    model, processor = text_model(memory_length=6)
    documents = [Document((Text("A red circle: " * 3),)), Document((Text("one sentence in one sentence"),))]
    examples = [processor(document) for document in documents]
    batch = collate([examples, examples[:1]], torch.zeros(0, 3, 0, 0), pad_to_multiple=5)
    T = batch.input_ids.shape[1]
    assert T > 12
    mask = attention_mask(batch)
    assert mask is not None
    mask = mask & segment_mask(range(0, T, 6), T, 6)
    mask |= torch.eye(T, dtype=torch.bool)  # padding sees itself
    expected = model.decoder(model.embed(batch).x, batch.position_ids, mask=mask)
    real = batch.document_ids > 0
    torch.testing.assert_close(model(batch)[real], expected[real], rtol=0, atol=5e-14)


def test_training_gives_no_gradient_beyond_the_segment() -> None:
    """Tokens of the first segment alone have no gradient from the second, though they are seen."""
    model, processor = text_model(memory_length=4, tie_embeddings=False)
    ids = torch.tensor([[10, 11, 12, 13, 20, 21, 22, 23]])
    example = processor(Document((Text("x"),)))
    example = dataclasses.replace(
        example, input_ids=ids[0], labels=torch.tensor([IGNORE_INDEX] * 4 + [21, 22, 23, 24]),
        position_ids=torch.arange(8), branch_ids=torch.zeros(8, dtype=torch.long),
    )  # fmt: skip
    batch = collate([[example]], torch.zeros(0, 3, 0, 0))
    loss, _ = model.loss(batch)
    loss.backward()
    grad = model.decoder.embedding.weight.grad
    assert grad is not None
    assert not grad[10:14].any()
    assert grad[20:24].any(dim=1).all()
    ids[0, 0] = 30
    assert model.loss(dataclasses.replace(batch, input_ids=ids))[0] != loss


# ---- Conversations ----


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(*make_tiny())


TURNS: list[Any] = [
    "Describe the image.",
    [Image(make_picture(1)), "What is in it?"],
    "one sentence",
    ["And", Image(make_picture(2)), "or", Image(make_picture(3)), "?"],
    "A red circle on a blue ground.",
]


def same_answers(assistant: Assistant, talk: ChatSession, turns: Sequence[Any], **options: Any) -> None:
    """Each turn's answer is that of the whole history, read by an engine that knows nothing of it."""
    config = assistant.chat_config({"logprobs": True, **options})
    for turn in turns:
        history = assistant.processor.chat([*talk.messages, {"role": "user", "content": turn}])
        (expected,) = Engine(assistant.model, assistant.processor).generate([history], config)
        found = talk.say(turn)
        assert str(found) == str(expected)
        assert (found.prompt_tokens, found.image_tokens) == (expected.prompt_tokens, expected.image_tokens)
        assert found.finish_reason == expected.finish_reason
        for mine, its in zip(found.logprobs or (), expected.logprobs or (), strict=True):
            assert mine.id == its.id
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ("e", "o")}])
def test_a_conversation_is_chat_on_the_whole_history(assistant: Assistant, options: dict[str, Any]) -> None:
    """With images in several turns, answers cut at their limit, and answers cut before a stop text."""
    options = {"max_new_tokens": 8} | options
    talk = assistant.conversation(logprobs=True, **options)
    same_answers(assistant, talk, TURNS, **options)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * len(TURNS)


def test_a_turn_reads_what_is_new(assistant: Assistant) -> None:
    assistant.engine.forget()
    talk, read, prompts = assistant.conversation(max_new_tokens=4), [], []
    for turn in TURNS:
        prompts.append(talk.say(turn).prompt_tokens)
        read.append(talk.tokens_read)
    assert read[0] == prompts[0]
    for before, now, tokens in zip(prompts, prompts[1:], read[1:], strict=False):
        assert tokens <= now - before  # the answer's own tokens are there already
    assert sum(read) < sum(prompts) / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "learned"},
        {"positions": "xpos"},
        {"attention": ("dense", "local"), "window": 9},
        {"attention": ("fixed",), "stride": 8, "summary": 2},
    ],
)
def test_conversations_of_other_decoders(changes: dict[str, Any]) -> None:
    """What a cache keeps depends on positions and patterns."""
    config, (_, processor) = tiny_config(make_tokenizer().vocab_size), make_tiny()
    assert isinstance(config.decoder, DecoderConfig)
    torch.manual_seed(0)
    model = MMGPT(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **changes))).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    other = Assistant(model, processor)
    options = {"max_new_tokens": 6, "no_repeat_ngram_size": 0}
    same_answers(other, ChatSession(other.engine, GenerationConfig(logprobs=True, **options)), TURNS[:4], **options)


def test_prefixes_are_read_anew(assistant: Assistant) -> None:
    """What a prompt's end says changes the states of its beginning: nothing of the cache is of use."""
    model, processor = make_tiny()
    model.config = dataclasses.replace(model.config, prefix_lm=True)
    other = Assistant(model, processor)
    talk = other.conversation(max_new_tokens=4, logprobs=True)
    same_answers(other, talk, TURNS[:3], max_new_tokens=4)
    assert talk.tokens_read == talk.answer.prompt_tokens


def test_interruptions(assistant: Assistant) -> None:
    """What was written is what was said; the next answer is that of this history."""
    talk = assistant.conversation(max_new_tokens=12, logprobs=True)
    for turn, pieces in zip(TURNS, (1, 2, 0, 3), strict=False):
        with closing(talk.stream(turn)) as stream:
            shown = "".join(itertools.islice(stream, pieces))
        if pieces:  # a stream that was not begun is a turn that was not taken
            assert talk.messages[-1]["content"] == talk.answer.text
            assert shown.strip().startswith(talk.answer.text)
        same_answers(assistant, talk, ["What?"], max_new_tokens=12)


def test_between_pieces_torch_is_as_the_caller_left_it(assistant: Assistant) -> None:
    """Inference mode that leaks out of a generator makes the caller's own tensors unusable for training."""
    with closing(assistant.conversation(max_new_tokens=6).stream("Describe")) as stream:
        next(stream)
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(2, requires_grad=True).sum().requires_grad
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("kind", ["unreadable", "too long"])
def test_a_turn_that_fails_was_not_taken(assistant: Assistant, tmp_path: Any, kind: str) -> None:
    talk = assistant.conversation(max_new_tokens=6, logprobs=True)
    same_answers(assistant, talk, TURNS[:2], max_new_tokens=6)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    messages, bad = (
        list(talk.messages),
        [Image(tmp_path / "broken.png"), "?"] if kind == "unreadable" else "word " * 300,
    )
    with pytest.raises((ImageError, ContextOverflowError)):
        talk.say(bad)
    assert talk.messages == messages
    same_answers(assistant, talk, TURNS[2:], max_new_tokens=6)


REWRITING = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if loop.last or m.role == 'user' -%}{{ m.content }}{%- else -%}{{ '(it answered)' }}{%- endif -%}
{{ '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
FORGETTING = """{{ '<|im_start|>user\\n' + messages[-1].content + '<|im_end|>\\n<|im_start|>assistant\\n' }}"""


@pytest.mark.parametrize("source", [REWRITING, FORGETTING])
def test_templates_that_write_earlier_turns_anew(source: str) -> None:
    """Templates drop an earlier answer's reasoning, say: from where the prompt differs, it is read again."""
    model, processor = make_tiny()
    template = ChatTemplate(source, special=processor.tokenizer.names, where="test", end_tokens=("<|im_end|>",))
    processor = Processor(processor.tokenizer, processor.config, vocab_size=processor.vocab_size, template=template)
    other = Assistant(model, processor)
    talk = other.conversation(max_new_tokens=6, logprobs=True)
    same_answers(other, talk, ["A red circle.", "A red ground.", "A red", "one"], max_new_tokens=6)


def test_an_image_in_the_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images have the same ids: a prompt that shows the last turn alone must not find the first one's image."""
    other = Assistant(*make_tiny())
    chat = other.processor.chat
    monkeypatch.setattr(other.processor, "chat", lambda messages, **options: chat(messages[-1:], **options))
    talk = other.conversation(max_new_tokens=6, logprobs=True)
    turns = [[Image(make_picture(seed)), "What is in it?"] for seed in (1, 2, 3)]
    same_answers(other, talk, turns, max_new_tokens=6)


def test_what_a_conversation_refuses(assistant: Assistant) -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        assistant.conversation(num_beams=2)
    model, processor = text_model()
    template = ChatTemplate(FORGETTING, special={}, where="test")
    processor = Processor(processor.tokenizer, processor.config, vocab_size=processor.vocab_size, template=template)
    with pytest.raises(ConfigError, match="ChatML"):
        ChatSession(Engine(model, processor), GenerationConfig())


# ---- Conversations with memory ----


def talk_of(model: MMGPT, processor: Processor, **options: Any) -> ChatSession:
    return ChatSession(Engine(model, processor), GenerationConfig(logprobs=True, **options))


def asked(number: int) -> str:
    return f"What is the circle {['red', 'blue', 'one', 'image'][number % 4]}?"


LONG = "A red circle on a blue ground. " * 4


@pytest.mark.parametrize("options", [{"max_new_tokens": 5}, {"max_new_tokens": 9, "stop": ("e", "i")}])
def test_with_memory_each_turn_is_a_segment(options: dict[str, Any]) -> None:
    """Against one pass over all that was said: turns, answers and their ends, in their order, none of them twice.

    One turn is longer than a segment, and one answer is interrupted.
    """
    model, processor = text_model(max_length=40, memory_length=24)
    talk = talk_of(model, processor, **options)
    large = Decoder(dataclasses.replace(model.decoder.config, max_length=2000, memory_length=0)).double().eval()
    large.load_state_dict(model.decoder.state_dict())
    config = dataclasses.replace(processor.config, max_length=2000)
    whole_chat = Processor(processor.tokenizer, config, vocab_size=processor.vocab_size)
    starts: list[int] = []
    for number in range(7):
        turn = LONG if number == 3 else asked(number)
        ids = whole_chat(whole_chat.chat([*talk.messages, {"role": "user", "content": turn}])).input_ids
        if number == 4:
            with closing(talk.stream(turn)) as stream:
                next(stream, None)
        else:
            talk.say(turn)
        read = talk.tokens_read
        assert (read > 40) == (number == 3)
        starts += range(len(ids) - read, len(ids), 40)
        mask = segment_mask(starts, len(ids), 24)
        with torch.no_grad():
            hidden = large(large.embed(ids[None]), torch.arange(len(ids))[None], mask=mask)
            expected = large.logits(hidden[0, -1]).log_softmax(-1)
        assert talk.answer.logprobs
        first = talk.answer.logprobs[0]
        assert first.logprob == pytest.approx(float(expected[first.id]), abs=1e-11)


@pytest.mark.parametrize(("memory", "call"), [(0, 1), (24, 1), (24, 2)])
def test_interrupted_while_reading(monkeypatch: pytest.MonkeyPatch, memory: int, call: int) -> None:
    """Ctrl-C in the prompt: the turn was not taken, and asked again it is answered as if nothing had been."""
    model, processor = text_model(max_length=40 if memory else 400, memory_length=memory)
    talks = [talk_of(model, processor, max_new_tokens=5) for _ in range(2)]
    turns = [asked(0), asked(1), LONG, asked(2)]
    expected = [[token.logprob for token in talks[0].say(turn).logprobs or ()] for turn in turns]
    read, calls = model.decoder.forward, itertools.count(1)

    def interrupted(*args: Any, **options: Any) -> Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return read(*args, **options)

    found = answered(talks[1], turns[:2])
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talks[1].say(LONG)
    assert len(talks[1].messages) == 4
    found += answered(talks[1], turns[2:])
    assert found == [pytest.approx(values, abs=1e-11) for values in expected]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is answered, whatever the model thinks of it: answers would else carry news from turn to turn."""
    script: list[int] = []
    replay: Iterator[int] = itertools.cycle([0])

    def choose(logits: Tensor, *_: Any) -> Tensor:
        nonlocal replay
        if script:
            replay = itertools.cycle(list(script))
            script.clear()
        return torch.tensor([next(replay)])

    monkeypatch.setattr(engine_module, "choose", choose)
    return script


def answered(talk: ChatSession, turns: Sequence[str]) -> list[list[float]]:
    return [[token.logprob for token in answer.logprobs or ()] for answer in map(talk.say, turns)]


def test_with_memory_turns_cost_the_same_for_ever(scripted: list[int]) -> None:
    """Thirty turns: tokens read and cache stay as they are while the chat grows to many times the context."""
    model, processor = text_model(max_length=48, memory_length=48)
    scripted += [*processor.tokenizer.encode("A red"), processor.tokenizer.special["<|im_end|>"]]
    talk, read, lengths, capacities, grown = talk_of(model, processor, max_new_tokens=8), [], [], [], []
    for number in range(30):
        answer = talk.say("What is the circle red?" if number % 2 else "What is the circle red!")
        assert isinstance(answer, Answer)
        assert talk._memory is not None
        assert talk._memory.cache is not None
        read.append(talk.tokens_read)
        lengths.append(talk._memory.cache.length)
        capacities.append(talk._memory.cache.keys.shape[3])
        grown.append(sum(len(processor.tokenizer.encode(m["content"])) + 4 for m in talk.messages))
    assert len(set(read[1:])) == 1
    assert len(set(lengths[6:])) == 1
    assert lengths[-1] <= 48 + read[-1] + 8
    assert len(set(capacities)) == 1
    assert grown[-1] > 8 * model.decoder.config.max_length
    assert grown[-1] == pytest.approx(30 * grown[0])


def test_what_is_beyond_the_reach_is_forgotten(scripted: list[int]) -> None:
    """Two layers pass on at most two memories' worth. Within it, another first turn is felt; beyond it, no bit is."""
    model, processor = text_model(max_length=32, memory_length=32)
    scripted += [processor.tokenizer.special["<|im_end|>"]]
    later = [asked(number) for number in range(12)]
    one, other = (answered(talk_of(model, processor), [first, *later]) for first in ("A red circle.", "A blue image."))
    changed = [a != b for a, b in zip(one, other, strict=True)]
    assert changed[:2] == [True, True]
    assert not any(changed[8:])
    assert changed == sorted(changed, reverse=True)


def test_with_memory_and_images() -> None:
    """Images of the present turn are read; those of earlier ones are in the memory."""
    config, (_, processor) = tiny_config(make_tokenizer().vocab_size), make_tiny()
    assert isinstance(config.decoder, DecoderConfig)
    relative = dataclasses.replace(config.decoder, positions="relative", memory_length=64, max_length=64)
    torch.manual_seed(0)
    model = MMGPT(dataclasses.replace(config, decoder=relative)).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    logprobs = []
    for seed in (1, 2):
        talk = talk_of(model, processor, max_new_tokens=1)
        talk.say([Image(make_picture(seed)), "What?"])
        answer = talk.say([Image(make_picture(3)), "And?"])
        assert answer.image_tokens == model.tokens_per_image + 2
        assert answer.logprobs
        logprobs.append(answer.logprobs[0].logprob)
    assert logprobs[0] != logprobs[1]


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its token counts are exact at any size; its seconds are a matter of the machine."""
    script = ROOT / "examples" / "benchmarks" / "conversation.py"
    if not script.is_file():
        pytest.skip("the examples are not installed")
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    command = [script, "--turns", "4", "--repeats", "1", "--width", "64", "--layers", "1", "--out", out, "--plot", plot]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    runpy.run_path(str(script), run_name="__main__")
    assert "again" in capsys.readouterr().out
    read = {row["way"]: row["tokens_read"] for row in json.loads(out.read_text())["rows"]}
    assert max(read["memory"][1:]) - min(read["memory"][1:]) <= 2  # how an answer ends may differ by that
    assert read["again"] == sorted(read["again"])
    assert read["again"][3] > 3 * read["again"][0]
    assert plot.stat().st_size > 1000
