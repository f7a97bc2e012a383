"""Model folders: what was saved comes back, and what is broken is named."""

import dataclasses
import json
import pickle
import resource
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub import checkpoint
from mm_gpt.hub.checkpoint import load_decoder, load_model, model_folder, save_model
from mm_gpt.inference.assistant import Assistant
from mm_gpt.model.decoder import Decoder, DecoderConfig
from mm_gpt.model.lora import LoRAConfig, merge_lora
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor, collate
from mm_gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A saved model of this test's own."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def hidden(model: MMGPT, processor: Processor) -> Tensor:
    example = processor(Document((Image(make_picture(1)), Text("a red circle"))))
    pixels = torch.stack([processor.transform(image.load()) for image in example.images])
    with torch.no_grad():
        return model.eval()(collate([[example]], pixels))


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    """Only matrices are rounded, to half precision; saved once more, nothing changes at all."""
    model, processor = make_tiny()
    save_model(model, processor, tmp_path, card="# Card")
    again, again_processor = load_model(tmp_path)
    for (name, before), (_, after) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        expected = before.half().float() if before.dim() >= 2 and before.is_floating_point() else before
        assert torch.equal(after, expected), name
    assert again.config == model.config
    assert again_processor.config == processor.config
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    text = "A red circle 😀 <|im_end|>"
    assert again_processor.tokenizer.encode(text) == processor.tokenizer.encode(text)
    assert again_processor.image_start_id == processor.image_start_id
    assert again_processor.tokenizer.end_ids == processor.tokenizer.end_ids
    torch.testing.assert_close(hidden(again, again_processor), hidden(model, processor), rtol=0, atol=0.05)
    second = tmp_path / "second"
    second.mkdir()
    save_model(again, again_processor, second)
    first_file, second_file = (load_file(f / "model.safetensors") for f in (tmp_path, second))
    assert all(torch.equal(first_file[k], second_file[k]) for k in first_file)
    assert torch.equal(hidden(*load_model(second)), hidden(again, again_processor))
    assert (tmp_path / "README.md").read_text() == "# Card"


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    """A run of days must not end in its first save: such a matrix is stored as it is, the others in half precision."""
    model, processor = make_tiny()
    with torch.no_grad():
        model.connector.fc1.weight[0, 0] = 1e6
    model.connector.fc2.weight.data = model.connector.fc2.weight.data.to(torch.bfloat16) * 1e6
    save_model(model, processor, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["connector.fc1.weight"].dtype == torch.float32
    assert stored["connector.fc2.weight"].dtype == torch.bfloat16
    assert stored["decoder.embedding.weight"].dtype == torch.float16
    again, _ = load_model(tmp_path)
    for name in ("connector.fc1.weight", "connector.fc2.weight"):
        assert torch.equal(again.get_parameter(name), model.get_parameter(name).float())


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    model, processor = make_tiny()
    with torch.no_grad():
        model.connector.fc1.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"connector\.fc1\.weight holds values that are no finite numbers"):
        save_model(model, processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_frozen_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    """Training rounds frozen weights to bfloat16; what is stored must not be the rounded ones."""
    model, processor = make_tiny()
    save_model(model, processor, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    frozen = {f"decoder.{name}": parameter.data.clone() for name, parameter in model.decoder.named_parameters()}
    model.decoder.to(torch.bfloat16)
    save_model(model, processor, tmp_path, frozen=frozen)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    with pytest.raises(CheckpointError, match=r"the frozen decoder\.norm\.weight has shape \(1,\), not \(48,\)"):
        save_model(model, processor, tmp_path, frozen={"decoder.norm.weight": torch.zeros(1)})


@pytest.mark.parametrize(("name", "limit"), [("model.safetensors", 20_000), ("tokenizer_config.json", 5_000_000)])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, name: str, limit: int) -> None:
    """A limit on the size of files stands for the disk: the weights do not fit, or the tokenizer's names do not."""
    model, processor = make_tiny()
    processor.tokenizer.names["bos_token"] = "x" * 6_000_000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MMGPTError, match=rf"{name}: cannot be written \(.*[Ff]ile too large") as error:
            save_model(model, processor, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob(".*"))


