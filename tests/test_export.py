"""Exported models: what transformers computes from them, and what is refused because nobody would compute it."""

import dataclasses
import json
import re
import resource
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, make_picture, make_tiny, make_tokenizer
from family_checks import logits_of, user
from torch import Tensor

from mm_gpt.commands.cli import main
from mm_gpt.document import Message
from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.export import folder as export_folder
from mm_gpt.hub.export.decoders import CLASSES, decoder_values
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.hub.gguf import mmproj
from mm_gpt.hub.gguf.file import read_gguf
from mm_gpt.hub.gguf.reader import load_gguf, read_tokenizer
from mm_gpt.hub.gguf.writer import pre_tokenizer_name
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.positions import RopeScaling, rotary_frequencies
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

CLOSE = {"atol": 1e-4, "rtol": 0.0}
"""Logits of about 1 in float32; a forgotten bias or a rotation of the wrong order shows at 0.1."""
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "A red circle?"}],
    [
        {"role": "system", "content": "You see\n images. "},
        {"role": "user", "content": [{"type": "text", "text": " Describe it, "}, {"type": "text", "text": "é 12!"}]},
        {"role": "assistant", "content": "A blue ground."},
        {"role": "user", "content": "And?\n"},
    ],
]
LLAMA: dict[str, Any] = {
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "mlp_width": 64,
    "max_length": 128,
}
GPT2 = LLAMA | {
    "num_kv_heads": 4,
    "mlp_width": 128,
    "max_length": 1024,
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "mlp_bias": True,
    "qkv_bias": True,
    "output_bias": True,
    "positions": "learned",
}
GEMMA = LLAMA | {"activation": "gelu_tanh", "embedding_scale": 32**0.5, "norm_eps": 1e-6}
LOCAL: dict[str, Any] = {"attention": ("local", "dense"), "window": 5}
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_length=32)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA | {"head_size": 16, "tie_embeddings": False}),
    "llama with biases, stretched": (
        "llama",
        LLAMA | {"qkv_bias": True, "output_bias": True, "rope_scaling": RopeScaling(kind="linear", factor=2.0)},
    ),
    "llama 3": ("llama", LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "a window as long as the context": ("llama", LLAMA | {"attention": ("local",), "window": 128, "dropout": 0.1}),
    "mistral": ("mistral", LLAMA | {"attention": ("local",), "window": 5}),
    "qwen2": ("qwen2", LLAMA | {"qkv_bias": True}),
    "qwen2 with windows": ("qwen2", LLAMA | {"qkv_bias": True, "attention": ("dense", "local"), "window": 5}),
    "qwen3": ("qwen3", LLAMA | {"qk_norm": True, "head_size": 16}),
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", GPT2 | {"tie_embeddings": False, "mlp_width": 40, "activation": "relu"}),
    "gemma": ("gemma", GEMMA),
    "gemma2": (
        "gemma2",
        GEMMA | LOCAL | {"norm_place": "both", "attention_scale": 0.1, "attention_softcap": 2.0, "logit_softcap": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | LOCAL | {"norm_place": "both", "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4},
    ),
}


def make_text(values: dict[str, Any], *, spare: int = 3, **processor: Any) -> tuple[MMGPT, Processor]:
    """A decoder of random half precision weights that matter everywhere, with `spare` ids behind the tokenizer's."""
    tokenizer = make_tokenizer()
    config = DecoderConfig(vocab_size=tokenizer.vocab_size + spare, **values)
    torch.manual_seed(0)
    model = MMGPT(ModelConfig(decoder=config)).eval()
    roughened(model)
    text = ProcessorConfig(max_length=config.max_length, **processor)
    return model, Processor(tokenizer, text, vocab_size=config.vocab_size)


def roughened(model: MMGPT) -> None:
    """Weights that half precision stores as they are: what an export then loses is a mistake of the export."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.15).copy_(parameter.half())


def saved(folder: Path, pair: tuple[MMGPT, Processor]) -> Path:
    folder.mkdir(parents=True)
    save_model(*pair, folder)
    return folder


def ours(model: MMGPT, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decoder.logits(model.decoder(model.decoder.embed(ids), torch.arange(ids.shape[1])[None]))


def theirs(folder: Path, **options: Any) -> Any:
    """Loaded by transformers, which must find all that it looks for, and nothing else."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("export") / "llama", make_text(LLAMA))


# ---- Decoders as Hugging Face folders ----


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    """A wrong class, a norm without its one, an unmentioned window: all load without a word."""
    kind, values = DECODERS[name]
    model, processor = make_text(values)
    out = tmp_path / "out"
    export_model(saved(tmp_path / "ours", (model, processor)), out)
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    other = theirs(out)
    assert type(other).__name__ == CLASSES[kind]
    ids = torch.randint(0, model.decoder.config.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0))
    expected = ours(model, ids)
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, expected, **CLOSE)
    torch.testing.assert_close(ours(load_model(out)[0], ids), expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "xpos"}, "the closest one, llama, lacks positions 'xpos'"),
        ({"sub_norm": True}, "lacks sub_norm True"),
        ({"positions": "relative", "memory_length": 8}, "lacks positions 'relative', memory_length 8"),
        ({"attention": ("fixed",), "stride": 4, "summary": 1}, "lacks attention ('fixed',), stride 4, summary 1"),
        ({"attention": ("local", "dense"), "window": 4}, "lacks "),
        ({"mlp_bias": True}, "lacks mlp_bias True"),
        ({"causal": False}, "lacks causal False"),
        ({"norm_place": "post", "residual_scale": 2.0}, "norm_place 'post', residual_scale 2.0"),
        ({"embedding_scale": 3.0}, "lacks embedding_scale 3.0"),
    ],
)
def test_a_decoder_that_no_class_has(changes: dict[str, Any], message: str) -> None:
    """Exported without a word, each of these would write fluent nonsense."""
    with pytest.raises(CheckpointError) as error:
        decoder_values(DecoderConfig(vocab_size=100, **LLAMA | changes))
    assert message in str(error.value)


