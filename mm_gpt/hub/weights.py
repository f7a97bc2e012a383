"""Weights from safetensors files into modules: tables of names, no second copy in memory, and an exact account.

A table maps each of our parameters to where it comes from: `{"blocks.{i}.mlp.down.weight": same("layers.{i}.fc2.weight")}`.
`{i}` is the number of a layer. The same table, read backwards, is the exporter.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError

WINDOW_BYTES = 64 << 20
"""A file is mapped anew after so many bytes: pages that were read once would otherwise count as memory of ours."""


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


class Account:
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
    ) -> None:
        """Give every parameter of `module`, which may be on the meta device, its tensor as `read` gives it.

        `skip` names parameters of ours that come from elsewhere. What is missing is remembered for `finish`. Raises
        CheckpointError for a shape that does not fit.
        """
        for ours, parameter in list(module.named_parameters()):
            if ours in skip:
                continue
            template, layer = _template(ours)
            origin = table[template]
            parts = [part.replace("{i}", layer) for part in origin.parts]
            absent = [part for part in parts if part not in self.names]
            self._used.update(parts)
            if absent:
                self._missing += absent
                continue
            target = torch.empty(parameter.shape, dtype=dtype, device="cpu" if parameter.is_meta else parameter.device)
            start = 0
            for part in parts:
                tensor = origin.read(read(part))
                place = target[start : start + len(tensor)] if len(parts) > 1 else target
                if place.shape != tensor.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(place.shape)}"
                    raise CheckpointError(f"{self.where}: {part} has shape {shapes}")
                place.copy_(tensor)
                start += len(place) if len(parts) > 1 else 0
            if len(parts) > 1 and start != len(target):
                raise CheckpointError(f"{self.where}: {', '.join(parts)} have {start} rows, not {len(target)}")
            _set_parameter(module, ours, nn.Parameter(target, requires_grad=parameter.requires_grad))

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Account for every tensor. `ignore`: patterns of names that are known and not needed.

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


class Checkpoint(Account):
    """The tensors of a folder: `model.safetensors`, or shards with an index.

    Raises CheckpointError naming the file when it is missing, corrupt, or a pickle stands in its place.
    """

    def __init__(self, folder: Path):
        self.files = safetensors_index(folder)
        super().__init__(str(folder), self.files)
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0

    def load(
        self, module: nn.Module, table: Table, *, dtype: torch.dtype = torch.float32, skip: Collection[str] = ()
    ) -> None:
        """`fill` from the files."""
        self.fill(module, table, self.tensor, dtype=dtype, skip=skip)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored. Raises CheckpointError when the index promises what the file does not hold."""
        path = self.files[name]
        if self._open is None or self._open[0] != path or self._read_bytes > WINDOW_BYTES:
            self._open, self._read_bytes = (path, open_safetensors(path)), 0
        try:
            tensor: Tensor = self._open[1].get_tensor(name)
        except SafetensorError:
            raise CheckpointError(f"{path}: lacks {name}, which the index says is here") from None
        self._read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def finish(self, ignore: Sequence[str] = ()) -> None:
        self._open = None
        super().finish(ignore)


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _template(name: str) -> tuple[str, str]:
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
        template, layer = _template(ours)
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
        with path.open("rb") as stream:
            start = stream.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: a pickle, not safetensors; pickles may run code and are never read"
            ) from None
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values
