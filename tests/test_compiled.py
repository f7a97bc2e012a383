"""The compiled decoder against the torch decoder, for everything that a decoder can be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_gpt.errors import ConfigError
from mm_gpt.inference.compiled import CompiledDecoder, missing
from mm_gpt.kernels.formats import quantize
from mm_gpt.kernels.kv_blocks import BLOCK
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.packed import Matrix, PackedEmbedding, PackedLinear
from mm_gpt.model.positions import RopeScaling
from mm_gpt.model.presets import PRESETS

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "width": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 8,
    "mlp_width": 52,
    "max_length": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_length=32)},
    "gpt": {
        "norm": "layer",
        "positions": "learned",
        "position_offset": 2,
        "num_kv_heads": 4,
        "head_size": 10,
        "mlp_bias": True,
        "qkv_bias": True,
        "output_bias": True,
        "gated_mlp": False,
        "activation": "gelu_tanh",
        "tie_embeddings": False,
    },
    "gemma": {
        "norm_place": "both",
        "qk_norm": True,
        "activation": "gelu_tanh",
        "attention": ("dense", "local"),
        "window": 5,
        "local_rope_theta": 500.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        "attention_scale": 0.3,
        "attention_softcap": 2.0,
        "logit_softcap": 5.0,
        "embedding_scale": 3.0,
        "head_size": 32,
    },
    "magneto": {"norm": "layer", "sub_norm": True, "positions": "xpos", "activation": "gelu", "gated_mlp": False},
    "deepnorm": {"norm_place": "post", "residual_scale": 1.5, "positions": "sinusoidal", "activation": "relu"},
    "wide heads": {"num_heads": 7, "num_kv_heads": 1, "head_size": 80, "num_layers": 2},
    "sparse": {
        "attention": ("strided", "fixed", "strided_heads", "fixed_heads"),
        "stride": 7,
        "summary": 2,
        "num_layers": 4,
        "num_heads": 6,
        "num_kv_heads": 1,
    },
}


def make(seed: int = 0, **changes: Any) -> Decoder:
    """A decoder with weights so large that every option shows."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(**(SMALL | changes))).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise * 0.3 if parameter.dim() > 1 else 0.7 + noise * 0.5)
    return decoder


