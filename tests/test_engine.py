"""Generation: a naive loop without cache, padding and batches is the oracle of the engine."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from torch import Tensor

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.inference.beams import BeamSearch, length_penalty
from mm_gpt.inference.constraints import Constraint
from mm_gpt.inference.detokenizer import TokenBytes
from mm_gpt.inference.engine import Engine, Stream
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.inference.rows import Row
from mm_gpt.inference.sampling import Sampler, choose
from mm_gpt.model.decoder import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor, ProcessorConfig, collate
from mm_gpt.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPTS = [
    Document((Text("A red "),)),
    Document((Image(make_picture(1)), Text("Describe the image in one sentence."))),
    Document((Text("x"),)),
    Document((Text("Left: "), Image(make_picture(2)), Text(" right: "), Image(make_picture(3)), Text(" so"))),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """In float64: a batch and a single prompt then differ by 1e-13, and never in a token."""
    return Engine(*exact(*make_tiny()))


def exact(model: MMGPT, processor: Processor) -> tuple[MMGPT, Processor]:
    return model.double(), processor


def next_logits(engine: Engine, document: Document, ids: list[int]) -> Tensor:
    """Logits (V,) after the prompt and `ids`, computed from nothing."""
    example = engine.processor(document)
    example.input_ids = torch.cat([example.input_ids, torch.tensor(ids, dtype=torch.long)])
    example.position_ids = torch.arange(len(example.input_ids))
    example.labels, example.branch_ids = torch.zeros_like(example.input_ids), torch.zeros_like(example.input_ids)
    pixels = [engine.processor.transform(image.load()) for image in example.images]
    batch = collate([[example]], torch.stack(pixels) if pixels else torch.zeros(0, 3, 32, 32))
    with torch.no_grad():
        return engine.model.decoder.logits(engine.model(batch)[:, -1])[0]


def naive(engine: Engine, document: Document, config: GenerationConfig) -> list[tuple[int, float]]:
    """(id, log-probability) one after another, until an end mark or `max_new_tokens`. No cache, no batch."""
    sampler = Sampler(config, engine.processor(document).input_ids, 0)
    result: list[tuple[int, float]] = []
    while len(result) < config.max_new_tokens:
        logits = next_logits(engine, document, [id for id, _ in result])
        token = choose(logits[None], [sampler], [None])
        id = int(token)
        sampler.accept(id)
        result.append((id, logits.log_softmax(-1)[id].item()))
        if id in engine.processor.tokenizer.end_ids:
            break
    return result


def ids_of(answer: Answer) -> list[int]:
    return list(answer.ids)


def with_end_bias(engine: Engine, bias: float) -> Engine:
    """The same engine whose model is more or less inclined to write an end mark."""
    model, processor = copy.deepcopy(engine.model), engine.processor
    original = model.decoder.logits

    def logits(hidden: Tensor) -> Tensor:
        values = original(hidden)
        values[..., list(processor.tokenizer.end_ids)] += bias
        return values

    model.decoder.logits = logits  # type: ignore[method-assign]
    return Engine(model, processor)


def never_ends(engine: Engine) -> Engine:
    return with_end_bias(engine, -1e9)


# ---- batch, cache and padding ----


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "seed": 3}, {"temperature": 1.3, "top_p": 0.8}],
    ids=["greedy", "sampled", "top-k", "top-p"],
)
def test_batched_equals_single_equals_naive(engine: Engine, options: dict[str, Any]) -> None:
    """Wrong positions or keys of left padding, a cache off by one: the third most reported bug of the field."""
    config = GenerationConfig(max_new_tokens=10, logprobs=True, **options)
    batched = engine.generate(PROMPTS, config)
    for document, answer in zip(PROMPTS, batched, strict=True):
        (single,) = engine.generate([document], config)
        expected = naive(engine, document, config)
        assert ids_of(answer) == ids_of(single) == [id for id, _ in expected]
        assert answer == single
        assert answer.prompt_tokens == len(engine.processor(document))
        assert answer.image_tokens == len(document.images) * (engine.model.tokens_per_image + 2)
        assert answer.completion_tokens == len(expected)
        for token, (_, logprob) in zip(answer.logprobs or [], expected, strict=True):
            assert token.logprob == pytest.approx(logprob, abs=1e-9)


def test_float32_agrees_too() -> None:
    """Weights as they are used; log-probabilities instead of words, which may flip where two are as likely."""
    engine = Engine(*make_tiny())
    config = GenerationConfig(max_new_tokens=4, logprobs=True)
    for document, answer in zip(PROMPTS, engine.generate(PROMPTS, config), strict=True):
        for token, (id, logprob) in zip(answer.logprobs or [], naive(engine, document, config), strict=True):
            assert token.logprob == pytest.approx(logprob, abs=1e-3)
            if token.id != id:
                break


def test_rows_end_one_by_one(engine: Engine) -> None:
    """A row that has ended must neither write on nor stop the others."""
    ending = with_end_bias(engine, 4.0)
    config = GenerationConfig(max_new_tokens=12, temperature=2.0, logprobs=True, seed=3)
    answers = ending.generate(PROMPTS, config)
    assert len({a.completion_tokens for a in answers}) >= 3
    for document, answer in zip(PROMPTS, answers, strict=True):
        expected = [id for id, _ in naive(ending, document, config)]
        assert ids_of(answer) == expected
        ended = expected[-1] in ending.processor.tokenizer.end_ids
        assert answer.finish_reason == ("stop" if ended else "length")


def test_seed_decides(engine: Engine) -> None:
    config = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=1)
    first, again = (engine.generate(PROMPTS, config) for _ in range(2))
    other = engine.generate(PROMPTS, GenerationConfig(max_new_tokens=8, temperature=1.0, seed=2))
    assert first == again
    assert first != other
    torch.manual_seed(0)
    state = torch.get_rng_state()
    engine.generate(PROMPTS[:1], config)
    assert torch.equal(torch.get_rng_state(), state)  # a library must not disturb the program's own randomness


def test_nothing_to_do(engine: Engine) -> None:
    assert engine.generate([], GenerationConfig()) == []


# ---- the end ----


def test_length_is_the_reason_when_nothing_else_ends(engine: Engine) -> None:
    for n in (1, 2, 7):
        (answer,) = never_ends(engine).generate(PROMPTS[:1], GenerationConfig(max_new_tokens=n))
        assert (answer.finish_reason, answer.completion_tokens) == ("length", n)


def test_the_end_mark_is_not_text(engine: Engine) -> None:
    end = engine.processor.tokenizer.special["<|im_end|>"]
    model = copy.deepcopy(engine.model)
    model.decoder.logits = lambda hidden: torch.eye(model.decoder.config.vocab_size)[[end] * len(hidden)]  # type: ignore[method-assign]
    (answer,) = Engine(model, engine.processor).generate(PROMPTS[:1], GenerationConfig(logprobs=True))
    assert answer == ""
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", 1)
    assert answer.logprobs is not None
    assert answer.logprobs[0].token == "<|im_end|>"


def test_a_prompt_as_long_as_the_context(engine: Engine) -> None:
    limit = engine.model.decoder.config.max_length
    full = Document((Text("x" * limit),))
    assert len(engine.processor(full)) == limit
    with pytest.raises(ContextOverflowError, match=f"the prompt has {limit} tokens; the context holds {limit}"):
        engine.generate([full], GenerationConfig())
    with pytest.raises(ContextOverflowError):
        engine.generate([Document((Text("x" * (limit + 1)),))], GenerationConfig())
    with pytest.raises(ContextOverflowError):
        list(engine.stream(full, GenerationConfig()))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_context_ends_for_each_row_by_itself(engine: Engine, num_beams: int) -> None:
    """A long neighbour must not shorten the answer of a short prompt."""
    unending = never_ends(engine)
    limit = engine.model.decoder.config.max_length
    documents = [Document((Text("x" * (limit - 3)),)), PROMPTS[1], Document((Text("x" * (limit - 1)),))]
    config = GenerationConfig(max_new_tokens=9, num_beams=num_beams, logprobs=True)
    together = unending.generate(documents, config)
    assert [a.completion_tokens for a in together] == [3, 9, 1]
    assert [a.finish_reason for a in together] == ["length"] * 3
    for document, answer in zip(documents, together, strict=True):
        assert ids_of(unending.generate([document], config)[0]) == ids_of(answer)


# ---- stop texts and streaming ----


def test_stop_texts(engine: Engine) -> None:
    """Cut before the first stop text, wherever tokens begin and end, also when it is part of one token."""
    unending = never_ends(engine)
    (whole,) = unending.generate(PROMPTS[1:2], GenerationConfig(max_new_tokens=12))
    text = whole.text
    assert len(text) > 6
    for start, end in [(1, 2), (2, 5), (4, 6)]:
        stop = text[start:end]
        (answer,) = unending.generate(PROMPTS[1:2], GenerationConfig(max_new_tokens=12, stop=("never", stop)))
        assert answer.text == text[: text.index(stop)].strip()
        assert answer.finish_reason == "stop"
        assert answer.completion_tokens <= whole.completion_tokens
    (answer,) = unending.generate(PROMPTS[1:2], GenerationConfig(max_new_tokens=12, stop=("not in there",)))
    assert (answer.text, answer.finish_reason) == (text, "length")


@pytest.mark.parametrize("stop", [(), ("a",), ("qqqq", "e")])
def test_streamed_pieces_are_the_answer(engine: Engine, stop: tuple[str, ...]) -> None:
    config = GenerationConfig(max_new_tokens=30, temperature=1.5, seed=5, stop=stop)
    for document in PROMPTS:
        stream = engine.stream(document, config)
        pieces = list(stream)
        (whole,) = engine.generate([document], config)
        assert all(pieces)
        assert "".join(pieces).strip() == whole.text == stream.answer.text
        assert stream.answer.completion_tokens == whole.completion_tokens
        assert stream.answer.finish_reason == whole.finish_reason


def test_streaming_starts_before_the_end(engine: Engine) -> None:
    stream = never_ends(engine).stream(PROMPTS[0], GenerationConfig(max_new_tokens=20))
    next(stream)
    assert stream.answer.completion_tokens < 20


SCRIPTED = Engine(*make_tiny())
TOKENIZER = SCRIPTED.processor.tokenizer


def scripted_stream(text: str, stop: tuple[str, ...] = ()) -> Stream:
    """A stream of a model that writes `text`, one token a step, and ends."""
    decoder, ids = SCRIPTED.model.decoder, [*TOKENIZER.encode(text), TOKENIZER.special["<|im_end|>"]]
    step, rows = iter(ids), torch.eye(decoder.config.vocab_size)
    decoder.logits = lambda hidden: rows[[next(step)]]  # type: ignore[method-assign]
    return SCRIPTED.stream(PROMPTS[2], GenerationConfig(max_new_tokens=len(ids), stop=stop))


@given(st.text(alphabet="ab 😀中é�\n<", min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_a_character_is_never_split(text: str) -> None:
    """Emoji and Chinese are several tokens each: no piece may hold half of one."""
    stream = scripted_stream(text)
    pieces = list(stream)
    assert "".join(pieces) == text
    assert stream.answer.finish_reason == "stop"
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(st.text(alphabet="abc", max_size=12), st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=2))
@settings(max_examples=40, deadline=None)
def test_no_part_of_a_stop_text_is_streamed(text: str, stops: list[str]) -> None:
    """Once shown it cannot be taken back. The stop text that is complete first ends the answer."""
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    cut = min(found, default=(0, len(text)))[1]
    assert "".join(scripted_stream(text, tuple(stops))) == text[:cut]


# ---- without repetition ----


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.2}])
@pytest.mark.parametrize("size", [1, 2])
def test_no_run_of_tokens_comes_twice(engine: Engine, options: dict[str, Any], size: int) -> None:
    # Stops: a guard that one way of decoding forgets. Without it the same prompts do repeat themselves.
    def repeats(answer: Answer) -> bool:
        ids = ids_of(answer)
        runs = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        return len(set(runs)) < len(runs)

    config = GenerationConfig(max_new_tokens=24, logprobs=True, no_repeat_ngram_size=size, **options)
    free = dataclasses.replace(config, no_repeat_ngram_size=0)
    assert not any(map(repeats, engine.generate(PROMPTS, config)))
    assert any(map(repeats, engine.generate(PROMPTS, free)))


# ---- answers of a given form ----


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 2.0}, {"no_repeat_ngram_size": 1}])
def test_answers_have_the_form_that_is_asked_for(engine: Engine, options: dict[str, Any]) -> None:
    """Stops: a way of decoding that forgets the grammar, states that rows or beams share, spaces cut off."""
    choices = ("a cat", "a dog ", " mice", "a cat and a dog")
    config = GenerationConfig(max_new_tokens=40, constraint=Constraint(choices=choices), **options)
    for answer in engine.generate(PROMPTS, config):
        assert str(answer) in choices
        assert answer.finish_reason == "stop"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22, 333]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    config = dataclasses.replace(config, constraint=Constraint(json_schema=schema))
    for answer in engine.generate(PROMPTS, config):
        assert answer.finish_reason == "length" or json.loads(answer)["n"] in (1, 22, 333)


def test_samples_of_one_form_differ_and_end_without_an_end_mark(engine: Engine) -> None:
    config = GenerationConfig(
        max_new_tokens=40, temperature=5.0, n=8, constraint=Constraint(regex="[a-z]{3}"), logprobs=True
    )
    answers = engine.generate(PROMPTS[:1], config)
    assert all(re.fullmatch("[a-z]{3}", answer) for answer in answers)
    assert len(set(answers)) > 4
    for answer in answers:
        assert not set(ids_of(answer)) & set(engine.processor.tokenizer.end_ids)


def test_a_form_that_was_cut_off_says_so(engine: Engine) -> None:
    config = GenerationConfig(max_new_tokens=3, constraint=Constraint(regex="[a-z]{30}"))
    stream = engine.stream(PROMPTS[0], config)
    assert "".join(stream) == str(stream.answer)
    assert stream.answer.finish_reason == "length"
    with pytest.raises(ConfigError, match="not cannot be enforced"):
        engine.stream(PROMPTS[0], dataclasses.replace(config, constraint=Constraint(json_schema={"not": {}})))


def test_a_bias_of_no_token_is_refused(engine: Engine) -> None:
    size = engine.model.decoder.config.vocab_size
    engine.generate(PROMPTS[:1], GenerationConfig(max_new_tokens=1, logit_bias={size - 1: 1.0}))
    with pytest.raises(ConfigError, match=f"logit_bias: there is no token {size};"):
        engine.generate(PROMPTS[:1], GenerationConfig(max_new_tokens=1, logit_bias={size: 1.0}))


# ---- beam search ----


def beam_search(engine: Engine, document: Document, config: GenerationConfig) -> Answer:
    """By the search for beams, also where there is only one of them."""
    job = engine.job(document, config)
    prompt = job.prepare()
    reading = engine.reader.read(prompt)
    end_ids = engine.processor.tokenizer.end_ids
    row = Row(prompt, config, engine.tokens, context=job.context, end_ids=end_ids)
    row.sequence = reading.sequence
    beams = BeamSearch(row, engine.sequences)
    logits = engine.model.decoder.logits(reading.hidden[-1:])
    while not beams.is_done:
        beams.advance(logits)
        if beams.rows:
            logits = engine.sequences.step([row.sequence for row in beams.rows], [row.ids[-1] for row in beams.rows])
    return beams.best.answer()


def small_vocabulary_engine(letters: str, seed: int) -> Engine:
    """A model that knows only `letters` and three special tokens, so that every answer can be listed."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    backend = Backend(backends.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = Tokenizer(backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    model, processor = make_tiny(seed)
    values = vars(model.config.decoder) | {"vocab_size": len(vocabulary)}
    config = type(model.config)(
        decoder=DecoderConfig(**values), vision=model.config.vision, connector=model.config.connector
    )
    torch.manual_seed(seed)
    small = MMGPT(config).eval()
    with torch.no_grad():
        for parameter in small.decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(12)
    image, k = processor.config.image, small.tokens_per_image
    small_processor = Processor(
        tokenizer, ProcessorConfig(image=image, tokens_per_image=k, max_length=256), vocab_size=len(vocabulary)
    )
    return Engine(*exact(small, small_processor))


