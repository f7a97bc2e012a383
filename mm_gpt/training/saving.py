"""Writing the checkpoints of a run, at once or while it goes on.

Each rank writes its own tensors; rank 0 writes the model, tells who wrote what, and gives the folder its name when
everything is on the disk. In the background a thread writes copies of the tensors. It talks to no other rank: whether
all threads are done is asked between two steps, where the ranks meet anyway.
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mm_gpt.errors import MMGPTError
from mm_gpt.system.tensor_files import Job, writing_later
from mm_gpt.system.writing import begin_folder, drop_folder, hidden_folder, naming, put_folder, remove_folder
from mm_gpt.training.checkpoint import (
    FORMAT,
    PROGRESS_FILE,
    STATE_FOLDER,
    Progress,
    own_state,
    step_folders,
    topology,
)
from mm_gpt.training.distributed import gather_over_ranks, raise_together, ranks
from mm_gpt.training.parallel import gathered
from mm_gpt.training.stage import Stage
from mm_gpt.training.state_files import file_of, write_slices

logger = logging.getLogger(__name__)

KEEP = 2  # step folders; older ones are deleted


@dataclass
class _Pending:
    """A checkpoint that has no name yet."""

    folders: list[Path]
    """Which get their names, in this order."""
    about: dict[str, Any]
    """For `PROGRESS_FILE`."""
    jobs: list[Job] = field(default_factory=list)
    """What this rank has to write."""
    errors: list[Exception] = field(default_factory=list)
    writing: Future[None] | None = None


class Saver:
    """Saves the checkpoints of one run, all of whose ranks do the same at the same time."""

    def __init__(self, out: Path, device: torch.device, *, background: bool = False):
        self.out, self.device, self.background = out, device, background
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what is being written. Where ranks may have failed at different places, it is not given its name."""
        if self._pending is not None and (kind is None or ranks()[1] == 1):
            with nullcontext() if kind is None else _besides():
                self.finish()
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def save(self, stage: Stage, optimizer: torch.optim.Optimizer, progress: Progress, *, best: bool) -> None:
        """Write `OUT/step-NNNNNN`, and before it `OUT/best` when `best`.

        In this order a kill in between makes the run repeat these steps and save the best model again; in the other one
        the log would know of a best loss whose model nobody saved. In the background only the copying is done when this
        returns. Raises MMGPTError, on all ranks, naming what cannot be written, also of the checkpoint before this one;
        nothing of it is left then, and what was there before stays.
        """
        self.finish()
        step = self.out / f"step-{progress.step:06d}"
        about = asdict(progress) | {"format": FORMAT, "saved_by": topology(stage.model)}
        pending = _Pending([self.out / "best", step] if best else [step], about)
        self._pending = pending
        try:
            self._fill(pending, stage, optimizer)
            if self._thread is not None:
                pending.writing = self._thread.submit(_run, pending)
                return
            _run(pending)
            self.finish()
        except BaseException:
            self._drop()
            raise

    def _fill(self, pending: _Pending, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Make the folders, write the model or copy it, and note what else is to be written."""
        rank, world = ranks()
        state = hidden_folder(pending.folders[-1]) / STATE_FOLDER
        with _noted(pending):
            if rank == 0:
                for folder in pending.folders:
                    begin_folder(folder)
                with naming(state):
                    state.mkdir()
        self._agree(pending)
        later = writing_later() if self.background else nullcontext(pending.jobs)
        with gathered(stage.model), later as jobs, _noted(pending):
            if rank == 0:
                for folder in pending.folders:
                    stage.save(hidden_folder(folder))
        pending.jobs = jobs
        self._agree(pending)
        slices = own_state(stage, optimizer, copy=self.background)
        if slices:
            path = state / file_of(rank, world)
            pending.jobs.append(lambda: write_slices(slices, path))

    def _agree(self, pending: _Pending) -> None:
        raise_together(pending.errors[0] if pending.errors else None, self.device)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._pending is not None and self._pending.writing is not None and not self._pending.writing.done()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun last has its name, or raise why it cannot. All ranks call it."""
        pending = self._pending
        if pending is None:
            return
        try:
            if pending.writing is not None:
                pending.writing.result()
            self._agree(pending)
            files = self._files(pending)
            with _noted(pending):
                if ranks()[0] == 0:
                    self._put(pending, files)
            self._agree(pending)
        except BaseException:
            self._drop()
            raise
        self._pending = None

    def _files(self, pending: _Pending) -> dict[str, int]:
        """The files that all ranks wrote, with their bytes: another machine's may not be seen here yet."""
        rank, world = ranks()
        path = hidden_folder(pending.folders[-1]) / STATE_FOLDER / file_of(rank, world)
        own = {path.name: path.stat().st_size} if path.exists() else {}
        told = gather_over_ranks(json.dumps(own).encode(), self.device)
        return {name: size for each in told for name, size in json.loads(each).items()}

    def _put(self, pending: _Pending, files: dict[str, int]) -> None:
        path = hidden_folder(pending.folders[-1]) / PROGRESS_FILE
        with naming(path):
            path.write_text(json.dumps(pending.about | {"files": files}) + "\n")
        for folder in pending.folders:
            put_folder(folder)
        for old in step_folders(self.out)[:-KEEP]:  # only now that the new one is durable
            remove_folder(old)

    def _drop(self) -> None:
        """Leave nothing of a checkpoint that failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.writing is not None:
            pending.writing.exception()  # waits
        if ranks()[0] == 0:
            for folder in pending.folders:
                drop_folder(folder)


def _run(pending: _Pending) -> None:
    with _noted(pending):
        for job in pending.jobs:
            job()
    pending.jobs = []  # and the copies with them


@contextmanager
def _noted(pending: _Pending) -> Iterator[None]:
    """An exception inside is raised later, when all ranks are there to learn of it."""
    try:
        yield
    except Exception as error:
        pending.errors.append(error)


@contextmanager
def _besides() -> Iterator[None]:
    """An error inside is one line beside that which is being raised already."""
    try:
        yield
    except MMGPTError as error:
        logger.error("%s", error)