def test_tokens_and_chats_in_transformers(llama: Path, tmp_path: Path) -> None:
    """The prompt is written by a template there and by code here: one space apart, and the model never saw it."""
    import transformers

    export_model(llama, tmp_path / "out")
    _, processor = load_model(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("A red circle").input_ids == processor.tokenizer.encode("A red circle")
    for chat in CHATS:
        for starts in (True, False):
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=starts, return_dict=False)
            assert ids == processor(processor.chat(chat, answer_starts=starts)).input_ids.tolist()
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(Exception, match="reads text alone"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(generation.eos_token_id) == set(processor.tokenizer.end_ids)
    assert tokenizer.eos_token == "<|im_end|>"
    _, again = load_model(tmp_path / "out")
    for chat in CHATS:
        assert torch.equal(again(again.chat(chat)).input_ids, processor(processor.chat(chat)).input_ids)


def test_updates_of_low_rank_are_merged(tmp_path: Path) -> None:
    model, processor = make_text(LLAMA)
    model.add_lora(LoRAConfig(rank=2, alpha=4.0))
    roughened(model)
    export_model(saved(tmp_path / "ours", (model, processor)), tmp_path / "out", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "out")(ids).logits, ours(model, ids), **CLOSE)


def test_types_and_shards(llama: Path, tmp_path: Path) -> None:
    """Vectors stay in float32; a matrix beyond half precision is refused, not made infinite."""
    from safetensors.torch import load_file

    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        export_model(llama, tmp_path / name, dtype=name)
        state = load_file(tmp_path / name / "model.safetensors")
        assert {t.dtype for t in state.values() if t.dim() > 1} == {dtype}
        assert {t.dtype for t in state.values() if t.dim() == 1} == {torch.float32}
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == name
    model, _ = load_model(llama)
    folder = tmp_path / "float32"
    tensors = list(export_folder.tensors_of(model, export_folder.decoder_export(model).tables))
    (folder / "model.safetensors").unlink()
    export_folder.write_weights(folder, tensors, dtype=torch.float32, shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(folder)(ids).logits, ours(model, ids), **CLOSE)
    with pytest.raises(CheckpointError, match="w holds values that float16 cannot store; --dtype bfloat16 can"):
        export_folder.compact(torch.full((2, 2), 1e5), torch.float16, "w")


# ---- The place, and mistakes ----


