"""The learning rate of each step."""

import math
from collections.abc import Sequence

from mm_gpt.training.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int, cycles: Sequence[int] = ()) -> float:
    """Linear warm-up, then cosine to `final_lr`; steps count from 0.

    `cycles`: the steps at which cycles end, by default one at `config.steps`. A later cycle is what a run was given
    when it was continued with more steps: it warms up from the final rate again over a tenth of its own steps
    (re-warming and re-decaying, 2403.08763), so that the rate never jumps.
    """
    ends = list(cycles) or [config.steps]
    number = next((n for n, end in enumerate(ends) if step < end), len(ends) - 1)
    begin, floor = (ends[number - 1] if number else 0), config.final_lr
    place, length = step - begin, ends[number] - begin
    warmup = max(1, round(length / 10)) if number else config.warmup_steps
    if place < warmup:
        return config.lr * (floor + (1 - floor) * place / warmup if number else (place + 1) / warmup)
    progress = (place - warmup) / max(1, length - warmup)
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
