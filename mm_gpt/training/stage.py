"""What a stage of training is made of: the side of it that the loop sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mm_gpt.datasets.loading.step_sizes import StepSizes


@dataclass(frozen=True)
class ParameterGroup:
    name: str
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Term:
    """A part of a step's loss: `weight` times the sum of its totals over the sum of its counts.

    The sums run over the step's micro-batches and all ranks, so that each part has a denominator of its own: PPO's
    tokens beside those of pretraining. Weight 0 makes it a gauge, which is logged and not learned.
    """

    total: Tensor
    count: float
    weight: float = 1.0


Terms = Mapping[str, Term]


@dataclass(frozen=True)
class Decides:
    """Which of `validate`'s values makes a checkpoint the best."""

    metric: str = "loss"
    higher_is_better: bool = False

    def is_better(self, value: float, than: float | None) -> bool:
        """NaN is never better, and anything is better than None."""
        if than is None:
            return value == value
        return value > than if self.higher_is_better else value < than


LOWEST_LOSS = Decides()


class Stage(Protocol):
    """What is trained, on what, and how it is judged."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def on_policy(self) -> bool:
        """Whether micro-batches depend on the weights: they are then asked for when the step before is done."""

    @property
    def decides(self) -> Decides: ...

    def prepare(self) -> list[ParameterGroup]:
        """Freeze, cast and compile, once the model is on its device; what is left to train, in groups."""

    def micro_batches(self, step: int, count: int) -> Sequence[Any]:
        """The up to `count` micro-batches of this rank in a step: the same ones each time. Runs in another thread,
        unless the stage is on-policy."""

    def counts(self, batch: Any) -> Mapping[str, float]:
        """What each learned term of `loss` is divided by, as far as this micro-batch goes: known before it is computed,
        since a gradient of several terms cannot be divided afterwards."""

    def loss(self, batch: Any) -> Terms:
        """The terms of the loss, with the counts that `counts` gives, and gauges."""

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data; the one that `decides` among them.

        All ranks run it: they divide what is held out and sum, or each sees all of it. Rank 0's values count."""

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


@runtime_checkable
class SizedSteps(Protocol):
    """A stage that knows how many tokens a micro-batch holds, and so how many of them make a step."""

    @property
    def step_sizes(self) -> StepSizes: ...


@runtime_checkable
class Shards(Protocol):
    """A stage whose `prepare` divides the model among ranks as `train.shard` says: it then brings it to its device."""

    shards: bool
    """Whether it does."""


@runtime_checkable
class TensorState(Protocol):
    """A stage that needs more than its model to go on, such as samples that are not all learned from yet."""

    def state_tensors(self) -> dict[str, Tensor]:
        """On the CPU; saved with every checkpoint."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Called before the first step of a run that goes on. Raises CheckpointError for what does not fit."""


@runtime_checkable
class Measured(Protocol):
    """A stage that knows what a micro-batch holds and costs."""

    def tokens(self, batch: Any) -> int:
        """Without padding; those that stand for an image are tokens as well."""

    def flops(self, batch: Any) -> float:
        """Of its forward and backward pass (`mm_gpt.model.flops`)."""


@runtime_checkable
class AfterStep(Protocol):
    """A stage with something to do behind a step: to average weights, to log what its time went to."""

    def after_step(self) -> dict[str, float]:
        """What is to be logged of the step that has just been done, besides the terms of its loss."""
