"""What there is to decide about learning from a reward: see `mm_gpt.alignment.policy`."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mm_gpt.alignment.rewards import RewardConfig
from mm_gpt.config import check_numbers
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import ConfigError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.language import LanguageRecipe
from mm_gpt.training.train_config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe:
    """A complete description of one run. A rollout is learned from in `epochs` x `minibatches` steps of the loop."""

    train: TrainConfig
    start: str
    """The name or folder of the model that is aligned: the first policy, and the reference."""
    sources: tuple[SourceConfig, ...]
    """Prompts; answers that come with them are not looked at."""
    rewards: tuple[RewardConfig, ...] = ()
    """What answers are worth: the weighted sum. At least one has to be named."""
    validation: tuple[SourceConfig, ...] = ()
    holdout: float = 0.0
    """Without `validation` sources: the share of the prompts that is kept from training to validate on."""
    validation_prompts: int = 64

    prompts: int = 8
    """P of this rank in a rollout."""
    samples: int = 4
    """k, answers to each prompt. At least 2 where they are judged by each other."""
    minibatches: int = 1
    """Steps that a rollout is divided into, by prompts."""
    epochs: int = 1
    """How often a rollout is learned."""
    max_new_tokens: int = 64
    """Of an answer, its end mark included."""
    temperature: float = 1.0
    """Of sampling; all log-probabilities are those at this temperature."""

    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "batch_std"] = "gae"
    """`gae` needs a critic; the others compare the answers to a prompt (`losses.ADVANTAGE_KINDS`)."""
    whiten: bool = True
    """Advantages of `gae` to mean 0 and variance 1 over the rollout."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """λ of generalised advantage estimation (1506.02438)."""
    critic: str | None = None
    """Folder of the reward model that the critic begins as. None: that of `rewards`, where there is one, else the
    policy's own weights with a new head."""
    critic_lr: float = 1.0
    """Learning rate of the critic as a multiple of `train.lr`."""
    value_weight: float = 0.1
    value_clip: float | None = 0.2

    beta: float = 0.02
    """Of the KL divergence from the reference, in nats. 0: there is no reference in training."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Taken from the reward of each token (of the whole answer without a critic), or a term of the loss."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """How it is estimated: see `losses.kl_estimate`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence", "sequence_sum"] = "token"
    """See `losses.RATIO_LEVELS`; `sequence` is GSPO's."""
    policy_loss: Literal["ppo", "cispo"] = "ppo"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """See `losses.AGGREGATIONS`; `constant` is Dr. GRPO's."""
    correction: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    """For the difference between the sampler's and the trainer's probabilities, where bf16 makes one."""
    max_mismatch: float = 0.5
    """A rollout whose mean |log p(sampler) - log p(trainer)| of a token is above this stops the run."""

    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """Answers that were cut off: rewarded like others, left out of the loss, or `truncation_penalty` taken from their
    reward. With a critic what is still to come is its value behind the last token."""
    truncation_penalty: float = 1.0
    drop_equal_groups: bool = False
    """Prompts whose answers are all worth the same are left out of the loss's denominators (DAPO, 2503.14476)."""

    pretraining: tuple[SourceConfig, ...] = ()
    """Data whose next tokens stay learned (PPO-ptx); part of it is held out to watch what alignment costs."""
    pretraining_weight: float = 27.8
    """γ of InstructGPT, beside a mean over tokens. 0: the data is only validated on."""
    pretraining_rows: int = 4
    """Rows of it in a micro-batch."""
    pretraining_holdout: float = 0.1
    row_length: int = 256
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is validated and saved; InstructGPT's 0.992."""

    lora: LoRAConfig | None = None
    """Low-rank adaptation for the decoder of `start`, where it has none and `decoder` is not "full"."""
    decoder: Literal["frozen", "full"] = "frozen"
    """`full` trains every weight of the decoder; else its low-rank adaptation alone is trained."""
    train_connector: bool = False
    data: str = "."

    def __post_init__(self) -> None:
        check_numbers(self, "holdout", "pretraining_holdout", at_least=0, below=1)
        if bool(self.validation) == bool(self.holdout):
            raise ConfigError("give either validation sources or a holdout above 0 and below 1")
        if not self.sources:
            raise ConfigError("give sources of prompts")
        check_numbers(self, "prompts", "samples", "minibatches", "epochs", "max_new_tokens", at_least=1)
        check_numbers(self, "validation_prompts", "pretraining_rows", "row_length", at_least=1)
        check_numbers(self, "temperature", "max_mismatch", above=0)
        check_numbers(self, "critic_lr", "value_weight", "beta", "pretraining_weight", at_least=0)
        check_numbers(self, "truncation_penalty", "clip_high", at_least=0)
        check_numbers(self, "gamma", "lam", at_least=0, at_most=1)
        check_numbers(self, "clip_low", at_least=0, at_most=1)
        check_numbers(self, "value_clip", above=0)
        check_numbers(self, "dual_clip", above=1)
        check_numbers(self, "ema", at_least=0, below=1)
        if self.advantage != "gae" and self.samples < 2:
            raise ConfigError(f"{self.advantage} compares the answers to a prompt: samples must be at least 2")
        if self.critic is not None and self.advantage != "gae":
            raise ConfigError(f"{self.advantage} has no critic: only advantage=gae has one")
        parts = self.minibatches * self.train.accumulate
        if self.prompts % parts:
            raise ConfigError(f"prompts must be a multiple of minibatches x train.accumulate ({parts}): {self.prompts}")
        if self.ratio != "token" and self.aggregation != "sequence":
            raise ConfigError("a sequence's ratio goes with aggregation=sequence")
        if self.kl_in == "loss" and self.kl == "k1" and self.beta:
            raise ConfigError("kl=k1 has no gradient in the loss on average: with kl_in=loss give kl=k2 or kl=k3")
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for prompts")

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has: the pretraining data is its data."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        shared |= {"sources": self.pretraining, "validation": (), "holdout": self.pretraining_holdout or 0.1}
        return LanguageRecipe(**shared, model=None, image=None, vision_blocks=0, rows=self.pretraining_rows)
