"""The mean of several models that were tuned from one start (model soups, 2203.05482): often better than each of them.

python examples/average_models.py runs/a/best runs/b/best --out runs/mean
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mm_gpt.errors import CheckpointError, MMGPTError


def average(folders: list[Path], out: Path) -> None:
    """Write into `out`, a new folder, the model whose every weight is the mean over `folders`.

    Raises CheckpointError naming a folder that cannot be read or holds another model than the first.
    """
    total: dict[str, torch.Tensor] = {}
    first = folders[0]
    for folder in folders:
        try:
            state = load_file(folder / "model.safetensors")
            is_alike = (folder / "config.json").read_text() == (first / "config.json").read_text()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: {error}") from None
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if not is_alike or (total and shapes != {name: tensor.shape for name, tensor in total.items()}):
            raise CheckpointError(f"{folder} holds another model than {first}")
        total = {name: total.get(name, 0.0) + tensor.double() for name, tensor in state.items()}
    types = {name: tensor.dtype for name, tensor in state.items()}
    out.mkdir(parents=True)
    for path in first.glob("*.json"):
        if path.name != "training_state.json":
            shutil.copy(path, out)
    mean = {name: (tensor / len(folders)).to(types[name]) for name, tensor in total.items()}
    save_file(mean, out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)  # the library writes for the owner alone


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="model folders, such as runs/a/best")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    args = parser.parse_args()
    try:
        average(args.folders, args.out)
    except (MMGPTError, FileExistsError) as error:
        sys.exit(f"error: {error}")