def test_places(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is not an export is deleted; a folder under its final name is whole."""
    out = tmp_path / "out"
    assert main(["export", str(llama), "--out", str(out)]) == 0
    assert str(out / "model.safetensors") in capsys.readouterr().out
    assert main(["export", str(llama), "--out", str(out)]) == 1
    assert "exists and is not empty; --overwrite replaces it" in capsys.readouterr().err
    (out / "old").touch()
    assert main(["export", str(llama), "--out", str(out), "--overwrite"]) == 0
    assert not (out / "old").exists()
    assert main(["export", str(llama), "--out", str(llama), "--overwrite"]) == 1
    assert main(["export", str(llama), "--out", str(llama.parent), "--overwrite"]) == 1
    assert "holds the model that is to be exported" in capsys.readouterr().err
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    assert main(["export", str(llama), "--out", str(precious), "--overwrite"]) == 1
    assert "holds no exported model, and is not replaced" in capsys.readouterr().err
    (precious / "config.json").touch()
    for other in ("processor.json", "notes"):  # a model from training; a folder
        (precious / other).mkdir()
        assert main(["export", str(llama), "--out", str(precious), "--overwrite"]) == 1
        assert "holds no exported model, and is not replaced" in capsys.readouterr().err
        (precious / other).rmdir()
    monkeypatch.chdir(precious)
    assert main(["export", str(llama), "--out", ".", "--overwrite"]) == 1
    assert capsys.readouterr().err.startswith("mm-gpt: error: .: the folder that you are in")
    (tmp_path / "link").symlink_to("out")
    assert main(["export", str(llama), "--out", str(tmp_path / "link"), "--overwrite"]) == 0
    assert (tmp_path / "link").readlink() == Path("out")
    (tmp_path / "link").unlink()
    capsys.readouterr()
    assert main(["export", str(llama), "--out", str(precious / "thesis.txt")]) == 1
    assert main(["export", str(llama), "--out", str(precious / "thesis.txt/x")]) == 1
    assert main(["export", str(llama), "--format", "ggfu", "--out", str(out)]) == 1
    assert "unknown format 'ggfu'; did you mean 'gguf'?" in capsys.readouterr().err
    assert main(["export", str(llama), "--dtype", "q8_0", "--out", str(out)]) == 1
    assert "format hf: unknown dtype 'q8_0'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


@pytest.mark.parametrize(
    ("format", "name", "spare"),
    [("hf", "model.safetensors", 0), ("hf", "tokenizer.json", 0), ("gguf", "model-float16.gguf", 8000)],
)
def test_a_full_disk(format: str, name: str, spare: int, llama: Path, tmp_path: Path) -> None:
    """One line that names the file, where it was to stand; no half of it, and what was there before stays.

    A limit on the size of files stands for the disk: a byte less than the file needs, and `spare` bytes less."""
    out = tmp_path / "out"
    export_model(llama, out, format=format)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) - 1 - spare, hard))
    try:
        message = rf"out/{re.escape(name)}: cannot be written \((.*[Ff]ile too large|is the disk full\? )"
        with pytest.raises(MMGPTError, match=message) as error:
            export_model(llama, out, format=format, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert ".tmp" not in str(error.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted(error: type[BaseException], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays, and no half folder is left."""
    out = tmp_path / "out"
    export_model(llama, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(export_folder, "write_weights", stop)
    with pytest.raises((KeyboardInterrupt, MMGPTError)):
        export_model(llama, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- GGUF ----

GGUFS = [name for name, (kind, _) in DECODERS.items() if kind in ("llama", "qwen2", "qwen3", "gpt2")]


@pytest.mark.parametrize("name", [n for n in GGUFS if n not in ("llama 3", "qwen2 with windows", "gpt2 untied")])
def test_gguf_is_read_back(name: str, tmp_path: Path) -> None:
    """By ourselves and by transformers: the order of rotary pairs, fused and split matrices, padded ids."""
    kind, values = DECODERS[name]
    model, processor = make_text(values)
    out = tmp_path / "out"
    export_model(saved(tmp_path / "ours", (model, processor)), out, format="gguf")
    path = out / "model-float16.gguf"
    decoder, fields = load_gguf(path)
    assert fields["general.architecture"] == kind
    ids = torch.arange(model.decoder.config.vocab_size)[None, -60:]
    expected = ours(model, ids)
    torch.testing.assert_close(ours(MMGPT(ModelConfig(decoder=decoder.config), decoder.eval()), ids), expected, **CLOSE)
    if name not in ("llama with biases, stretched", "qwen3"):  # its reader drops both, and takes 128 as the head size
        other = theirs(out, gguf_file=path.name)
        with torch.no_grad():
            torch.testing.assert_close(other(ids).logits, expected, **CLOSE)
    again = read_tokenizer(fields)
    for text in ("<|im_start|>user\nA red circle 12?<|im_end|>", "é\n\n x"):
        assert again.encode(text, allow_special=True) == processor.tokenizer.encode(text, allow_special=True)
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{model.decoder.config.vocab_size - 1}]"
    special = processor.tokenizer.special
    assert fields["tokenizer.ggml.eos_token_id"] == special["<|im_end|>"]
    assert fields["tokenizer.ggml.eot_token_id"] == fields["tokenizer.ggml.bos_token_id"] == special["<|endoftext|>"]
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert "<|im_start|>" in fields["tokenizer.chat_template"]


def test_gguf_of_llama_3_has_its_frequencies(tmp_path: Path) -> None:
    """The file has no key for this scaling, but a factor for each pair."""
    pair = make_text(DECODERS["llama 3"][1])
    export_model(saved(tmp_path / "ours", pair), tmp_path / "out", format="gguf")
    factors = read_gguf(tmp_path / "out/model-float16.gguf").tensors["rope_freqs.weight"]
    here = (torch.float32, torch.device("cpu"))
    plain, stretched = (rotary_frequencies(8, 5e5, scaling, *here) for scaling in (None, LLAMA3))
    assert 1 < factors.data.max() <= 4
    torch.testing.assert_close(plain / torch.from_numpy(np.array(factors.data)), stretched, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
def test_gguf_types(dtype: str, llama: Path, tmp_path: Path) -> None:
    export_model(llama, tmp_path / "out", format="gguf", dtype=dtype)
    tensors = read_gguf(tmp_path / f"out/model-{dtype}.gguf").tensors
    stored = {name: tensor.kind.name for name, tensor in tensors.items()}
    kind = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert {stored["token_embd.weight"], stored["blk.1.ffn_down.weight"]} == {kind}
    assert stored["blk.1.attn_norm.weight"] == "F32"
    decoder, _ = load_gguf(tmp_path / f"out/model-{dtype}.gguf")
    ids = torch.arange(20)[None]
    expected = ours(load_model(llama)[0], ids)
    got = ours(MMGPT(ModelConfig(decoder=decoder.config), decoder.eval()), ids)
    # 8 bits of a mantissa are lost in bfloat16, and as many of each block's largest value in Q8_0.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if dtype == "float32" else 0.2 * expected.std().item())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistral", "attention ('local',) has no counterpart in GGUF"),
        ("qwen2 with windows", "has no counterpart in GGUF, where all layers are dense"),
        ("gpt2 untied", "activation 'relu' has no counterpart in GGUF's gpt2: 'gelu_tanh'"),
        ("gemma", "gemma decoders are not written as GGUF, only llama, qwen2, qwen3, gpt2"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(name: str, message: str, tmp_path: Path) -> None:
    """The file has no room for any of this, so that it would load and be wrong."""
    folder = saved(tmp_path / "ours", make_text(DECODERS[name][1]))
    with pytest.raises(CheckpointError) as error:
        export_model(folder, tmp_path / "out", format="gguf")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_splits_have_names() -> None:
    """llama.cpp knows the split before BPE by name: a wrong one splits numbers in another way, and nothing else."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    patterns = {
        # As Qwen 2 and Llama 3 publish them
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    for name, pattern in patterns.items():
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        assert pre_tokenizer_name(backend) == name
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(backend) == "gpt-2"
    assert pre_tokenizer_name(make_tokenizer().backend) == "smollm"
    for other in (pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Whitespace(), None):
        if other is not None:
            backend.pre_tokenizer = other
        else:
            backend = Backend(models.BPE())
        with pytest.raises(CheckpointError, match="the tokenizer splits text otherwise than GGUF's"):
            pre_tokenizer_name(backend)


# ---- Whole models ----


def reference(kind: str, folder: Path) -> tuple[list[list[Message]], Any]:
    """Writes a tiny model of a public family; gives conversations, and what a processor of theirs makes of one."""
    import test_family_gemma3 as gemma3
    import test_family_idefics3 as idefics3
    import test_family_llava as llava
    import test_family_paligemma as paligemma

    folder.mkdir()
    if kind == "paligemma":
        gemma = paligemma.make_theirs(folder, "gemma2", query_pre_attn_scalar=16, final_logit_softcapping=3.0)
        cases = {id(chat): case for chat, case in zip(paligemma.CHATS, paligemma.CASES, strict=True)}
        return (
            paligemma.CHATS[1:],
            lambda chat, processor: gemma._replace(processor=processor).inputs(*cases[id(chat)]),
        )
    if kind == "gemma3":
        seeing = gemma3.make_theirs(folder)
        return gemma3.CHATS, lambda chat, processor: seeing._replace(processor=processor).inputs(chat)
    if kind in ("idefics3", "smolvlm"):
        theirs = idefics3.make_theirs(folder, kind, idefics3.MARKS if kind == "idefics3" else [])
        return idefics3.CHATS, lambda chat, processor: theirs._replace(processor=processor).inputs(chat)
    model, processor = llava.make_reference(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return llava.CHATS, lambda chat, processor: llava.Case(kind, folder, model, processor).inputs(chat)


KINDS = ["llava", "llava_interleave", "llava_next", "llava_onevision", "idefics3", "smolvlm", "paligemma", "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_in_transformers(kind: str, tmp_path: Path) -> None:
    """A public model, taken over, saved in our layout and exported: the same ids, pixels and logits as before."""
    import transformers as tf

    chats, inputs = reference(kind, tmp_path / "public")
    (tmp_path / "ours").mkdir()
    save_model(*load_model(tmp_path / "public"), tmp_path / "ours")  # matrices in half precision from here on
    out = tmp_path / "out"
    export_model(tmp_path / "ours", out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, report = tf.AutoModelForImageTextToText.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        processor = tf.AutoProcessor.from_pretrained(out)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    other.eval()
    mine = load_model(tmp_path / "ours")
    before = tf.AutoProcessor.from_pretrained(tmp_path / "public")
    for chat, logits in zip(chats, logits_of(*mine, chats), strict=True):
        given, old = inputs(chat, processor), inputs(chat, before)
        assert given.keys() == old.keys()
        assert all(torch.equal(given[name], old[name]) for name in given if given[name] is not None)
        with torch.inference_mode():
            expected = other(**given).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, **CLOSE)
    again = load_model(out)
    assert again[0].config == mine[0].config
    for one, two in zip(logits_of(*again, chats), logits_of(*mine, chats), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


TOWER = ViTConfig(
    image_size=IMAGE_SIZE,
    patch_size=16,
    width=24,
    num_layers=3,
    num_heads=3,
    mlp_width=40,
    activation="gelu_tanh",
    feature_layer=-1,
    post_norm=False,
)
SEEN: list[list[Message]] = [
    [user("What is red?")],
    [user(make_picture(1), "What is it, é?")],
    [user("First ", make_picture(2), " then", make_picture(3, (21, 50)), "?")],
]


def make_seeing(
    *, spare: int = 0, tower: ViTConfig = TOWER, connector: str = "mlp", **decoder: Any
) -> tuple[MMGPT, Processor]:
    """A model of ours, with image marks behind the vocabulary, and a tower that public models have."""
    _, processor = make_text(LLAMA, spare=spare)
    torch.manual_seed(0)
    model = MMGPT(
        ModelConfig(
            decoder=DecoderConfig(vocab_size=processor.vocab_size, **LLAMA | decoder),
            vision=VisionConfig(model=tower, image_size=IMAGE_SIZE),
            connector=ConnectorConfig(kind=connector),  # type: ignore[arg-type]
        )
    ).eval()
    roughened(model)
    image = ImageTransformConfig(size=IMAGE_SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), backend="torchvision")
    config = ProcessorConfig(image=image, tokens_per_image=model.tokens_per_image, max_length=128)
    return model, Processor(processor.tokenizer, config, vocab_size=processor.vocab_size)


@pytest.mark.parametrize(
    ("spare", "decoder"),
    [(0, {"tie_embeddings": False}), (2, {}), (9, {"qkv_bias": True})],
    ids=["untied", "tied", "padded"],
)
def test_marks_behind_the_vocabulary_go_inside(spare: int, decoder: dict[str, Any], tmp_path: Path) -> None:
    """Their ids are special tokens afterwards; the logits of all others stay, and they are never generated."""
    import transformers as tf

    model, processor = make_seeing(spare=spare, **decoder)
    export_model(saved(tmp_path / "ours", (model, processor)), tmp_path / "out")
    other = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    theirs_processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    known = processor.tokenizer.vocab_size
    assert other.config.text_config.vocab_size == max(known + 3, known + spare)
    inside = {known + spare + place: known + place for place in range(3)}  # our id -> the exported one
    for chat, logits in zip(SEEN, logits_of(model, processor, SEEN), strict=True):
        messages = [{"role": "user", "content": [as_part(part) for part in chat[0]["content"]]}]
        given = theirs_processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        example = processor(processor.chat(chat))
        assert given["input_ids"][0].tolist() == [inside.get(id, id) for id in example.input_ids.tolist()]
        with torch.inference_mode():
            expected = other(**given).logits[0]
            written = other.generate(**given, do_sample=False, max_new_tokens=8)[0, len(logits) :]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits[:, :known], expected[:, :known], **CLOSE)
        assert not set(written.tolist()) & set(inside.values())
        if example.images:
            assert torch.equal(processor.pixels([example]), given["pixel_values"])
    again = load_model(tmp_path / "out")
    for one, two in zip(logits_of(*again, SEEN), logits_of(model, processor, SEEN), strict=True):
        torch.testing.assert_close(one[:, :known], two[:, :known], **CLOSE)


def as_part(part: Any) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def test_structures_that_no_family_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with what is in the way, and without its eyes the decoder goes all the same."""
    cases = [
        (make_tiny(), "vision encoder 'timm/test_vit' has no counterpart"),
        (
            make_seeing(tower=dataclasses.replace(TOWER, post_norm=True)),
            "vision.post_norm True has no counterpart in llava",
        ),
        (make_seeing(connector="resampler"), "connector 'resampler' has no counterpart"),
        (make_seeing(connector="pixel_shuffle"), "begin and end marks of images have no counterpart"),
        (make_seeing(positions="xpos"), "the closest one, llama, lacks positions 'xpos'"),
        (make_seeing(**GPT2), "lacks norm 'layer'"),
    ]
    for number, (pair, message) in enumerate(cases):
        folder = saved(tmp_path / str(number), pair)
        assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 1
        assert message in (told := capsys.readouterr().err)
        assert "--decoder-only exports the language model alone" in told or "lacks" in told
        assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "0"), "--out", str(tmp_path / "out"), "--decoder-only"]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tmp_path / "out")(ids).logits, ours(load_model(tmp_path / "0")[0], ids), **CLOSE
        )


