"""Plain texts as training documents: what is a source of them, what is read, and where they are cut."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from mm_gpt.config import override
from mm_gpt.datasets.loading.pieces import piece_document, sample_pieces
from mm_gpt.datasets.samples import ErrorCounter, Sample
from mm_gpt.datasets.sources import detect, read_samples
from mm_gpt.document import Document, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.processor import IGNORE_INDEX, Processor, ProcessorConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.language import LanguageTask
from mm_gpt.training.recipes import recipe

TOKENIZER = make_tokenizer()


def texts_of(sample: Sample) -> list[str]:
    assert isinstance(sample, Document)
    return [segment.text for segment in sample.segments if isinstance(segment, Text)]


def pieces_of(text: str, processor: Processor, room: int) -> list[Document]:
    page = Document((Text(text),), id="x")
    return [piece_document(page, piece, processor) for piece, _, _ in sample_pieces(page, processor, room)]


def processor_of(tokenizer: Tokenizer, *, begin_of_text: bool = False) -> Processor:
    config = ProcessorConfig(max_length=10_000, begin_of_text=begin_of_text)
    return Processor(tokenizer, config, vocab_size=tokenizer.vocab_size)


def beginning_tokenizer() -> Tokenizer:
    """One whose own rule puts a token in front, as Llama's does."""
    tokenizer = make_tokenizer()
    mark = "<|endoftext|>"
    post = processors.TemplateProcessing(single=f"{mark} $A", special_tokens=[(mark, tokenizer.special[mark])])
    tokenizer.backend.post_processor = post
    return Tokenizer(tokenizer.backend, end_of_text=mark, end_of_turn="<|im_end|>")


@pytest.mark.parametrize(
    ("files", "is_text"),
    [
        (["a.txt", "b.txt"], True),
        (["below/A.TXT", "notes.md"], True),
        (["a.txt", "a.png"], False),
        (["a.txt", "below/a.jpeg"], False),
        (["a.txt", "a.gif"], False),  # a caption, although the picture beside it cannot be read
        (["a.txt", "0.tar"], False),
        (["a.md"], False),
        ([], False),
    ],
)
def test_what_is_a_source_of_texts(tmp_path: Path, files: list[str], is_text: bool) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    try:
        found = detect(str(tmp_path)).name
    except MMGPTError:
        found = "none"
    assert (found == "text") == is_text


def test_files_are_read_by_name_and_bad_ones_counted(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeff two\r\nlines ".encode())  # as Windows writes it
    (tmp_path / "a.TXT").write_text("öne")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.txt").mkdir()
    (tmp_path / "f.md").write_text("no text")
    errors = ErrorCounter()
    assert [texts_of(sample) for sample in read_samples(str(tmp_path), errors)] == [["öne"], ["two\nlines"]]
    assert errors.counts == {"text is not UTF-8": 1, "empty text": 1}


def test_what_is_indented_stays_so(tmp_path: Path) -> None:
    """Stops: programs whose blocks lose the indentation of their first line, which then mean something else."""
    program = "def f():\n    one()\n\n    two()\n\n\ndef g():\n    pass"
    (tmp_path / "a.txt").write_text(program + "\n\n")
    (sample,) = read_samples(str(tmp_path / "a.txt"), ErrorCounter())
    assert texts_of(sample) == ["def f():\n    one()", "    two()", "def g():\n    pass"]


TEXT = st.lists(st.sampled_from(["a", "one ", "😀", "  ", "\n", "image", "é", "<|endoftext|>", "<|im_"]), max_size=60)


@given(TEXT, st.integers(16, 40), st.booleans())
@example(["<|endoftext|>"] * 60, 24, True)
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_and_no_piece_is_too_long(words: list[str], room: int, begins: bool) -> None:
    """Special tokens that stand in a text are many tokens there: a piece of them must not grow beyond its row."""
    text = "".join(words)
    processor = processor_of(beginning_tokenizer() if begins else TOKENIZER, begin_of_text=begins)
    documents = pieces_of(text, processor, room)
    written = [[s for s in document.segments if isinstance(s, Text)] for document in documents]
    assert "".join(s.text for segments in written for s in segments if not s.is_control) == text
    for number, (document, segments) in enumerate(zip(documents, written, strict=True), start=1):
        ends = [s.text for s in segments if s.is_control]
        assert ends == (["<|endoftext|>"] if number == len(documents) else [])
        assert len(segments) > len(ends) or not text  # the end is learned behind a text, not alone
        assert document.id == "x"
        found = processor(document)
        assert len(found) <= room
        assert found.labels[:-1].tolist() == found.input_ids[1:].tolist()  # every token is learned
        assert found.labels[-1] == IGNORE_INDEX


def test_rows_are_filled() -> None:
    processor = processor_of(TOKENIZER)
    lengths = [len(processor(piece)) for piece in pieces_of("A red circle. " * 500, processor, 64)]
    assert min(lengths[:-2]) >= 62


SIZES = ("num_layers=1", "width=16", "num_heads=2", "num_kv_heads=2", "head_size=8", "mlp_width=16", "vocab_size=500")
SMALL = [f"model.decoder.{value}" for value in SIZES]


def test_a_bad_file_is_counted_once_though_the_tokenizer_reads_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The cat sat on the mat. " * 200)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    task = LanguageTask(override(recipe("gpt2-small", str(tmp_path)), [*SMALL, "row_length=64"]))
    assert task.errors.total == 1


def test_a_tokenizer_is_learned_from_chats(tmp_path: Path) -> None:
    """Without their words every letter would be a token of its own."""
    word = "extraordinarily"
    chats = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": [{"type": "text", "text": f"{word} 1"}]}]
    ] * 20
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    task = LanguageTask(override(recipe("gpt2-small", str(tmp_path)), [*SMALL, "sources=chats.jsonl"]))
    assert len(task.processor.tokenizer.encode(word)) == 1
