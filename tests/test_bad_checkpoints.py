"""Folders that are broken: one line that names the file, from Python and from the command line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_gpt.commands.cli import main
from mm_gpt.errors import MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.decoders import DEFAULTS, decoder_config
from mm_gpt.hub.weights import written
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.tokenizer import Tokenizer

VOCAB = 300
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


def write_sharded(folder: Path, state: dict[str, Tensor]) -> None:
    names, files = sorted(state), {}
    for number, file in enumerate(SHARDS):
        save_file({name: state[name] for name in names[number::2]}, folder / file)
        files |= dict.fromkeys(names[number::2], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that loads, in two shards, and beside it the same in one file."""
    from mm_gpt.hub.decoders import decoder_table, part_sizes

    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer.train(["user assistant system", "The cat sat on the mat."] * 4, VOCAB)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    decoder = Decoder(decoder_config(CONFIG, "config.json"))
    init_weights(decoder, torch.Generator().manual_seed(0))
    sizes = lambda name, parts, rows: part_sizes(decoder.config, name, parts, rows)  # noqa: E731
    write_sharded(folder, dict(written(decoder, decoder_table("llama"), sizes)))
    return folder


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in SHARDS for name, tensor in load_file(folder / file).items()}


def configured(**changes: Any) -> Callable[[Path], None]:
    """A change to `config.json`; `...` removes a key."""

    def spoil(folder: Path) -> None:
        values = CONFIG | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return spoil


def stored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """A change to the tensors."""

    def spoil(folder: Path) -> None:
        state = state_of(folder)
        change(state)
        write_sharded(folder, state)

    return spoil