# ---- mmproj ----


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_mmproj(kind: str, tmp_path: Path) -> None:
    """Every key and tensor that llama.cpp's clip.cpp looks for, by name and shape, with its values."""
    reference(kind, tmp_path / "public")
    model, processor = load_model(tmp_path / "public")
    if kind == "llava":  # its vocabulary is SentencePiece's, which is not written
        with pytest.raises(CheckpointError, match="the tokenizer splits text otherwise"):
            export_model(tmp_path / "public", tmp_path / "out", format="gguf")
        (tmp_path / "out").mkdir()
        mmproj.write_mmproj(model, processor, tmp_path / "out/mmproj-float32.gguf", dtype="float32")
    else:
        export_model(tmp_path / "public", tmp_path / "out", format="gguf", dtype="float32")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-float32.gguf", "mmproj-float32.gguf"}
    reader = read_gguf(tmp_path / "out/mmproj-float32.gguf")
    fields = reader.fields
    assert model.config.vision is not None
    tower = model.config.vision.model
    assert isinstance(tower, ViTConfig)
    is_llava = kind == "llava"
    expected: dict[str, Any] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 0,
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp" if is_llava else "idefics3",
        "clip.use_gelu": not is_llava,  # CLIP's is QuickGELU, which llama.cpp takes where nothing is said
        "clip.vision.image_size": tower.image_size,
        "clip.vision.patch_size": tower.patch_size,
        "clip.vision.embedding_length": tower.width,
        "clip.vision.feed_forward_length": tower.mlp_width,
        "clip.vision.block_count": 2,  # LLaVA's tower has three, of which the last is not run
        "clip.vision.attention.head_count": tower.num_heads,
        "clip.vision.projection_dim": model.decoder.config.width,
        "clip.vision.attention.layer_norm_epsilon": np.float32(tower.norm_eps),
        "clip.vision.image_mean": [float(np.float32(mean)) for mean in processor.config.image.mean],  # type: ignore[union-attr]
        "clip.vision.image_std": [float(np.float32(std)) for std in processor.config.image.std],  # type: ignore[union-attr]
    }
    if is_llava:
        expected["clip.vision.feature_layer"] = [2]
    else:
        expected |= {"clip.vision.projector.scale_factor": 2, "clip.vision.preproc_image_size": 56}
    assert {name: fields[name] for name in expected} == expected
    assert {name for name in fields if name.startswith("clip.")} <= set(expected)

    width, wide = tower.width, tower.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (width, 3, tower.patch_size, tower.patch_size),
        "v.position_embd.weight": (tower.num_patches + is_llava, width),
    }
    norms = [f"v.blk.{layer}.ln{number}" for layer in range(2) for number in (1, 2)]
    norms.append("v.pre_ln" if is_llava else "v.post_ln")
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            shapes |= {f"v.blk.{layer}.{name}.weight": (width, width), f"v.blk.{layer}.{name}.bias": (width,)}
        shapes |= {f"v.blk.{layer}.ffn_up.weight": (wide, width), f"v.blk.{layer}.ffn_up.bias": (wide,)}
        shapes |= {f"v.blk.{layer}.ffn_down.weight": (width, wide), f"v.blk.{layer}.ffn_down.bias": (width,)}
    if is_llava:
        shapes["v.class_embd"] = (width,)
        shapes |= {"mm.0.weight": (32, width), "mm.0.bias": (32,), "mm.2.weight": (32, 32), "mm.2.bias": (32,)}
    else:
        shapes |= {"v.patch_embd.bias": (width,), "mm.model.fc.weight": (32, 4 * width)}
    tensors = {name: tensor.data for name, tensor in reader.tensors.items()}
    assert {name: data.shape for name, data in tensors.items()} == shapes
    state = model.vision.state_dict()  # type: ignore[union-attr]
    q, _, v = state["tower.blocks.1.attention.qkv.weight"].chunk(3)
    for name, tensor in {
        "v.blk.1.attn_q.weight": q,
        "v.blk.1.attn_v.weight": v,
        "v.blk.0.ffn_up.bias": state["tower.blocks.0.mlp.up.bias"],
        "v.position_embd.weight": state["tower.position_embedding"],
    }.items():
        assert np.array_equal(tensors[name], tensor.numpy())


