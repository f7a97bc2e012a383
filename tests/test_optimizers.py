"""Optimizers against their formulas, whole and sharded; the gradient noise scale; dropout that a recipe sets."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny
from forked_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_stage import Pairs, ToyStage, logged, losses, one_step, toy_config

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.loop import train
from mm_gpt.training.muon import COEFFICIENTS, Muon, block_matrices, orthogonalised
from mm_gpt.training.noise_scale import NoiseScale
from mm_gpt.training.optimizers import Together, make_optimizer
from mm_gpt.training.stage import ParameterGroup, Term

OPTIMIZERS = ("adamw", "muon", "adafactor")


class Net(nn.Module):
    """An embedding, blocks whose matrices are wide, tall and square, and a head with one row: a rank may have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 5, bias=False), nn.Linear(5, 8)])
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x) * 1.0


def net_steps(net: Net, steps: int, **changes: Any) -> torch.optim.Optimizer:
    config = toy_config(**({"lr": 0.01, "weight_decay": 0.1} | changes))
    optimizer = make_optimizer([ParameterGroup("all", list(net.parameters()))], config, net)
    for step in range(steps):
        ids = (torch.arange(6).view(2, 3) + step) % 7
        (net(ids) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


# ---- Muon ----


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (1, 9)])
def test_newton_schulz_acts_on_singular_values_alone(shape: tuple[int, int]) -> None:
    """In float64 against the quintic of the singular values, which an SVD gives; they end near 1."""
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalised(matrix, torch.float64), left * values @ right)
    assert ((values > 0.6) & (values < 1.25)).all()
    assert not orthogonalised(torch.zeros(3, 4), torch.float32).any()  # B of a fresh adaptation


def test_muon_by_hand() -> None:
    """Two steps in float64: Nesterov's momentum, the length 0.2 √max(A, B), decay outside of it."""
    matrix = nn.Parameter(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    wanted, momentum = matrix.detach().clone(), torch.zeros(4, 6, dtype=torch.float64)
    optimizer = Muon([{"params": [matrix]}], lr=0.1, weight_decay=0.3, momentum=0.9, dtype=torch.float64)
    for step in (0, 1):
        gradient = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5 + step))
        matrix.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonalised(0.1 * gradient + 0.9 * momentum, torch.float64)
        wanted = wanted * (1 - 0.1 * 0.3) - 0.1 * 0.2 * math.sqrt(6) * direction
        torch.testing.assert_close(matrix.detach(), wanted)
        torch.testing.assert_close(optimizer.state[matrix], {"momentum_buffer": momentum})


def test_muon_is_torchs_where_matrices_are_whole() -> None:
    net, peer = Net(), Net()
    net_steps(net, 3, optimizer="muon", precision="bf16", beta2=0.9)
    weights = [block.weight for block in peer.blocks]
    names = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1, "lr": 0.01}
    muon = torch.optim.Muon(weights, **names)  # type: ignore[arg-type]
    rest = [p for p in peer.parameters() if not any(p is weight for weight in weights)]
    groups = [{"params": [p for p in rest if p.dim() == d], "weight_decay": 0.1 * (d - 1)} for d in (1, 2)]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.9), eps=1e-6)
    for step in range(3):
        ids = (torch.arange(6).view(2, 3) + step) % 7
        (peer(ids) - 1).square().sum().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    same(net, peer, 1e-5)


def test_stacked_maps_are_taken_apart() -> None:
    """Queries, keys, values, gate and up: each has its own singular values made 1, as if it were a matrix by itself."""
    model, _ = make_tiny()
    rows = block_matrices(model)
    attention, mlp = model.decoder.blocks[0].attention, model.decoder.blocks[0].mlp
    config = model.decoder.config
    shared = config.num_kv_heads * config.head_size
    assert rows[attention.qkv.weight] == (config.num_heads * config.head_size, shared, shared)  # type: ignore[union-attr, index]
    assert rows[mlp.gate_up.weight] == (config.mlp_width, config.mlp_width)  # type: ignore[union-attr, index]
    stacked = nn.Parameter(torch.zeros(10, 4))
    stacked.grad = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    Muon([{"params": [stacked], "rows": (6, 2, 2)}], lr=1.0, dtype=torch.float32).step()
    for part, gradient in zip(stacked.split([6, 2, 2]), stacked.grad.split([6, 2, 2]), strict=True):
        expected = -0.2 * math.sqrt(max(part.shape)) * orthogonalised(gradient, torch.float32)
        torch.testing.assert_close(part.detach(), expected)


