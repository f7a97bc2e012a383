"""Rows that join and leave a running batch, prompts and images that are kept, and many askers at one engine."""

import dataclasses
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture, make_tiny
from PIL import Image as PILImage

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.batcher import Batcher, QueueFullError
from mm_gpt.inference.block_sequences import BlockSequences
from mm_gpt.inference.engine import Engine, Run
from mm_gpt.inference.generation import Answer, GenerationConfig, Piece
from mm_gpt.processor import collate

PICTURE = make_picture(1)
PROMPTS = [
    Document((Text("A red "),)),
    Document((Image(PICTURE), Text("Describe the image in one sentence."))),
    Document((Text("x"),)),
    Document((Text("Left: "), Image(make_picture(2)), Text(" right: "), Image(make_picture(3)), Text(" so"))),
]
CONFIGS = [
    GenerationConfig(max_new_tokens=9, logprobs=True),
    GenerationConfig(max_new_tokens=4, temperature=1.0, seed=7, logprobs=True),
    GenerationConfig(max_new_tokens=12, temperature=1.4, top_k=30, seed=7, logprobs=True, no_repeat_ngram_size=2),
    GenerationConfig(max_new_tokens=7, num_beams=3, logprobs=True),
]


@pytest.fixture(scope="module", params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(*make_tiny(), compiled=request.param == "compiled")


@pytest.fixture
def fresh(engine: Engine) -> Engine:
    """The engine without anything that it has read."""
    engine.forget()
    return engine


def numbers(answer: Answer) -> list[tuple[int, float]]:
    assert answer.logprobs is not None
    return [(token.id, token.logprob) for token in answer.logprobs]


def same(engine: Engine, first: Answer, second: Answer) -> None:
    """Bit by bit where steps are compiled; torch's products differ a little with the number of rows."""
    assert first.ids == second.ids
    assert first.finish_reason == second.finish_reason
    if isinstance(engine.sequences, BlockSequences):
        assert numbers(first) == numbers(second)
    else:
        mine, its = ([p for _, p in numbers(answer)] for answer in (first, second))
        assert mine == pytest.approx(its, abs=1e-4)


# ---- company ----


def test_rows_have_settings_of_their_own(fresh: Engine) -> None:
    """Stops: the batch's first request deciding for all."""
    together = fresh.generate(PROMPTS, CONFIGS)
    for document, config, answer in zip(PROMPTS, CONFIGS, together, strict=True):
        fresh.forget()
        (alone,) = fresh.generate([document], config)
        same(fresh, answer, alone)
        assert answer.generation == config


@pytest.mark.parametrize("steps", [1, 3])
def test_rows_join_and_leave(fresh: Engine, steps: int) -> None:
    """One comes while another is in the middle, and a third when the first has gone."""
    jobs = [fresh.job(document, config) for document, config in zip(PROMPTS, CONFIGS, strict=True)]
    run = Run(fresh)
    for job in jobs:
        run.waiting.append(job)
        for _ in range(steps):
            run.step()
    while run.is_busy:
        run.step()
    for job, document, config in zip(jobs, PROMPTS, CONFIGS, strict=True):
        fresh.forget()
        (alone,) = fresh.generate([document], config)
        same(fresh, *job.answers(), alone)


def test_few_rows_at_a_time(engine: Engine) -> None:
    """More prompts than rows, one of them with more answers than there are rows."""
    narrow = Engine(engine.model, engine.processor, compiled=isinstance(engine.sequences, BlockSequences), max_rows=2)
    configs = [dataclasses.replace(CONFIGS[1], n=3), *CONFIGS[:3]]
    answers = narrow.generate(PROMPTS, configs)
    wide = engine.generate(PROMPTS, configs)
    assert [answer.ids for answer in answers] == [answer.ids for answer in wide]


def test_samples_of_one_prompt(fresh: Engine) -> None:
    """Each has a seed of its own, the first that of the options; they come again, whoever is beside them."""
    config = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=5, n=4, logprobs=True)
    encoded = fresh.reader.images.queries - fresh.reader.images.hits
    answers = fresh.generate(PROMPTS[1:2], config)
    assert len({answer.ids for answer in answers}) == 4
    (single,) = fresh.generate(PROMPTS[1:2], dataclasses.replace(config, n=1))
    assert single.ids == answers[0].ids
    crowd = fresh.generate(PROMPTS, config)
    assert [answer.ids for answer in crowd[4:8]] == [answer.ids for answer in answers]
    # Each of the three images is encoded once
    assert fresh.reader.images.queries - fresh.reader.images.hits - encoded == 3


