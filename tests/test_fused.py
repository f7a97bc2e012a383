"""Blocks as one function: the same values and gradients as the blocks that are written out, and the same training."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_gpt.kernels import parallel
from mm_gpt.model import decoder as decoder_module
from mm_gpt.model import fused as module
from mm_gpt.model import loss as loss_module
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig, LoRALinear, add_lora
from mm_gpt.model.loss import next_token_loss
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.recompute import recompute_blocks

CONFIG = DecoderConfig(
    vocab_size=64, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, mlp_width=80, max_length=512
)


def make(*, lora: bool = False, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes))
    init_weights(decoder)
    if lora:
        decoder.requires_grad_(False)
        add_lora(decoder.blocks, LoRAConfig(rank=4, alpha=8))
    with torch.no_grad():
        for parameter in decoder.parameters():  # norms that do something, adaptations that are not 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.train()


@contextmanager
def written_out() -> Iterator[None]:
    """Blocks and loss as torch computes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_module, "fused", lambda *_: None)
        patch.setattr(loss_module, "fused_kind", lambda *_: None)
        yield


def packed(rows: int, tokens: int) -> Tensor:
    """A mask (B, 1, T, T): texts of other lengths in each row, short and long, the last one of two branches."""
    documents = torch.zeros(rows, tokens, dtype=torch.long)
    branches = torch.zeros(rows, tokens, dtype=torch.long)
    for row in range(rows):
        lengths = [3 + row, 10, 40, 7]
        ends = torch.tensor(lengths).cumsum(0)
        documents[row] = torch.bucketize(torch.arange(tokens), ends, right=True)
        last = int(ends[-1])
        branches[row, last + 20 : last + 30], branches[row, last + 30 :] = 1, 2
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    sees = (branches.unsqueeze(1) == 0) | (branches.unsqueeze(2) == branches.unsqueeze(1))
    return (same & sees & torch.ones(tokens, tokens, dtype=torch.bool).tril()).unsqueeze(1)


