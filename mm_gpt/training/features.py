"""What a frozen vision tower sees, in the fastest form that this processor has, and remembered.

A tower that is not trained gives the same for the same pixels each time. Where images are not augmented, the epochs
after the first need not run it again.
"""

import copy
import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.vision.encoder import VisionEncoder
from mm_gpt.vision.native_vit import NativeViT

logger = logging.getLogger(__name__)

Seen = tuple[Tensor, Tensor | None]
"""Patch tokens (N, P, D_v), and the probabilities of classes (N, C) where the tower has concepts."""


class FrozenTower:
    """A copy of a tower, prepared for inference in bfloat16, that keeps up to `max_bytes` of what it has seen.

    The copy leaves the tower itself as it is, to be saved. Images that are remembered go through it one at a time: what
    an image gives then has the same bits whatever it came with, and whether or not it was remembered.
    """

    def __init__(self, vision: VisionEncoder, *, max_bytes: int):
        self.vision = copy.deepcopy(vision).requires_grad_(False).eval()
        if lack := self.vision.prepare("bf16"):
            logger.info("the frozen vision tower runs in float32: %s", lack)
            self.vision = vision  # which takes no second place in memory
        self.dtype = next(self.vision.parameters()).dtype
        self.room = 0 if isinstance(vision.tower, NativeViT) else max_bytes
        self.remembered: dict[bytes, Seen] = {}
        self.hits = 0
        """Images that were not computed again."""

    @torch.no_grad()
    def see(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]] = ()) -> Seen:
        """As `VisionEncoder.see`, of pixels (N, 3, H, W)."""
        if not self.room and not self.remembered:
            return self._see(pixel_values, grids)
        each = [self._recall(pixels) for pixels in pixel_values.split(1)]
        scores = [found for _, found in each if found is not None]
        return torch.cat([tokens for tokens, _ in each]), torch.cat(scores) if scores else None

    def _recall(self, pixels: Tensor) -> Seen:
        """Of one image. What there is no room for any more is computed each time: to forget the oldest would forget
        each image just before its next epoch."""
        key = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16).digest()
        if key in self.remembered:
            self.hits += 1
            return self.remembered[key]
        seen = self._see(pixels, ())
        size = sum(tensor.numel() * tensor.itemsize for tensor in seen if tensor is not None)
        if size <= self.room:
            self.room -= size
            self.remembered[key] = seen
        return seen

    def _see(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> Seen:
        with torch.autocast("cpu", enabled=False):
            return self.vision.see(pixel_values.to(self.dtype), grids)


def use_frozen_tower(model: MMGPT, *, max_bytes: int) -> None:
    """Let a model see through a `FrozenTower` in training, where its tower is frozen and it is on the CPU."""
    if model.vision is None or model.device.type != "cpu" or any(p.requires_grad for p in model.vision.parameters()):
        return
    model.frozen_tower = FrozenTower(model.vision, max_bytes=max_bytes)