def test_what_muon_is_for() -> None:
    """Matrices of blocks, of the decoder and of the tower; never embeddings, heads, norms, connectors, convolutions."""
    model, _ = make_tiny()
    names = {parameter: name for name, parameter in model.named_parameters()}
    chosen = {names[parameter] for parameter in block_matrices(model)}
    of_a_block = {"attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"}
    assert {name for name in chosen if name.startswith("decoder.blocks.1.")} == {
        f"decoder.blocks.1.{name}.weight" for name in of_a_block
    }
    assert "vision.tower.trunk.blocks.0.attn.qkv.weight" in chosen
    assert all(".blocks." in name and name.endswith("weight") and "norm" not in name for name in chosen)
    groups = [ParameterGroup("all", list(model.parameters()), 0.5)]
    optimizer = make_optimizer(groups, toy_config(optimizer="muon", weight_decay=0.1), model)
    taken = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))  # each by one of the two
    assert all(group["lr_scale"] == 0.5 for group in optimizer.param_groups)
    model.decoder.requires_grad_(False)
    assert model.vision is not None
    model.vision.requires_grad_(False)
    model.add_lora(LoRAConfig(rank=2, alpha=4))
    with pytest.raises(ConfigError, match="for the matrices of blocks, and none of them is trained here: take adamw"):
        make_optimizer(groups, toy_config(optimizer="muon"), model)
    with pytest.raises(ConfigError, match="muon needs the model"):
        make_optimizer(groups, toy_config(optimizer="muon"))


def test_one_rate_serves_both() -> None:
    """Muon's update of a matrix is 0.2 · lr long (root mean square), whatever its shape, as AdamW's is about."""
    net = Net()
    before = [block.weight.detach().clone() for block in net.blocks]
    net_steps(net, 1, optimizer="muon", weight_decay=0.0)
    for block, old in zip(net.blocks, before, strict=True):
        length = (block.weight - old).square().mean().sqrt()  # type: ignore[operator]
        assert 0.1 * 0.01 < float(length) < 0.25 * 0.01


# ---- Adafactor, AdamW, and what they share ----


def test_adafactor_by_hand() -> None:
    """1804.04235, algorithm 4 with relative steps: factored second moments, updates clipped at an RMS of 1."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (4,)))
    wanted = [p.detach().double() for p in (matrix, vector)]
    row, column, second = torch.zeros(3, 1).double(), torch.zeros(1, 5).double(), torch.zeros(4).double()
    config = toy_config(optimizer="adafactor", lr=0.01, weight_decay=0.2)
    optimizer = make_optimizer([ParameterGroup("all", [matrix, vector])], config)
    for step in (1, 2):
        decay = 1 - step**-0.8
        for parameter in (matrix, vector):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        squares = [p.grad.double().square() for p in (matrix, vector)]  # type: ignore[union-attr]
        row = decay * row + (1 - decay) * squares[0].mean(1, keepdim=True)
        column = decay * column + (1 - decay) * squares[0].mean(0, keepdim=True)
        second = decay * second + (1 - decay) * squares[1]
        for number, estimate in enumerate([row @ column / row.mean(), second]):
            update = (matrix, vector)[number].grad.double() / estimate.sqrt()  # type: ignore[union-attr]
            update = update / max(1.0, float(update.square().mean().sqrt()))
            size = max(1e-3, float(wanted[number].square().mean().sqrt()))
            kept = 1 - 0.01 * (0.2 if number == 0 else 0.0)  # matrices alone decay
            wanted[number] = wanted[number] * kept - 0.01 * size * update
    torch.testing.assert_close([matrix.double(), vector.double()], wanted, rtol=1e-5, atol=1e-6)
    shapes = {name: tuple(value.shape) for name, value in optimizer.state[matrix].items()}
    assert shapes == {"step": (), "row_var": (3, 1), "col_var": (1, 5)}  # what it is for: little memory


def test_adamw_is_fused() -> None:
    """In one kernel, and the same as torch's plain one."""
    net, peer = Net(), Net()
    optimizer = net_steps(net, 3)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["fused"] for group in optimizer.param_groups)
    groups = [{"params": [p for p in peer.parameters() if p.dim() == d], "weight_decay": 0.1 * (d - 1)} for d in (1, 2)]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, foreach=False, fused=False)
    for step in range(3):
        ids = (torch.arange(6).view(2, 3) + step) % 7
        (peer(ids) - 1).square().sum().backward()
        plain.step()
        plain.zero_grad()
    same(net, peer)


