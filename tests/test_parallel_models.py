"""All kinds of models can be shared by ranks: decoders of every family, towers for images of any size, fused blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_tiny
from forked_ranks import on_ranks
from sharded_model import CPU, Learned, batch_of, document, same, step_of
from torch import Tensor

import mm_gpt.model.decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Batch, Processor
from mm_gpt.training.distributed import process_group
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.native_vit import NativeViTConfig

GPT: dict[str, Any] = {
    "positions": "learned", "norm": "layer", "gated_mlp": False, "activation": "gelu", "num_kv_heads": 6,
    "qkv_bias": True, "output_bias": True, "mlp_bias": True,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "gpt-1": GPT | {"norm_place": "post"},
    "gpt-2, untied": GPT | {"tie_embeddings": False},
    "magneto": {"positions": "xpos", "sub_norm": True, "init": "magneto"},
    "gemma": {
        "norm_place": "both", "attention_softcap": 20.0, "logit_softcap": 10.0, "embedding_scale": 7.0,
        "attention": ("local", "dense"), "window": 8, "qk_norm": True,
    },
    "sparse": {"attention": ("strided",), "stride": 4},
    "relative": {"positions": "relative", "num_kv_heads": 6},
}  # fmt: skip


def text_model(changes: dict[str, Any]) -> tuple[MMGPT, Processor]:
    model, processor = make_tiny()
    torch.manual_seed(0)
    return MMGPT(ModelConfig(decoder=dataclasses.replace(model.decoder.config, **changes))), processor


def texts(processor: Processor) -> list[Batch]:
    return [batch_of(processor, [document(n, image=False)]) for n in range(2)]


def any_size() -> tuple[MMGPT, Processor]:
    """A tower for images of any size whose middle layers go to the decoder as well (Qwen3-VL)."""
    sizes: dict[str, Any] = {"patch_size": 4, "width": 32, "num_layers": 2, "num_heads": 2, "mlp_width": 32}
    tower = NativeViTConfig(**sizes, deepstack=(0,))
    decoder = DecoderConfig(vocab_size=40, width=48, num_layers=2, num_heads=2, num_kv_heads=2, head_size=24,
                            mlp_width=32, max_length=64)  # fmt: skip
    vision = VisionConfig(model=tower, image_size=tower.image_size)
    torch.manual_seed(0)
    model = MMGPT(ModelConfig(decoder=decoder, vision=vision, connector=ConnectorConfig(kind="merger", deepstack=1)))
    return model, make_tiny()[1]


def images_of_any_size(processor: Processor) -> list[Batch]:
    """Two images in one micro-batch, none in the other."""
    generator = torch.Generator().manual_seed(3)

    def row(grids: list[tuple[int, int]]) -> Batch:
        cells = [rows * columns for rows, columns in grids]
        ids = [token for count in cells for token in (40, *[41] * count, 42)] + list(range(5, 12))

        def column(values: list[int]) -> Tensor:
            return torch.tensor([values])

        return Batch(
            input_ids=column(ids),
            labels=column([-100] * (len(ids) - 7) + list(range(6, 13))),
            position_ids=column(list(range(len(ids)))),
            document_ids=column([1] * len(ids)),
            branch_ids=column([0] * len(ids)),
            image_rows=torch.zeros(len(grids), dtype=torch.long),
            image_grids=torch.tensor(grids, dtype=torch.long).reshape(-1, 2),
            image_tiles=torch.tensor(cells, dtype=torch.long),
            image_sizes=torch.zeros(len(grids), 2, dtype=torch.long),
            pixel_values=torch.randn(sum(cells), 3, 8, 8, generator=generator),
            ids=["row"],
        )

    return [row([(2, 3), (1, 2)]), row([])]


CASES: dict[str, tuple[Callable[[Processor], list[Batch]], Callable[[], tuple[MMGPT, Processor]]]] = {
    name: (texts, lambda changes=changes: text_model(changes)) for name, changes in DECODERS.items()
} | {"images of any size": (images_of_any_size, any_size)}


def test_every_family() -> None:
    def run(rank: int) -> dict[str, Learned]:
        with process_group(CPU):
            return {name: step_of(batches, build=build) for name, (batches, build) in CASES.items()}

    expected = run(0)
    assert sum(gradient is not None for gradient in expected["images of any size"].gradients.values()) > 40
    for found in on_ranks(run):
        assert isinstance(found, dict), found
        for name, learned in expected.items():
            same(found[name], learned)


def test_blocks_of_one_function() -> None:
    """On the CPU a block may be one function with a gradient of its own, over weights that come and go."""

    def build() -> tuple[MMGPT, Processor]:
        sizes = {"width": 64, "num_heads": 2, "num_kv_heads": 1, "head_size": 32, "mlp_width": 64, "num_layers": 2}
        return text_model(sizes)

    def rows(processor: Processor) -> list[Batch]:
        return [batch_of(processor, [document(n, image=False)], multiple=64) for n in range(2)]

    kinds: dict[str, tuple[Callable[[MMGPT], None], dict[str, Any], float]] = {
        "float32": (lambda model: None, {}, 1e-5),
        "recomputed": (lambda model: recompute_blocks(model.decoder, "full"), {}, 1e-5),
        "bfloat16": (lambda model: None, {"precision": "bf16"}, 2e-2),
    }

    def run(rank: int) -> tuple[dict[str, Learned], int]:
        used: list[int] = []
        fused_block = mm_gpt.model.decoder.fused_block

        def noted(*args: Any) -> Any:
            used.append(1)  # at first: a recomputation ends in the middle, once it has what is needed
            found = fused_block(*args)
            assert found is not None
            return found

        with process_group(CPU), pytest.MonkeyPatch.context() as patch:
            patch.setattr(mm_gpt.model.decoder, "fused_block", noted)
            found = {name: step_of(rows, prepare, build=build, **more) for name, (prepare, more, _) in kinds.items()}
        return found, len(used)

    expected, used = run(0)
    assert used == 2 * (2 + 2 * 2 + 2)  # micro-batches, and blocks: those that are recomputed run twice
    for each in on_ranks(run):
        assert not isinstance(each, str), each
        found, used = each
        assert used == 2 + 2 * 2 + 2
        for name, (_, _, tolerance) in kinds.items():
            same(found[name], expected[name], rtol=tolerance, within=5 * tolerance)
