"""A reward model: any of our models with one linear layer that reads how good an answer is off its last state.

The score is that of the answer's last token, its end mark, whose place is known from how the answer was written into the
batch: never looked for, so that neither padding nor an end mark inside the prompt can move it (2009.01325, 2203.02155).
The same layer on every token is a critic, which PPO begins with.

Shapes: B rows, T tokens, C completions of all prompts, D width.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_gpt import config as configs
from mm_gpt.alignment.completions import CompletionBatch, last_positions
from mm_gpt.config import check_numbers
from mm_gpt.errors import CheckpointError, ConfigError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.weights import open_safetensors, read_json
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Batch, Processor
from mm_gpt.system.writing import whole_file, write_text

WEIGHTS, CONFIG = "reward_head.safetensors", "reward_model.json"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """What a folder says about its reward model besides the weights."""

    centred_on: int = 0
    """Demonstrations, or preferred answers, whose mean score is 0. 0: the scores have no zero of their own."""

    def __post_init__(self) -> None:
        check_numbers(self, "centred_on", at_least=0)


class RewardModel(nn.Module):
    """`model` with a scalar head: weight (1, D), bias (1,), both float32."""

    def __init__(self, model: MMGPT):
        """Raises ConfigError for a decoder that is not causal: its last state would be no summary of what came before.

        The head is drawn with a standard deviation of 1 / √(D + 1), as in 2009.01325.
        """
        super().__init__()
        if not model.decoder.config.causal:
            raise ConfigError("a reward model needs a causal decoder: its head reads the state at the last token")
        self.model = model
        width = model.decoder.config.width
        self.head = nn.Linear(width, 1, device=model.device)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.head.bias)
        self.eval()

    def train(self, mode: bool = True) -> "RewardModel":
        """Stays in evaluation mode: with dropout a pair would be judged by two different models, and what is learned is
        to be what is judged by."""
        return super().train(False)

    def scores(self, batch: CompletionBatch, images: Sequence[ImageFeatures] | None = None) -> Tensor:
        """The reward of each completion (C,), float32: the head on the state of its last token.

        `images` are those of `MMGPT.image_tokens`, where they are known already.
        """
        hidden = self.model(batch.batch, images=images)  # (B, T, D)
        return self._score(hidden[batch.rows, last_positions(batch)])

    def values(self, batch: Batch, images: Sequence[ImageFeatures] | None = None) -> Tensor:
        """The head on every token (B, T), float32: a critic's values."""
        return self._score(self.model(batch, images=images))

    def _score(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…). In float32 also inside autocast: pairs are told apart by small differences."""
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return F.linear(hidden.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype)).squeeze(-1)


def separates(model: MMGPT) -> bool:
    """Whether each answer needs a row of its own: where the prompt is read with the answer in view, or distances are
    those of the row, branches cannot share it."""
    decoder = model.decoder.config
    return model.config.prefix_lm or decoder.positions == "relative" or bool(decoder.memory_length)


def save_reward_model(
    model: RewardModel,
    processor: Processor,
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] | None = None,
    shift: float = 0.0,
    centred_on: int = 0,
) -> None:
    """Write the model, and the head beside it, into an existing folder. What half precision would round is stored in
    float32, so that scores stay what they were.

    `frozen`: as `save_model` takes it. `shift` is added to the bias that is stored: minus the mean score of
    `centred_on` demonstrations, say. Raises CheckpointError naming what cannot be stored.
    """
    if not math.isfinite(shift) or not all(p.isfinite().all() for p in model.head.parameters()):
        raise CheckpointError(f"{folder}: the head of the reward model holds values that are no finite numbers")
    save_model(model.model, processor, folder, frozen=frozen, exact=True)
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach() + shift}
    with whole_file(folder / WEIGHTS) as partial:
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in head.items()}, partial)
        partial.chmod(0o644)
    config = configs.to_dict(RewardModelConfig(centred_on=centred_on))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def is_reward_model(folder: str | Path) -> bool:
    """Whether a folder holds what `save_reward_model` writes."""
    return (Path(folder) / CONFIG).is_file()


def load_reward_model(folder: str | Path) -> tuple[RewardModel, Processor]:
    """A reward model that `mm-gpt train reward` wrote, on the CPU.

    Raises CheckpointError naming what is missing or does not fit, also where the folder holds another kind of model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a reward model is one that `mm-gpt train reward` wrote")
    if not is_reward_model(folder):
        best = f"; {folder / 'best'} is one" if is_reward_model(folder / "best") else ""
        raise CheckpointError(f"{folder}: not the folder of a reward model: it has no {CONFIG}{best}")
    read_config(folder)
    path = folder / WEIGHTS
    language, processor = load_model(folder)
    model = RewardModel(language)
    with open_safetensors(path) as file:
        names = set(file.keys())
        if names != {"weight", "bias"}:
            raise CheckpointError(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}, not weight and bias")
        for name, target in (("weight", model.head.weight), ("bias", model.head.bias)):
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise CheckpointError(f"{path}: {name} has shape {shape}, not {tuple(target.shape)}")
            with torch.no_grad():
                target.copy_(file.get_tensor(name))
    if not all(p.isfinite().all() for p in model.head.parameters()):
        raise CheckpointError(f"{path}: holds values that are no finite numbers")
    return model.eval(), processor


def read_config(folder: Path) -> RewardModelConfig:
    """Raises CheckpointError or ConfigError naming the file and key."""
    return configs.from_dict(RewardModelConfig, read_json(folder / CONFIG), where=str(folder / CONFIG))
