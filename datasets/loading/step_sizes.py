"""How many micro-batches each step has: always as many, or more and more of them at the start of a run (GPT-3's ramp).

A pure function of the step, so that a run that was stopped, and every rank of it, knows which rows a step has.
"""

from dataclasses import dataclass, field

from mm_gpt.config import check_numbers
from mm_gpt.errors import ConfigError

MAX_RAMP_STEPS = 1_000_000


@dataclass(frozen=True)
class StepSizes:
    """Micro-batches of one rank in a step: `full`, once the steps have grown.

    Before, a step has `first` and grows linearly with the micro-batches behind it until there are `growth` of them, in
    multiples of `first`: the steps are then the same for half as many micro-batches of twice the size. Raises
    ConfigError for a ramp that does not rise, and for one of more than a million steps.
    """

    full: int
    first: int = 0
    """0: no ramp."""
    growth: int = 0
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The micro-batches before each step of the ramp, and before the first full one."""

    def __post_init__(self) -> None:
        check_numbers(self, "full", at_least=1)
        check_numbers(self, "first", "growth", at_least=0)
        starts = [0]
        if self.first:
            if self.first >= self.full:
                raise ConfigError(f"steps cannot grow from {self.first} micro-batches to {self.full}")
            if self.growth // self.first > MAX_RAMP_STEPS:
                raise ConfigError(f"the ramp would take up to {self.growth // self.first:,} steps: begin with more")
            while starts[-1] < self.growth:
                starts.append(starts[-1] + self._grown(starts[-1]))
        object.__setattr__(self, "_starts", tuple(starts))

    def _grown(self, before: int) -> int:
        line = self.first * self.growth + (self.full - self.first) * before  # times `growth`, to stay with integers
        return min(self.full, line // (self.growth * self.first) * self.first)

    def count(self, step: int) -> int:
        """Micro-batches of one rank in `step`, which counts from 0."""
        return self._grown(self._starts[step]) if step < len(self._starts) - 1 else self.full

    def before(self, step: int) -> int:
        """Those of one rank in all steps before `step`."""
        last = len(self._starts) - 1
        return self._starts[step] if step < last else self._starts[last] + (step - last) * self.full