def test_one_answer_where_one_is_given() -> None:
    assistant = Assistant(*make_tiny())
    assert len(assistant.samples([{"role": "user", "content": "Hi"}], n=3, temperature=1.0, max_new_tokens=3)) == 3
    with pytest.raises(ConfigError, match=r"n is 2.*samples"):
        assistant.ask(None, "Hi", n=2)
    with pytest.raises(ConfigError, match="n is 2"):
        assistant.chat([{"role": "user", "content": "Hi"}], stream=True, n=2)
    with pytest.raises(ConfigError, match="set n to 1"):
        GenerationConfig(n=2, num_beams=2)


def test_what_was_sampled_and_how_likely_it_was(fresh: Engine) -> None:
    """Ids come back exactly, and the probabilities are those of a training forward pass over them."""
    config = GenerationConfig(max_new_tokens=10, temperature=1.0, seed=2, n=2, logprobs=True, prompt_logprobs=True)
    answers = fresh.generate(PROMPTS[:2], config)
    for answer, document in zip(answers, [d for d in PROMPTS[:2] for _ in range(2)], strict=True):
        assert answer.ids == tuple(token.id for token in answer.logprobs or ())
        example = fresh.processor(document)
        ids = torch.cat([example.input_ids, torch.tensor(answer.ids)])
        whole = dataclasses.replace(
            example,
            input_ids=ids,
            labels=torch.zeros_like(ids),
            branch_ids=torch.zeros_like(ids),
            position_ids=torch.arange(len(ids)),
        )
        batch = collate([[whole]], fresh.processor.pixels([example]))
        with torch.no_grad():
            logprobs = fresh.model.decoder.logits(fresh.model(batch)[0]).log_softmax(-1)
        start = len(example) - 1
        expected = [logprobs[start + at, id].item() for at, id in enumerate(answer.ids)]
        assert [p for _, p in numbers(answer)] == pytest.approx(expected, abs=1e-5)
        assert answer.prompt_logprobs is not None
        assert len(answer.prompt_logprobs) == len(example)
        for at, token in enumerate(answer.prompt_logprobs):
            is_text = at > 0 and not fresh.processor.is_image(int(ids[at]))
            assert (token is not None) == is_text
            if token is not None:
                assert token.logprob == pytest.approx(logprobs[at - 1, ids[at]].item(), abs=1e-5)


def test_most_likely_tokens_come_along(fresh: Engine) -> None:
    config = GenerationConfig(max_new_tokens=6, temperature=2.0, seed=1, logprobs=True, top_logprobs=3)
    (answer,) = fresh.generate(PROMPTS[:1], config)
    for token in answer.logprobs or ():
        values = [top.logprob for top in token.top]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0]
    assert b"".join(token.bytes for token in answer.logprobs or ()).decode(errors="replace").strip() == answer.text
    with pytest.raises(ConfigError, match="top_logprobs cannot be 3 without logprobs"):
        GenerationConfig(top_logprobs=3)


def test_an_error_is_one_prompt_s_own(fresh: Engine) -> None:
    run = Run(fresh)
    fine = fresh.job(PROMPTS[0], CONFIGS[0])
    late = fresh.job(PROMPTS[1], CONFIGS[0])
    late.example.images[0] = Image("no-such-file.png")
    run.waiting.extend([late, fine])
    while run.is_busy:
        run.step()
    assert isinstance(late.error, ImageError)
    assert len(fine.answers()) == 1
    with pytest.raises(ImageError, match="no-such-file"):
        late.answers()


# ---- what is kept ----


def ask(engine: Engine, *parts: Any, **options: Any) -> Answer:
    segments = tuple(Text(part) if isinstance(part, str) else Image(part) for part in parts)
    config = GenerationConfig(max_new_tokens=5, logprobs=True, **options)
    return engine.generate([Document(segments)], config)[0]


LONG = "A red circle on a blue ground, and so on. "


