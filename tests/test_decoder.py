"""The decoder: parity with transformers for its file formats, the cache, causality, initial weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from gguf import GGMLQuantizationType, GGUFWriter, quants
from torch import Tensor

from mm_gpt.errors import CheckpointError, ContextOverflowError, DownloadError
from mm_gpt.hub.decoders import decoder_config, decoder_table, tied_left_over
from mm_gpt.hub.gguf import reader as gguf
from mm_gpt.hub.gguf.file import read_gguf
from mm_gpt.hub.weights import Checkpoint, read_json
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

IDS = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))


def small_decoder(**changes: Any) -> Decoder:
    values: dict[str, Any] = {
        "vocab_size": 100,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 8,
        "mlp_width": 48,
        "max_length": 64,
    }
    decoder = Decoder(DecoderConfig(**(values | changes)))
    init_weights(decoder, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    return decoder.eval()


def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    with torch.no_grad():
        return decoder.logits(decoder(decoder.embed(ids), positions))


# ---- Hugging Face folders ----


def load_hf_folder(folder: Path) -> Decoder:
    values = read_json(folder / "config.json")
    with torch.device("meta"):
        decoder = Decoder(decoder_config(values, f"{folder}/config.json"))
    checkpoint = Checkpoint(folder)
    checkpoint.load(decoder, decoder_table(values["model_type"]))
    checkpoint.finish(tied_left_over(decoder.config))
    return decoder.eval()


def hf_llama(**changes: Any) -> Any:
    """A random LlamaForCausalLM whose every parameter matters, biases and norms included."""
    values: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(values | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-3},
    ],
    ids=["plain", "tied", "bias", "no GQA", "one kv head", "wide heads", "theta and eps"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_same_logits_as_transformers(tmp_path: Path, changes: dict[str, Any], sharded: bool) -> None:
    """A swapped gate and up, a forgotten bias, a wrong rotation or head order: all give plausible nonsense."""
    model = hf_llama(**changes)
    model.save_pretrained(tmp_path, **({"max_shard_size": "8KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    decoder = load_hf_folder(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(decoder, IDS), expected, rtol=0, atol=1e-5)


def test_half_precision_folders_become_float32(tmp_path: Path) -> None:
    """A decoder in bfloat16 under float32 connectors fails at the first matrix product, or trains in bfloat16."""
    hf_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = load_hf_folder(tmp_path)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert not any(p.is_meta for p in [*decoder.parameters(), *decoder.buffers()])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "unknown model type 'lama'; did you mean 'llama'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}},
            "rope scaling 'yarn' is not supported",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"hidden_act": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"intermediate_size": 40}, r"mlp\.gate_proj.*has shape|has shape"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors \(model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"has 9 tensors \(model\.layers\.1\..* left over"),
        ({"tie_word_embeddings": False, "attention_bias": True}, r"lacks .*k_proj\.bias"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A scaled rotation that is ignored gives a model that is only a little wrong, and only in long texts."""
    hf_llama().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises((CheckpointError, ValueError), match=message):
        load_hf_folder(tmp_path)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_hf_folder(tmp_path)
    hf_llama().save_pretrained(tmp_path)
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_hf_folder(tmp_path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": 3}, {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 3}}]
)
def test_hostile_shard_index(tmp_path: Path, index: dict[str, Any]) -> None:
    """An index may name files of its own folder only."""
    hf_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no weight_map of tensor names to files in this folder"):
        load_hf_folder(tmp_path)


def test_an_index_that_is_wrong_about_a_shard(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    path = tmp_path / "model.safetensors.index.json"
    files = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map=dict.fromkeys(files, files["model.norm.weight"]))
    with pytest.raises(CheckpointError, match="which the index says is here"):
        load_hf_folder(tmp_path)
    edit_json(path, weight_map=dict.fromkeys(files, "gone.safetensors"))
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        load_hf_folder(tmp_path)


# ---- GGUF ----


