"""The gradient noise scale (McCandlish et al., 1812.06162, appendix A.1): how large a batch is worth its time.

B = tr(Σ) / |G|²: the noise of one target's gradient, Σ its covariance, over the square of the true gradient. A batch
much smaller than B learns twice as much from twice the targets; one much larger hardly more. Both are estimated without
bias from the squares of the gradient over two batches: the first micro-batch of each rank, and the whole step.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm_gpt.errors import MMGPTError
from mm_gpt.training.distributed import sum_over_ranks

MEMORY = 0.99
"""Of the moving averages: a single step says little, |G|² may even come out negative."""


class NoiseScale:
    """The moving averages of tr(Σ) and |G|², and what a step that is being computed has shown so far."""

    def __init__(self, averages: Sequence[float] = ()):
        """`averages`: what `state` gave, for a run that goes on."""
        self.variance, self.square = (*averages, 0.0, 0.0)[:2]
        self._first = (0.0, 0.0, 0.0)

    @property
    def state(self) -> list[float]:
        return [self.variance, self.square]

    def see_first(self, parameters: Sequence[nn.Parameter], terms: dict[str, float], counts: dict[str, float]) -> None:
        """After the backward pass of a rank's first micro-batch, whose learned terms have these counts and whose
        gradient was divided by `counts`, of the whole step.

        Raises MMGPTError for a loss of several terms, each of which has a batch of its own.
        """
        if len(counts) > 1:
            raise MMGPTError(f"noise_scale is of a loss of one term; this one has {', '.join(counts)}")
        gradients = [p.grad for p in parameters if p.grad is not None]
        own, whole = sum(terms.values()), sum(counts.values())
        if not own:
            self._first = (0.0, 0.0, 0.0)
            return
        norm = float(nn.utils.get_total_norm(gradients))
        self._first = ((norm * whole / own) ** 2, 1 / own, 1.0)

    def after_step(self, norm: Tensor, counts: dict[str, float], device: torch.device) -> dict[str, float]:
        """With the norm of the step's gradient, over all ranks and before it is clipped: what is to be logged."""
        small, inverse, found = sum_over_ranks(self._first, device)
        self._first = (0.0, 0.0, 0.0)
        whole = sum(counts.values())
        if not found or not whole or inverse / found - 1 / whole < 1e-9 / whole:
            return {}  # one micro-batch was the whole step
        small, inverse, large = small / found, inverse / found, float(norm) ** 2
        variance = (small - large) / (inverse - 1 / whole)  # E|g_B|² = |G|² + tr(Σ) / B
        self.variance += (1 - MEMORY) * (variance - self.variance)
        self.square += (1 - MEMORY) * (large - variance / whole - self.square)
        if self.square <= 0 or not math.isfinite(self.variance):
            return {}
        return {"noise_scale": max(0.0, self.variance) / self.square}
