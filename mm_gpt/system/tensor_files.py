"""Files of tensors, written whole: at once, or later as the tensors were when they were handed over."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mm_gpt.system.writing import whole_file

Job = Callable[[], None]

_later: ContextVar[list[Job] | None] = ContextVar("later", default=None)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, which gets its name when it is whole. Raises MMGPTError naming what cannot be written."""
    about = dict(metadata) if metadata is not None else None
    later = _later.get()
    if later is None:
        _write({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, about)
        return
    held = {name: host_copy(tensor) for name, tensor in tensors.items()}
    later.append(lambda: _write(held, path, about))


@contextmanager
def writing_later() -> Iterator[list[Job]]:
    """What `write_tensors` is given inside is copied; the jobs, which write the copies, may run in another thread."""
    jobs: list[Job] = []
    token = _later.set(jobs)
    try:
        yield jobs
    finally:
        _later.reset(token)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which does not change when the tensor does. It is done when this returns."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o644)  # the library writes for the owner alone; a model is to be shared
