"""Documents cut to rows: nothing lost, nothing twice, no image apart, and as few rows as that allows."""

import dataclasses
import time
from collections.abc import Sequence

import pytest
from conftest import make_picture, make_tiny, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.loading.index import Measure
from mm_gpt.datasets.loading.pieces import (
    Piece,
    cut,
    piece_document,
    sample_pieces,
    training_segments,
)
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter
from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.images import to_file
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig

PROCESSOR = make_tiny()[1]
IMAGE_TOKENS = PROCESSOR.count(Document((Image(make_picture()),)))
PICTURES = [to_file(make_picture(n, (8, 8))) for n in range(3)]


def text_of(segments: Sequence[Segment]) -> list[str | Image]:
    """Runs of text as one string, images in place: what a document says, however it is cut."""
    found: list[str | Image] = []
    for segment in segments:
        if isinstance(segment, Image):
            found.append(segment)
        elif segment.text:
            if found and isinstance(found[-1], str):
                found[-1] += segment.text
            else:
                found.append(segment.text)
    return found


WORDS = st.sampled_from(
    ["a circle ", "Describe the ", "<|endoftext|>", "<|im_end|>", "\n", "中文字", "👩‍👩‍👧", "é", "\u0301", "x" * 40]
)
TEXT = st.lists(WORDS | st.text(st.characters(codec="utf-8"), max_size=5), max_size=40).map("".join)
SEGMENTS = st.lists(st.builds(Text, TEXT) | st.sampled_from(PICTURES).map(Image), max_size=8)


@settings(max_examples=80, deadline=None)
@given(SEGMENTS, st.integers(4, 60))
def test_pieces_are_the_document(segments: list[Segment], max_tokens: int) -> None:
    """Stops: text lost or doubled at a cut, half an image, and pieces longer than a row."""
    document = training_segments(Document(tuple(segments)), PROCESSOR)
    pieces = cut(document, PROCESSOR, max_tokens)
    spans = [piece.of(document) for piece, _ in pieces]
    assert text_of([segment for span in spans for segment in span]) == text_of(document)
    assert [s for span in spans for s in span if isinstance(s, Image)] == [s for s in segments if isinstance(s, Image)]
    for (_, tokens), span in zip(pieces, spans, strict=True):
        assert tokens == PROCESSOR.count(Document(span)) > 0
        one = len(span) == 1 and (isinstance(span[0], Image) or len(getattr(span[0], "text", "")) == 1)
        assert tokens <= max_tokens or one
        for segment in span:  # the mark of the end is whole, and the only one
            assert isinstance(segment, Image) or not segment.is_control or segment.text == "<|endoftext|>"
    assert sum(isinstance(s, Text) and s.is_control for span in spans for s in span) == 1


@pytest.mark.parametrize(
    ("text", "waste"),
    [
        ("A red circle on a blue ground, and a few other words. " * 200, 4),
        ("user" * 3000, 4),
        ("中文字和其他的字" * 200, 4),  # several tokens a character
        ("👩‍👩‍👧" * 300, 8),
        (" " * 5000, 8),
        ("no end of <|endoftext|> and <|im_end|> in it. " * 100, 16),
        ("<|endoftext|>" * 600, 16),
    ],
)
def test_pieces_are_full(text: str, waste: int) -> None:
    """Stops: rows left empty by special tokens in a text, each of which is several tokens, and by such characters."""
    document = training_segments(Document((Text(text),)), PROCESSOR)
    lengths = [tokens for _, tokens in cut(document, PROCESSOR, 64)]
    assert len(lengths) > 2
    assert max(lengths) <= 64
    assert min(lengths[:-1]) >= 64 - waste
    assert sum(lengths) <= 1.1 * PROCESSOR.count(Document(document))


def test_images_fill_rows() -> None:
    """As many images as fit stand in a piece; text fills what is left before the next."""
    images = [Image(PICTURES[n % 3]) for n in range(20)]
    document = training_segments(Document(tuple(images)), PROCESSOR)
    pieces = cut(document, PROCESSOR, 4 * IMAGE_TOKENS + 1)
    counts = [sum(isinstance(s, Image) for s in piece.of(document)) for piece, _ in pieces]
    assert counts[:5] == [4] * 5
    mixed = [part for image in images for part in (image, Text("a few words about a circle " * 6))]
    document = training_segments(Document(tuple(mixed)), PROCESSOR)
    lengths = [tokens for _, tokens in cut(document, PROCESSOR, 64)]
    assert max(lengths) <= 64
    assert min(lengths[:-1]) > 64 - IMAGE_TOKENS


def test_an_image_longer_than_a_row_stands_alone() -> None:
    parts = (Text("before"), Image(PICTURES[0]), Image(PICTURES[1]), Text("behind"))
    document = training_segments(Document(parts), PROCESSOR)
    pieces = cut(document, PROCESSOR, IMAGE_TOKENS - 1)
    images = [piece.of(document) for piece, tokens in pieces if tokens > IMAGE_TOKENS - 1]
    assert images == [(parts[1],), (parts[2],)]


def test_time_grows_with_the_length() -> None:
    """Stops: the rest of a book encoded anew for each of its pieces."""

    def seconds(words: int) -> float:
        document = training_segments(Document((Text("A red circle on a blue ground. " * words),)), PROCESSOR)
        start = time.process_time()
        assert len(cut(document, PROCESSOR, 64)) > words / 10
        return time.process_time() - start

    seconds(100)
    assert seconds(8_000) < 12 * seconds(2_000) + 0.5  # four times as long


