"""`dtype`: every kind of checkpoint, kept in every way, against itself in float32."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import make_tiny, make_tokenizer
from safetensors.torch import load_file, save_file
from test_decoder import hf_llama, write_gguf
from torch import Tensor

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub import packing as packing_module
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.gguf.reader import load_gguf
from mm_gpt.hub.packing import packing_of, parts_of, places
from mm_gpt.inference import assistant as assistant_module
from mm_gpt.inference.assistant import load
from mm_gpt.kernels.formats import quantize
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT

PACKED = {"bf16": 2e-3, "int8": 7e-3, "int4": 0.09}
"""Relative error of the weights."""
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def packed_weights(decoder: Decoder) -> dict[str, Tensor]:
    return {name: torch.cat([p.values(0, p.rows) for p in parts_of(place)]) for name, place in places(decoder)}


def kinds(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    return {name: tuple(part.kind for part in parts_of(place)) for name, place in places(decoder)}


@torch.inference_mode()
def logits(decoder: Decoder) -> Tensor:
    ids = torch.arange(24).view(2, 12) % decoder.config.vocab_size
    return decoder.logits(decoder(decoder.embed(ids), torch.arange(12).expand(2, -1)))


def check(packed: Decoder, plain: Decoder, error: float) -> None:
    """The packed weights are those of the plain decoder up to `error`, its other parameters the same, and so the
    logits are close."""
    expected = dict(plain.named_parameters())
    weights = packed_weights(packed)
    linear = {n for n, p in expected.items() if p.dim() == 2 and not n.startswith("position") and "_bias" not in n}
    assert weights.keys() == linear
    for name, weight in weights.items():
        assert (weight - expected[name]).norm() <= error * expected[name].norm(), name
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
    wanted = logits(plain)
    # Where the processor multiplies bfloat16, activations are rounded to it in each product
    assert (logits(packed) - wanted).norm() <= max(6 * error, 0.03) * wanted.norm()
    assert torch.isfinite(logits(packed)).all()


def hf_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **values: Any) -> Path:
    tokenizer = make_tokenizer()
    ids = {"vocab_size": tokenizer.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    sizes = GPT2 if kind == "gpt2" else SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
    name = {"gpt2": "GPT2", "llama": "Llama", "gemma2": "Gemma2", "qwen3": "Qwen3"}[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{'LMHeadModel' if kind == 'gpt2' else 'ForCausalLM'}")(
        getattr(transformers, f"{name}Config")(**ids, **sizes, **values)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


@pytest.mark.parametrize("dtype", sorted(PACKED))
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),  # matrices are stored transposed
        ("gemma2", {"head_dim": 16}),  # norms are stored as distances from one
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_hugging_face_folders(tmp_path: Path, kind: str, values: dict[str, Any], dtype: str) -> None:
    folder = hf_folder(tmp_path, kind, **values)
    plain, _ = load_model(folder)
    packed, _ = load_model(folder, decoder_dtype=dtype)
    check(packed.decoder, plain.decoder, PACKED[dtype])
    ends = kinds(packed.decoder)["embedding.weight"]
    assert ends == {"bf16": ("BF16",), "int8": ("Q8_0",), "int4": ("Q8_0",)}[dtype]


def test_bfloat16_files_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor multiplies it; elsewhere they are expanded, as they were before."""
    folder = hf_folder(tmp_path, "llama", torch.bfloat16)
    plain, _ = load_model(folder)
    monkeypatch.setattr(packing_module, "multiplies_bf16", lambda: True)
    packed, _ = load_model(folder, decoder_dtype="auto")
    check(packed.decoder, plain.decoder, 0)
    assert set(kinds(packed.decoder)["blocks.0.attention.qkv.weight"]) == {"BF16"}
    monkeypatch.setattr(packing_module, "multiplies_bf16", lambda: False)
    assert not load_model(folder, decoder_dtype="auto")[0].decoder.packed_head


@pytest.mark.parametrize(
    ("stored", "updated", "multiplies", "expected"),
    [
        ({"F32"}, False, True, None),
        ({"F32", "BF16"}, False, True, None),
        ({"BF16"}, False, True, "bf16"),
        ({"F16"}, True, True, "bf16"),
        ({"BF16"}, False, False, None),
        ({"Q4_K", "Q6_K", "F32"}, False, False, "stored"),
        ({"Q4_1", "Q8_0"}, True, False, "int8"),
    ],
)
def test_auto(
    stored: set[str], updated: bool, multiplies: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "multiplies_bf16", lambda: multiplies)
    wanted = None if expected is None else packing_module.PACKINGS[expected]
    assert packing_of("auto", stored, updated=updated) is wanted


# ---- our own folders ----


