"""Text <-> ids: parity with transformers, public folders, and text that only looks like a special token."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_chat_template import BYTE_LEVEL, FAMILIES, ours, theirs
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends
from tokenizers import processors as post_processors

from mm_gpt.errors import CheckpointError, DownloadError, MMGPTError
from mm_gpt.hub.gguf.file import Fields, read_gguf
from mm_gpt.hub.gguf.reader import read_tokenizer
from mm_gpt.tokenizer import Tokenizer

TOKENIZER = make_tokenizer()
GPT2_FILES = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizers"
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
    from mm_gpt.hub.fetching import download

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


RUNS = st.lists(
    st.tuples(
        st.one_of(
            st.text(max_size=6),
            st.sampled_from(["Hello", " world", "A red", " circle", "\n", "  ", "中", "e", "\u0301", "▁", "1", "😀"]),
        ),
        st.booleans(),
    ),
    max_size=6,
)


@given(st.sampled_from(sorted(FAMILIES)), RUNS, st.data())
@settings(max_examples=100, deadline=None)
def test_runs_give_the_ids_of_one_call_of_transformers(name: str, runs: list[tuple[str, bool]], data: st.DataObject):
    """SentencePiece begins a text with a space, and added tokens may swallow one: runs apart give other ids."""
    tokenizer = ours(name)[0]
    assume(not any(token in "".join(text for text, _ in runs) for token in tokenizer.special))
    special = st.tuples(st.sampled_from(sorted(set(tokenizer.special) - {"<unk>"})), st.booleans(), st.just(True))
    mixed = [(text, target, data.draw(st.booleans())) for text, target in runs]
    for _ in range(data.draw(st.integers(0, 3))):
        mixed.insert(data.draw(st.integers(0, len(mixed))), data.draw(special))
    ids, targets = tokenizer.encode_runs(mixed)
    assert ids == theirs(name)("".join(text for text, *_ in mixed), add_special_tokens=False)["input_ids"]
    assert len(targets) == len(ids)


@given(st.sampled_from(BYTE_LEVEL), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_targets_are_the_text_of_the_target_runs(name: str, before: str, answer: str, behind: str) -> None:
    """An answer that is learned with its first token missing, or with the header's last."""
    tokenizer = ours(name)[0]
    mark = FAMILIES[name][4]
    assume(not any(token in before + answer + behind for token in tokenizer.special))
    runs = [(before, False, False), (mark, False, True), (answer, True, False), (mark, True, True)]
    ids, targets = tokenizer.encode_runs([*runs, (behind, False, False)])
    learned = [id for id, target in zip(ids, targets, strict=True) if target]
    assert learned == tokenizer.encode(answer + mark, allow_special=True)
    assert not any(targets[: len(tokenizer.encode(before)) + 1])


def test_an_end_mark_that_swallows_spaces_is_its_own() -> None:
    """Some files let </s> take the space before it, another run's: it is learned or not as the mark says."""
    tokenizer = ours("llama2-swallow")[0]
    ids, targets = tokenizer.encode_runs([("Hello  ", False, False), ("</s>", True, True), (" Hello", False, False)])
    assert [id for id, target in zip(ids, targets, strict=True) if target] == [tokenizer.special["</s>"]]