def test_many_paragraphs_take_linear_time() -> None:
    def seconds(paragraphs: int) -> float:
        document = training_segments(Document((Text("A red circle."),) * paragraphs), PROCESSOR)
        start = time.process_time()
        cut(document, PROCESSOR, 64)
        return time.process_time() - start

    assert seconds(8_000) < 12 * seconds(2_000) + 0.5


def test_what_a_model_reads_of_a_page() -> None:
    """Golden: an empty line between paragraphs, nothing around images, the end of text as a target."""
    image = Image(PICTURES[0])
    page = Document((Text("A heading"), Text("Words."), image, Text("More."), image, image, Text("")))
    assert training_segments(page, PROCESSOR) == (
        Text("A heading"),
        Text("\n\nWords."),
        image,
        Text("More."),
        image,
        image,
        Text(""),
        Text("<|endoftext|>", is_control=True),
    )
    (piece, *_), *others = sample_pieces(page, PROCESSOR, 200)
    assert not others
    example = PROCESSOR(piece_document(page, piece, PROCESSOR))
    assert example.labels[-2] == PROCESSOR.tokenizer.special["<|endoftext|>"]
    assert len(example.images) == 3


def test_begin_of_text_is_counted_for_each_piece() -> None:
    """Stops: pieces of one token too many for models whose texts begin with one of their own."""
    tokenizer = make_tokenizer()
    from tokenizers import processors

    end = tokenizer.special["<|endoftext|>"]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]
    )
    tokenizer = Tokenizer(tokenizer.backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    assert tokenizer.prefix_ids == [end]
    config = dataclasses.replace(PROCESSOR.config, begin_of_text=True)
    processor = Processor(tokenizer, config, vocab_size=PROCESSOR.vocab_size)
    page = Document((Text("A red circle on a blue ground. " * 60), Image(PICTURES[0])))
    pieces = sample_pieces(page, processor, 32)
    for piece, tokens, _ in pieces:
        example = processor(piece_document(page, piece, processor))
        assert len(example) == tokens <= 32
        assert example.input_ids[0] == end
    assert min(tokens for _, tokens, _ in pieces[:-2]) >= 28


def tiled() -> Processor:
    """A processor whose images take tokens by their size."""
    tokenizer = make_tokenizer()
    from tokenizers import AddedToken

    tokenizer.backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer = Tokenizer(tokenizer.backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    config = ProcessorConfig(
        image=ImageTransformConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        tokens_per_image=4,
        max_length=256,
        tiling=TilingConfig(kind="internvl", max_tiles=6, min_tiles=1),
        image_text=ImageTextConfig(token="<image>"),
    )
    return Processor(tokenizer, config, vocab_size=tokenizer.vocab_size)


def test_a_broken_image_does_not_take_its_page_along() -> None:
    """Where tokens depend on sizes, a file without one counts for nothing; the rest of the page has its pieces."""
    processor = tiled()
    wide, tall = (to_file(make_picture(n, size)) for n, size in enumerate([(96, 32), (32, 64)]))
    good = (Text("A red circle. " * 20), Image(wide), Text("Between."), Image(tall), Text("Behind. " * 20))
    page = Document((*good[:3], Image(b"broken"), *good[3:]))
    pieces = sample_pieces(page, processor, 64)
    assert sum(images for _, _, images in pieces) == 2 + 0
    assert max(tokens for _, tokens, _ in pieces) <= 64
    spans = [segment for piece, _, _ in pieces for segment in piece_document(page, piece, processor).segments]
    assert [s for s in spans if isinstance(s, Image)] == [good[1], Image(b"broken"), good[3]]
    for piece, tokens, _ in pieces:
        document = piece_document(page, piece, processor)
        whole = [s for s in document.segments if not isinstance(s, Image) or s.source != b"broken"]
        assert processor.count(Document(tuple(whole))) == tokens


def test_what_cannot_be_trained_on() -> None:
    """Stops: an error over one document that takes its whole shard along, and one that nobody counts."""
    alone = Processor(PROCESSOR.tokenizer, ProcessorConfig(max_length=256), vocab_size=PROCESSOR.vocab_size)
    picture = Image(PICTURES[0])
    long: dict[str, object] = {"role": "user", "content": "word " * 400}
    cases = [
        (PROCESSOR, Conversation("a", (long,)), "longer than the context"),
        (PROCESSOR, Conversation("a", ({"role": "nobody", "content": "x"},)), "cannot be written"),
        (alone, Document((picture,)), "cannot be written"),
    ]
    for processor, sample, reason in cases:
        with pytest.raises(BadRecordError, match=reason):
            sample_pieces(sample, processor, 64)
        errors = ErrorCounter()
        samples = [(0, Document((Text("a"),))), (1, sample), (9, Document((Text("b"),)))]
        table = Measure(processor, 64).table(samples, "a", errors)
        assert table.pieces[:, 0].tolist() == [0, 9]
        assert errors.total == 1


def test_pieces_of_other_documents_are_refused() -> None:
    with pytest.raises(MMGPTError, match="not of this document"):
        Piece((0, 0), (9, 0)).of([Text("a")])
    with pytest.raises(MMGPTError, match="not of this document"):
        Piece((1, 0), (0, 3)).of([Text("a")])
