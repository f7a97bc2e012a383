"""A moving average of the weights that are trained (EMA): PPO's last policy wavers, its mean does not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError

PREFIX = "average."


class WeightAverage:
    """average = decay · average + (1 - decay) · weights after each step, in float32."""

    def __init__(self, model: nn.Module, decay: float):
        """To be made when it is known what is trained; the average begins with the first weights."""
        self.decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach().float(), 1 - self.decay)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model has the average's weights while inside."""
        kept = {name: parameter.data for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            parameter.data = self._average[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.data = kept[name]

    def state_tensors(self) -> dict[str, Tensor]:
        return {PREFIX + name: average.cpu() for name, average in self._average.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises CheckpointError for an average of another model."""
        own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        shapes = {name: average.shape for name, average in self._average.items()}
        if {name: tensor.shape for name, tensor in own.items()} != shapes:
            raise CheckpointError("the checkpoint's average of weights is not one of this model")
        for name, tensor in own.items():
            self._average[name].copy_(tensor)