def test_two_optimizers_are_one() -> None:
    """Groups, state and a saved state go through the one that the loop and checkpoints see."""
    net = Net()
    optimizer = net_steps(net, 2, optimizer="muon")
    assert isinstance(optimizer, Together)
    assert {id(group) for part in optimizer.parts for group in part.param_groups} == set(
        map(id, optimizer.param_groups)
    )
    assert set(optimizer.state) == set(net.parameters())
    assert set(optimizer.state[net.blocks[0].weight]) == {"momentum_buffer"}  # type: ignore[index]
    assert set(optimizer.state[net.head.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    again = Net()
    other = make_optimizer([ParameterGroup("all", list(again.parameters()))], toy_config(optimizer="muon"), again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(net.state_dict())
    ids = torch.arange(6).view(2, 3)
    for model, its in ((net, optimizer), (again, other)):
        (model(ids) - 1).square().sum().backward()
        for group in its.param_groups:
            group["lr"] = 0.003
        its.step()
    same(again, net, 0.0)


class Blocks(ToyStage):
    """The toy stage with a matrix in a block, for Muon."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        torch.manual_seed(0)
        self.model.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def loss(self, batch: Pairs) -> dict[str, Term]:
        before = self.model.blocks[0](batch.x)  # type: ignore[operator, index]
        return super().loss(Pairs(before, batch.y))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_exactly(tmp_path: Path, name: str) -> None:
    """Every optimizer's state is in the checkpoint, and what had no gradient stays as it was, decay and all."""
    config = toy_config(optimizer=name, lr=0.02, weight_decay=0.1, save_every=3, steps=6, schedule="constant")
    whole = Blocks()
    train(whole, config, tmp_path / "whole", progress=False)
    train(Blocks(), dataclasses.replace(config, steps=3), tmp_path / "parts", progress=False)
    again = Blocks()
    train(again, config, tmp_path / "parts", resume=True, progress=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6
    same(again.model, whole.model, 0.0)
    assert (whole.model.unused == 1).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sharded_parameters(name: str) -> None:
    """FSDP2 over two ranks, some of whose slices are empty: the same weights as in one process, on both."""
    whole = Net()
    net_steps(whole, 3, optimizer=name)
    wanted = [p.detach() for p in whole.parameters()]

    def run(rank: int) -> float:
        dist.init_process_group("gloo")
        net = Net()
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
        optimizer = net_steps(net, 3, optimizer=name)
        assert all(isinstance(value, DTensor) for p in net.blocks.parameters() for value in _moments(optimizer, p))
        found = [p.full_tensor().detach() for p in net.parameters() if isinstance(p, DTensor)]
        dist.destroy_process_group()
        return max(float((mine - other).abs().max()) for mine, other in zip(found, wanted, strict=True))

    assert on_ranks(run) == [pytest.approx(0, abs=1e-5)] * 2


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    return [value for name, value in optimizer.state[parameter].items() if name != "step"]


def test_adafactor_refuses_slices() -> None:
    def run(rank: int) -> None:
        dist.init_process_group("gloo")
        net = Net()
        fully_shard(net)
        net_steps(net, 1, optimizer="adafactor")

    (message, _) = on_ranks(run)
    assert message.startswith("ConfigError: optimizer=adafactor needs whole parameters in each process: take shard=1")


# ---- the gradient noise scale ----

WIDTH, DISTANCE, NOISE = 20, 0.5, 2.0
TRUE_SCALE = WIDTH * NOISE**2 / (WIDTH * DISTANCE**2)


class Quadratic(ToyStage):
    """Half the squared distance to samples around a point: the gradient's noise is theirs, and it hardly moves."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes=sizes)
        self.model = nn.Module()
        self.model.matrix = nn.Parameter(torch.full((1, WIDTH), DISTANCE))

    def micro_batches(self, step: int, count: int) -> list[Pairs]:
        generator = torch.Generator().manual_seed(step)
        return [Pairs(NOISE * torch.randn(size, WIDTH, generator=generator), torch.zeros(1)) for size in self.sizes]

    def loss(self, batch: Pairs) -> dict[str, Term]:
        distances = (self.model.matrix - batch.x).square().sum() / 2
        return {"loss": Term(distances, len(batch.x))}


def test_noise_scale_golden(tmp_path: Path) -> None:
    """tr(Σ) / |G|² = 16 of a quadratic, from micro-batches of unequal sizes; a run that goes on knows the averages."""
    config = toy_config(steps=160, lr=1e-9, accumulate=4, noise_scale=True, validate_every=1000, save_every=80)
    train(Quadratic([10, 40, 25, 5]), config, tmp_path / "run", progress=False)
    found = logged(tmp_path / "run", "noise_scale")
    assert found[160] == pytest.approx(TRUE_SCALE, rel=0.15)
    stopped = dataclasses.replace(config, steps=80)
    train(Quadratic([10, 40, 25, 5]), stopped, tmp_path / "parts", progress=False)
    train(Quadratic([10, 40, 25, 5]), config, tmp_path / "parts", resume=True, progress=False)
    assert logged(tmp_path / "parts", "noise_scale")[160] == pytest.approx(found[160], rel=1e-6)


def test_noise_scale_is_unbiased() -> None:
    """Over many steps the means of both estimates are the truth; a moving average would hide a bias of a tenth."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(2)
    parameter = nn.Parameter(torch.zeros(WIDTH))
    for _ in range(4000):
        samples = DISTANCE + NOISE * torch.randn(12, WIDTH, generator=generator)
        noise = NoiseScale()
        parameter.grad = samples[:3].sum(0) / 12
        noise.see_first([parameter], {"loss": 3}, {"loss": 12})
        noise.after_step(samples.mean(0).norm(), {"loss": 12}, torch.device("cpu"))
        sums += torch.tensor(noise.state) / 0.01
    assert sums[0] / 4000 == pytest.approx(WIDTH * NOISE**2, rel=0.02)
    assert sums[1] / 4000 == pytest.approx(WIDTH * DISTANCE**2, rel=0.05)


def test_noise_scale_over_ranks(tmp_path: Path) -> None:
    """Two ranks with one micro-batch each, of other samples, are two micro-batches."""
    config = toy_config(steps=150, lr=1e-9, noise_scale=True, validate_every=1000, save_every=1000)

    def run(rank: int) -> None:
        stage = Quadratic([25 + 10 * rank])
        plain = stage.micro_batches
        stage.micro_batches = lambda step, count: plain(2 * step + rank, count)  # type: ignore[method-assign]
        train(stage, config, tmp_path / "run", progress=False)

    assert on_ranks(run) == [None, None]
    assert logged(tmp_path / "run", "noise_scale")[150] == pytest.approx(TRUE_SCALE, rel=0.2)


def test_noise_scale_changes_nothing(tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        train(ToyStage(), toy_config(accumulate=3, noise_scale=on), tmp_path / name, progress=False)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_where_there_is_no_noise_scale(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="noise_scale compares micro-batches: give accumulate=2 or more"):
        train(ToyStage(), toy_config(noise_scale=True), tmp_path / "one", progress=False)
    counts = {"fit": 3.0, "pull": 2.0}
    with pytest.raises(MMGPTError, match="of a loss of one term; this one has fit, pull"):
        NoiseScale().see_first([], counts, counts)


# ---- dropout ----


def test_dropout_of_a_model_that_is_there() -> None:
    """At any rate, whatever the model was made with; in training alone, and gone again at 0."""
    model, _ = make_tiny()
    decoder, ids = model.decoder, torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, 12)

    def states(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return decoder(decoder.embed(ids), positions).detach()  # type: ignore[no-any-return]

    model.train()
    before = states(0)
    decoder.set_dropout(0.3)
    assert not torch.equal(states(0), states(1))
    assert torch.equal(states(1), states(1))
    model.eval()
    torch.testing.assert_close(states(0), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(states(0), states(1))
    model.train()
    decoder.set_dropout(0.0)
    assert torch.equal(states(0), states(1))
    for wrong in (1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="dropout"):
            decoder.set_dropout(wrong)


class Dropping(ToyStage):
    """The toy stage, which notes what is dropped."""

    def __init__(self) -> None:
        super().__init__(sizes=(4, 4))
        self.masks: list[list[bool]] = []

    def loss(self, batch: Pairs) -> dict[str, Term]:
        kept = torch.nn.functional.dropout(torch.ones_like(batch.x), 0.5, self.model.training)
        self.masks.append(kept.flatten().bool().tolist())
        return super().loss(Pairs(batch.x * kept, batch.y))


def test_each_micro_batch_and_each_rank_drops_something_else(tmp_path: Path) -> None:
    def masks(rank: int) -> list[list[bool]]:
        stage = Dropping()
        config = toy_config(accumulate=2)
        optimizer = make_optimizer(stage.prepare(), config)
        dist.init_process_group("gloo")
        for step in (0, 1, 0):  # the last as after a stop
            one_step(stage, optimizer, config, step)
        dist.destroy_process_group()
        return stage.masks

    first, second = on_ranks(masks)
    drawn = [tuple(mask) for mask in first[:4] + second[:4]]
    assert len(set(drawn)) == 8
    assert (first[4:], second[4:]) == (first[:2], second[:2])


def test_dropout_goes_on_exactly(tmp_path: Path) -> None:
    config = toy_config(accumulate=2, steps=6, save_every=3, schedule="constant")
    train(Dropping(), config, tmp_path / "whole", progress=False)
    train(Dropping(), dataclasses.replace(config, steps=3), tmp_path / "parts", progress=False)
    train(Dropping(), config, tmp_path / "parts", resume=True, progress=False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
