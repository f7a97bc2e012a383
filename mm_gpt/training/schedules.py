"""The learning rate of each step, and how many micro-batches it learns from."""

import math
from collections.abc import Sequence

from mm_gpt.datasets.loading.step_sizes import StepSizes
from mm_gpt.errors import ConfigError
from mm_gpt.training.stage import SizedSteps, Stage
from mm_gpt.training.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int, cycles: Sequence[int] = (), sizes: StepSizes | None = None) -> float:
    """Linear warm-up, then `config.schedule`; steps count from 0.

    `cycles`: the steps at which cycles end, by default one at `config.steps`. A later cycle is what a run was given
    when it was continued with more steps: it warms up from the final rate again over a tenth of its own steps
    (re-warming and re-decaying, 2403.08763), so that the rate never jumps.

    `sizes`: where steps grow, the schedule goes by what was learned, not by steps, as in GPT-3 (2005.14165): each step
    is as long as its share of a full one.
    """
    sizes = sizes or StepSizes(1)

    def learned(steps: int) -> float:  # in full steps
        return sizes.before(steps) / sizes.full

    ends = list(cycles) or [config.steps]
    number = next((n for n, end in enumerate(ends) if step < end), len(ends) - 1)
    if config.schedule == "constant":
        number, ends = 0, ends[-1:]
    begin, floor = (ends[number - 1] if number else 0), config.final_lr
    place, length = learned(step) - learned(begin), learned(ends[number]) - learned(begin)
    warmup = max(1, round(length / 10)) if number else config.warmup_steps
    if place < warmup:
        at_end = learned(step + 1) - learned(begin)
        return config.lr * (floor + (1 - floor) * place / warmup if number else min(1.0, at_end / warmup))
    first, last = _fall(config, length, warmup)
    progress = min(1.0, max(0.0, (place - first) / max(1, last - first)))
    match config.schedule:
        case "constant":
            left = 1.0
        case "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear" | "wsd":
            left = 1 - progress
    return config.lr * (floor + (1 - floor) * left)


def _fall(config: TrainConfig, length: float, warmup: float) -> tuple[float, float]:
    """Between which places of a cycle of `length` the rate falls."""
    last = length * (1 - config.final_share)
    first = last - config.decay_share * length if config.schedule == "wsd" else warmup
    return max(warmup, first), last


def cycle_ends(config: TrainConfig, done: int, ends: Sequence[int], sizes: StepSizes | None = None) -> list[int]:
    """The steps at which cycles end, for a run of which `done` steps are done and whose cycles ended at `ends` so far.

    More steps are a cycle of their own, unless the rate has not begun to fall: then the cycle that there is grows. That
    is what the plateau of `wsd` is for, and `constant` never falls.
    """
    if config.steps <= max(ends, default=0):
        return list(ends)
    if config.schedule == "constant":
        return [config.steps]
    if config.schedule == "wsd" and len(ends) == 1:
        sizes = sizes or StepSizes(1)
        first, _ = _fall(config, sizes.before(ends[0]) / sizes.full, config.warmup_steps)
        if sizes.before(done) / sizes.full <= first:
            return [config.steps]
    return [*ends, config.steps]


def sizes_of(stage: Stage, config: TrainConfig) -> StepSizes:
    """The micro-batches of each step of a stage. Raises ConfigError for tokens where a stage does not count them."""
    if isinstance(stage, SizedSteps):
        return stage.step_sizes
    if config.step_tokens is not None or config.ramp_from is not None:
        raise ConfigError("step_tokens and ramp_from are for stages that learn packed rows: give accumulate here")
    return StepSizes(config.accumulate)


def step_sizes(config: TrainConfig, micro_tokens: int) -> StepSizes:
    """The micro-batches of each step, of which one holds `micro_tokens` over all ranks, padding included.

    Raises ConfigError for a ramp that does not grow.
    """
    full = config.accumulate if config.step_tokens is None else math.ceil(config.step_tokens / micro_tokens)
    if config.ramp_from is None or config.ramp_tokens is None:
        return StepSizes(full)
    first = math.ceil(config.ramp_from / micro_tokens)
    if first >= full:
        raise ConfigError(
            f"ramp_from={config.ramp_from} are {first} micro-batches of {micro_tokens:,} tokens over all processes, "
            f"and a whole step has {full}: give a larger step_tokens"
        )
    return StepSizes(full, first, math.ceil(config.ramp_tokens / micro_tokens))
