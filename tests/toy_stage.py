"""A stage of a few numbers, for tests of the loop."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.loop import training_step
from mm_gpt.training.saving import Saver
from mm_gpt.training.stage import LOWEST_LOSS, ParameterGroup, Stage, Term
from mm_gpt.training.train_config import TrainConfig


@dataclasses.dataclass
class Pairs:
    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> "Pairs":
        return self


class Toy(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.vector = nn.Parameter(torch.randn(3, generator=generator))
        self.unused = nn.Parameter(torch.ones(2, 2))  # like a connector in a run without images
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.norm(x), self.matrix, self.vector)


class ToyStage:
    """A regression whose micro-batches have different sizes."""

    on_policy = False
    decides = LOWEST_LOSS

    def __init__(self, *, sizes: Sequence[int] = (3, 5, 2), norm: bool = False, validation: Sequence[float] = ()):
        self.model: nn.Module = Toy(norm)
        self.sizes, self.validation = sizes, list(validation)
        self.on_loss: Callable[[Tensor], Tensor] = lambda loss: loss

    def prepare(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", list(self.model.parameters()))]

    def micro_batches(self, step: int, count: int) -> list[Pairs]:
        generator = torch.Generator().manual_seed(step)
        everything = [torch.randn(size, 7, generator=generator) for size in self.sizes]
        if count == 1:
            everything = [torch.cat(everything)]
        return [Pairs(values[:, :4], values[:, 4:]) for values in everything]

    def counts(self, batch: Pairs) -> dict[str, float]:
        return {"loss": len(batch.x)}

    def loss(self, batch: Pairs) -> dict[str, Term]:
        loss = (self.model(batch.x) - batch.y).square().sum()
        return {"loss": Term(self.on_loss(loss), len(batch.x))}

    def validate(self) -> dict[str, float]:
        return {"loss": self.validation.pop(0) if self.validation else 1.0}

    def samples(self) -> list[str]:
        return ["a sample"]

    def save(self, folder: Path) -> None:
        (folder / "weights.txt").write_text(str(self.model.matrix[0, 0].item()))  # type: ignore[union-attr, index]


def save_checkpoint(
    stage: Stage, optimizer: torch.optim.Optimizer, progress: Progress, out: Path, *, best: bool
) -> None:
    """One checkpoint, which is there when this returns."""
    with Saver(out, next(stage.model.parameters()).device) as saver:
        saver.save(stage, optimizer, progress, best=best)


def toy_config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 6, "lr": 0.1, "precision": "fp32", "device": "cpu", "log_every": 1}
    return TrainConfig(**(values | changes))


def logged(out: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def losses(out: Path) -> dict[int, float]:
    return logged(out, "loss")


def one_step(task: Stage, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> dict[str, float]:
    batches = task.micro_batches(step, config.accumulate)
    return training_step(task, batches, optimizer, config, step, torch.device("cpu"))
