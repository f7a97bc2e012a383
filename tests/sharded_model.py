"""A tiny multimodal model that learns from given batches, in one process or by ranks that share it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from conftest import make_picture, make_tiny
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from mm_gpt.document import Document, Image, Text
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor, collate
from mm_gpt.training.distributed import process_group, ranks
from mm_gpt.training.loop import training_step
from mm_gpt.training.parallel import shard_model, sharing
from mm_gpt.training.stage import LOWEST_LOSS, ParameterGroup, Term
from mm_gpt.training.train_config import TrainConfig

CPU = torch.device("cpu")
WORDS = "a red circle on a blue ground"
Build = Callable[[], tuple[MMGPT, Processor]]


def document(number: int, *, image: bool) -> Document:
    """Texts of different lengths."""
    text = Text(f"{number} " + f"{WORDS} " * (1 + number % 3))
    return Document((Image(make_picture(number)), text) if image else (text,), id=f"doc{number}")


def batch_of(processor: Processor, documents: Sequence[Document], *, learned: bool = True, multiple: int = 1) -> Batch:
    """One packed row, padded to a `multiple` of tokens. `learned`: whether anything of it is supervised."""
    examples = [processor(each) for each in documents]
    transform = processor.transform
    assert transform is not None
    pixels = [transform(image.load()) for example in examples for image in example.images]
    batch = collate([examples], torch.stack(pixels) if pixels else torch.zeros(0, 3, 32, 32), pad_to_multiple=multiple)
    return batch if learned else dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))


class Given:
    """A stage whose micro-batches are given, of all ranks in turn: number n is one of rank n modulo their number."""

    on_policy = False
    decides = LOWEST_LOSS
    shards = True

    def __init__(self, model: MMGPT, batches: Sequence[Batch]):
        self.model, self.batches = model, batches

    def prepare(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", [p for p in self.model.parameters() if p.requires_grad])]

    def micro_batches(self, step: int, count: int) -> list[Batch]:
        rank, world = ranks()
        return list(self.batches[rank::world])

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": int((batch.labels != IGNORE_INDEX).sum())}

    def loss(self, batch: Batch) -> dict[str, Term]:
        total, count = self.model.loss(batch)
        return {"loss": Term(total, int(count))}

    def validate(self) -> dict[str, float]:
        return {"loss": 0.0}

    def samples(self) -> list[str]:
        return []

    def save(self, folder: Any) -> None:
        raise AssertionError("not saved")


class Recorder(torch.optim.SGD):
    """Changes nothing, and keeps the gradients that a step would be made with."""

    def __init__(self, model: MMGPT):
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.gradients: dict[str, NDArray[Any] | None] = {}
        super().__init__([{"params": list(self.names), "lr_scale": 1.0}], lr=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = {n: None if p.grad is None else whole(p.grad).numpy().copy() for p, n in self.names.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclasses.dataclass
class Learned:
    """What a step of training came to."""

    loss: float
    norm: float
    gradients: dict[str, Any]


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 1, "lr": 1e-3, "precision": "fp32", "device": "cpu", "clip": 1e9}
    return TrainConfig(**(values | changes))


def step_of(
    batches: Callable[[Processor], Sequence[Batch]],
    prepare: Callable[[MMGPT], None] = lambda model: None,
    *,
    build: Build = make_tiny,
    shard: int | None = None,
    **changes: Any,
) -> Learned:
    """One step, on as many ranks as there are; `shard` of them share the model, None: all. In one process, plain."""
    model, processor = build()
    model.train()
    prepare(model)
    settings = config(**changes)
    with process_group(CPU):
        if sharing(shard) > 1:
            shard_model(model, sharing(shard), CPU, bf16=settings.precision == "bf16")
        stage = Given(model, batches(processor))
        optimizer = Recorder(model)
        metrics = training_step(stage, stage.micro_batches(0, 1), optimizer, settings, 0, CPU)
    return Learned(metrics["loss"], metrics["grad_norm"], optimizer.gradients)


def same(found: Learned, expected: Learned, *, rtol: float = 1e-6, within: float = 1e-6) -> None:
    """`within`: of the largest gradient of a parameter."""
    assert abs(found.loss - expected.loss) <= rtol * expected.loss
    assert abs(found.norm - expected.norm) <= rtol * expected.norm
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        own = found.gradients[name]
        assert (own is None) == (gradient is None), name
        if gradient is not None:
            assert abs(own - gradient).max() <= within * max(abs(gradient).max(), 1e-3 * expected.norm), name