def replaced(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Other content in a file."""
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def indexed(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """A change to the index of shards."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return spoil


def truncated(file: str, share: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return spoil


def only(file: str, content: bytes) -> Callable[[Path], None]:
    """This file instead of all weights."""

    def spoil(folder: Path) -> None:
        for name in (*SHARDS, INDEX):
            (folder / name).unlink()
        (folder / file).write_bytes(content)

    return spoil


def torch_file(folder: Path) -> None:
    only("model.safetensors", b"")(folder)
    torch.save({"w": torch.zeros(3)}, folder / "model.safetensors")


def ours(**changes: Any) -> Callable[[Path], None]:
    """A folder of our own."""

    def spoil(folder: Path) -> None:
        from mm_gpt.hub.checkpoint import save_model

        model, processor = load_model(folder)
        for file in folder.iterdir():
            file.unlink()
        save_model(model, processor, folder)
        values = json.loads((folder / "config.json").read_text())
        values["decoder"] |= changes
        (folder / "config.json").write_text(json.dumps(values))

    return spoil


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    # what the configuration asks for
    "wrong architecture": (configured(model_type="bert"), r"config\.json: unknown model type 'bert'"),
    "misspelt architecture": (configured(model_type="lama"), r"config\.json: .* did you mean 'llama'\?"),
    "no architecture": (configured(model_type=...), r"config\.json: has no model_type"),
    "yarn": (configured(rope_parameters=YARN), r"config\.json: rope scaling 'yarn' is not supported"),
    "old yarn": (configured(rope_scaling={"type": "yarn", "factor": 4.0}), r"config\.json: rope scaling 'yarn'"),
    "rope without factor": (configured(rope_scaling={"type": "linear"}), r"config\.json: lacks 'factor'"),
    "partial rotation": (configured(partial_rotary_factor=0.5), r"config\.json: partial_rotary_factor 0\.5 is not"),
    "partial rotation inside": (
        configured(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        r"config\.json: partial_rotary_factor 0\.5 is not supported",
    ),
    "interleaved rotation": (configured(rope_interleaved=True), r"config\.json: rope_interleaved True is not"),
    "both directions": (configured(is_causal=False), r"config\.json: is_causal False is not supported"),
    "quantised": (configured(quantization_config={"bits": 4}), r"config\.json: quanti[sz]\w+.* not supported"),
    "activation": (configured(hidden_act="sylu"), r"config\.json: unknown activation 'sylu'; did you mean 'silu'\?"),
    "text for a number": (configured(hidden_size="16"), r"config\.json: hidden_size '16' is not a whole number"),
    "no layers": (configured(num_hidden_layers=0), r"config\.json: num_hidden_layers 0 is not a whole number above 0"),
    "null": (configured(vocab_size=None), r"config\.json: vocab_size None is not a whole number above 0"),
    "head groups": (configured(num_attention_heads=3), r"config\.json: a width of 16 cannot be split into 3 heads"),
    "kv groups": (configured(num_key_value_heads=3), r"config\.json: num_heads 2 is not a multiple"),
    "endless width": (configured(hidden_size=10**12), r"config\.json: no configuration of this model type"),
    "endless head": (configured(head_dim=10**30), r"config\.json: no configuration of this model type"),
    "endless depth": (configured(num_hidden_layers=10**9), r"config\.json: num_hidden_layers 1000000000 is more than"),
    "config without end": (replaced("config.json", '{"a":' * 100_000), r"config\.json: not readable as JSON"),
    "number without end": (replaced("config.json", f'{{"a": {"9" * 5000}}}'), r"config\.json: not readable as JSON"),
    "endless vocabulary": (configured(vocab_size=1 << 50), r"no memory for|has shape"),
    # its files
    "config not JSON": (replaced("config.json", "{'a': 1}"), r"config\.json: not readable as JSON"),
    "config not UTF-8": (replaced("config.json", b"\xff\xfe{}"), r"config\.json: not readable as JSON"),
    "config empty": (replaced("config.json", ""), r"config\.json: not readable as JSON"),
    "config a list": (replaced("config.json", "[]"), r"config\.json: expected a JSON object"),
    "config gone": (lambda folder: (folder / "config.json").unlink(), r"config\.json: no such file"),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), r"has neither tokenizer\.json nor"),
    "tokenizer not JSON": (replaced("tokenizer.json", "{"), r"tokenizer\.json: not a readable tokenizer"),
    "tokenizer too large": (configured(vocab_size=260), r"the tokenizer has \d+ ids, the decoder 260"),
    # shards
    "shard cut off": (truncated(SHARDS[1], 0.5), rf"{SHARDS[1]}: not a readable safetensors file"),
    "shard nearly whole": (truncated(SHARDS[0], 0.999), rf"{SHARDS[0]}: not a readable safetensors file"),
    "shard empty": (replaced(SHARDS[0], b""), rf"{SHARDS[0]}: not a readable safetensors file"),
    "shard gone": (lambda folder: (folder / SHARDS[1]).unlink(), rf"{SHARDS[1]}: no such file"),
    "shard misnamed": (
        indexed(lambda files: files.update(dict.fromkeys(files, "model-00003-of-00002.safetensors"))),
        r"model-00003-of-00002\.safetensors: no such file",
    ),
    "tensor elsewhere": (
        indexed(lambda files: files.update({NORM: SHARDS[files[NORM] == SHARDS[0]]})),
        rf"safetensors: lacks {NORM}, which the index says is here",
    ),
    "shard a pickle": (replaced(SHARDS[0], pickle.dumps({})), rf"{SHARDS[0]}: a pickle, not safetensors"),
    "shard not fetched": (replaced(SHARDS[0], "version https://git-lfs.github.com/spec/v1\n"), "Git LFS's note"),
    "index empty": (replaced(INDEX, "{}"), rf"{INDEX}: no weight_map"),
    "index of nothing": (replaced(INDEX, '{"weight_map": {}}'), rf"{INDEX}: no weight_map"),
    "index not JSON": (replaced(INDEX, "weight_map"), rf"{INDEX}: not readable as JSON"),
    "index to elsewhere": (replaced(INDEX, '{"weight_map": {"a": "/etc/passwd"}}'), rf"{INDEX}: no weight_map"),
    # a pickle where safetensors belong
    "torch file": (torch_file, r"model\.safetensors: a pickle, not safetensors"),
    "pickle": (only("model.safetensors", pickle.dumps({"w": 1})), r"model\.safetensors: a pickle, not safetensors"),
    "bin alone": (
        only("pytorch_model.bin", b"PK"),
        r"model\.safetensors: no such file .*pytorch_model\.bin is a pickle, which may run code",
    ),
    # tensors
    "missing": (stored(lambda state: state.pop(NORM)), rf"lacks 1 tensor \({NORM}\)"),
    "left over": (stored(lambda state: state.update(new=torch.zeros(1))), r"has 1 tensor \(new\) left over"),
    "renamed": (
        stored(lambda state: state.update({"norm.weight": state.pop("model.norm.weight")})),
        r"lacks 1 tensor \(model\.norm\.weight\) and has 1 tensor \(norm\.weight\) left over",
    ),
    "shape": (
        stored(lambda state: state.update({NORM: torch.zeros(3)})),
        rf"{NORM} has shape \(3,\), not \(16,\)",
    ),
    "int8": (
        stored(lambda state: state.update({NORM: state[NORM].to(torch.int8)})),
        rf"{NORM} is stored as I8; quantised weights are not read",
    ),
    "float8": (
        stored(lambda state: state.update({NORM: state[NORM].to(torch.float8_e4m3fn)})),
        rf"{NORM} is stored as F8_E4M3; quantised weights are not read",
    ),
    # our own format
    "our unknown key": (ours(num_hedas=2), r"config\.json\.decoder: unknown key 'num_hedas'; did you mean 'num_heads'"),
    "our wrong type": (ours(num_heads="2"), r"config\.json\.decoder\.num_heads: expected int, got '2'"),
    "our other size": (ours(mlp_width=25), r"model\.safetensors: decoder\.\S+ has shape"),
}


