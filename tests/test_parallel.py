"""Ranks that share a model learn what one process does: losses, gradients and their norm."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny
from forked_ranks import on_ranks
from sharded_model import CPU, Given, Learned, batch_of, config, document, same, step_of, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mm_gpt.errors import ConfigError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Batch, Processor
from mm_gpt.training.distributed import process_group, ranks
from mm_gpt.training.loop import training_step
from mm_gpt.training.parallel import clip_gradients, forget_unused, gathered, reshard, shard_model, sharing


def ragged(processor: Processor) -> list[Batch]:
    """Six micro-batches: of different lengths, with and without images, one with nothing to learn."""
    return [
        batch_of(processor, [document(3 * n + i, image=(n + i) % 3 == 0) for i in range(1 + n % 3)], learned=n != 3)
        for n in range(6)
    ]


def texts(processor: Processor) -> list[Batch]:
    return [batch_of(processor, [document(n, image=False)]) for n in range(6)]


def half_with_images(processor: Processor) -> list[Batch]:
    """Of two ranks one sees all images."""
    return [batch_of(processor, [document(n, image=n % 2 == 1)]) for n in range(6)]


def frozen_tower(model: MMGPT) -> None:
    assert model.vision is not None
    model.vision.requires_grad_(False)


def connector_alone(model: MMGPT) -> None:
    model.decoder.requires_grad_(False)
    frozen_tower(model)


def low_rank(model: MMGPT) -> None:
    torch.manual_seed(1)
    model.add_lora(LoRAConfig(rank=2, alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.1)


def everything(model: MMGPT) -> None:
    pass


Case = tuple[Callable[[Processor], Sequence[Batch]], Callable[[MMGPT], None]]
CASES: dict[str, Case] = {
    "ragged": (ragged, everything),
    "ragged, frozen tower": (ragged, frozen_tower),
    "ragged, connector alone": (ragged, connector_alone),
    "ragged, low-rank": (ragged, low_rank),
    "images on one rank": (half_with_images, everything),
    "images on one rank, connector alone": (half_with_images, connector_alone),
    "no images": (texts, everything),
    "no images, connector alone": (texts, connector_alone),
}


SOME = ("ragged", "ragged, low-rank", "images on one rank, connector alone")
"""On three ranks."""


@pytest.fixture(scope="module")
def alone() -> dict[str, Learned]:
    return {name: step_of(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[2, 3])
def shared(request: pytest.FixtureRequest) -> list[dict[str, Learned]]:
    """Of 2 ranks x 3 micro-batches, and 3 ranks x 2. Some weights have fewer rows than there are ranks."""

    def run(rank: int) -> dict[str, Learned]:
        with process_group(CPU):  # one for all: another would meet what the first one left
            return {name: step_of(*case) for name, case in chosen.items()}

    chosen = CASES if request.param == 2 else {name: CASES[name] for name in SOME}
    found = on_ranks(run, request.param, seconds=200)
    assert all(isinstance(each, dict) for each in found), found
    return found


@pytest.mark.parametrize("case", CASES)
def test_shared_models_learn_what_one_process_does(
    alone: dict[str, Learned], shared: list[dict[str, Learned]], case: str
) -> None:
    """Checks 1, 2 and 3: micro-batches of different lengths, one without targets; images on no rank or some; parts of
    the model frozen. Losses, norms and gradients are equal on all ranks, and to those of one process."""
    for each in shared:
        if case not in each:
            pytest.skip("on two ranks")
        same(each[case], alone[case])
        assert (each[case].loss, each[case].norm) == (shared[0][case].loss, shared[0][case].norm)


def test_gradients_are_clipped_as_one_process_does(alone: dict[str, Learned]) -> None:
    """Check 3."""
    clip = alone["ragged"].norm / 3
    expected = step_of(*CASES["ragged"], clip=clip)
    for found in on_ranks(lambda rank: step_of(*CASES["ragged"], clip=clip)):
        same(found, expected)
        assert found.norm > 2.9 * clip


def test_norm_of_slices() -> None:
    """Check 3: slices with norms 3 and 4 are a gradient of norm 5; with a plain one of norm 12 beside it, 13. A mixed
    list was an error."""

    def run(rank: int) -> tuple[float, float, float, list[float]]:
        with process_group(CPU):
            mesh = init_device_mesh("cpu", (2,))
            parameter = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Shard(0)]))
            own = torch.tensor([[3.0, 0.0], [0.0, 4.0]][rank])
            plain = nn.Parameter(torch.zeros(1))

            def norm(largest: float, *parameters: nn.Parameter) -> float:
                parameter.grad = DTensor.from_local(own.clone(), mesh, [Shard(0)])
                plain.grad = torch.tensor([12.0])
                return float(clip_gradients(parameters, largest))

            sizes = norm(100.0, parameter), norm(100.0, parameter, plain), norm(1.3, plain, parameter)
            assert plain.grad is not None
            assert parameter.grad is not None
            return *sizes, [*whole(parameter.grad).tolist(), *plain.grad.tolist()]

    for *sizes, clipped in on_ranks(run):
        assert sizes == pytest.approx([5, 13, 13])
        assert clipped == pytest.approx([0.3, 0, 0, 0.4, 1.2], abs=1e-5)
    nothing = nn.Parameter(torch.zeros(1))
    assert float(clip_gradients([nothing], 1.0)) == 0


def test_no_rank_waits_for_another_s_images() -> None:
    """Check 2: twenty steps with images on one rank, on both, on none, in turn. The vision side has zeros for a rank
    without images, and nothing once no rank had any, so that its moments stand still."""

    def run(rank: int) -> Any:
        model, processor = make_tiny()
        model.train()
        world = ranks()[1]
        with process_group(CPU):
            if world > 1:
                shard_model(model, world, CPU, bf16=False)
            optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr_scale": 1.0}], eps=1e-3)
            for step in range(20):
                shown = [step % 4 in (1, 3), step % 4 in (2, 3)]
                rows = [batch_of(processor, [document(2 * step + n, image=shown[n])]) for n in range(2)]
                stage = Given(model, rows)
                training_step(stage, stage.micro_batches(step, 1), optimizer, config(lr=0.01, steps=20), step, CPU)
            weights = {name: whole(p.detach()).numpy().copy() for name, p in model.named_parameters()}
            steps = {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
            if world > 1:  # the raw gradients of a step without images
                model.loss(batch_of(processor, [document(rank, image=False)]))[0].backward()
                side = [p for name, p in model.named_parameters() if not name.startswith("decoder.")]
                assert all(p.grad is not None and not whole(p.grad).any() for p in side)
                forget_unused(model)
                assert all(p.grad is None for p in side)
        return weights, steps

    weights, steps = run(0)
    assert set(steps.values()) == {15.0, 20.0}
    for found in on_ranks(run, seconds=120):
        assert not isinstance(found, str), found
        assert found[1] == steps
        for name, values in weights.items():
            assert abs(found[0][name] - values).max() < 2e-5, name


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_get_what_rank_0_holds(tied: bool) -> None:
    """Check 4: the others have no weights of their own. Embedding and head stay one where they are tied, and their
    gradient is the sum of both uses; the whole state is that of rank 0."""

    def build() -> tuple[MMGPT, Processor]:
        model, processor = make_tiny()
        decoder = dataclasses.replace(model.decoder.config, tie_embeddings=tied)
        torch.manual_seed(0)
        return MMGPT(dataclasses.replace(model.config, decoder=decoder)), processor

    def run(rank: int) -> Any:
        model, processor = build()
        if rank:
            model = model.to("meta")
        model.train()
        with process_group(CPU):
            shard_model(model, 2, CPU, bf16=False)
            with gathered(model):
                state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()} if not rank else {}
            loss, _ = model.loss(batch_of(processor, [document(rank, image=True)]))
            assert (model.decoder.head_weight is model.decoder.embedding.weight) == tied
            loss.backward()
            gradient = model.decoder.head_weight.grad
            assert gradient is not None
            return state, whole(gradient).numpy().copy()

    model, processor = build()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = MMGPT(
        dataclasses.replace(model.config, decoder=dataclasses.replace(model.decoder.config, tie_embeddings=False))
    )
    head = {"decoder.head.weight": expected.get("decoder.head.weight", expected["decoder.embedding.weight"])}
    both.load_state_dict(expected | head)
    for rank in range(2):
        both.loss(batch_of(processor, [document(rank, image=True)]))[0].backward()
    assert both.decoder.head is not None
    sides = (both.decoder.head.weight.grad, both.decoder.embedding.weight.grad)
    assert sides[0] is not None
    assert sides[1] is not None
    wanted = (sides[0] + sides[1] if tied else sides[0]).numpy()
    found = on_ranks(run)
    state = found[0][0]
    assert state.keys() == expected.keys()
    assert all((state[name] == tensor.numpy()).all() for name, tensor in expected.items())
    for _, gradient in found:
        assert abs(gradient - wanted).max() < 1e-6 * abs(wanted).max()


def test_bfloat16_is_for_computing() -> None:
    """Check 10: weights and rotary tables stay in float32, and gradients of bfloat16 are summed in float32."""

    def run(rank: int) -> tuple[set[str], set[str], float]:
        seen: set[str] = set()
        with process_group(CPU):
            plain, processor = make_tiny()
            model, _ = make_tiny()
            batch = batch_of(processor, [document(rank, image=True)])
            plain.train()
            plain.decoder.blocks.bfloat16()
            with torch.autocast("cpu", torch.bfloat16):
                plain.loss(batch)[0].backward()
            model.train()
            shard_model(model, 2, CPU, bf16=True)

            def look(block: nn.Module, args: Any) -> None:
                seen.update(f"weight {p.dtype}" for p in block.parameters())
                seen.update(f"table {table.dtype}" for table in args[1].rotation[:2])

            for block in model.decoder.blocks:
                block.register_forward_pre_hook(look)
            with torch.autocast("cpu", torch.bfloat16):
                model.loss(batch)[0].backward()
            worst = 0.0
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                if ".blocks." in name and name.startswith("decoder"):
                    assert p.grad is not None
                    assert q.grad is not None
                    by_hand = q.grad.float()
                    dist.all_reduce(by_hand)
                    worst = max(worst, float((whole(p.grad) - by_hand).abs().max() / by_hand.abs().max()))
            kept = {f"{value.dtype}" for value in model.state_dict().values()}
            return seen, kept, worst

    for seen, kept, worst in on_ranks(run):
        assert seen == {"weight torch.bfloat16", "table torch.float32"}
        assert kept == {"torch.float32"}
        assert worst < 1e-6


def test_validation_leaves_slices() -> None:
    """What is saved after it would otherwise find the root's weights whole, and not those that are trained."""

    def run(rank: int) -> list[bool]:
        model, processor = make_tiny()
        with process_group(CPU):
            shard_model(model, 2, CPU, bf16=False)
            with torch.no_grad():
                model.loss(batch_of(processor, [document(rank, image=True)]))
            before = all(isinstance(p, DTensor) for p in model.parameters())
            reshard(model)
            return [before, all(isinstance(p, DTensor) for p in model.parameters())]

    assert on_ranks(run) == [[False, True]] * 2


def test_what_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharing(None) == sharing(1) == 1
    with pytest.raises(ConfigError, match="2 ranks cannot share a copy of the model: the run has 1"):
        sharing(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert [sharing(number) for number in (None, 1, 2, 3, 6)] == [6, 1, 2, 3, 6]
    with pytest.raises(ConfigError, match="the run has 6"):
        sharing(4)
    model, _ = make_tiny()
    model.decoder.config = dataclasses.replace(model.decoder.config, positions="relative", memory_length=8)
    with pytest.raises(ConfigError, match="segment memory"):
        shard_model(model, 6, CPU, bf16=False)
    model, _ = make_tiny()
    model.decoder.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"decoder\.temperature is a single number"):
        shard_model(model, 6, CPU, bf16=False)


@pytest.mark.slow
def test_two_copies_of_two_ranks(alone: dict[str, Learned]) -> None:
    """HSDP: slices among two ranks, gradients summed over four. Micro-batches are a multiple of the ranks."""

    def four(processor: Processor) -> list[Batch]:
        return ragged(processor)[:4]

    expected = step_of(four)
    for found in on_ranks(lambda rank: step_of(four, shard=2), 4):
        same(found, expected)
