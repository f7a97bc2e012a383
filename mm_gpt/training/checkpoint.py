"""Checkpoints of a run: the model, and beside it what it takes to continue.

`OUT/step-000200/` holds the complete model and `training_state.safetensors` (optimizer moments and every trainable
parameter in its training precision). A checkpoint is written to a temporary folder and renamed, so that a folder with
its final name is always whole. `OUT/best` is the model with the lowest validation loss.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mm_gpt.errors import CheckpointError

if TYPE_CHECKING:
    from mm_gpt.training.loop import Task

STATE_FILE = "training_state.safetensors"
KEEP = 2  # step folders; older ones are deleted


def save(
    task: "Task",
    optimizer: torch.optim.Optimizer,
    step: int,
    out: Path,
    *,
    best: bool,
    data: dict[str, Any] | None = None,
) -> None:
    """Write `OUT/step-NNNNNN`, and `OUT/best` when `best`. `data` is the place in the data, as JSON values."""
    folder = out / f"step-{step:06d}"
    temporary = _empty(out / f".tmp-step-{step:06d}")
    task.save(temporary)
    save_file(_training_state(task.model, optimizer), temporary / STATE_FILE, metadata={"step": str(step)})
    (temporary / "training_state.json").write_text(json.dumps({"step": step, "data": data or {}}) + "\n")
    _replace(temporary, folder)
    if best:
        temporary = _empty(out / ".tmp-best")
        task.save(temporary)
        _replace(temporary, out / "best")
    for old in _steps(out)[:-KEEP]:
        shutil.rmtree(old)


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(_steps(out), key=_step_of, default=None)


def _steps(out: Path) -> list[Path]:
    return sorted(out.glob("step-*"), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Put parameters and optimizer moments back; the number of steps done, and the place in the data.

    Raises CheckpointError when the state is missing, corrupt, or of another model.
    """
    path = folder / STATE_FILE
    try:
        tensors = load_file(path)
        state = json.loads((folder / "training_state.json").read_text())
        step, data = int(state["step"]), dict(state.get("data", {}))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot continue from it ({error})") from None
    expected = {name: tensor.shape for name, tensor in _training_state(model, optimizer).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise CheckpointError(f"{path}: {len(wrong)} tensors do not match this model, such as {wrong[0]}")
    with torch.no_grad():
        for name, buffer in _buffers(model).items():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in _trainable(model).items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if steps := tensors[f"step.{name}"]:  # 0: it had no gradient yet, and so has no moments
                optimizer.state[parameter] = {
                    "step": steps,
                    "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
                }
    return step, data


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"buffer.{name}": buffer.contiguous() for name, buffer in _buffers(model).items()}
    for name, parameter in _trainable(model).items():
        state = optimizer.state.get(parameter, {})
        tensors[f"parameter.{name}"] = parameter.detach().contiguous()
        # Each parameter counts its own steps: those without a gradient (no image in any batch) are not among them.
        tensors[f"step.{name}"] = state.get("step", torch.tensor(0.0))
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = state.get(moment, torch.zeros_like(parameter)).contiguous()
    return tensors


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes without gradients: the running statistics of BatchNorm."""
    saved = model.state_dict(keep_vars=True)
    return {name: saved[name] for name, _ in model.named_buffers() if name in saved}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _replace(temporary: Path, folder: Path) -> None:
    """Put the finished folder in place; what was there is deleted last."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
