"""The reference policy: what the policy was before it was trained, without a second model in memory.

What is trained is small beside what is not (low-rank adaptation, a connector), and everything else is shared.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mm_gpt.model.lora import LoRALinear


class Reference:
    """The parameters that are trained, as they were."""

    def __init__(self, model: nn.Module):
        """To be made when it is known what is trained, before the first step and before a run's state is loaded.

        A fresh low-rank adaptation needs no copy: it is switched off. Everything else that is trained is copied.
        """
        self.model = model
        self._fresh = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear) and not module.lora_b.any()
        }
        switched = {f"{name}.{part}" for name in self._fresh for part in ("lora_a", "lora_b")}
        self._trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in switched
        }
        self._kept = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.is_active = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model is the reference policy while inside: no gradients, no dropout."""
        was = {module: module.training for module in self.model.modules()}
        self._swap()
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in was.items():
                module.training = training
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self._fresh.values():
            module.enabled = self.is_active
        for name, parameter in self._trained.items():
            kept = self._kept[name]
            self._kept[name], parameter.data = parameter.data, kept.to(parameter.device)
        self.is_active = not self.is_active
        torch.clear_autocast_cache()  # inside autocast it has the other weights, and without their graph