def test_what_mmproj_cannot_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where the answer would be another one; told where only pixels differ a little."""
    for number, (pair, message) in enumerate(
        [
            (make_tiny(), "vision encoder 'timm/test_vit' has no counterpart in llama.cpp"),
            (make_seeing(), "begin and end marks of images behind the vocabulary has no counterpart in llama.cpp"),
            (make_seeing(connector="linear"), "connector 'linear' has no counterpart in llama.cpp"),
        ]
    ):
        folder = saved(tmp_path / str(number), pair)
        assert main(["export", str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
        assert (
            main(
                ["export", str(folder), "--format", "gguf", "--out", str(tmp_path / f"{number}-text"), "--decoder-only"]
            )
            == 0
        )
    cropped = ImageTransformConfig(size=30, mode="crop")
    assert mmproj.differences(TOWER, ConnectorConfig(kind="mlp"), cropped) == [
        "the projector's GELU is computed by its tanh approximation",
        "images are padded, with bicubic interpolation, not 'crop', 'bicubic'",
    ]
    clip = dataclasses.replace(TOWER, class_token=True)
    assert "class token" in mmproj.differences(clip, ConnectorConfig(kind="mlp"), cropped)[0]
    lanczos = ImageTransformConfig(size=30, interpolation="lanczos")
    assert mmproj.differences(TOWER, ConnectorConfig(kind="pixel_shuffle"), lanczos) == []


def test_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands and the code of docs/export.md, with a small model of a public structure in the place of theirs."""
    text = (Path(__file__).parent.parent / "docs/export.md").read_text()
    saved(tmp_path / "runs/finetune/best", make_seeing())
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
    (code,) = re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, "docs/export.md", "exec"), {})
    assert (tmp_path / "exported-gguf/model-q8_0.gguf").exists()