# ---- decoders that are named, not stored ----


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """`load_decoder("smollm2-135m-instruct")` gives this tiny one."""
    model, processor = make_tiny()

    def load(name: str, dtype: str) -> tuple[Decoder, Tokenizer]:
        assert name == "smollm2-135m-instruct"
        fresh, _ = make_tiny()
        return fresh.decoder, processor.tokenizer

    monkeypatch.setattr(checkpoint, "load_decoder", load)
    return model.decoder


def test_a_named_decoder_is_not_stored(tmp_path: Path, named: Decoder) -> None:
    """Its weights come from the registry; what was trained on top comes from the folder."""
    tiny, processor = make_tiny()
    config = dataclasses.replace(tiny.config, decoder="smollm2-135m-instruct", lora=LoRAConfig(rank=2, alpha=4))
    model = MMGPT(config, named)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    save_model(model, processor, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [k for k in stored if k.startswith("decoder.") and ".lora_" not in k]
    assert [k for k in stored if ".lora_b" in k]
    assert not (tmp_path / "tokenizer.json").exists()
    again, again_processor = load_model(tmp_path)
    torch.testing.assert_close(hidden(again, again_processor), hidden(model, processor), rtol=0, atol=0.05)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert torch.equal(again.get_parameter(name), parameter.half().float())


def test_decoders_by_name() -> None:
    with pytest.raises(MMGPTError, match=r"unknown weights 'smollm'; did you mean 'smollm2-135m-instruct'\?"):
        load_decoder("smollm")
    with pytest.raises(MMGPTError, match="efficientnet-lite2"):
        load_decoder("efficientnet-lite")


def test_a_hugging_face_folder_as_decoder(tmp_path: Path) -> None:
    import transformers

    _, processor = make_tiny()
    vocab = processor.tokenizer.vocab_size
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    processor.tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    decoder, tokenizer = load_decoder(str(tmp_path))
    assert decoder.config.vocab_size == vocab
    assert tokenizer.end_of_turn == "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_decoder(str(tmp_path))[1].end_of_turn == "<|endoftext|>"  # config.json's id 0


# ---- broken folders ----


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such model folder"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name", ["config.json", "processor.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
)
def test_missing_and_mangled_files(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(b"\x00\xff not what it should be")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(folder)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: no such file"):
        load_model(folder)


def test_a_wrong_key_in_the_configuration(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["decoder"]["num_layer"] = values["decoder"].pop("num_layers")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(MMGPTError, match=r"config\.json\.decoder: unknown key 'num_layer'; did you mean 'num_layers'"):
        load_model(folder)


def test_missing_left_over_and_misshapen_tensors(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    edit_tensors(folder, lambda t: t.pop("connector.fc1.bias"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lacks the tensor connector\.fc1\.bias"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    edit_tensors(folder, lambda t: t.update({"extra": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has an unknown tensor extra"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    edit_tensors(folder, lambda t: t.update({"image_marks": torch.zeros(1, 48)}))  # would broadcast
    with pytest.raises(CheckpointError, match=r"image_marks has shape \(1, 48\), not \(2, 48\)"):
        load_model(folder)


def test_truncated_weights(folder: Path) -> None:
    """An interrupted copy."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
            load_model(folder)


def test_pickles_are_refused(folder: Path) -> None:
    """A pickle runs code when it is read: under no name is one read."""
    marker = folder / "executed"

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="a pickle, not safetensors"):
        load_model(folder)
    path.unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="weights are read from safetensors only"):
        load_model(folder)
    assert not marker.exists()


def test_a_tokenizer_larger_than_the_vocabulary(folder: Path) -> None:
    """Its last ids would be read as images."""
    larger = Tokenizer.train(["completely different words, longer ones too, and many more of them " * 3], 100_000)
    values = json.loads((folder / "config.json").read_text())
    assert larger.vocab_size > 0
    while larger.vocab_size <= values["decoder"]["vocab_size"]:
        larger.backend.add_tokens([f"extra{larger.vocab_size}"])
    larger.save(folder / "tokenizer.json")
    message = rf"the tokenizer has {larger.vocab_size} ids, the decoder {values['decoder']['vocab_size']}"
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_decoder_may_be_larger_than_its_tokenizer(tmp_path: Path) -> None:
    """Some tables are padded to a round number: the image ids lie behind the table, not behind the tokenizer."""
    tiny, processor = make_tiny()
    assert isinstance(tiny.config.decoder, DecoderConfig)
    decoder = dataclasses.replace(tiny.config.decoder, vocab_size=512)
    model = MMGPT(dataclasses.replace(tiny.config, decoder=decoder)).eval()
    padded = Processor(processor.tokenizer, processor.config, vocab_size=512)
    save_model(model, padded, tmp_path)
    again, again_processor = load_model(tmp_path)
    assert again_processor.image_start_id == 512
    torch.testing.assert_close(hidden(again, again_processor), hidden(model, padded), rtol=0, atol=0.05)


def test_the_mean_of_models(folder: Path, tmp_path: Path) -> None:
    """Stops: a sum for a mean, sums in half precision, one model counted twice, and different models averaged."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    state = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: t + torch.rand(t.shape, generator=generator).to(t.dtype) for name, t in state.items()}
    save_file(moved, other / "model.safetensors")
    average = runpy.run_path(str(ROOT / "examples/average_models.py"))["average"]
    average([folder, other, other], tmp_path / "mean")
    mean = load_file(tmp_path / "mean/model.safetensors")
    for name, tensor in state.items():
        expected = ((tensor.double() + 2 * moved[name].double()) / 3).to(tensor.dtype)
        assert torch.equal(mean[name], expected), name
    load_model(tmp_path / "mean")
    average([folder, other], tmp_path / "weighted", [1.0, 2.0])
    weighted = load_file(tmp_path / "weighted/model.safetensors")
    assert all(torch.equal(weighted[name], tensor) for name, tensor in mean.items())
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(MMGPTError, match="2 folders need as many weights"):
            average([folder, other], tmp_path / "never", weights)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"head_size": ', '"head_size": 1'))
    with pytest.raises(CheckpointError, match=r"other holds another model than .*model"):
        average([folder, other], tmp_path / "never")
    with pytest.raises(CheckpointError, match="nowhere"):
        average([folder, tmp_path / "nowhere"], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_adapted_model_as_decoder(tmp_path: Path) -> None:
    """Its updates become weights, so that a model on top of it may have its own; two around one layer cannot merge."""
    tiny, processor = make_tiny()
    tiny.add_lora(LoRAConfig(rank=2, alpha=4))
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    for name in ("below", "above"):
        (tmp_path / name).mkdir()
    save_model(tiny, processor, tmp_path / "below")
    decoder, _ = load_decoder(str(tmp_path / "below"))
    assert not [name for name, _ in decoder.named_parameters() if ".lora_" in name]
    config = dataclasses.replace(tiny.config, decoder=str(tmp_path / "below"), lora=LoRAConfig(rank=3, alpha=3))
    above = MMGPT(config, decoder)
    save_model(above, processor, tmp_path / "above")
    again, again_processor = load_model(tmp_path / "above")
    torch.testing.assert_close(hidden(again, again_processor), hidden(above, processor), rtol=0, atol=0.05)
    before = hidden(again, again_processor)
    merge_lora(again.decoder)
    torch.testing.assert_close(hidden(again, again_processor), before, rtol=0, atol=1e-4)


def test_a_folder_that_is_its_own_decoder(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"decoder": str(folder)}))
    with pytest.raises(CheckpointError, match=r"config\.json: the folder names itself as its decoder"):
        load_model(folder)


def test_folders_that_are_each_others_decoder(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for one, its in ((folder, other), (other, folder)):
        values = json.loads((one / "config.json").read_text())
        (one / "config.json").write_text(json.dumps(values | {"decoder": str(its)}))
    with pytest.raises(CheckpointError, match=r"config\.json: the folder names itself as its decoder"):
        load_model(folder)


def test_a_folder_called_like_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare names are those of models first; a folder of such a name is given with a slash, or as a Path."""
    shutil.copytree(folder, tmp_path / "shipped/default")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    for name in ("default", "smollm2-135m-instruct", "mine"):
        shutil.copytree(folder, name)
    assert model_folder("default") == tmp_path / "shipped/default"
    assert model_folder("./default") == model_folder(Path("default")) == Path("default")
    assert model_folder("mine") == Path("mine")
    monkeypatch.setattr(checkpoint.download, "fetch", lambda name: {"asked": Path(f"{name}.gguf")})
    monkeypatch.setattr(checkpoint.gguf, "load_gguf", lambda path, dtype: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_decoder("smollm2-135m-instruct")
    with pytest.raises(ZeroDivisionError):
        load_model("smollm2-135m-instruct")
    assert load_decoder("./smollm2-135m-instruct")[0].config.width == 48
    assert load_model("./smollm2-135m-instruct")[0].config.vision is not None


@pytest.mark.parametrize("stored", [True, False])
def test_a_merged_model_is_saved_whole(tmp_path: Path, named: Decoder, stored: bool) -> None:
    """An Assistant merges low-rank updates; what it then saves has them in its weights, and loads."""
    tiny, processor = make_tiny()
    decoder = tiny.config.decoder if stored else "smollm2-135m-instruct"
    model = MMGPT(dataclasses.replace(tiny.config, decoder=decoder, lora=LoRAConfig(rank=2, alpha=4)), named)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    expected = hidden(model, processor)
    assistant = Assistant(model, processor)
    save_model(assistant.model, processor, tmp_path)
    again, again_processor = load_model(tmp_path)
    torch.testing.assert_close(hidden(again, again_processor), expected, rtol=0, atol=0.05)
    assert again.config.lora is None
    assert isinstance(again.config.decoder, DecoderConfig)
    half_merged, _ = make_tiny()
    half_merged.add_lora(LoRAConfig(rank=2, alpha=4))
    merge_lora(half_merged.decoder)
    with pytest.raises(CheckpointError, match=r"MMGPT\.merge_lora"):
        save_model(half_merged, processor, tmp_path)


SIZES: dict[str, tuple[str, tuple[str, ...], object, str]] = {
    "depth": ("config.json", ("decoder", "num_layers"), 10_000, "num_layers 10000 is more than 1000"),
    "width": ("config.json", ("decoder", "width"), 1 << 40, "has shape|no configuration"),
    "vocabulary": ("config.json", ("decoder", "vocab_size"), 1 << 40, r"embedding\.weight has shape"),
    "MLP": ("config.json", ("decoder", "mlp_width"), 1 << 40, r"mlp\.\S+ has shape"),
    "positions": ("config.json", ("decoder", "max_length"), 1 << 60, None),
    "tower": ("config.json", ("vision", "model"), "timm/vit_giant_patch14_224", "unknown tensor|lacks the tensor"),
    "image": ("config.json", ("vision", "image_size"), 1 << 20, "image_size must be 1 to 4096, not 1048576"),
    "connector": ("config.json", ("connector", "kind"), "resampler", "unknown tensor|lacks the tensor"),
    "latents": ("config.json", ("connector",), {"kind": "resampler", "depth": 10**9}, "depth must be at most 1000"),
    "pixels": ("processor.json", ("image", "size"), 1 << 20, "size must be 1 to 4096 pixels, not 1048576"),
    "other pixels": ("processor.json", ("image", "size"), 48, "images of 48 pixels .* a model that sees 32"),
    "short side": ("processor.json", ("image", "short_side"), 1 << 30, "short_side"),
    "image tokens": ("processor.json", ("tokens_per_image",), 10**9, "tokens_per_image is 1000000000, .* makes 4"),
    "context": ("processor.json", ("max_length",), -1, "max_length must be at least 1"),
    "tiles": (
        "processor.json",
        ("tiling",),
        {"kind": "idefics3", "longest_edge": 4096},
        r"processor\.json",
    ),
    "ends": ("tokenizer_config.json", ("more_ends",), [1 << 70], r"tokenizer_config\.json: more_ends"),
    "negative ends": ("tokenizer_config.json", ("more_ends",), [-1], r"tokenizer_config\.json: more_ends"),
}


@pytest.mark.parametrize("what", SIZES)
def test_sizes_are_checked_before_anything_is_built(folder: Path, what: str) -> None:
    """A folder of a few kilobytes asks for days and terabytes: refused in one line that names its file."""
    file, keys, value, message = SIZES[what]
    values = json.loads((folder / file).read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / file).write_text(json.dumps(values))
    if message is None:
        load_model(folder)
        return
    with pytest.raises(MMGPTError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizers_of_our_folders_are_checked(folder: Path) -> None:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    empty = state["model"] | {"vocab": {}, "merges": []}
    for content, message in (
        (state | {"model": empty, "added_tokens": []}, r"tokenizer\.json: the tokenizer has no special token"),
        (state | {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}}, "tokenizer"),
        (state | {"decoder": {"type": "ByteLevel"}}, r"tokenizer\.json: not a readable tokenizer"),
        (state | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}, "not a readable tokenizer"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message) as error:
            load_model(folder)
        assert str(folder) in str(error.value)
