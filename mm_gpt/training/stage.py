"""What a stage of training is made of: the side of it that the loop sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    name: str
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0


class Stage(Protocol):
    """What is trained, on what, and how it is judged."""

    @property
    def model(self) -> nn.Module: ...

    def prepare(self) -> list[ParameterGroup]:
        """Freeze, cast and compile, once the model is on its device; what is left to train, in groups."""

    def micro_batches(self, step: int, count: int) -> Sequence[Any]:
        """The up to `count` micro-batches of this rank in a step: the same ones each time. Runs in another thread."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Summed loss and the count it is divided by, once a step's micro-batches are summed over all ranks."""

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; `loss` among them decides which checkpoint is the best. Rank 0 alone runs it."""

    def samples(self) -> list[str]:
        """A few outputs to read."""

    def save(self, folder: Path) -> None:
        """Write the model, complete, into an existing empty folder."""


@runtime_checkable
class DataState(Protocol):
    """A stage whose place in its data is more than the number of the step."""

    def data_state(self, step: int) -> dict[str, Any]:
        """JSON values from which step `step` can be loaded."""

    def load_data_state(self, state: dict[str, Any]) -> None:
        """Raises MMGPTError when the data is no longer what it was."""
