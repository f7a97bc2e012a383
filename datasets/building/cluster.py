"""Corpora built on many machines: the parts that `building.runner.Runner` works on, on a Ray cluster.

All machines must see sources, output folder, and whatever settings name (a quality classifier, an index of evaluation
sets) under the same names: on a network file system, or for sources in an object store. mm-gpt must be installed on all
of them, in one version: no code is sent. Only small rows travel: which part, and what came of it.

A machine may die, or come, at any time. Ray runs again what was lost, and a part that runs twice does no harm (see
`building.corpus`). When the driver's own machine dies, the same command continues.
"""

import json
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mm_gpt import __version__
from mm_gpt.datasets.building.runner import Argument, Result, Runner
from mm_gpt.datasets.samples import optional_import
from mm_gpt.errors import MMGPTError

ATTEMPTS = 5
"""How often a part is started when the process or machine that works on it dies. A page that kills every process that
reads it must not keep a cluster busy for ever."""
LOG_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,  # that there is no progress bar of its own
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,  # what is raised as well
}
BLOCK_BYTES = 2**20
"""Ray sets memory aside for a task's result; ours are small."""


class RayRunner(Runner):
    """Runs a function over items with Ray Data. Results must be JSON values."""

    def __init__(self, address: str | None = None, *, workers: int | None = None, progress: bool = True):
        """`address` is `HOST:PORT` of a cluster that this machine is part of, `auto` for the one that runs here, None
        for one that is started, of this machine only. `workers` is how many items are worked on at a time, a CPU each;
        None: as many as there are CPUs. The first run connects, and raises MMGPTError when there is no such cluster.
        """
        super().__init__(workers, progress=progress)
        self.address = address
        self._limit = workers
        self._started = False

    def results(self, function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
        """The results in the order of items, whatever the order in which they come.

        An MMGPTError is raised as soon as it is known, and when a part was given up.
        """
        if not arguments:
            return
        ray = self._connect()
        waiting: dict[int, Result] = {}
        number = 0
        try:
            for row in self._dataset(_RayTask(function, __version__), arguments).iter_rows():
                if row["error"]:
                    raise MMGPTError(row["error"])
                waiting[row["number"]] = json.loads(row["result"])
                while number in waiting:
                    yield waiting.pop(number)
                    number += 1
        except ray.exceptions.RayError as error:
            is_system = isinstance(error, ray.exceptions.RaySystemError)  # such as a machine without mm-gpt
            if isinstance(error, ray.exceptions.RayTaskError) and not is_system:
                raise  # a bug of ours, with its traceback
            raise MMGPTError(
                f"Ray gave up on a part after {ATTEMPTS} attempts: {_first_line(getattr(error, 'cause', error))}"
            ) from None
        if number < len(arguments):
            raise RuntimeError(f"Ray returned {number} of {len(arguments)} results")

    def close(self) -> None:
        """Leave the cluster, or stop it if it is our own."""
        if self._started:
            optional_import("ray", extra="cluster").shutdown()
            self._started = False

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Any:
        """The module `ray`, connected. A connection that the program has already is used as it is."""
        if self.address is not None and self.address != "auto":
            _check_reachable(self.address)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` Ray would send this folder to all machines
        ray = optional_import("ray", extra="cluster")
        optional_import("ray.data", extra="cluster")
        for name, level in LOG_LEVELS.items():
            logging.getLogger(name).setLevel(level)
        if ray.is_initialized():
            return ray
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self.address is None:
                ray.init("local", num_cpus=self.workers, include_dashboard=False, **quiet)
            else:
                ray.init(self.address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "of its own" if self.address is None else f"at {self.address}"
            raise MMGPTError(f"no Ray cluster {where}: {_first_line(error)}") from None
        self._started = True
        return ray

    def _dataset(self, task: "_RayTask", items: Sequence[Any]) -> Any:
        """One block for each item, so that each is a task of its own."""
        data = optional_import("ray.data", extra="cluster")
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = context.print_on_execution_start = context.enable_auto_log_stats = False
        context.target_max_block_size = BLOCK_BYTES
        # Pickled by the driver for its own workers, as Ray does with the function beside it: nothing from outside.
        rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
        with data.DataContext.current(context), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `max_retries` has no other place yet; without it Ray tries for ever
            source = data.from_items(rows, override_num_blocks=len(rows))
            compute = data.TaskPoolStrategy(size=self._limit)
            return source.map(task, compute=compute, num_cpus=1, max_retries=ATTEMPTS - 1)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check_reachable(address: str) -> None:
    """Raises MMGPTError when nobody listens: Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isascii() or not port.isdigit():
        raise MMGPTError(f"{address}: not HOST:PORT of a Ray cluster that this machine is part of")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise MMGPTError(f"no Ray cluster at {address}: {error}") from None


@dataclass(frozen=True)
class _RayTask:
    """What a worker does with a row. An MMGPTError comes back as a value: Ray makes another of an exception it sees."""

    function: Callable[[Any], Any]
    version: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result, error = "null", ""
        try:
            if self.version != __version__:
                host = os.uname().nodename
                raise MMGPTError(f"mm-gpt is {__version__} on {host}, and {self.version} where the build was started")
            result = json.dumps(self.function(pickle.loads(row["item"])))
        except MMGPTError as problem:
            error = str(problem)
        return {"number": row["number"], "result": result, "error": error}