def test_a_prompt_that_begins_alike_is_read_from_where_it_differs(fresh: Engine) -> None:
    first = ask(fresh, PICTURE, LONG, "What is it?")
    assert first.cached_tokens == 0
    again = ask(fresh, PICTURE, LONG, "What is it?")
    assert again.cached_tokens == again.prompt_tokens - 1  # the last one's state is needed
    other = ask(fresh, PICTURE, LONG, "Why?")
    assert 0 < other.cached_tokens < other.prompt_tokens - 1
    continued = ask(fresh, PICTURE, LONG, "What is it?", first.text, " And more of it")
    assert continued.cached_tokens >= first.prompt_tokens - 1
    for answer, question in ((again, ("What is it?",)), (other, ("Why?",))):
        fresh.forget()
        expected = ask(fresh, PICTURE, LONG, *question)
        assert answer.ids == expected.ids
        assert [p for _, p in numbers(answer)] == pytest.approx([p for _, p in numbers(expected)], abs=1e-5)


def changed(picture: PILImage.Image) -> PILImage.Image:
    pixels = np.array(picture)
    pixels[:8, :8] ^= 255
    return PILImage.fromarray(pixels)


def encoded(picture: PILImage.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind)
    return stream.getvalue()


def test_only_the_same_image_is_taken_for_it(fresh: Engine) -> None:
    """Stops: one image's answer for another, by a digest cut short, without a shape, or without a place."""
    picture, other = PICTURE, make_picture(2)
    prompt = ("See this: ", picture, " and this: ", other, LONG)
    length = ask(fresh, *prompt).prompt_tokens
    segments = tuple(Text(part) if isinstance(part, str) else Image(part) for part in prompt)
    (before, _) = fresh.processor(Document(segments)).image_starts
    for different in (
        ("See this: ", changed(picture), " and this: ", other, LONG),
        ("See this: ", other, " and this: ", picture, LONG),
        ("See this: ", picture.transpose(PILImage.Transpose.ROTATE_90), " and this: ", other, LONG),
        ("See this: ", picture.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT), " and this: ", other, LONG),
    ):
        assert ask(fresh, *different).cached_tokens <= before
    same_pixels = ("See this: ", encoded(picture, "PNG"), " and this: ", encoded(other, "BMP"), LONG)
    assert ask(fresh, *same_pixels).cached_tokens == length - 1
    second_differs = ask(fresh, "See this: ", picture, " and this: ", changed(other), LONG)
    assert before < second_differs.cached_tokens < length - len(LONG.split())
    moved = ask(fresh, "Now see this: ", picture, " and this: ", other, LONG)
    assert moved.cached_tokens <= before
    assert fresh.reader.images.hits >= 4  # the features are the same wherever an image stands


def test_what_is_kept_has_bounds(fresh: Engine) -> None:
    prompts, images = fresh.reader.prompts, fresh.reader.images
    ask(fresh, PICTURE, LONG)
    one, picture = prompts.bytes, images.bytes
    prompts.max_bytes, images.max_bytes = 3 * one, 2 * picture
    try:
        for number in range(8):
            ask(fresh, make_picture(10 + number), str(number), LONG)
            assert prompts.bytes <= 3 * one
            assert images.bytes <= 2 * picture
        assert ask(fresh, PICTURE, LONG).cached_tokens == 0
    finally:
        prompts.max_bytes, images.max_bytes = 256 << 20, 64 << 20


def test_nothing_is_held_when_nothing_runs(fresh: Engine) -> None:
    """Stops: blocks that leak, with forks, beams, stop texts, cancelled and broken streams."""
    fresh.generate(PROMPTS * 2, [*CONFIGS, *(dataclasses.replace(config, stop=("e",)) for config in CONFIGS)])
    fresh.generate(PROMPTS, GenerationConfig(max_new_tokens=6, temperature=1.0, n=3))
    stream = fresh.stream(PROMPTS[1], GenerationConfig(max_new_tokens=20))
    next(stream)
    stream.close()
    fresh.reader.prompts.clear()
    assert fresh.reader.prompts.bytes == 0
    if isinstance(fresh.sequences, BlockSequences):
        assert fresh.sequences.blocks_in_use == fresh.sequences.pool.num_used == 0