def interleave_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What gguf.cpp's converter does to queries and keys: rotary pairs (i, i + C/2) are put side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, *, architecture: str = "llama", leave_out: str = "", extra: str = "") -> None:
    """`model` as gguf.cpp's converter writes it."""
    config, state = model.config, {k: v.numpy() for k, v in model.state_dict().items()}
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    writer.add_token_types([3, *[1] * (config.vocab_size - 1)])
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    layer_names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(config.num_hidden_layers):
        for theirs, ours in layer_names.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{i}.{theirs}.{kind}"] = f"blk.{i}.{ours}.{kind}"
    for theirs, name in names.items():
        if theirs not in state or name == leave_out:
            continue
        weight = state[theirs]
        if "attn_q." in name:
            weight = interleave_pairs(weight, config.num_attention_heads)
        if "attn_k." in name:
            weight = interleave_pairs(weight, config.num_key_value_heads)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    if extra:
        writer.add_tensor(extra, np.zeros(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}])
def test_gguf_has_the_logits_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The order of rotary pairs: a model with q and k as stored still writes words, only worse ones."""
    model = hf_llama(**changes)
    write_gguf(tmp_path / "a.gguf", model)
    decoder, fields = gguf.load_gguf(tmp_path / "a.gguf")
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert decoder.config.norm_eps == 1e-6  # not the float32 nearest to it
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, IDS), model(IDS).logits, rtol=0, atol=1e-5)
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
        torch.testing.assert_close(logits_of(decoder, IDS), theirs(IDS).logits, rtol=0, atol=1e-5)


def test_gguf_with_biases(tmp_path: Path) -> None:
    """The biases of q and k are rotated as their weights are."""
    model = hf_llama(attention_bias=True)
    write_gguf(tmp_path / "a.gguf", model)
    decoder, _ = gguf.load_gguf(tmp_path / "a.gguf")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, IDS), model(IDS).logits, rtol=0, atol=1e-5)


def test_gguf_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    model = hf_llama()
    write_gguf(path, model, architecture="falcon")
    with pytest.raises(CheckpointError, match=r"a\.gguf: unknown general\.architecture 'falcon' \(known: gpt2"):
        gguf.load_gguf(path)
    write_gguf(path, model, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(blk\.1\.ffn_up\.weight\)"):
        gguf.load_gguf(path)
    write_gguf(path, model, extra="rope_freqs.weight")
    with pytest.raises(CheckpointError, match=r"has 1 tensor \(rope_freqs\.weight\) left over"):
        gguf.load_gguf(path)
    write_gguf(path, model)
    whole = path.read_bytes()
    for size in (0, 3, 30, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.gguf"):
            gguf.load_gguf(path)
    with pytest.raises(CheckpointError, match=r"gone\.gguf"):
        gguf.load_gguf(tmp_path / "gone.gguf")


def test_quantised_tensors_are_expanded(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    data = quants.quantize(weight, GGMLQuantizationType.Q8_0)
    writer.add_tensor("w", data, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(path).tensors["w"]
    assert np.abs(quants.dequantize(tensor.data, tensor.kind) - weight).max() < 0.02


@pytest.mark.slow
def test_the_real_decoder_has_the_logits_of_transformers() -> None:
    from mm_gpt.hub.fetching import download

    try:
        path = next(iter(download.fetch("smollm2-135m-instruct", progress=False).values()))
    except DownloadError as error:
        pytest.skip(f"the weights of SmolLM2 are out of reach: {error}")
    decoder, fields = gguf.load_gguf(path)
    model = transformers.LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital is Paris"
    ids = torch.tensor([gguf.read_tokenizer(fields).encode(text, allow_special=True)])
    # 1e-4: on texts that make no sense, float32 itself is that far from float64 after thirty layers.
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, ids), model(ids).logits, rtol=0, atol=1e-4)


# ---- the decoder itself ----


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "output_bias": True, "tie_embeddings": False}])
def test_cache_equals_no_cache(changes: dict[str, Any]) -> None:
    """In float64, so that only a real difference shows: token by token, and in pieces."""
    decoder = small_decoder(**changes).double()
    positions = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        x = decoder.embed(IDS)
        full = decoder(x, positions)
        cache = KVCache(decoder.config, 2, 20, dtype=torch.float64, device=torch.device("cpu"))
        pieces = [decoder(x[:, :9], positions[:, :9], cache=cache)]
        pieces += [decoder(x[:, t : t + 1], positions[:, t : t + 1], cache=cache) for t in range(9, 17)]
    assert full.dtype == torch.float64
    assert cache.length == 17
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-12)


def test_one_new_token_with_a_mask() -> None:
    """Grouped heads as queries of one key-value head: the mask must hold for each of them."""
    decoder = small_decoder().double()
    positions = torch.arange(5).expand(2, 5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        outputs = []
        for noise in (0.0, 1.0):
            cache = KVCache(decoder.config, 2, 6, dtype=torch.float64, device=torch.device("cpu"))
            x = decoder.embed(IDS[:, :5])
            x[:, 1] += noise * torch.randn(x[:, 1].shape, generator=generator, dtype=torch.float64)
            causal = torch.ones(5, 5, dtype=torch.bool).tril()
            causal[2:, 1] = False  # nobody after it sees position 1
            decoder(x, positions, mask=causal.expand(2, 1, 5, 5), cache=cache)
            keys = torch.tensor([True, False, True, True, True, True]).expand(2, 1, 1, 6)
            new = decoder.embed(IDS[:, 5:6])
            outputs.append(decoder(new, torch.full((2, 1), 5), mask=keys, cache=cache))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("at", [0, 8, 16])
def test_causality(at: int) -> None:
    """Noise at token t leaves everything before it bitwise equal. (Noise: a norm would remove a constant.)"""
    decoder = small_decoder()
    positions = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        x = decoder.embed(IDS)
        before = decoder(x, positions)
        x[:, at] += torch.randn(x[:, at].shape, generator=torch.Generator().manual_seed(3))
        after = decoder(x, positions)
    assert torch.equal(before[:, :at], after[:, :at])
    assert (before[:, at:] != after[:, at:]).any(dim=-1).all()


def test_rotary_positions_are_relative() -> None:
    """Moving a whole text changes nothing: what padding on the left relies on."""
    decoder = small_decoder().double()
    positions = torch.arange(17).expand(2, 17)
    with torch.no_grad():
        x = decoder.embed(IDS)
        torch.testing.assert_close(decoder(x, positions + 40), decoder(x, positions), rtol=0, atol=1e-12)


def test_select_rows() -> None:
    config = small_decoder().config
    cache = KVCache(config, 3, 4, dtype=torch.float32, device=torch.device("cpu"))
    cache.keys.copy_(torch.arange(3).view(1, 3, 1, 1, 1).expand_as(cache.keys))
    cache.select_rows(torch.tensor([2, 2, 0, 1]))
    assert cache.keys[0, :, 0, 0, 0].tolist() == [2, 2, 0, 1]
    assert cache.values.shape[1] == 4


def test_too_long() -> None:
    decoder = small_decoder()
    with pytest.raises(ContextOverflowError, match="65 tokens do not fit into the model's context of 64"):
        decoder(torch.zeros(1, 65, 32), torch.zeros(1, 65, dtype=torch.long))


def test_initial_weights() -> None:
    """GPT-2's: 0.02, residual projections smaller by the root of twice the layers, norms one, biases left alone."""
    config = tiny_config(400).decoder
    assert isinstance(config, DecoderConfig)
    values = vars(config) | {"width": 256, "num_heads": 4, "head_size": 64, "mlp_width": 512, "qkv_bias": True}
    decoder = Decoder(DecoderConfig(**values))
    init_weights(decoder, torch.Generator().manual_seed(0))
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2:
            expected = 0.02 / 6**0.5 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all()


def test_number_of_parameters_of_the_default_decoder() -> None:
    """SmolLM2-135M: 134,515,008, the embedding counted once."""
    with torch.device("meta"):
        decoder = Decoder(
            DecoderConfig(
                vocab_size=49152,
                width=576,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                head_size=64,
                mlp_width=1536,
                max_length=8192,
            )
        )
    assert sum(p.numel() for p in decoder.parameters()) == 134_515_008
