"""The mean of several models that were tuned from one start (model soups, 2203.05482): often better than each of them.

python examples/average_models.py runs/a/best runs/b/best --out runs/mean
python examples/average_models.py runs/a/best runs/b/best --weights 1 3 --out runs/mean
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mm_gpt.errors import CheckpointError, MMGPTError


def average(folders: list[Path], out: Path, weights: list[float] | None = None) -> None:
    """Write into `out`, a new folder, the model whose every weight is the mean over `folders`, weighted if told so.

    Raises CheckpointError naming a folder that cannot be read or holds another model than the first, MMGPTError for
    weights that do not fit.
    """
    weights = [1.0] * len(folders) if weights is None else weights
    if len(weights) != len(folders) or not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise MMGPTError(f"{len(folders)} folders need as many weights, 0 or more and not all 0, not {weights}")
    total: dict[str, torch.Tensor] = {}
    first = folders[0]
    for folder, weight in zip(folders, weights, strict=True):
        try:
            state = load_file(folder / "model.safetensors")
            is_alike = (folder / "config.json").read_text() == (first / "config.json").read_text()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: {error}") from None
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if not is_alike or (total and shapes != {name: tensor.shape for name, tensor in total.items()}):
            raise CheckpointError(f"{folder} holds another model than {first}")
        total = {name: total.get(name, 0.0) + weight * tensor.double() for name, tensor in state.items()}
    types = {name: tensor.dtype for name, tensor in state.items()}
    out.mkdir(parents=True)
    for path in first.glob("*.json"):
        if path.name != "training_state.json":
            shutil.copy(path, out)
    mean = {name: _cast(tensor / sum(weights), types[name]) for name, tensor in total.items()}
    save_file(mean, out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)  # the library writes for the owner alone


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of tokens and the like are alike in all of them: their mean is that number again."""
    return tensor.to(dtype) if dtype.is_floating_point else tensor.round().to(dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="model folders, such as runs/a/best")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of each folder; default: all alike")
    args = parser.parse_args()
    try:
        average(args.folders, args.out, args.weights)
    except (MMGPTError, FileExistsError) as error:
        sys.exit(f"error: {error}")
