"""Blocks that compute again in the backward pass what they did not keep."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from forked_ranks import on_ranks
from sharded_model import Learned, batch_of, document, same, step_of
from test_compiling import CONFIG
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mm_gpt.model.decoder import Decoder
from mm_gpt.model.lora import LoRAConfig, add_lora
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Batch, Processor
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.distributed import process_group
from mm_gpt.training.recompute import recompute_blocks

Kind = Literal["none", "selective", "full"]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder.train()


def gradients(decoder: Decoder, *, masked: bool = False) -> list[Tensor]:
    """Hidden states, and every gradient; the same dropout each time."""
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril() if masked else None
    decoder.zero_grad()
    torch.manual_seed(5)
    hidden = decoder(decoder.embed(ids), torch.arange(12).expand(2, 12), mask=mask)
    hidden.square().sum().backward()
    return [hidden.detach(), *(p.grad for p in decoder.parameters() if p.grad is not None)]


def kept(decoder: Decoder) -> int:
    """Numbers that one pass keeps for its backward pass, beside the weights. What selective recomputation keeps is not
    told."""
    weights = {p.data_ptr() for p in decoder.parameters()}
    held: list[Tensor] = []  # nothing takes a freed tensor's place

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        decoder(decoder.embed(torch.ones(2, 12, dtype=torch.long)), torch.arange(12).expand(2, 12))
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in held if tensor.data_ptr() not in weights}
    return sum(sizes.values())


class Operators(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


SHAPES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.2},
    "five products a block": {"dropout": 0.2, "gated_mlp": False, "positions": "xpos", "num_kv_heads": 4},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "norm_place": "post"},
    "soft cap": {"attention_softcap": 5.0, "norm_place": "both"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_the_same_gradients_with_less_memory(shape: str, kind: Literal["selective", "full"]) -> None:
    """Check 9, with dropout, a mask and adapters."""
    plain, decoder = make(**SHAPES[shape]), make(**SHAPES[shape])
    for each in (plain, decoder):
        torch.manual_seed(2)
        add_lora(each.blocks[1], LoRAConfig(rank=2, alpha=4, dropout=0.1))
    names = list(decoder.state_dict())
    recompute_blocks(decoder, kind)
    assert list(decoder.state_dict()) == names
    for masked in (False, True):
        torch.testing.assert_close(gradients(decoder, masked=masked), gradients(plain, masked=masked))
    if kind == "full":
        assert kept(decoder) < 0.5 * kept(plain)


def test_what_is_computed_again() -> None:
    """Everything, or every second product and no attention; but not a block's last product, which nothing needs."""
    names: dict[str, Counter[str]] = {}
    kinds: list[Kind] = ["none", "selective", "full"]
    for kind in kinds:
        decoder = make(num_layers=1)
        recompute_blocks(decoder, kind)
        with Operators() as operators:
            gradients(decoder)
        names[kind] = operators.names
    again = {kind: names[kind] - names["none"] for kind in kinds}
    assert {name for name in again["full"] if "scaled_dot_product" in name}
    assert not {name for name in again["selective"] if "scaled_dot_product" in name}
    assert again["full"]["aten.mm.default"] == 3
    assert again["selective"]["aten.mm.default"] == 1
    assert again["full"]["aten.silu.default"] == again["selective"]["aten.silu.default"] == 1


@pytest.mark.parametrize(
    "kind", ["selective", pytest.param("none", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)]
)
def test_compiled_blocks_recompute(kind: Kind) -> None:
    """Check 9: with torch.compile and dropout."""
    decoder = make(dropout=0.2)
    expected = gradients(make(dropout=0.2))
    compile_blocks(decoder, recompute=kind, backend="aot_eager")
    torch.testing.assert_close(gradients(decoder), expected, rtol=1e-5, atol=1e-5)


def batches(processor: Processor) -> list[Batch]:
    return [batch_of(processor, [document(n, image=n == 0)]) for n in range(2)]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shared_models_recompute(compiled: bool) -> None:
    """Check 9 on two ranks: a block's weights are gathered again before it is."""

    def prepared(kind: Kind, *, compiled: bool) -> Learned:
        def prepare(model: MMGPT) -> None:
            model.decoder.set_dropout(0.2)
            if compiled:
                compile_blocks(model.decoder, recompute=kind, backend="aot_eager")
            else:
                recompute_blocks(model.decoder, kind)

        return step_of(batches, prepare)

    def run(rank: int) -> list[Learned]:
        from sharded_model import CPU

        with process_group(CPU):
            kinds: list[Kind] = ["none", "selective", "full"]
            return [prepared("none", compiled=False), *(prepared(kind, compiled=compiled) for kind in kinds)]

    for found in on_ranks(run):
        for each in found[1:]:
            same(each, found[0], rtol=1e-5, within=1e-5)