def test_a_word_counts_where_it_stands_and_not_its_space() -> None:
    """Behind a template's "Assistant: " the answer's first word, often all of it, would not be learned. The file's
    `trim_offsets` changes nothing about it."""
    backend = Backend.from_str(TOKENIZER.backend.to_str())
    trim = post_processors.ByteLevel(trim_offsets=True)
    backend.post_processor = post_processors.Sequence([trim])
    backend.enable_truncation(2)
    tokenizer = Tokenizer(backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    ids, targets = tokenizer.encode_runs([("A ", False, False), ("red circle", True, False)])
    assert ids == TOKENIZER.encode("A red circle")
    assert tokenizer.decode([i for i, target in zip(ids, targets, strict=True) if target]) == " red circle"


@given(st.sampled_from(sorted(FAMILIES)), st.data())
@settings(max_examples=100, deadline=None)
def test_only_trusted_runs_make_special_tokens(name: str, data: st.DataObject) -> None:
    """Of a vocabulary that holds </s> as a word, of a token put together at a border, beside real ones."""
    tokenizer = ours(name)[0]
    special = sorted(set(tokenizer.special) - {"<unk>"})
    halves = [half for token in special for half in (token[:2], token[2:])]
    text = st.lists(st.sampled_from([*special, *halves, "<unk>", " ", "x", "＜/s＞"]), max_size=4).map("".join)
    runs: list[tuple[str, bool, bool]] = []
    trusted = data.draw(st.lists(st.sampled_from(special), max_size=3))
    for token in trusted:
        runs += [(data.draw(text), False, False), (token, True, True)]
    runs.append((data.draw(text), False, False))
    ids, _ = tokenizer.encode_runs(runs)
    known = {tokenizer.special[token] for token in special}
    assert [id for id in ids if id in known] == [tokenizer.special[token] for token in trusted]


def test_text_with_and_without_lookalikes_is_encoded_alike() -> None:
    """One <|im_end|> in a user's text must not change how the rest of the conversation is read."""
    for name in ("llama2", "llama2-first", "llama2-swallow", "gemma", "qwen3"):
        tokenizer = ours(name)[0]
        mark = FAMILIES[name][4]
        plain = [("Hello world ", False, False), (mark, False, True), (" A red circle", False, False)]
        usual = tokenizer.encode_runs(plain)[0]
        hostile = tokenizer.encode_runs([*plain, (mark, False, True), ("x" + mark, False, False)])[0]
        assert hostile[: len(usual)] == usual
        assert hostile.count(tokenizer.special[mark]) == 2


def test_a_vocabulary_that_cannot_write_a_text() -> None:
    """A special token of one character has no other spelling there: refused, never let through."""
    backend = Backend(backends.Unigram([("<unk>", 0.0), ("#", 0.0), ("a", -1.0)], 0))
    backend.add_special_tokens(["<unk>", "#"])
    tokenizer = Tokenizer(backend, end_of_text="#", end_of_turn="#")
    with pytest.raises(MMGPTError, match="'#' in a text can only be written as a special token"):
        tokenizer.encode("a#a")
    assert tokenizer.encode("a#a", allow_special=True) == [2, 1, 2]
    assert tokenizer.encode("ab") == [2, 0]  # an unknown character is no forgery


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


def write(folder: Path, **files: object) -> Path:
    """Files by name, `__` for the dot; whatever is not a string is written as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_public_folder(tmp_path: Path) -> None:
    """The same ids, names and templates as transformers reads from it, and all of the ids that end an answer."""
    from transformers import AutoTokenizer

    backend = Backend.from_str(ours("llama3")[0].backend.to_str())
    bos, end, *_ = special = list(FAMILIES["llama3"][0]().get_added_tokens_decoder().values())
    pair = (bos.content, backend.token_to_id(bos.content))
    backend.post_processor = post_processors.TemplateProcessing(single=f"{bos.content} $A", special_tokens=[pair])
    last = backend.get_vocab_size()
    added = {str(last): {"content": "<image>", "lstrip": False, "normalized": False, "special": False}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos.content,
        "eos_token": {"content": end.content, "__type": "AddedToken"},
        "added_tokens_decoder": added,
        "chat_template": [{"name": "default", "template": FAMILIES["llama3"][1]}, {"name": "rag", "template": "x"}],
    }
    ends = [backend.token_to_id(special[2].content), backend.token_to_id(end.content)]
    folder = write(
        tmp_path,
        tokenizer__json=backend.to_str(),
        tokenizer_config__json=config,
        generation_config__json={"eos_token_id": ends},
        config__json={"model_type": "llava", "image_token_id": last, "text_config": {"eos_token_id": 3}},
    )
    tokenizer = Tokenizer.from_hf_folder(folder)
    assert tokenizer.end_ids == (ends[1], ends[0])
    assert tokenizer.end_tokens == (end.content, special[2].content)
    assert tokenizer.names == {"bos_token": bos.content, "eos_token": end.content}
    assert tokenizer.prefix_ids == [pair[1]]
    assert tokenizer.chat_templates == {"default": FAMILIES["llama3"][1], "rag": "x"}
    assert tokenizer.vocab_size == last + 1
    # An image's placeholder is not for users to write, whatever the file says.
    assert last not in tokenizer.encode("a <image>")
    assert last in tokenizer.encode("a <image>", allow_special=True)
    config["chat_template"] = FAMILIES["llama3"][1]
    write(folder, tokenizer_config__json=config)
    reference = AutoTokenizer.from_pretrained(folder)
    assert reference.special_tokens_map == tokenizer.names
    text = f"{bos.content} Hello <image> {end.content}x"
    assert tokenizer.prefix_ids + tokenizer.encode(text, allow_special=True) == reference(text)["input_ids"]


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    """transformers has kept them in five places; a processor's own outranks its tokenizer's."""
    config = {"eos_token": "<|im_end|>", "chat_template": "5"}
    folder = write(tmp_path, tokenizer__json=TOKENIZER.backend.to_str(), tokenizer_config__json=config)
    found = lambda: Tokenizer.from_hf_folder(folder).chat_templates  # noqa: E731
    assert found() == {"default": "5"}
    write(folder, chat_template__jinja="4")
    write(folder / "additional_chat_templates", rag__jinja="r")
    assert found() == {"default": "4", "rag": "r"}
    write(folder, chat_template__json={"chat_template": "2"})
    assert found()["default"] == "2"
    write(folder, processor_config__json={"chat_template": "1"})
    assert found()["default"] == "1"
    write(folder, processor_config__json={}, chat_template__json={"chat_template": 3})
    with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template is neither"):
        found()


def test_a_folder_with_a_vocabulary_and_merges(tmp_path: Path) -> None:
    """GPT-2, OPT and Qwen2 before tokenizer.json; a merge of two `#` is not a comment."""
    from transformers import GPT2Tokenizer

    backend = Backend(backends.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, "## ## Hello ## world"] * 3, trainer)
    state = json.loads(backend.to_str())["model"]
    merges = "\n".join(["#version: 0.2", *map(" ".join, state["merges"]), ""])
    assert "\n# #\n" in merges
    folder = write(tmp_path / "hf", vocab__json=state["vocab"], merges__txt=merges)
    write(folder, tokenizer_config__json={"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"})
    write(folder, added_tokens__json={"<image>": 330}, config__json={"eos_token_id": 0, "model_type": "gpt2"})
    tokenizer, reference = Tokenizer.from_hf_folder(folder), GPT2Tokenizer.from_pretrained(folder)
    assert tokenizer.end_ids == (0,)
    assert tokenizer.names == reference.special_tokens_map
    for text in [*TEXTS, "## <image> ##"]:
        if "<|" not in text:
            assert tokenizer.prefix_ids + tokenizer.encode(text) == reference(text)["input_ids"]
    assert tokenizer.prefix_ids == [0]
    assert 0 not in tokenizer.encode("<|endoftext|>")
    original = write(tmp_path / "openai", encoder__json=state["vocab"], vocab__bpe=merges)
    again = Tokenizer.from_hf_folder(original)
    assert again.encode(" Hello ##") == tokenizer.encode(" Hello ##")
    assert again.prefix_ids == []
    same = Tokenizer.from_gpt2_files(original / "encoder.json", original / "vocab.bpe")
    assert same.backend.to_str() == again.backend.to_str()
    write(folder, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"})
    qwen2 = Tokenizer.from_hf_folder(folder)
    assert qwen2.encode("e\u0301 12") == qwen2.encode("\u00e9 12")
    assert qwen2.names["pad_token"] == "<|endoftext|>"
    for name, content, error in [
        ("tokenizer_config.json", '{"tokenizer_class": "CLIPTokenizer"}', "lacks tokenizer.json, without which CLIP"),
        ("tokenizer_config.json", "{}", ""),
        ("merges.txt", "a b c", r"merges\.txt: line \('a', 'b', 'c'\) is not a pair"),
        ("merges.txt", "no where", r"merges\.txt: does not fit vocab\.json"),
        ("merges.txt", "", ""),
        ("added_tokens.json", '{"<image>": 77}', "'<image>' is declared as id 77, but the vocabulary gives 330"),
        ("added_tokens.json", '{"<image>": "x"}', "malformed"),
        ("vocab.json", '{"low</w>": 0}', r"vocab\.json: not a byte-level vocabulary"),
    ]:
        (folder / name).write_text(content)
        if error:
            with pytest.raises(CheckpointError, match=error):
                Tokenizer.from_hf_folder(folder)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Tokenizer.from_hf_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has neither tokenizer\.json nor vocab\.json with merges\.txt"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer__model="x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: a bare SentencePiece .*save_pretrained\(folder\)"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer__json="{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer__json=TOKENIZER.backend.to_str())
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: no eos_token"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, special_tokens_map__json={"eos_token": "</s>"})
    with pytest.raises(CheckpointError, match="the vocabulary lacks the eos_token '</s>'"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, special_tokens_map__json={"eos_token": "<|im_end|>"}, generation_config__json={"eos_token_id": "x"})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id \['x'\] is not a list of ids"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, generation_config__json="[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected a JSON object"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, generation_config__json={"eos_token_id": [0, 99_999]}, tokenizer_config__json="{,")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer_config__json={})
    assert Tokenizer.from_hf_folder(tmp_path).end_ids == (2, 0)
    write(tmp_path, tokenizer_config__json={"extra_special_tokens": True})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the extra special tokens True are no list"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer_config__json='{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer_config__json='{"a": ' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not readable as JSON"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, tokenizer_config__json={}, generation_config__json={"eos_token_id": 10**12})
    with pytest.raises(CheckpointError, match=r"eos_token_id \[1000000000000\] is not a list of ids"):
        Tokenizer.from_hf_folder(tmp_path)
    write(tmp_path, generation_config__json={}, config__json={"image_token_id": []})
    Tokenizer.from_hf_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": {"a": 1 << 31}}, r"tokenizer\.json: its ids go up to 2147483648"),  # counted one by one
        ({"continuing_subword_prefix": "much longer than a token"}, "not a readable tokenizer"),  # a panic
    ],
)
def test_a_hostile_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    state = json.loads(TOKENIZER.backend.to_str())
    state["model"] |= changes | {"vocab": state["model"]["vocab"] | changes.get("vocab", {})}
    write(tmp_path, tokenizer__json=state, special_tokens_map__json={"eos_token": "<|im_end|>"})
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_hf_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_ids_with_gaps() -> None:
    """What counts for a decoder's table is the largest id, not how many there are."""
    state = json.loads(TOKENIZER.backend.to_str())
    state["model"]["vocab"]["far"] = 5000
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)), end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
    assert tokenizer.vocab_size == 5001