def own_folder(folder: Path, *, lora: bool, width: int = 64) -> Path:
    tiny, processor = make_tiny()
    config = dataclasses.replace(
        tiny.config, decoder=dataclasses.replace(tiny.decoder.config, width=width, head_size=16, mlp_width=96)
    )
    torch.manual_seed(0)
    model = MMGPT(config)
    if lora:
        model.add_lora(LoRAConfig(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir()
    save_model(model, processor, folder)
    return folder


@pytest.mark.parametrize("dtype", sorted(PACKED))
@pytest.mark.parametrize("lora", [False, True])
def test_our_folders(tmp_path: Path, lora: bool, dtype: str) -> None:
    folder = own_folder(tmp_path / "model", lora=lora)
    plain, _ = load_model(folder)
    plain.merge_lora()
    packed, _ = load_model(folder, decoder_dtype=dtype)
    assert (packed.config.lora is not None) == lora
    check(packed.decoder, plain.decoder, PACKED[dtype])
    assert packed.vision is not None
    assert plain.vision is not None
    for ours, theirs in zip(packed.vision.parameters(), plain.vision.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_above_another(tmp_path: Path) -> None:
    """Both have low-rank updates: those of the lower one are added exactly before anything is rounded."""
    below = own_folder(tmp_path / "below", lora=True)
    model, processor = load_model(below)
    model.merge_lora()
    above = MMGPT(
        dataclasses.replace(model.config, decoder=str(below), lora=LoRAConfig(rank=2, alpha=4)), model.decoder
    )
    with torch.no_grad():
        for name, parameter in above.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "above").mkdir()
    save_model(above, processor, tmp_path / "above")
    plain, _ = load_model(tmp_path / "above")
    plain.merge_lora()
    packed, _ = load_model(tmp_path / "above", decoder_dtype="int8")
    check(packed.decoder, plain.decoder, PACKED["int8"])


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    """48 is no multiple of 32: bfloat16, which is better than what was asked for, as GGUF files have float16 there."""
    packed, _ = load_model(own_folder(tmp_path / "model", lora=False, width=48), decoder_dtype="int8")
    found = kinds(packed.decoder)
    assert found["blocks.0.mlp.gate_up.weight"] == ("BF16",)
    assert found["blocks.0.mlp.down.weight"] == ("Q8_0",)


def test_answers(tmp_path: Path) -> None:
    """The whole door, with a picture: prompts, steps, beams and log-probabilities."""
    folder = own_folder(tmp_path / "model", lora=True)
    for dtype in ("fp32", "int8"):
        model = load(folder, device="cpu", dtype=dtype)
        answer = model.ask(np.zeros((8, 8, 3), np.uint8), "What?", max_new_tokens=3, logprobs=True)
        assert answer.logprobs is not None
        assert model.ask(None, "What?", max_new_tokens=2, num_beams=2).completion_tokens >= 1
        assert model.token_logprobs("a red", " circle").isfinite().all()
        if dtype == "int8":
            with pytest.raises(CheckpointError, match="a packed decoder is not saved; load the model with dtype fp32"):
                save_model(model.model, model.processor, tmp_path)


def test_loss_of_packed_decoders(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "model", lora=False)
    hidden, labels = torch.randn(2, 5, 64), torch.tensor([[3, -100, 5, 1, -100], [7, 8, 9, -100, 2]])
    found = []
    for dtype in ("fp32", "int8"):
        decoder = load_model(folder, decoder_dtype=dtype)[0].decoder
        with torch.no_grad():
            nats, count = decoder.loss(hidden, labels)
        assert count == 7
        found.append(float(nats))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


# ---- GGUF ----


def rewritten(path: Path, out: Path, kind_of: Callable[[str], str | None]) -> Path:
    """A GGUF file with its matrices stored in other ways; None leaves one as it is."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        kind = kind_of(tensor.name) if tensor.data.ndim > 1 else None
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            known = kind in packing_module.FORMATS
            data = quantize(tensor.data, kind) if known else np.zeros((len(tensor.data), 84), np.uint8)
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def mixed(name: str) -> str:
    """As published files are: q and k in one kind, v in another."""
    endings = {"attn_q.weight": "Q4_K", "attn_k.weight": "Q4_K", "attn_v.weight": "Q6_K", "ffn_gate.weight": "Q5_K"}
    ends = {"token_embd.weight": "Q6_K", "output.weight": "Q8_0"}
    return ends.get(name) or next((kind for end, kind in endings.items() if name.endswith(end)), "Q5_0")


@pytest.fixture(scope="module")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, and wide enough for K blocks."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write_gguf(path, hf_llama(hidden_size=256, intermediate_size=256, attention_bias=True))
    return path


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q4_K", "Q5_K", "Q6_K", None])
def test_gguf_blocks_are_used_as_they_are(llama_gguf: Path, tmp_path: Path, kind: str | None) -> None:
    """Bit for bit what expanding gives, in the order of our heads; None: q, k and v of different kinds."""
    path = rewritten(llama_gguf, tmp_path / "b.gguf", mixed if kind is None else lambda name: kind)
    plain, _ = load_gguf(path)
    packed, _ = load_gguf(path, "auto")
    check(packed, plain, 0)
    for name, weight in packed_weights(packed).items():
        assert torch.equal(weight, plain.get_parameter(name)), name
    wanted = ("Q4_K", "Q4_K", "Q6_K") if kind is None else (kind,) * 3
    assert kinds(packed)["blocks.0.attention.qkv.weight"] == wanted


@pytest.mark.parametrize("dtype", sorted(PACKED))
def test_gguf_in_another_dtype(llama_gguf: Path, tmp_path: Path, dtype: str) -> None:
    path = rewritten(llama_gguf, tmp_path / "b.gguf", mixed)
    plain, _ = load_gguf(path)
    packed, _ = load_gguf(path, dtype)
    check(packed, plain, PACKED[dtype])
    if dtype == "int4":  # what has 4 bits keeps them
        assert kinds(packed)["blocks.0.attention.qkv.weight"] == ("Q4_K", "Q4_K", "Q4_1")


def test_gguf_in_float32_stays_so(llama_gguf: Path) -> None:
    decoder, _ = load_gguf(llama_gguf, "auto")
    assert not decoder.packed_head


def test_gguf_types_that_are_not_supported(llama_gguf: Path, tmp_path: Path) -> None:
    path = rewritten(llama_gguf, tmp_path / "b.gguf", lambda name: "Q2_K" if name == "blk.1.attn_v.weight" else "Q8_0")
    expected = r"b\.gguf: tensor blk\.1\.attn_v\.weight is stored as Q2_K, which is not multiplied here"
    with pytest.raises(CheckpointError, match=expected):
        load_gguf(path, "auto")
    assert load_gguf(path, "fp32")[0].get_parameter("blocks.1.attention.qkv.weight")[-1].count_nonzero() == 0


def test_missing_and_misshaped_tensors(tmp_path: Path) -> None:
    """No table may be left without its values."""
    model = hf_llama(hidden_size=256, intermediate_size=256)
    for name in ("token_embd.weight", "blk.1.ffn_up.weight", "blk.0.attn_k.weight"):
        write_gguf(tmp_path / "a.gguf", model, leave_out=name)
        rewritten(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda _: "Q8_0")
        with pytest.raises(CheckpointError, match=rf"lacks 1 tensor \({name}\)"):
            load_gguf(tmp_path / "b.gguf", "auto")
    folder = hf_folder(tmp_path / "hf", "llama")
    state = load_file(folder / "model.safetensors")

    def broken(changes: dict[str, Tensor | None]) -> str:
        changed = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load_model(folder, decoder_dtype="int8")
        return str(caught.value)

    layer = "model.layers.1.self_attn."
    assert f"lacks 1 tensor ({layer}v_proj.weight)" in broken({f"{layer}v_proj.weight": None})
    assert "has 1 tensor (model.more) left over" in broken({"model.more": torch.zeros(3)})
    assert f"{layer}v_proj.weight have 112 rows, not 128" in broken({f"{layer}v_proj.weight": torch.zeros(16, 64)})
    assert "o_proj.weight has shape (64, 32), not (64, 64)" in broken({f"{layer}o_proj.weight": torch.zeros(64, 32)})
    assert "which is no matrix's" in broken({f"{layer}o_proj.weight": torch.zeros(64)})


def test_values_without_room(tmp_path: Path) -> None:
    """Scales are of half precision: what overflows them is named, not stored as infinity."""
    folder = hf_folder(tmp_path, "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = -1e6
    save_file(state, folder / "model.safetensors")
    assert torch.isfinite(logits(load_model(folder, decoder_dtype="int8")[0].decoder)).all()
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.mlp\.down\.weight has the value 1e\+06, which Q4_1 has no room for"
    ):
        load_model(folder, decoder_dtype="int4")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down\.weight has the value nan"):
        load_model(folder, decoder_dtype="bf16")


# ---- doors ----


def test_dtypes_that_are_not_there(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "-m", str(tiny_model_folder), "--dtype", "int9", "What?"]) == 1
    assert "unknown dtype 'int9'; did you mean 'int8'? (known: auto, bf16, fp32, int4, int8)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown dtype 'float16'"):
        mm_gpt.load(tiny_model_folder, dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_on_a_gpu(dtype: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant_module, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match=f"dtype {dtype} is for the CPU; on cuda weights are bf16 or fp32"):
        load(tiny_model_folder, dtype=dtype)


def peak_memory(lines: Iterable[str]) -> int:
    """The peak of a fresh process, in MB."""
    code = "\n".join((*lines, "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_no_second_copy(tmp_path: Path) -> None:
    """A checkpoint of 130 MB in float32 takes the memory of its blocks, and little more while it is loaded."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    hf_folder(tmp_path, "llama")
    config = transformers.LlamaConfig.from_pretrained(tmp_path, **sizes, num_attention_heads=16, num_key_value_heads=4)
    config.head_dim = 64
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert stored > 100
    load = f"from mm_gpt.hub.checkpoint import load_model; kept = load_model({str(tmp_path)!r}, decoder_dtype="
    # What is imported and compiled besides is there with the smallest model, too
    small = hf_folder(tmp_path / "small", "llama")
    base = {d: peak_memory([load.replace(str(tmp_path), str(small)) + f"{d!r})"]) for d in ("int8", "int4")}
    for dtype, bits in (("int8", 8.5), ("int4", 5.0)):
        extra = peak_memory([load + f"{dtype!r})"]) - base[dtype]
        assert extra <= stored * bits / 32 + 25, dtype