def logprob_of(engine: Engine, document: Document, ids: list[int]) -> float:
    steps = [next_logits(engine, document, ids[:at]).log_softmax(-1)[id].item() for at, id in enumerate(ids)]
    return sum(steps)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_wide_beams_are_exhaustive_search(seed: int) -> None:
    """With at least V^T beams nothing is ever dropped: the answer is the best of all."""
    engine, steps = small_vocabulary_engine("ab", seed), 3
    document = Document((Text("ab"), Image(make_picture(seed))))
    ends = engine.processor.tokenizer.end_ids
    vocab = engine.model.decoder.config.vocab_size
    everything = {
        ids: logprob_of(engine, document, list(ids))
        for length in range(1, steps + 1)
        for ids in itertools.product(range(vocab), repeat=length)
        if not any(i in ends for i in ids[:-1]) and (ids[-1] in ends or length == steps)
    }
    for penalty in (0.0, 0.6, 2.0, -1.0):
        best = max(everything, key=lambda ids: everything[ids] / ((5 + len(ids)) / 6) ** penalty)
        config = GenerationConfig(max_new_tokens=steps, num_beams=vocab**steps, length_penalty=penalty, logprobs=True)
        (answer,) = engine.generate([document], config)
        assert ids_of(answer) == list(best)
        assert answer.finish_reason == ("stop" if best[-1] in ends else "length")


