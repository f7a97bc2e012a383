"""Text <-> ids: parity with transformers, round trips, and text that only looks like a special token."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends

from mm_gpt.errors import CheckpointError, DownloadError
from mm_gpt.tokenizer import Tokenizer

TOKENIZER = make_tokenizer()
TEXTS = [
    "Hello world",
    " don't stop!! 123",
    "a  b\n\n  c\t\td   ",
    "😀 family 👨‍👩‍👧, flag 🇩🇪, 中文字符和日本語",
    "def f(x):\n    return x ** 2  # 1234567890\n\n",
    "<|im_end|> and <|endoftext|> are only text here",
    "naïve café Å Å ﬁ \u00a0\u2028\ufeff",
    "3.14159, 1,000,000 and ٣ and ½",
    "\r\n\x00\x7f",
    "",
]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real decoder's GGUF file."""
    from mm_gpt.hub import download

    try:
        return next(iter(download.fetch("smollm2-135m-instruct", progress=False).values()))
    except DownloadError as error:
        pytest.skip(f"the weights of SmolLM2 are out of reach: {error}")


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip(text: str) -> None:
    """Lost spaces, digits or half characters."""
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|", "im_end", "|>", " ", "a"])))
@settings(max_examples=100, deadline=None)
def test_text_never_becomes_special(pieces: list[str]) -> None:
    """A user who writes <|im_end|> must not end a turn, also when it is put together from several runs."""
    special = set(TOKENIZER.special.values())
    assert not special & set(TOKENIZER.encode("".join(pieces)))
    ids, _ = TOKENIZER.encode_runs([(piece, True, False) for piece in pieces])
    assert not special & set(ids)
    assert TOKENIZER.decode(ids) == "".join(pieces)


def test_special_tokens_where_they_are_allowed() -> None:
    start, end = TOKENIZER.special["<|im_start|>"], TOKENIZER.special["<|im_end|>"]
    ids = TOKENIZER.encode("<|im_start|>user\n<|im_end|>", allow_special=True)
    assert ids[0] == start
    assert ids[-1] == end
    assert ids[1:-1] == TOKENIZER.encode("user\n")
    assert TOKENIZER.decode(ids) == "user\n"
    assert TOKENIZER.decode(ids, keep_special=True) == "<|im_start|>user\n<|im_end|>"


@given(st.lists(st.tuples(st.text(max_size=8), st.booleans(), st.just(False)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_runs_are_encoded_as_one_string(runs: list[tuple[str, bool, bool]]) -> None:
    """Encoding run by run gives other tokens than training on the whole text did."""
    ids, targets = TOKENIZER.encode_runs(runs)
    assert ids == TOKENIZER.encode("".join(text for text, *_ in runs))
    assert len(targets) == len(ids)


def test_a_token_belongs_to_the_run_in_which_it_starts() -> None:
    ids, targets = TOKENIZER.encode_runs([("A red", False, False), (" circle😀", True, False)])
    assert TOKENIZER.decode([i for i, target in zip(ids, targets, strict=True) if target]) == " circle😀"


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    assert again.special == TOKENIZER.special
    assert again.end_ids == TOKENIZER.end_ids
    for text in TEXTS:
        assert again.encode(text) == TOKENIZER.encode(text)


def test_training_a_tokenizer_is_deterministic() -> None:
    """A resumed run trains its tokenizer again: other ids would be another language."""
    first, again = (Tokenizer.train(TEXTS * 2, 330).backend.to_str() for _ in range(2))
    assert first == again


def test_two_threads_may_encode_at_once() -> None:
    """Training reads ahead in a thread while validation encodes; older backends raise "Already borrowed"."""
    text = "A red circle on a blue ground. " * 3000
    expected = TOKENIZER.encode(text)
    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for ids in pool.map(TOKENIZER.encode, [text] * 12))


def test_errors_name_the_file(tmp_path: Path) -> None:
    ends = {"end_of_text": "<|endoftext|>", "end_of_turn": "<|im_end|>"}
    with pytest.raises(CheckpointError, match=r"nothing\.json: no such file"):
        Tokenizer.from_file(tmp_path / "nothing.json", **ends)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(CheckpointError, match=r"broken\.json: not a readable tokenizer"):
        Tokenizer.from_file(broken, **ends)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="no special token '</s>'"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", end_of_text="</s>", end_of_turn="<|im_end|>")


def test_the_vocabulary_inside_a_gguf_file() -> None:
    """SmolLM2's numbers are written digit by digit, and control tokens are not part of BPE."""
    backend = Backend(backends.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "the quick brown fox jumps over the lazy dog 12 34"] * 3, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.encode_special_tokens = True
    vocabulary = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    merges = json.loads(backend.to_str())["model"]["merges"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = Tokenizer.from_gguf_fields(fields, "a.gguf")
    assert tokenizer.end_ids == (0, 2)
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    with pytest.raises(CheckpointError, match=r"a\.gguf: tokenizer 'gpt2'/'llama-bpe' is not supported"):
        Tokenizer.from_gguf_fields(fields | {"tokenizer.ggml.pre": "llama-bpe"}, "a.gguf")
    for key in fields:
        without = {k: v for k, v in fields.items() if k != key}
        if key != "tokenizer.ggml.pre":
            with pytest.raises(CheckpointError, match=r"a\.gguf"):
                Tokenizer.from_gguf_fields(without, "a.gguf")


@pytest.mark.slow
def test_same_ids_as_transformers(smollm2: Path) -> None:
    """The shipped model's prompts must be the ids that its decoder was trained on."""
    import transformers

    from mm_gpt.hub.llama import open_gguf

    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    fields = {name: field.contents() for name, field in open_gguf(smollm2).fields.items()}
    ours = Tokenizer.from_gguf_fields(fields, str(smollm2))
    for text in TEXTS:
        # transformers leaves out the model's own rule that every digit stands alone. That shows only at digits that
        # occur in merges, those of other scripts, and makes special tokens of text that looks like them.
        if "<|" not in text and "٣" not in text:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ours.encode(text)) == text
    chat = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert ours.encode(chat, allow_special=True) == theirs(chat, add_special_tokens=False)["input_ids"]
    assert not set(ours.special.values()) & set(ours.encode(chat))
