"""What a run has used so far, and how fast: tokens, FLOPs, their share of the device's peak, memory.

Tokens and FLOPs are those of all ranks, without padding, and go on exactly where a run does. MFU is model FLOPs over
what the devices could have multiplied in bf16 in the same time (2204.02311, appendix B); time for validation and
checkpoints is not counted, waiting for data is.
"""

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.distributed import ranks
from mm_gpt.training.stage import Measured, Stage
from mm_gpt.training.train_config import TrainConfig, use_bf16

BF16_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""FLOP/s of dense products in bf16 with float32 sums, from the makers' data sheets."""


def known_peak(name: str) -> float | None:
    """FLOP/s in bf16 of a GPU by its name, such as "NVIDIA H200"; None for one that is not in the table."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in BF16_PEAKS.items() if f" {part} " in words), None)


def measured_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """FLOP/s of a large square product here and now: the best of several."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Telemetry:
    """Counts a run's steps. A stage that is not `Measured` has memory alone."""

    def __init__(self, stage: Stage, config: TrainConfig, device: torch.device):
        self.stage, self.device = stage, device
        self.peak: float | None = None
        if config.mfu_peak == "measured":
            dtype = torch.bfloat16 if use_bf16(config.precision, device) else torch.float32
            self.peak = measured_peak(device, dtype)
        elif device.type == "cuda":
            self.peak = known_peak(torch.cuda.get_device_name(device))

    def count(self, batches: Sequence[Any]) -> list[float]:
        """Tokens and FLOPs of this rank's micro-batches of a step: to be summed over ranks."""
        if not isinstance(self.stage, Measured):
            return []
        return [
            float(sum(self.stage.tokens(batch) for batch in batches)),
            float(sum(self.stage.flops(batch) for batch in batches)),
        ]

    def measure(self, at: Progress, counted: Sequence[float], seconds: float) -> dict[str, float]:
        """What is to be logged of a step that took so long, given the sums over all ranks, which `at` takes over."""
        values: dict[str, float] = {}
        if counted:
            tokens, flops = counted
            at.tokens += int(tokens)
            at.flops += flops
            values = {"tokens": at.tokens, "flops": at.flops, "tokens_per_s": tokens / seconds}
            if self.peak is not None:
                values["mfu"] = flops / seconds / (self.peak * ranks()[1])
        return values | {"memory": peak_memory(self.device)}