@pytest.mark.parametrize("seed", range(4))
def test_one_beam_is_greedy(seed: int) -> None:
    """Without a length penalty no longer answer can be better than the greedy one when that ends."""
    engine = small_vocabulary_engine("abcd", seed)
    documents = [Document((Text("abca"),)), Document((Image(make_picture(seed)), Text("b")))]
    config = GenerationConfig(max_new_tokens=8, length_penalty=0.0, logprobs=True)
    greedy = engine.generate(documents, config)
    beams = [beam_search(engine, document, config) for document in documents]
    assert [ids_of(a) for a in beams] == [ids_of(a) for a in greedy]


@pytest.mark.parametrize("num_beams", [2, 3, 5])
def test_batched_beams_equal_single_beams(engine: Engine, num_beams: int) -> None:
    """Beams of one prompt must not be mixed with another's, and a prompt that is done must stay as it is."""
    for options in ({"max_new_tokens": 8}, {"max_new_tokens": 15, "stop": ("e", "o")}):
        config = GenerationConfig(num_beams=num_beams, logprobs=True, **options)  # type: ignore[arg-type]
        together = engine.generate(PROMPTS, config)
        for document, answer in zip(PROMPTS, together, strict=True):
            (single,) = engine.generate([document], config)
            assert ids_of(answer) == ids_of(single)
            assert answer == single
            assert answer.finish_reason == single.finish_reason


