"""Ids to text one by one: the pieces joined are the whole decoded, and stop texts are found wherever pieces end."""

from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import byte_level, metaspace, unigram
from tokenizers import decoders, models

from mm_gpt.inference.detokenizer import Detokenizer, StopMatcher, TokenBytes
from mm_gpt.tokenizer import Tokenizer
from tests.conftest import make_tokenizer

ASTRONAUT = "👩‍🚀"


def word_pieces() -> tokenizers.Tokenizer:
    """BERT's form: pieces of a word begin with ##, words have spaces between them."""
    words = ["<unk>", "<s>", "dog", "##s", "a", "##\u00e9", "cat"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return backend


def tokenizer_of(backend: tokenizers.Tokenizer, end: str) -> Tokenizer:
    backend.add_special_tokens([end])
    return Tokenizer(backend, end_of_text=end, end_of_turn=end)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": make_tokenizer,
    "byte level with added tokens": lambda: tokenizer_of(
        byte_level("smollm", SPECIAL, plain=["<é>", "< b>"]), SPECIAL[0]
    ),
    "Llama's": lambda: tokenizer_of(metaspace("prepend", ["<s>", "</s>"]), "</s>"),
    "Gemma's": lambda: tokenizer_of(metaspace("none", ["<s>", "</s>"]), "</s>"),
    "unigram": lambda: tokenizer_of(unigram(["<s>", "</s>"]), "</s>"),
    "word pieces": lambda: tokenizer_of(word_pieces(), "<s>"),
}
TOKENIZERS: dict[str, Tokenizer] = {}


def named(kind: str) -> Tokenizer:
    if kind not in TOKENIZERS:
        TOKENIZERS[kind] = MAKERS[kind]()
    return TOKENIZERS[kind]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TokenBytes(tokenizer))
    return [*(detokenizer.add(id) for id in ids), detokenizer.finish()]


def is_a_byte(tokenizer: Tokenizer, id: int) -> bool:
    return (tokenizer.backend.id_to_token(id) or "").startswith("<0x")


@pytest.mark.parametrize("kind", MAKERS)
@given(st.data())
@settings(max_examples=60)
def test_pieces_joined_are_the_whole(kind: str, data: st.DataObject) -> None:
    """Random ids: halves of characters, special tokens, gaps, spaces at the start.

    Byte tokens among words stand for whole characters here: of others `decode` gives up what was said already.
    """
    tokenizer = named(kind)
    tokens = TokenBytes(tokenizer)
    single = [id for id in range(tokenizer.vocab_size) if not is_a_byte(tokenizer, id)]
    runs = [st.sampled_from(single).map(lambda id: [id])]
    if len(single) < tokenizer.vocab_size:
        letters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
        runs.append(letters.map(lambda c: [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in c.encode()]))
    ids = [id for run in data.draw(st.lists(st.one_of(runs), max_size=12)) for id in run]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    texts = [id for id in ids if id not in tokenizer.special.values()]
    written = b"".join(tokens(id, first=n == 0) for n, id in enumerate(texts))
    assert written.decode(errors="replace") == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "Llama's", "Gemma's"])
def test_texts_come_back_character_by_character(kind: str) -> None:
    tokenizer = named(kind)
    for text in ("naïve 日本語 text", f"an {ASTRONAUT} in space", "tabs\t\tand\n\nlines", "🦆" * 3):
        ids = tokenizer.encode(text)
        parts = pieces(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert not any("\ufffd" in part for part in parts)
        assert sum(map(len, parts[: len(ids) // 2])) >= len(text) // 4  # it does not wait for the end


def test_a_character_that_is_cut_is_one_sign_at_the_end() -> None:
    tokenizer = named("byte level")
    ids = tokenizer.encode(f"a{ASTRONAUT}")
    for size in range(1, len(ids)):
        parts = pieces(tokenizer, ids[:size])
        assert "".join(parts) == tokenizer.decode(ids[:size])
        assert not any("\ufffd" in part for part in parts[:-1])
        assert parts[-1] in ("", "\ufffd")


def test_bytes_that_are_no_text_do_not_take_their_neighbours_along() -> None:
    tokenizer = named("Llama's")
    run = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xC3, 0xA9, 0xFF, 0xC3, 0xA8)]
    assert "".join(pieces(tokenizer, run)) == "é\ufffdè"
    assert "é" not in tokenizer.decode(run)


def test_copies_of_a_detokenizer() -> None:
    tokenizer = named("byte level")
    ids = tokenizer.encode("🦆")
    first = Detokenizer(TokenBytes(tokenizer))
    for id in ids[:-1]:
        assert first.add(id) == ""
    second = first.copy()
    assert second.add(ids[-1]) == "🦆"
    assert first.finish() == "\ufffd"


# ---- stop texts ----


def matched(texts: list[str], stops: list[str]) -> tuple[str, bool]:
    """(all that is released, whether a stop text came)"""
    matcher = StopMatcher(stops)
    released = []
    for text in texts:
        piece, stopped = matcher.add(text)
        released.append(piece)
        if stopped:
            return "".join(released), True
    return "".join([*released, matcher.finish()]), False


@given(
    st.lists(st.text(alphabet="abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=300)
def test_the_stop_text_that_is_complete_first_ends_the_text(texts: list[str], stops: list[str]) -> None:
    whole = "".join(texts)
    ends = [(end, -len(stop)) for stop in stops for end in range(len(whole) + 1) if whole[:end].endswith(stop)]
    end, size = min(ends, default=(len(whole), 0))
    assert matched(texts, stops) == (whole[: end + size], bool(ends))


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=150)
def test_what_is_held_back_begins_a_stop_text(text: str, stops: list[str]) -> None:
    """The longest end of the text that does, and nothing more."""
    matcher, said = StopMatcher(stops), ""
    for end in range(1, len(text) + 1):
        piece, stopped = matcher.add(text[end - 1])
        if stopped:
            return
        said += piece
        beginnings = [text[at:end] for at in range(end) if any(stop.startswith(text[at:end]) for stop in stops)]
        assert said + (beginnings[0] if beginnings else "") == text[:end]


@pytest.mark.parametrize(
    ("texts", "stops", "expected"),
    [
        (["Paris", "\n", "\n", "More"], ["\n\n"], ("Paris", True)),
        (["Paris", "\n", "More"], ["\n\n"], ("Paris\nMore", False)),
        (["x<", "/", "s", ">"], ["</s>", "</s"], ("x", True)),
        (["ab", "c"], ["abcd", "ab"], ("", True)),
        (["aab"], ["ab"], ("a", True)),
        (["a", "a", "a", "b"], ["aab"], ("a", True)),
        (["the EN", "D"], ["END"], ("the ", True)),
        (["the EN"], ["END"], ("the EN", False)),
        (["日本", "語。終"], ["。終"], ("日本語", True)),
        (["any"], [], ("any", False)),
    ],
)
def test_stop_texts_across_pieces(texts: list[str], stops: list[str], expected: tuple[str, bool]) -> None:
    """The last two: text held back comes out when its stop text fails, and at the end."""
    assert matched(texts, stops) == expected


def test_copies_of_a_matcher() -> None:
    first = StopMatcher(["END"])
    assert first.add("the E") == ("the ", False)
    second = first.copy()
    assert first.add("ND") == ("", True)
    assert second.add("x") == ("Ex", False)
