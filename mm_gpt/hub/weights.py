"""Weights from safetensors files into modules: tables of names, no second copy in memory, and an exact account.

A table maps each parameter to where it comes from: `{"blocks.{i}.mlp.down.weight": same("layers.{i}.fc2.weight")}`
with `{i}` for the number of a layer. The same table, read backwards, is the exporter.

A matrix that is stored as it is needed, in one place (gate and up mostly are), becomes a mapping of its part of the
file, one for each, which goes when the matrix does. The rest, such as q, k and v or another type, is read into place
through a small buffer: a file that is mapped as a whole would stay in memory next to the parameters made of it.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.packing import Packing, Rows, packed, places, put, shape_of
from mm_gpt.kernels.formats import PLAIN
from mm_gpt.model.packed import Matrix
from mm_gpt.system.writing import write_text

CHUNK_BYTES = 256 << 10
"""Read at a time where the type changes: little enough to stay in a core's cache."""
MAX_THREADS = 4
"""That read at once. One is slower: most of the time goes into the pages of new memory, not into the disk."""
MAPPED_BYTES = 1 << 20
"""From this size on a tensor is mapped."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as."""


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules are built on the meta device, and nothing is drawn for them.

    Without this, random numbers on the meta device import torch's compiler to draw nothing: seconds, and 80 MB.
    """
    with torch.device("meta"), NothingDrawn():
        yield


class NothingDrawn(TorchFunctionMode):
    """Where modules are built whose weights are read afterwards: random ones would take time for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (torch.rand, torch.randn):
            func = torch.empty
        if func is torch.linspace:  # older versions of timm ask it for drop rates, as numbers
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


_BROKEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Whatever is wrong with a model's configuration becomes one CheckpointError that names the file."""
    try:
        yield
    except MMGPTError as error:
        if str(Path(where).parent) in str(error):
            raise
        raise CheckpointError(f"{where}: {error}") from None
    except _BROKEN as error:  # a value of a type or a size that nobody asked about
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{where}: no configuration of this model type ({what})") from error


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Origin:
    """Where one of our parameters comes from."""

    parts: tuple[str, ...]
    """Names in the other format; several are stacked along the first dimension."""
    read: Callable[[Tensor], Tensor] = _as_it_is
    """A part of theirs to ours."""
    write: Callable[[Tensor], Tensor] = _as_it_is
    """Ours to a part of theirs."""


Table = dict[str, Origin]


def same(*parts: str) -> Origin:
    return Origin(parts)


def transposed(*parts: str) -> Origin:
    """Stored as (in, out), as GPT-2's Conv1D does."""
    return Origin(parts, lambda t: t.t(), lambda t: t.t())


def plus_one(part: str) -> Origin:
    """Norm weights stored as their distance from one, as Gemma does."""
    return Origin((part,), lambda t: t.float() + 1, lambda t: t.float() - 1)


def times(part: str, factor: float) -> Origin:
    return Origin((part,), lambda t: t.float() * factor, lambda t: t.float() / factor)