def test_beams_of_small_vocabularies_in_a_batch() -> None:
    """Here many end early, at different steps."""
    documents = [Document((Text(text),)) for text in ("a", "abcabc", "bb", "cab")]
    for seed in range(3):
        engine = small_vocabulary_engine("abc", seed)
        config = GenerationConfig(max_new_tokens=6, num_beams=3, logprobs=True)
        together = engine.generate(documents, config)
        singles = [engine.generate([d], config)[0] for d in documents]
        assert [ids_of(a) for a in together] == [ids_of(a) for a in singles]


def test_more_beams_find_what_is_at_least_as_likely(engine: Engine) -> None:
    document = PROMPTS[1]
    scores = []
    for num_beams in (1, 4, 16):
        config = GenerationConfig(max_new_tokens=6, num_beams=num_beams, length_penalty=0.0, logprobs=True)
        (answer,) = engine.generate([document], config)
        assert answer.logprobs is not None
        total = sum(token.logprob for token in answer.logprobs)
        assert total == pytest.approx(logprob_of(engine, document, ids_of(answer)), abs=1e-5)
        scores.append(total)
    assert scores == pytest.approx(sorted(scores), abs=1e-9)  # the same answer's sums differ by rounding


def test_all_beams_may_end_at_once() -> None:
    """Both end marks lead in every beam: search must go on with what is left, or finish with an answer."""
    engine = small_vocabulary_engine("ab", 0)
    logits = torch.tensor([3.0, -5.0, 2.9, 0.0, -1.0], dtype=torch.float64)
    engine.model.decoder.logits = lambda hidden: logits.expand(len(hidden), 5).clone()  # type: ignore[method-assign]
    config = GenerationConfig(max_new_tokens=4, num_beams=2, logprobs=True)
    (answer,) = engine.generate([Document((Text("a"),))], config)
    assert ids_of(answer) == [0]


