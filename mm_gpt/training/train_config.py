"""How a run is trained, whatever its stage."""

from dataclasses import dataclass
from typing import Literal

import torch

from mm_gpt.config import check_numbers
from mm_gpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """Optimizer steps."""
    lr: float
    """Peak learning rate; a stage's parameter groups scale it."""
    batch_tokens: int | None = None
    """Tokens in a step that `lr` is meant for, where that is known. Of a step with fewer the rate is lower
    (`mm_gpt.training.recipes.peak_rate`)."""
    accumulate: int = 1
    """Micro-batches per step."""
    step_tokens: int | None = None
    """Tokens in a step over all processes, padding included; sets `accumulate`, rounded up. For stages of packed
    rows."""
    ramp_from: int | None = None
    """Tokens in the first step; they grow linearly, in multiples of this, to a whole step (GPT-3)."""
    ramp_tokens: int | None = None
    """Tokens over which steps grow from `ramp_from`. Meanwhile the schedule goes by tokens: `warmup_steps` stand for as
    many whole ones."""
    optimizer: Literal["adamw", "muon", "adafactor"] = "adamw"
    """muon: orthogonalised momentum (2502.16982) for the matrices of blocks, whose updates are as long as AdamW's, and
    AdamW for the rest. adafactor (1804.04235): `lr` is relative to the size of each parameter, as a rule 0.01."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warm-up. wsd stays at the peak and falls linearly over the last `decay_share` of the run
    (2404.06395); constant stays."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    final_lr: float = 0.0
    """Where the learning rate ends, as a fraction of the peak; `constant` has no use for it."""
    decay_share: float = 0.1
    """The share of the run over which `wsd` falls."""
    final_share: float = 0.0
    """The share of the run at its end that stays at `final_lr`."""
    weight_decay: float = 0.0
    """Of matrices alone."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    """Of AdamW, as are the betas."""
    clip: float = 1.0
    """Largest norm of all gradients together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 computes matrix products in bfloat16 under autocast, with float32 master weights for what is trained. `auto`
    takes it where the hardware multiplies it: a processor without the instructions is four times slower in bf16."""
    shard: int | None = 1
    """Processes that share one copy of the model, each with a slice of every weight (FSDP2). 1: each has all of it;
    None: all of them share one."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the decoder's blocks compute again in the backward pass instead of keeping it. full: all but their inputs;
    selective: all but attention and every second matrix product."""
    device: str = "auto"
    mfu_peak: Literal["known", "measured"] = "known"
    """What `mfu` in the log is a share of: the peak of a GPU whose data sheet is known (others have no `mfu`), or of a
    product that is timed when the run begins, on any device."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log goes besides `log.jsonl`."""
    seed: int = 0
    patience: int | None = None
    """Validations without a better one after which the run ends; None: it goes to its last step."""
    noise_scale: bool = False
    """Log the gradient noise scale (1812.06162): the batch, in targets, beyond which more of them hardly help."""
    log_every: int = 10
    validate_every: int = 200
    save_every: int = 200
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy of the tensors in memory."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "steps",
            "accumulate",
            "log_every",
            "validate_every",
            "save_every",
            "batch_tokens",
            "shard",
            at_least=1,
        )
        check_numbers(self, "step_tokens", "ramp_from", "ramp_tokens", "patience", at_least=1)
        check_numbers(self, "accumulate", at_most=10**6)  # a step's micro-batches are in memory together
        check_numbers(self, "step_tokens", "ramp_from", at_most=10**9)
        check_numbers(self, "steps", "ramp_tokens", "batch_tokens", at_most=10**18)
        if self.step_tokens is not None and self.accumulate != 1:
            raise ConfigError(
                f"step_tokens sets accumulate: give step_tokens={self.step_tokens} or accumulate={self.accumulate}"
            )
        check_numbers(self, "decay_share", "final_share", at_least=0, at_most=1)
        check_numbers(self, "lr", "eps", "clip", above=0)
        check_numbers(self, "warmup_steps", "weight_decay", at_least=0)
        check_numbers(self, "final_lr", at_least=0, at_most=1)
        check_numbers(self, "beta1", "beta2", at_least=0, below=1)
        if (self.ramp_from is None) != (self.ramp_tokens is None):
            raise ConfigError("ramp_from and ramp_tokens go together: where the steps begin, and when they are whole")
        if self.schedule == "wsd" and self.decay_share + self.final_share > 1:
            raise ConfigError(
                f"decay_share {self.decay_share} and final_share {self.final_share} are more than the run"
            )
        if twice := [name for name in self.trackers if self.trackers.count(name) > 1]:
            raise ConfigError(f"trackers has {twice[0]} twice")
        check_numbers(self, "seed", at_least=0, below=2**32)  # times a million, it must fit into a generator's seed


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether a precision setting means bfloat16 on this device."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.cuda.is_bf16_supported()
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "bf16"