class WeightLoader:
    """Tensors of another format, by name: taken one by one into modules, and accounted for at the end."""

    def __init__(self, where: str, names: Collection[str]):
        self.where, self.names = where, names
        self._used: set[str] = set()
        self._missing: list[str] = []

    def fill(
        self,
        module: nn.Module,
        table: Table,
        read: Callable[[str], Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        skip: Collection[str] = (),
        packing: Packing | None = None,
        rows: Callable[[str], Rows] | None = None,
    ) -> None:
        """Give every parameter of `module`, which may be on the meta device, its tensor as `read` gives it.

        `skip` names parameters of ours that come from elsewhere. `packing` says how the weights of packed modules are
        kept; `rows` gives them, where `read` would expand them. What is missing is remembered for `finish`. Raises
        CheckpointError for a shape that does not fit.
        """
        if packing is not None:
            self._pack(module, table, packing, lambda part, origin: (rows or _rows_of(read, origin))(part))

        def put(part: str, origin: Origin, room: Tensor) -> int:
            tensor = origin.read(read(part))
            self._place(part, origin, room, tensor.shape).copy_(tensor)
            return tensor.shape[0] if tensor.dim() else 1

        self._fill(module, table, put, dtype=dtype, skip=skip)

    def _fill(
        self,
        module: nn.Module,
        table: Table,
        put: Callable[[str, Origin, Tensor], int],
        *,
        dtype: torch.dtype,
        skip: Collection[str],
    ) -> None:
        """`put` writes a part into the first rows of the room that is left, and says how many it took."""
        for ours, parameter in list(module.named_parameters()):
            if ours in skip or not (parts := self._parts(ours, table)):
                continue
            origin = table[template_of(ours)[0]]
            target = self._mapped(parts, origin, parameter, dtype)
            if target is None:
                target = self._empty(parts[0], parameter, dtype)
                start = 0
                for part in parts:
                    start += put(part, origin, target[start:] if len(parts) > 1 else target)
                if len(parts) > 1 and start != len(target):
                    raise CheckpointError(f"{self.where}: {', '.join(parts)} have {start} rows, not {len(target)}")
            _set_parameter(module, ours, nn.Parameter(target, requires_grad=parameter.requires_grad))

    def _parts(self, ours: str, table: Table) -> list[str]:
        """The tensors that make up a parameter; none where one is missing, which is remembered."""
        template, layer = template_of(ours)
        parts = [part.replace("{i}", layer) for part in table[template].parts]
        absent = [part for part in parts if part not in self.names]
        self._used.update(parts)
        self._missing += absent
        return [] if absent else parts

    def _pack(self, module: nn.Module, table: Table, packing: Packing, rows: Callable[[str, Origin], Rows]) -> None:
        """The weights of the packed modules inside `module`."""
        for ours, place in places(module):
            if not (parts := self._parts(ours, table)):
                continue
            sources = [rows(part, table[template_of(ours)[0]]) for part in parts]
            height, width = shape_of(place)
            for part, source in zip(parts, sources, strict=True):
                if source.columns != width or (len(parts) == 1 and source.rows != height):
                    wanted = height if len(parts) == 1 else source.rows
                    shape = (source.rows, source.columns)
                    raise CheckpointError(f"{self.where}: {part} has shape {shape}, not {(wanted, width)}")
            if (total := sum(source.rows for source in sources)) != height:
                raise CheckpointError(f"{self.where}: {', '.join(parts)} have {total} rows, not {height}")
            put(place, packed(ours, sources, packing, self.where))

    def _mapped(self, parts: Sequence[str], origin: Origin, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The parameter as a piece of a file, where there is one that is the same byte for byte."""
        return None

    def _empty(self, part: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        try:
            return torch.empty(parameter.shape, dtype=dtype, device=device)
        except RuntimeError:
            shape = tuple(parameter.shape)
            raise CheckpointError(f"{self.where}: no memory for {part} of shape {shape}") from None

    def _place(self, part: str, origin: Origin, room: Tensor, shape: Sequence[int]) -> Tensor:
        """Where in `room` a part of this shape belongs. Raises CheckpointError when it does not fit."""
        place = room[: shape[0]] if len(origin.parts) > 1 and shape else room
        if place.shape != torch.Size(shape):
            raise CheckpointError(f"{self.where}: {part} has shape {tuple(shape)}, not {tuple(place.shape)}")
        return place

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """WeightLoader for every tensor. `ignore`: patterns of names that are known and not needed.

        Raises CheckpointError that lists what is missing and what is left over.
        """
        known = [re.compile(pattern) for pattern in ignore]
        left_over = [n for n in self.names if n not in self._used and not any(p.fullmatch(n) for p in known)]
        problems = []
        if self._missing:
            problems.append(f"lacks {_listed(self._missing)}")
        if left_over:
            problems.append(f"has {_listed(left_over)} left over")
        if problems:
            raise CheckpointError(f"{self.where}: the checkpoint {' and '.join(problems)}")


def _rows_of(read: Callable[[str], Tensor], origin: Origin) -> Callable[[str], Rows]:
    return lambda part: Matrix.of(origin.read(read(part)))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """In bytes, from the beginning of the file."""

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Checkpoint(WeightLoader):
    """The tensors of a folder: `model.safetensors`, or shards with an index.

    Raises CheckpointError naming the file when it is missing, corrupt, or a pickle stands in its place.
    """

    def __init__(self, folder: Path):
        files = safetensors_index(folder)
        headers = {path: read_header(path) for path in sorted(set(files.values()))}
        for name, path in files.items():
            if name not in headers[path]:
                raise CheckpointError(f"{path}: lacks {name}, which the index says is here")
        self.tensors = {name: headers[path][name] for name, path in files.items()}
        super().__init__(str(folder), self.tensors)

    def load(
        self,
        module: nn.Module,
        table: Table,
        *,
        dtype: torch.dtype = torch.float32,
        skip: Collection[str] = (),
        packing: Packing | None = None,
    ) -> None:
        """`fill` from the files, which may be replaced by others afterwards, but not written into."""
        if packing is not None:
            self._pack(module, table, packing, self._rows)
        jobs: list[Future[None]] = []
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:

            def put(part: str, origin: Origin, room: Tensor) -> int:
                stored = self._stored(part)
                with torch.device("meta"):
                    shape = stored.shape if origin.read is _as_it_is else origin.read(torch.empty(stored.shape)).shape
                place = self._place(part, origin, room, shape)
                jobs.append(pool.submit(_read, stored, origin, place))
                return shape[0] if shape else 1

            try:
                self._fill(module, table, put, dtype=dtype, skip=skip)
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _mapped(self, parts: Sequence[str], origin: Origin, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        stored = [self._stored(part) for part in parts]
        first, last = stored[0], stored[-1]
        if (
            origin.read is not _as_it_is
            or not parameter.dim()
            or not (parameter.is_meta or parameter.device.type == "cpu")
            or any(DTYPES[s.dtype] != dtype or not s.shape or s.shape[1:] != parameter.shape[1:] for s in stored)
            or sum(s.shape[0] for s in stored) != len(parameter)
            or any((a.path, a.end) != (b.path, b.start) for a, b in pairwise(stored))
            or last.end - first.start < MAPPED_BYTES
            or first.start % dtype.itemsize
        ):
            return None
        mapped = _map(first.path, first.start, last.end, dtype)
        return None if mapped is None else mapped.view(parameter.shape)

    def _rows(self, name: str, origin: Origin) -> Rows:
        """A matrix, to be read row by row where it is stored as it is needed."""
        stored = self._stored(name)
        if origin.read is _as_it_is and len(stored.shape) == 2 and stored.dtype in PLAIN:
            return _FileRows(stored)
        tensor = origin.read(self.tensor(name))
        if tensor.dim() != 2:
            raise CheckpointError(f"{self.where}: {name} has shape {tuple(tensor.shape)}, which is no matrix's")
        return Matrix.of(tensor)

    def kinds(self, module: nn.Module, table: Table) -> set[str]:
        """How the matrices are stored that a module's linear layers and embedding are to be filled with."""
        layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        templates = [template_of(f"{name}.weight") for name in ("embedding", *layers)]
        parts = [part.replace("{i}", layer) for template, layer in templates for part in table[template].parts]
        return {self._stored(part).dtype for part in parts if part in self.names}

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return _whole(self._stored(name))

    def _stored(self, name: str) -> Stored:
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            kinds = ", ".join(DTYPES)
            raise CheckpointError(
                f"{stored.path}: {name} is stored as {stored.dtype}; quantised weights are not read, only {kinds}"
            )
        return stored


@dataclass(frozen=True)
class _FileRows:
    """A matrix in a file."""

    stored: Stored

    @property
    def kind(self) -> str:
        return self.stored.dtype

    @property
    def rows(self) -> int:
        return self.stored.shape[0]

    @property
    def columns(self) -> int:
        return self.stored.shape[1]

    def values(self, start: int, stop: int) -> Tensor:
        place = self.stored.start + start * self.columns * DTYPES[self.kind].itemsize
        return _whole(Stored(self.stored.path, self.kind, (stop - start, self.columns), place)).float()

    def whole(self) -> Matrix:
        stored, dtype = self.stored, DTYPES[self.kind]
        mapped = None if stored.start % dtype.itemsize else _map(stored.path, stored.start, stored.end, dtype)
        return Matrix(self.kind, _whole(stored) if mapped is None else mapped.view(stored.shape))


def _map(path: Path, start: int, end: int, dtype: torch.dtype) -> Tensor | None:
    """Bytes [start, end) of a file as a flat tensor; None where they cannot be mapped."""
    offset = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        try:
            # What is written to the pages stays in memory: the file is never changed
            pages = mmap.mmap(stream.fileno(), end - start + offset, access=mmap.ACCESS_COPY, offset=start - offset)
        except (OSError, ValueError):  # a file system without mappings, or a file that has become shorter
            return None
    return torch.frombuffer(pages, dtype=dtype, count=(end - start) // dtype.itemsize, offset=offset)


def _read(stored: Stored, origin: Origin, place: Tensor) -> None:
    """A stored tensor into `place`, which has the shape that `origin` gives it."""
    if origin.read is not _as_it_is or place.device.type != "cpu":
        place.copy_(origin.read(_whole(stored)))
        return
    flat, dtype = place.view(-1), DTYPES[stored.dtype]
    with stored.path.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        if dtype == place.dtype:
            _read_bytes(stream, flat, stored.path)
            return
        buffer = torch.empty(CHUNK_BYTES // dtype.itemsize, dtype=dtype)
        for piece in flat.split(len(buffer)):
            _read_bytes(stream, buffer[: len(piece)], stored.path)
            piece.copy_(buffer[: len(piece)])


def _whole(stored: Stored) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    with stored.path.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        _read_bytes(stream, tensor.view(-1), stored.path)
    return tensor


def _read_bytes(stream: FileIO, flat: Tensor, path: Path) -> None:
    """The next bytes of a file into a flat tensor."""
    room = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(room):
        count = stream.readinto(room)  # one call reads 2 GB at most
        if not count:
            raise CheckpointError(f"{path}: ends in the middle of a tensor")
        room = room[count:]


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def template_of(name: str) -> tuple[str, str]:
    """`blocks.3.mlp.up.weight` -> (`blocks.{i}.mlp.up.weight`, "3"). Only the first number is a layer's."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    if match is None:
        return name, ""
    return name[: match.start()] + "{i}" + name[match.end() :], match[0]


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for step in path:
        module = getattr(module, step)
    setattr(module, last, parameter)


def written(
    module: nn.Module, table: Table, sizes: Callable[[str, int, int], Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `module` under the other format's names, one after another.

    `sizes(ours, num_parts, rows)` gives the rows of each part of a stacked parameter.
    """
    for ours, parameter in module.named_parameters():
        template, layer = template_of(ours)
        origin = table[template]
        tensor, parts = parameter.detach(), [part.replace("{i}", layer) for part in origin.parts]
        tensors = [tensor] if len(parts) == 1 else tensor.split(list(sizes(ours, len(parts), len(tensor))))
        for part, piece in zip(parts, tensors, strict=True):
            yield part, origin.write(piece).contiguous()


def safetensors_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, for `model.safetensors` or its shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        if not single.exists():
            pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
            instead = f"; {pickles[0]} is a pickle, which may run code and is never read" if pickles else ""
            raise CheckpointError(f"{single}: no such file (weights are read from safetensors only{instead})")
        return dict.fromkeys(open_safetensors(single).keys(), single)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(f == Path(str(f)).name for f in files.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to files in this folder")
    return {name: folder / file for name, file in files.items()}


def open_safetensors(path: Path) -> Any:
    """An open safetensors file, mapped into memory. Raises CheckpointError when it is missing, corrupt or a pickle."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file (weights are read from safetensors only)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_what_else(path) or f'not a readable safetensors file ({error})'}") from None


def _what_else(path: Path) -> str | None:
    """What is found in place of safetensors."""
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError:
        return None
    if start.startswith((b"PK", b"\x80")):
        return "a pickle, not safetensors; pickles may run code and are never read"
    if start.startswith(b"version https://git-lfs"):
        return "not the weights, but Git LFS's note of them; `git lfs pull` fetches the file"
    return None


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file is. Raises what `open_safetensors` does."""
    open_safetensors(path)  # the library has checked it: sizes, overlaps, and that nothing is cut off
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number without end
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def read_text(path: Path) -> str:
    """Raises CheckpointError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """An object as a JSON file that people can read."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