def test_search_goes_on_while_a_longer_answer_may_be_better() -> None:
    """Ending at once is likelier than going on, but with the penalty the long answer is the better one."""
    engine = small_vocabulary_engine("ab", 0)
    first = torch.tensor([0.5, 1e-9, 1e-9, 0.499, 1e-9], dtype=torch.float64).log()
    later = torch.tensor([1e-9, 1e-9, 1e-9, 0.999, 1e-9], dtype=torch.float64).log()
    steps = itertools.chain([first], itertools.repeat(later))
    engine.model.decoder.logits = lambda hidden: next(steps).expand(len(hidden), 5).clone()  # type: ignore[method-assign]
    config = GenerationConfig(max_new_tokens=10, length_penalty=2.0, logprobs=True)
    answer = beam_search(engine, Document((Text("a"),)), config)
    assert ids_of(answer) == [3] * 10


@pytest.mark.parametrize(("length", "expected"), [(1, 1.0), (5, 1.3587), (10, 1.7329), (20, 2.3544)])
def test_length_penalty_golden(length: int, expected: float) -> None:
    assert length_penalty(length, GenerationConfig(length_penalty=0.6)) == pytest.approx(expected, abs=5e-5)


def test_beams_cannot_stream_or_sample(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="cannot stream"):
        engine.stream(PROMPTS[0], GenerationConfig(num_beams=2))
    with pytest.raises(ConfigError, match="does not sample"):
        GenerationConfig(num_beams=2, temperature=0.5)


