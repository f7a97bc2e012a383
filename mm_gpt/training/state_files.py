"""Tensors of several ranks in one folder, to be read by another number of them.

Each rank writes the slices that it holds into one safetensors file, in the layout of torch's
`HuggingFaceStorageWriter(save_distributed=True)`: the place of a slice in its tensor is in the file's metadata, so
`torch.distributed.checkpoint.load` reads the folder as well. Which slices there are, and which of them a reader needs,
is what torch's planners say; nothing here is pickled, and no rank talks to another.

The files are written by safetensors itself: torch's writer first copies them whole into memory (twice the memory and
eight times the time for 1 GB, torch 2.14.1). And the reader checks what torch's leaves out: a file that is gone makes
it leave those slices of a tensor as they were, without a word (findings/torch_checkpoint_lost_file.sh).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from mm_gpt.errors import CheckpointError
from mm_gpt.system.tensor_files import host_copy, write_tensors

SLICES = "DCP_SHARDING_INFO"
"""In a file's metadata: of each tensor, where the slice begins. The key is torch's."""


def file_of(rank: int, world: int) -> str:
    """What a rank's file is called."""
    return f"rank-{rank}-of-{world}.safetensors"


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor, in each dimension."""


def own_slices(state: Mapping[str, Tensor], *, copy: bool) -> dict[str, Slice]:
    """What this rank writes of `state`: whole tensors as they are, and of sharded ones the slice that it holds, if it
    is the first rank to hold it. With `copy`, on the CPU and as they are now."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state), is_coordinator=True)
    slices = {}
    for item in planner.create_local_plan().items:
        name = item.index.fqn
        if isinstance(whole := state[name], DTensor) and not _is_first(whole):
            continue
        assert item.tensor_data is not None
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        offsets = tuple(item.tensor_data.chunk.offsets)
        if tensor.numel() == 0 and any(offsets):  # more ranks than rows
            continue
        slices[name] = Slice(host_copy(tensor) if copy else tensor.detach(), offsets)
    return slices


def _is_first(tensor: DTensor) -> bool:
    """Whether no rank before this one holds the same slice."""
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return False
    return all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate())


def write_slices(slices: Mapping[str, Slice], path: Path) -> None:
    """Raises MMGPTError naming the file that cannot be written."""
    places = {name: {"saved_offsets": list(each.offsets)} for name, each in slices.items()}
    metadata = {SLICES: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
    write_tensors({name: each.tensor.cpu() for name, each in slices.items()}, path, metadata=metadata)


class SavedTensors:
    """The tensors in a folder of such files."""

    def __init__(self, folder: Path):
        """Raises CheckpointError when a file is corrupt, or a tensor is not there in full."""
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: cannot be read ({_line(error)})") from None
        self.found: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name, about in self._metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)
            if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
                raise CheckpointError(f"{folder}: not each part of {name} is there once, of shape {tuple(about.size)}")
            self.found[name] = about.properties.dtype, about.size

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or sharded, of the shapes and dtypes that `found` tells. Raises CheckpointError."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(dict(state), self._metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            with torch.no_grad():
                self._reader.read_data(planner.create_local_plan(), planner).wait()
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