def test_when_memory_is_used_up(fresh: Engine) -> None:
    """Kept prompts go first; then the rows that have no room for their next token are told, and the engine goes on."""
    if not isinstance(fresh.sequences, BlockSequences):
        pytest.skip("torch asks the system")
    pool = fresh.sequences.pool
    ask(fresh, PICTURE, LONG)
    most = pool.max_blocks
    pool.max_blocks = len(pool.addresses)
    held = [pool.allocate() for _ in range(pool.max_blocks - pool.num_used)]
    try:
        assert ask(fresh, "x").cached_tokens == 0  # in the place of what was kept
        fresh.reader.prompts.clear()
        held += [pool.allocate() for _ in range(pool.max_blocks - pool.num_used)]
        with pytest.raises(MMGPTError, match="no room for more keys and values"):
            ask(fresh, "x")
    finally:
        pool.max_blocks = most
        for block in held:
            pool.release(block)
    assert len(ask(fresh, "x").ids) == 5
    fresh.reader.prompts.clear()
    assert pool.num_used == 0


def test_the_youngest_makes_room(fresh: Engine) -> None:
    """Where memory ends in the middle, one prompt is told, and the others go on to their ends."""
    if not isinstance(fresh.sequences, BlockSequences):
        pytest.skip("torch asks the system")
    pool = fresh.sequences.pool
    jobs = [fresh.job(Document((Text("x" * 14),)), GenerationConfig(max_new_tokens=12, logprobs=True)) for _ in "ab"]
    run = Run(fresh)
    run.waiting.extend(jobs)
    run.step()  # both prompts are read, each in one block; their third token needs another
    most, pool.max_blocks = pool.max_blocks, len(pool.addresses)
    held = [pool.allocate() for _ in range(pool.max_blocks - pool.num_used)]
    try:
        while run.is_busy:
            run.step()
    finally:
        pool.max_blocks = most
        for block in held:
            pool.release(block)
    assert isinstance(jobs[1].error, MMGPTError)
    fresh.forget()
    (alone,) = fresh.generate([Document((Text("x" * 14),))], jobs[0].config)
    assert jobs[0].answers()[0].ids == alone.ids
    fresh.forget()
    assert pool.num_used == 0


@pytest.mark.parametrize("options", [{"n": 4, "temperature": 1.0}, {"num_beams": 4}])
@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_what_has_no_room_leaves_nothing_behind(fresh: Engine, options: dict[str, Any], spare: int) -> None:
    """Stops: blocks of a prompt whose forks failed, of which nobody knows any more."""
    if not isinstance(fresh.sequences, BlockSequences):
        pytest.skip("torch asks the system")
    pool = fresh.sequences.pool
    ask(fresh, "x")
    fresh.forget()
    most, pool.max_blocks = pool.max_blocks, len(pool.addresses)
    held = [pool.allocate() for _ in range(pool.max_blocks - pool.num_used - spare)]
    try:
        with pytest.raises(MMGPTError, match="no room for more keys and values"):
            ask(fresh, "xxx", **options)
        fresh.forget()
        assert pool.num_used == len(held)
    finally:
        pool.max_blocks = most
        for block in held:
            pool.release(block)