# ---- Answer ----


def test_an_answer_is_a_string() -> None:
    answer = Answer(
        "A dog",
        prompt_tokens=3,
        image_tokens=2,
        completion_tokens=4,
        finish_reason="stop",
        generation=GenerationConfig(),
    )
    assert answer == "A dog"
    assert str(answer) == f"{answer}" == answer.text == "A dog"
    assert answer.upper() == "A DOG"
    assert answer + "!" == "A dog!"
    assert {answer: 1}["A dog"] == 1
    assert json.dumps({"answer": answer}) == '{"answer": "A dog"}'
    assert isinstance(answer, str)
    assert answer.logprobs is None
    for again in (pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer), copy.copy(answer)):
        assert again == answer
        assert vars(again) == vars(answer)


def test_probability_of_an_answer_is_that_of_its_tokens(engine: Engine) -> None:
    (answer,) = engine.generate(PROMPTS[:1], GenerationConfig(max_new_tokens=4, logprobs=True))
    assert answer.logprobs is not None
    assert all(token.logprob <= 0 and math.isfinite(token.logprob) for token in answer.logprobs)
    assert (engine.generate(PROMPTS[:1], GenerationConfig(max_new_tokens=4))[0]).logprobs is None


# ---- text piece by piece ----


def rows_text(tokenizer: Tokenizer, ids: list[int], **options: Any) -> tuple[str, Answer]:
    """(the pieces joined, the answer) of a row that was given these ids."""
    prompt = SCRIPTED.reader.prompt(PROCESSOR(Document((Text("x"),))))
    config = GenerationConfig(max_new_tokens=len(ids), **options)
    row = Row(prompt, config, TokenBytes(tokenizer), context=10_000, end_ids=tokenizer.end_ids)
    return "".join(row.add(id) for id in ids), row.answer()