def test_the_whole_one_loads(whole: Path) -> None:
    load_model(whole)


def test_a_special_token_without_a_row(whole: Path, tmp_path: Path) -> None:
    """Gemma 3 1B has the tokenizer of its larger siblings, with an image token right behind the decoder's vocabulary.
    Such text is text: the id would be an index out of range."""
    folder = shutil.copytree(whole, tmp_path / "model")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([f"<{n}>" for n in range(VOCAB - backend.get_vocab_size())] + ["<image_soft_token>"])
    assert backend.token_to_id("<image_soft_token>") == VOCAB
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "mask_token": "<image_soft_token>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    _, processor = load_model(folder)
    assert processor.tokenizer.vocab_size == processor.vocab_size == VOCAB
    text = "cat <image_soft_token> mat <|im_end|>"
    ids = processor.tokenizer.encode(text, allow_special=True)
    assert max(ids) < VOCAB
    assert processor.tokenizer.special["<|im_end|>"] == ids[-1]
    assert processor.tokenizer.decode(ids, keep_special=True) == text


@pytest.mark.parametrize("name", BROKEN)
def test_one_line(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """From Python an MMGPTError, on the command line exit code 1 and nothing but the line, no traceback."""
    spoil, message = BROKEN[name]
    folder = shutil.copytree(whole, tmp_path / "model")
    spoil(folder)
    with pytest.raises(MMGPTError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert main(["ask", "Hello?", "--model", str(folder), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"mm-gpt: error: {' '.join(str(error.value).split())}\n"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
ROPE_KEYS = ("rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "full_attention")
ROPE = st.dictionaries(st.sampled_from(ROPE_KEYS), st.sampled_from(["linear", "llama3", "default"]) | JSON)
KEYS = sorted({key for keys in DEFAULTS.values() for key in keys} | {"layer_types", "rope_scaling", "rope_parameters"})


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DEFAULTS)), st.dictionaries(st.sampled_from(KEYS), ROPE | JSON, max_size=4))
def test_any_configuration(kind: str, values: dict[str, Any]) -> None:
    """Whatever stands in a configuration, it is read or refused in one line."""
    problem = "config.json: "
    try:
        decoder_config({"model_type": kind, **values}, "config.json")
    except MMGPTError as error:
        problem = str(error)
    assert problem.startswith("config.json: ")