def test_new_weights_are_told(fresh: Engine) -> None:
    model, processor = make_tiny()
    engine = Engine(model, processor, compiled=isinstance(fresh.sequences, BlockSequences))
    before = ask(engine, PICTURE, LONG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.forget()
    after = ask(engine, PICTURE, LONG)
    assert after.cached_tokens == 0
    assert numbers(after) != numbers(before)
    expected = ask(Engine(model, processor), PICTURE, LONG)
    assert [p for _, p in numbers(after)] == pytest.approx([p for _, p in numbers(expected)], abs=1e-4)


# ---- many askers ----


@pytest.fixture
def batcher(fresh: Engine) -> Iterator[Batcher]:
    batcher = Batcher(fresh, max_rows=3, max_waiting=8)
    yield batcher
    batcher.close()


class Asker:
    """Collects the pieces of all answers to a prompt."""

    def __init__(self, batcher: Batcher, document: Document, config: GenerationConfig):
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        self._left = set(range(config.n))
        self.ticket = batcher.submit(document, config, self.take)

    def take(self, piece: Piece) -> None:
        assert piece.index in self._left
        self.pieces.append(piece)
        if piece.finish_reason is not None or piece.error is not None:
            self._left.remove(piece.index)
        if not self._left:
            self.done.set()

    def wait(self) -> "Asker":
        assert self.done.wait(60)
        return self

    def text(self, index: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    def ids(self, index: int = 0) -> tuple[int, ...]:
        return tuple(token.id for piece in self.pieces if piece.index == index for token in piece.tokens)


def test_pieces_are_the_answers(fresh: Engine, batcher: Batcher) -> None:
    configs = [dataclasses.replace(CONFIGS[1], n=2), CONFIGS[0], CONFIGS[2], CONFIGS[3]]
    askers = [Asker(batcher, document, config) for document, config in zip(PROMPTS, configs, strict=True)]
    for asker, document, config in zip(askers, PROMPTS, configs, strict=True):
        asker.wait()
        for index, answer in enumerate(fresh.generate([document], config)):
            assert asker.ids(index) == answer.ids
            assert asker.text(index).strip() == answer.text
            last = [piece for piece in asker.pieces if piece.index == index][-1]
            assert last.finish_reason == answer.finish_reason
            assert asker.ticket.prompt_tokens == answer.prompt_tokens
            assert asker.ticket.image_tokens == answer.image_tokens
    stats = batcher.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_who_leaves_frees_a_place(fresh: Engine, batcher: Batcher) -> None:
    endless = GenerationConfig(max_new_tokens=200, temperature=1.0, logit_bias={0: -100.0, 2: -100.0})
    askers = [Asker(batcher, Document((Text(f"x{number}"),)), endless) for number in range(5)]
    for asker in askers[:4]:
        asker.ticket.cancel()
    for asker in askers[:4]:
        assert asker.wait().pieces[-1].finish_reason == "cancelled"
    assert askers[4].wait().pieces[-1].finish_reason == "length"


def test_what_is_wrong_is_said_when_it_is_asked(fresh: Engine, batcher: Batcher) -> None:
    nothing = GenerationConfig()
    with pytest.raises(ContextOverflowError):
        Asker(batcher, Document((Text("x" * 5000),)), nothing)
    with pytest.raises(ImageError, match="no-such"):
        Asker(batcher, Document((Image("no-such.png"), Text("?"))), nothing)
    assert batcher.stats().waiting == 0
    Asker(batcher, PROMPTS[0], nothing).wait()


def test_a_full_queue(fresh: Engine, batcher: Batcher) -> None:
    endless = GenerationConfig(max_new_tokens=200, temperature=1.0, logit_bias={0: -100.0, 2: -100.0})
    askers = []
    with fresh.lock:
        for _ in range(8):
            askers.append(Asker(batcher, PROMPTS[0], endless))
        with pytest.raises(QueueFullError, match="8 prompts are waiting"):
            Asker(batcher, PROMPTS[0], endless)
    for asker in askers:
        asker.ticket.cancel()
        asker.wait()
    Asker(batcher, PROMPTS[0], CONFIGS[0]).wait()


def test_a_callback_that_fails_is_its_own_problem(fresh: Engine, batcher: Batcher) -> None:
    def fails(piece: Piece) -> None:
        raise RuntimeError("the loop is closed")

    batcher.submit(PROMPTS[0], GenerationConfig(max_new_tokens=50), fails)
    assert Asker(batcher, PROMPTS[1], CONFIGS[0]).wait().pieces[-1].finish_reason is not None


@pytest.mark.parametrize("finish", [True, False])
def test_closing(fresh: Engine, finish: bool) -> None:
    batcher = Batcher(fresh, max_rows=2)
    askers = [Asker(batcher, document, GenerationConfig(max_new_tokens=30)) for document in PROMPTS]
    batcher.close(finish=finish)
    reasons = {asker.wait().pieces[-1].finish_reason for asker in askers}
    assert reasons <= ({"stop", "length"} if finish else {"stop", "length", "cancelled"})
    assert not batcher.is_alive
    with pytest.raises(MMGPTError, match="closed"):
        Asker(batcher, PROMPTS[0], CONFIGS[0])
    fresh.reader.prompts.clear()
    if isinstance(fresh.sequences, BlockSequences):
        assert fresh.sequences.blocks_in_use == 0


def test_a_fault_of_the_engine_is_told_to_all(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(fresh)
    monkeypatch.setattr(Run, "_add", lambda self, after: 1 / 0)
    asker = Asker(batcher, PROMPTS[0], CONFIGS[0]).wait()
    assert isinstance(asker.pieces[-1].error, ZeroDivisionError)
    batcher._thread.join(10)
    assert not batcher.is_alive
    assert isinstance(batcher.failure, ZeroDivisionError)
