"""A function over many arguments, in processes of this machine."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.system.processes import process_pool

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Runner:
    """Runs a function over arguments in processes of this machine; `building.cluster.RayRunner` on many machines."""

    def __init__(self, workers: int | None = None, *, progress: bool = True):
        if workers is not None and workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers}")
        self.workers = workers or os.cpu_count() or 1
        self.progress = progress

    def __call__(
        self, what: str, function: Callable[[Argument], Result], arguments: Sequence[Argument]
    ) -> Iterator[Result]:
        """The results in their order. What `function` raises is raised here."""
        yield from tqdm(
            self.results(function, arguments), total=len(arguments), desc=what, unit="part", disable=not self.progress
        )

    def results(self, function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
        if self.workers == 1 or len(arguments) < 2:
            yield from map(function, arguments)
            return
        try:
            with process_pool(min(self.workers, len(arguments))) as pool:
                yield from pool.map(function, arguments)
        except BrokenProcessPool:
            raise MMGPTError("a worker process was killed, for its memory perhaps; what is finished is kept") from None