def sentencepiece_tokenizer() -> Tokenizer:
    """Of Llama's form: spaces as ▁, bytes as tokens, and the very first space dropped."""
    words = ["▁", "▁a", "▁dog", "dog", "s", "é", "▁▁"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *byte_tokens, *words])}
    backend = Backend(backends.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Tokenizer(backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")


PROCESSOR = make_tiny()[1]
TOKENIZERS = {"bytes": PROCESSOR.tokenizer, "sentencepiece": sentencepiece_tokenizer()}


def byte_tokens_of(character: str) -> list[int]:
    return [len(SPECIAL) + byte for byte in character.encode()]


RUNS = {
    "bytes": st.integers(0, PROCESSOR.tokenizer.vocab_size - 1).map(lambda id: [id]),
    # Whole characters: bytes that are none make a run of signs of its bytes, whatever was said of them before.
    "sentencepiece": st.one_of(
        st.sampled_from([1, *range(len(SPECIAL) + 256, len(SPECIAL) + 256 + 7)]).map(lambda id: [id]),
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd").map(byte_tokens_of),
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.data())
@settings(deadline=None, max_examples=60)
def test_an_answer_decoded_piece_by_piece_is_the_whole_decoded(kind: str, data: st.DataObject) -> None:
    """Stops: a space lost or doubled where the window of decoded tokens moves, characters cut in halves."""
    tokenizer = TOKENIZERS[kind]
    drawn = data.draw(st.lists(RUNS[kind], min_size=1))
    ids = [id for run in drawn for id in run if id not in tokenizer.end_ids] or [1]
    pieces, answer = rows_text(tokenizer, ids)
    assert pieces == tokenizer.decode(ids)
    assert answer == pieces.strip()


def test_a_stop_text_of_the_replacement_sign_does_not_match_half_characters() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a 🦆 duck")
    assert len(ids) > len("a 🦆 duck")  # the duck is several tokens, halves of a character
    pieces, answer = rows_text(tokenizer, ids, stop=("\ufffd",))
    assert (pieces, answer.finish_reason) == ("a 🦆 duck", "length")
    cut = ids[: len(tokenizer.encode("a ")) + 2]  # the limit comes inside the duck
    pieces, answer = rows_text(tokenizer, cut, stop=("\ufffd",))
    assert (pieces, answer.finish_reason) == ("a \ufffd", "length")
    pieces, answer = rows_text(tokenizer, tokenizer.encode("a \ufffd duck"), stop=("\ufffd",))
    assert (answer, answer.finish_reason) == ("a", "stop")


# ---- options ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 10**30),
        ("temperature", 1e-45),
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("length_penalty", 1e308),
        ("length_penalty", -1e308),
        ("length_penalty", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("num_beams", 0),
        ("num_beams", 10**9),
        ("max_new_tokens", 0),
        ("no_repeat_ngram_size", -1),
        ("stop", ("",)),
        ("stop", ("caf\udce9",)),
    ],
)
def test_options_out_of_range_are_refused_when_they_are_made(name: str, value: Any) -> None:
    with pytest.raises(MMGPTError, match=name):
        GenerationConfig(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-6},
        {"temperature": 1e6},
        {"temperature": 1.0, "seed": 2**63 - 1},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_k": 10**30},
        {"num_beams": 2, "length_penalty": 10.0},
        {"num_beams": 2, "length_penalty": -10.0},
        {"no_repeat_ngram_size": 10**30},
    ],
)
def test_options_at_the_edge_of_their_range_work(options: dict[str, Any], engine: Engine) -> None:
    config = GenerationConfig(max_new_tokens=4, **options)
    (answer,) = engine.generate(PROMPTS[:1], config)
    assert answer.generation == config
    assert 1 <= answer.completion_tokens <= 4
    if options == {"temperature": 1e-6}:
        assert answer == engine.generate(PROMPTS[:1], GenerationConfig(max_new_tokens=4))[0]
