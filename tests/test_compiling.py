"""Compiled blocks compute what the plain ones do."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig, add_lora
from mm_gpt.training.compiling import compile_blocks

CONFIG = DecoderConfig(
    vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, mlp_width=48, max_length=16
)
PLACES: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"norm_place": "post", "residual_scale": 1.5},
    "both": {"norm_place": "both"},
    "local": {"attention": ("local", "dense"), "window": 4},
    "xpos": {"positions": "xpos", "sub_norm": True, "num_kv_heads": 4},
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(changes: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in decoder.parameters():  # norms that do something
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder.train()


def outputs(decoder: Decoder) -> list[Tensor]:
    """Hidden states, and every gradient."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (2, 12), generator=generator)
    hidden = decoder(decoder.embed(ids), torch.arange(12).expand(2, 12))
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)]


@pytest.mark.parametrize("place", PLACES)
def test_compiled_blocks_are_the_same_network(place: str) -> None:
    """Every place of the norms: all blocks were compiled as if their norms stood before."""
    decoder = make(PLACES[place])
    expected = outputs(decoder)
    decoder.zero_grad()
    compile_blocks(decoder, backend="eager")
    torch.testing.assert_close(outputs(decoder), expected, rtol=1e-5, atol=1e-5)


def test_compiled_blocks_are_read_with_their_memory() -> None:
    changes = {"positions": "relative", "norm_place": "post", "num_kv_heads": 4, "memory_length": 16}
    decoder = make(changes)
    x = torch.randn(2, 8, 32)
    positions = torch.arange(8).expand(2, 8)

    def segments() -> Tensor:
        memory, found = None, []
        for _ in range(2):
            hidden, memory = decoder.forward_segment(x, positions, memory)
            found.append(hidden)
        return torch.cat(found)

    expected = segments()
    compile_blocks(decoder, backend="eager")
    torch.testing.assert_close(segments(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_are_compiled_once_and_for_training_alone() -> None:
    """One graph for all layers of a kind; evaluation, whose shapes change, and a second call compile nothing."""
    decoder = make({"norm_place": "post"})
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_blocks(decoder, backend=counting)
    compile_blocks(decoder, backend=counting)
    decoder.eval()
    outputs(decoder)
    assert not graphs
    decoder.train()
    outputs(decoder)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_to_machine_code() -> None:
    decoder = make(PLACES["post"])
    add_lora(decoder.blocks, LoRAConfig(rank=2, alpha=4))
    expected = outputs(decoder)
    decoder.zero_grad()
    compile_blocks(decoder)
    torch.testing.assert_close(outputs(decoder), expected, rtol=1e-3, atol=1e-3)