def gradients(decoder: Decoder, tokens: int, mask: Tensor | None, *, bf16: bool = False) -> dict[str, Tensor]:
    """The loss, and all gradients, that of the embeddings included."""
    decoder.zero_grad()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (2, tokens + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, ::3] = -100
    x = decoder.embed(ids[:, :-1]).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total, count = decoder.loss(decoder(x, torch.arange(tokens).expand(2, -1), mask=mask), labels)
    (total / count).backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    return found | {"loss": total.detach() / count, "x": x.grad}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """By the size of the difference over the size of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [(16, None), (320, None), (112, "packed"), (352, "packed"), (48, "prefix"), (320, "all")],
)
def test_values_and_gradients_are_those_of_written_out_blocks(lora: bool, tokens: int, mask: str | None) -> None:
    """float32: 1e-5. More queries than are computed at a time, texts and branches, what is ahead."""
    decoder = make(lora=lora)
    seen = None
    if mask == "packed":
        seen = packed(2, tokens)
    elif mask == "prefix":  # read in both directions
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
        seen[:, :, :20, :20] = True
    elif mask == "all":
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    ours = gradients(decoder, tokens, seen)
    with written_out():
        assert_alike(ours, gradients(decoder, tokens, seen), 1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_in_bfloat16_they_are_as_close_to_float32_as_written_out_blocks(lora: bool) -> None:
    """Each gradient's error against float32 is at most a tenth above that of torch's autocast."""
    decoder, mask = make(lora=lora), packed(2, 112)
    ours = gradients(decoder, 112, mask, bf16=True)
    with written_out():
        exact, theirs = gradients(decoder, 112, mask), gradients(decoder, 112, mask, bf16=True)
    assert_alike(ours, exact, 0.05)
    error, other = (
        sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
        for found in (ours, theirs)
    )
    assert error <= 1.1 * other


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit, or a run would not continue exactly on another machine's cores."""
    decoder, mask, threads = make(), packed(2, 112), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            kernel_sums = torch.zeros(parallel.PIECES, 48)
            x, dy = (torch.randn(96, 48, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
            y, out, rounded = (torch.empty(96, 48) for _ in range(3))
            module._run(
                "norm_backward",
                ("f32", 48),
                96,
                dy,
                dy,
                x,
                torch.ones(96),
                torch.ones(48),
                out,
                rounded,
                y,
                kernel_sums,
            )
            found.append((out, kernel_sums))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=0, atol=0)
    torch.testing.assert_close(gradients(decoder, 112, mask), gradients(decoder, 112, mask), rtol=0, atol=0)


def test_without_openmp_threads_of_python_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, mask = make(), packed(2, 112)
    expected, threads = gradients(decoder, 112, mask), torch.get_num_threads()
    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    try:
        torch.set_num_threads(2)
        assert_alike(gradients(decoder, 112, mask), expected, 1e-6)
    finally:
        torch.set_num_threads(threads)


PLAIN: list[dict[str, Any]] = [
    {"norm_place": "both"},
    {"qk_norm": True},
    {"qkv_bias": True},
    {"attention": ("local", "dense"), "window": 16},
    {"dropout": 0.1},
    {"attention_softcap": 5.0},
    {"head_size": 16},
    {"activation": "gelu"},
]


@pytest.mark.parametrize("changes", PLAIN, ids=lambda changes: next(iter(changes)))
def test_other_blocks_stay_as_they_are(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with anything that the function has not must not go through it."""
    decoder = make(**changes)
    torch.manual_seed(2)
    ours = gradients(decoder, 48, None)
    torch.manual_seed(2)
    with written_out():
        assert_alike(ours, gradients(decoder, 48, None), 2e-6)


def test_an_adaptation_that_is_off_is_off() -> None:
    decoder = make(lora=True)
    for layer in decoder.modules():
        if isinstance(layer, LoRALinear):
            layer.enabled = False
    decoder.embedding.requires_grad_(True)
    ours = gradients(decoder, 32, None)
    with written_out():
        assert_alike(ours, gradients(decoder, 32, None), 1e-5)
    assert set(ours) == {"embedding.weight", "loss", "x"}


def test_evaluation_and_odd_lengths_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function serves lengths that fill vectors; nothing is computed wrong for others."""
    calls: list[int] = []
    real = decoder_module.fused_block

    def counting(*args: Any) -> Tensor | None:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(decoder_module, "fused_block", counting)
    decoder = make()
    gradients(decoder, 33, None)
    decoder.eval()
    gradients(decoder, 32, None)
    assert not calls
    decoder.train()
    gradients(decoder, 32, None)
    assert len(calls) == 2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_in_few_passes(monkeypatch: pytest.MonkeyPatch, scaled: bool, bf16: bool) -> None:
    """Value and gradients over the bounds of chunks, with a factor for each position; large logits do not overflow."""
    monkeypatch.setattr(loss_module, "FUSED_CHUNK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 16, requires_grad=True)
    weight = (3 * torch.randn(64, 16)).requires_grad_()
    labels = torch.randint(64, (2, 20))
    labels[0, :3] = -100
    scales = torch.randn(2, 20) if scaled else None

    def both() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total, count = next_token_loss(hidden, weight, labels, scales=scales)
        assert int(count) == 37
        return (total.detach(), *torch.autograd.grad(total * 0.3, [hidden, weight]))

    ours = both()
    with written_out():
        theirs = both()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= (2e-2 if bf16 else 1e-5) * other.norm()


def test_a_gradient_that_is_gone_is_not_given_again() -> None:
    """It was scaled where it lay: a second backward pass would scale it twice."""
    hidden = torch.randn(1, 4, 16, requires_grad=True)
    total, _ = next_token_loss(hidden, torch.randn(64, 16), torch.zeros(1, 4, dtype=torch.long))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="not kept for a second time"):
        total.backward()


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("bf16", [False, True])
def test_blocks_that_recompute(kind: Any, bf16: bool) -> None:
    """What is written over in its place must not be taken for what was kept."""
    decoder, mask = make(lora=True), packed(2, 112)
    expected = gradients(decoder, 112, mask, bf16=bf16)
    recompute_blocks(decoder, kind)
    assert_alike(gradients(decoder, 112, mask, bf16=bf16), expected, 2e-2 if bf16 else 1e-5)


def test_compiled_blocks_leave_it_to_the_function() -> None:
    """torch.compile cannot look into it."""
    decoder, mask = make(lora=True), packed(2, 112)
    expected = gradients(decoder, 112, mask)
    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_blocks(decoder, backend=counting)
    torch.testing.assert_close(gradients(decoder, 112, mask), expected, rtol=0, atol=0)
    assert not graphs


@pytest.mark.parametrize("place", ["norm", "hidden"])
def test_what_is_not_a_number_comes_out_as_one_that_is_not(place: str) -> None:
    """The loop stops at a loss or gradient that is not finite: it has to see it."""
    decoder = make()
    with torch.no_grad():
        if place == "norm":
            dict(decoder.named_parameters())["blocks.0.mlp_norm.weight"][3] = torch.nan
        else:
            decoder.embedding.weight[:, 5] = torch.inf
    assert not gradients(decoder, 48, None)["loss"].isfinite()


def test_training_in_bfloat16_learns_as_autocast_does() -> None:
    """Thirty steps: the loss falls, and ends within a hundredth of what blocks as they are written reach."""

    def train() -> float:
        decoder = make()
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
        for _ in range(30):
            loss = float(gradients(decoder, 48, None, bf16=True)["loss"])
            optimizer.step()
        return loss

    begin = float(gradients(make(), 48, None)["loss"])
    ours = train()
    with written_out():
        theirs = train()
    assert ours < 0.7 * begin
    assert abs(ours - theirs) < 0.01 * theirs
