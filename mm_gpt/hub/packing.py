"""What a decoder's weights are kept as: the meaning of `dtype`, and matrices from files into packed modules.

A matrix becomes what it is kept as tile by tile, while it is loaded: it never exists twice. One that is stored as it
is kept stays in its file, mapped into memory.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError, ConfigError, unknown_name
from mm_gpt.kernels.formats import FORMATS, PLAIN, quantize
from mm_gpt.kernels.memory import passing
from mm_gpt.model.packed import PLAIN_DTYPES, Matrix, PackedEmbedding, PackedLinear, multiplies_bf16, workers

DTYPES = ("auto", "fp32", "bf16", "int8", "int4")
"""What `load` and `--dtype` take."""
TILE = 1 << 18
"""Values that are converted at a time: 1 MB."""


class Rows(Protocol):
    """A matrix that is somewhere: in a file, or in memory."""

    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    def values(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32."""

    def whole(self) -> Matrix:
        """All of it, as it is stored."""


@dataclass(frozen=True)
class Update:
    """B · A, which is added to a matrix: the low-rank part of LoRA, with its scale in B."""

    b: Tensor
    """(rows, rank)"""
    a: Tensor
    """(rank, columns)"""

    def add(self, values: Tensor, start: int) -> Tensor:
        """To the rows from `start` on."""
        return torch.addmm(values, self.b[start : start + len(values)], self.a)


@dataclass(frozen=True)
class Packing:
    """How the matrices of a decoder are kept."""

    layers: str | None
    """The kind of those in its layers; None: as they are stored."""
    ends: str | None
    """The kind of the embedding and of the head, whose errors cost more."""
    keep: tuple[str, ...] = ()
    """Kinds that are small enough to stay as they are stored."""

    def kind(self, name: str, stored: str, columns: int) -> str:
        """What the parameter `name`, stored as one kind, is kept as."""
        wanted = self.ends if name.startswith(("embedding.", "head.")) else self.layers
        if wanted is None or stored in self.keep:
            return stored
        # Rows that are no whole blocks are as rare as they are short
        return "BF16" if columns % FORMATS[wanted].block else wanted


PACKINGS = {
    "stored": Packing(None, None),
    "bf16": Packing("BF16", "BF16"),
    "int8": Packing("Q8_0", "Q8_0"),
    "int4": Packing("Q4_1", "Q8_0", keep=("Q4_0", "Q4_1", "Q4_K")),
}


def check_dtype(dtype: str) -> None:
    """Raises ConfigError with the closest right one."""
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))


def packing_of(dtype: str, stored: Collection[str], *, updated: bool = False) -> Packing | None:
    """How a decoder is kept whose matrices are `stored` as these kinds; None: as float32, in torch's own modules.

    `auto` is what is stored, where the processor multiplies it. `updated`: low-rank updates are added to the matrices,
    whose 4 bits would lose most of them.
    """
    if dtype == "auto":
        if any(kind not in PLAIN for kind in stored):
            dtype = "int8" if updated else "stored"
        elif multiplies_bf16() and all(kind in ("F16", "BF16") for kind in stored):
            dtype = "bf16"
        else:
            dtype = "fp32"
    return None if dtype == "fp32" else PACKINGS[dtype]


def places(module: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedEmbedding]]:
    """The packed modules inside, each by the name that its weight would have as a parameter."""
    for name, child in module.named_modules():
        if isinstance(child, PackedLinear | PackedEmbedding):
            yield f"{name}.weight", child


def shape_of(place: PackedLinear | PackedEmbedding) -> tuple[int, int]:
    if isinstance(place, PackedEmbedding):
        return place.num_embeddings, place.embedding_dim
    return place.out_features, place.in_features


def put(place: PackedLinear | PackedEmbedding, parts: list[Matrix]) -> None:
    """The weight of a packed module. An embedding has one part: rows are taken from it by their number."""
    if isinstance(place, PackedLinear):
        place.parts = parts
    else:
        (place.matrix,) = parts


def parts_of(place: PackedLinear | PackedEmbedding) -> list[Matrix]:
    return place.parts if isinstance(place, PackedLinear) else [place.matrix]


def stored_kinds(decoder: nn.Module) -> set[str]:
    """The kinds of a packed decoder's matrices."""
    return {part.kind for _, place in places(decoder) for part in parts_of(place)}


def weights_dtype(decoder: nn.Module) -> Literal["fp32", "bf16", "int8", "int4"]:
    """How a decoder's matrices are kept, its smallest ones deciding."""
    kinds = stored_kinds(decoder)
    if all(kind in PLAIN for kind in kinds):
        return "bf16" if kinds & {"F16", "BF16"} else "fp32"
    return "int8" if kinds <= {*PLAIN, "Q8_0"} else "int4"


def repack(decoder: nn.Module, packing: Packing, updates: dict[str, Update], where: str) -> None:
    """Keep the matrices of a packed decoder in another way, each with its update, one after another."""
    for name, place in places(decoder):
        put(place, packed(name, parts_of(place), packing, where, updates.get(name)))


def packed(
    name: str, sources: Sequence[Rows], packing: Packing, where: str, update: Update | None = None
) -> list[Matrix]:
    """The matrix whose rows are those of all sources, as it is kept: in one part, or in several of different kinds or
    that are mapped from different places.

    Raises CheckpointError naming the parameter when a kind has no room for its values.
    """
    parts: list[Matrix] = []
    first_row = 0
    for kind, same in groupby(sources, lambda source: packing.kind(name, source.kind, source.columns)):
        group = list(same)
        if update is None and all(source.kind == kind for source in group):
            parts += [source.whole() for source in group]
        else:
            parts.append(_converted(f"{where}: {name}", group, kind, update, first_row))
        first_row += sum(source.rows for source in group)
    return parts


def _converted(name: str, sources: Sequence[Rows], kind: str, update: Update | None, first_row: int) -> Matrix:
    rows, columns = sum(source.rows for source in sources), sources[0].columns
    format, dtype = FORMATS[kind], PLAIN_DTYPES.get(kind, torch.uint8)
    # The compiled decoder moves it once more: what it leaves must not stay
    out = passing(rows * format.row_bytes(columns)).view(dtype).view(rows, -1)

    def convert(job: tuple[Rows, int, int, int]) -> None:
        source, start, stop, place = job
        values = source.values(start, stop)
        if update is not None:
            values = update.add(values, first_row + place)
        top = float(values.abs().max()) if values.numel() else 0.0
        if not top <= format.largest:
            raise CheckpointError(f"{name} has the value {top:g}, which {kind} has no room for")
        if kind in PLAIN:
            out[place : place + len(values)] = values
        else:
            out[place : place + len(values)] = torch.from_numpy(quantize(values.numpy(), kind, fit=True))

    step = max(1, TILE // max(1, columns))
    jobs, place = [], 0
    for source in sources:
        jobs += [(source, at, min(at + step, source.rows), place + at) for at in range(0, source.rows, step)]
        place += source.rows
    list(workers().map(convert, jobs))
    return Matrix(kind, out)