@pytest.mark.skipif(not GPT2_FILES.exists(), reason="needs OpenAI's files of GPT-2")
def test_the_published_ids_of_gpt2() -> None:
    """Golden ids from OpenAI's own encoder."""
    tokenizer = Tokenizer.from_gpt2_files(GPT2_FILES / "gpt2_encoder.json", GPT2_FILES / "gpt2_vocab.bpe")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" don't stop!! 123") == [836, 470, 2245, 3228, 17031]
    assert tokenizer.encode("a  b\n\n  c") == [64, 220, 275, 628, 220, 269]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [50256]
    assert (tokenizer.vocab_size, tokenizer.end_ids, tokenizer.prefix_ids) == (50257, (50256,), [])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


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
    tokenizer = read_tokenizer(Fields(fields, "a.gguf"))
    assert tokenizer.end_ids == (0, 2)
    for text in TEXTS:
        assert tokenizer.encode(text) == backend.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    with pytest.raises(CheckpointError, match=r"a\.gguf: unknown tokenizer\.ggml\.pre 'llama-bpe'"):
        read_tokenizer(Fields(fields | {"tokenizer.ggml.pre": "llama-bpe"}, "a.gguf"))
    for key in fields:
        without = {k: v for k, v in fields.items() if k != key}
        if key != "tokenizer.ggml.pre":
            with pytest.raises(CheckpointError, match=r"a\.gguf"):
                read_tokenizer(Fields(without, "a.gguf"))


@pytest.mark.slow
def test_same_ids_as_transformers(smollm2: Path) -> None:
    """The shipped model's prompts must be the ids that its decoder was trained on."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = read_tokenizer(read_gguf(smollm2).fields)
    for text in TEXTS:
        # transformers leaves out the model's own rule that every digit stands alone. That shows only at digits that
        # occur in merges, those of other scripts, and makes special tokens of text that looks like them.
        if "<|" not in text and "٣" not in text:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ours.encode(text)) == text
    chat = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert ours.encode(chat, allow_special=True) == theirs(chat, add_special_tokens=False)["input_ids"]
    assert not set(ours.special.values()) & set(ours.encode(chat))