def run(compiled: CompiledDecoder, ids: Tensor, blocks: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states (T, D) and logits (T, V) of one row's ids (T,), token by token."""
    if blocks is None:
        blocks = [compiled.pool.allocate() for _ in range(len(ids) // BLOCK + 1)]
    steps = [compiled(ids[i : i + 1], torch.tensor([i]), torch.tensor([i]), [blocks]) for i in range(len(ids))]
    return torch.cat([hidden for hidden, _ in steps]), torch.cat([logits for _, logits in steps])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_torch_decoder(name: str) -> None:
    decoder = make(**CONFIGS[name])
    ids = torch.randint(0, 101, (40,))
    hidden = decoder(decoder.embed(ids[None]), torch.arange(40)[None])
    expected = decoder.logits(hidden)[0]
    found_hidden, found = run(CompiledDecoder(decoder, threads=2), ids)
    # Sums of float32 in another order; torch itself is as far from float64.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_hidden, hidden[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_presets_go_through(preset: Any) -> None:
    config = preset.config
    config = config if isinstance(config, DecoderConfig) else config.decoder
    assert isinstance(config, DecoderConfig)
    assert missing(config) == ("relative positions" if preset.name.startswith("transformer-xl") else None)


def test_refused() -> None:
    config = DecoderConfig(**SMALL)
    assert missing(replace(config, causal=False)) == "attention that looks ahead"
    with pytest.raises(ConfigError, match="relative positions"):
        CompiledDecoder(Decoder(replace(config, positions="relative")))
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        CompiledDecoder(Decoder(config), threads=0)
    decoder = make()
    decoder.blocks[1].mlp.down = nn.Sequential()
    with pytest.raises(ConfigError, match=r"mlp\.down cannot be compiled: it is a Sequential"):
        CompiledDecoder(decoder)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_others(kv_dtype: torch.dtype) -> None:
    """The same bits alone, among 1 to 33 others, at any place, with one thread or three."""
    decoder = make(num_layers=2)
    prompts = [torch.randint(0, 101, (3 + row % 29,)) for row in range(34)]
    alone = {}
    compiled = CompiledDecoder(decoder, kv_dtype=kv_dtype, threads=1)
    tables = [[compiled.pool.allocate() for _ in range(3)] for _ in prompts]
    for row, prompt in enumerate(prompts):
        alone[row] = run(compiled, prompt, tables[row])
    for threads in (1, 3):
        other = CompiledDecoder(decoder, kv_dtype=kv_dtype, threads=threads)
        other.pool = compiled.pool
        for rows in ([5], [5, 0], [33, 5, 7], list(range(34)), list(range(33, -1, -1))):
            last = [len(prompts[row]) - 1 for row in rows]
            ids = torch.stack([prompts[row][-1] for row in rows])
            hidden, logits = other(ids, torch.tensor(last), torch.tensor(last), [tables[row] for row in rows])
            for place, row in enumerate(rows):
                assert torch.equal(hidden[place], alone[row][0][-1])
                assert torch.equal(logits[place], alone[row][1][-1])


def test_goes_on_from_a_prompt() -> None:
    """Keys and values of torch's prompt, written into the blocks, serve the compiled steps; greedy tokens are equal."""
    decoder = make(vocab_size=64)
    compiled = CompiledDecoder(decoder, threads=2)
    prompt = torch.randint(0, 64, (1, 21))
    cache = KVCache(decoder.config, 1, 90, dtype=torch.float32, device=torch.device("cpu"))
    hidden = decoder(decoder.embed(prompt), torch.arange(21)[None], cache=cache)
    token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
    blocks = [compiled.pool.allocate() for _ in range(6)]
    compiled.pool.write(blocks, 0, cache.keys[:, 0, :, :21], cache.values[:, 0, :, :21])
    expected, found, fast = [], [], token
    for place in range(21, 85):
        hidden = decoder(decoder.embed(token[None]), torch.tensor([[place]]), cache=cache)
        token = decoder.logits(hidden[:, -1]).argmax(dim=-1)
        expected.append(int(token))
        at = torch.tensor([place])
        fast = compiled(fast, at, at, [blocks])[1].argmax(dim=-1)
        found.append(int(fast))
    assert found == expected


def test_bfloat16_weights() -> None:
    decoder = make()
    ids = torch.randint(0, 101, (20,))
    for module in decoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data = module.weight.data.bfloat16()
    bf16 = run(CompiledDecoder(decoder, threads=2), ids)[1]
    for module in decoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data = module.weight.data.float()
    expected = run(CompiledDecoder(decoder, threads=2), ids)[1]
    # Activations lose all but 8 bits before each product.
    assert (bf16 - expected).abs().max() < 0.05 * expected.abs().max()
    assert (bf16 - expected).abs().max() > 0


def pack(decoder: Decoder, kinds: dict[str, str]) -> None:
    """Weights into blocks of the first kind whose name is a part of the module's."""
    for name, module in list(decoder.named_modules()):
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        blocks = torch.from_numpy(quantize(module.weight.numpy(), kind))
        packed: PackedLinear | PackedEmbedding
        if isinstance(module, nn.Linear):
            packed = PackedLinear(module.in_features, module.out_features, bias=False)
            third = len(blocks) // 4  # parts may end anywhere
            packed.parts = [Matrix(kind, blocks[:third]), Matrix(kind, blocks[third:])]
        else:
            packed = PackedEmbedding(module.num_embeddings, module.embedding_dim)
            packed.matrix = Matrix(kind, blocks)
        parent, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(parent), last, packed)


PACKED = [
    {"embedding": "Q8_0", "": "Q4_0"},
    {"embedding": "Q6_K", "qkv": "Q4_K", "down": "Q6_K", "": "Q5_K"},
    {"embedding": "Q5_1", "qkv": "Q4_1", "": "Q5_0"},
]


@pytest.mark.parametrize("kinds", PACKED, ids=lambda kinds: kinds["embedding"])
def test_packed_weights(kinds: dict[str, str]) -> None:
    """Blocks as they are stored, against their values in float32."""
    changes: dict[str, Any] = {"width": 256, "num_heads": 8, "head_size": 32, "mlp_width": 512, "num_layers": 2}
    decoder, plain = make(**changes), make(**changes)
    for parameter in (*decoder.parameters(), *plain.parameters()):
        if parameter.dim() > 1:
            parameter.mul_(0.3)  # or softmax makes rounding errors into other answers
    pack(decoder, kinds)
    for name, module in decoder.named_modules():
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            parts = module.parts if isinstance(module, PackedLinear) else [module.matrix]
            values = torch.cat([part.values(0, part.rows) for part in parts])
            plain.get_submodule(name).weight.data = values
    ids = torch.randint(0, 101, (20,))
    expected = plain.logits(plain(plain.embed(ids[None]), torch.arange(20)[None]))[0]
    compiled = CompiledDecoder(decoder, threads=2)
    found = run(compiled, ids)[1]
    # Activations keep 15 bits; bfloat16 would be fifty times as far away.
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert torch.equal(run(CompiledDecoder(decoder, threads=1), ids)[1], found)


def test_blocks_that_do_not_fit() -> None:
    decoder = make(num_layers=1, head_size=10)  # 40 columns, which are no whole blocks
    packed = PackedLinear(40, 40, bias=False)
    packed.parts = [Matrix("Q8_0", torch.zeros(40, 34, dtype=torch.uint8))]
    decoder.blocks[0].attention.out = packed
    with pytest.raises(ConfigError, match=r"attention\.out has 32 columns, not 40"):
        CompiledDecoder(decoder)


def test_tables_and_lengths_are_checked() -> None:
    compiled = CompiledDecoder(make(num_layers=1), threads=1)
    one = torch.tensor([1])
    blocks = [compiled.pool.allocate()]
    with pytest.raises(ValueError, match="16 tokens has 1 blocks"):
        compiled(one, one, torch.tensor([16]), [blocks])
    with pytest.raises(IndexError, match="no token 101"):
        compiled(torch.tensor([101]), one, one, [blocks])
    with pytest.raises(IndexError, match="no position -1"):
        compiled(one, -one, one, [blocks])
    with pytest.raises(IndexError):
        compiled(one, one, one, [[10**9]])
