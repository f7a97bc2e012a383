"""Learning from a reward: PPO with a critic and a pretraining term (PPO-ptx), RLOO, GRPO and its variants, with images.

One stage for all of them. Prompts are drawn, the policy answers each of them some times, the answers are rewarded, and
a few steps are taken on what was sampled: PPO's clipped loss on advantages that come from a critic (2203.02155), or
from how the other answers to the same prompt did (2402.14740, 2402.03300, 2503.20783).

Shapes: P prompts of a rollout, k answers to each, R = P k answers, N their tokens; see `mm_gpt.alignment.completions`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm_gpt.alignment import losses
from mm_gpt.alignment.completions import logprobs_and_entropy, token_values
from mm_gpt.alignment.experience import Actor, Experience, PolicyBatch
from mm_gpt.alignment.reference import Reference
from mm_gpt.alignment.reward_model import RewardModel, is_reward_model, load_reward_model, save_reward_model
from mm_gpt.alignment.rewards import RewardConfig, Rewards
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import save_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.training.averaging import WeightAverage
from mm_gpt.training.distributed import ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.language import LanguageRecipe, LanguageTask, build_model, count_targets, prepare_language
from mm_gpt.training.loop import TrainConfig, use_bf16
from mm_gpt.training.stage import Decides, ParameterGroup, Term

logger = logging.getLogger(__name__)


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
        if self.train.batch_tokens is not None:
            raise ConfigError("train.batch_tokens is for rows of tokens, not for prompts")

    def language(self) -> LanguageRecipe:
        """The part that any language model's run has: the pretraining data is its data."""
        own = {field.name for field in dataclasses.fields(LanguageRecipe)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        shared |= {"sources": self.pretraining, "validation": (), "holdout": self.pretraining_holdout or 0.1}
        return LanguageRecipe(**shared, model=None, image=None, vision_blocks=0, rows=self.pretraining_rows)


class ActorCritic(nn.Module):
    """What is trained: the policy, and the critic where there is one.

    Both stay in evaluation mode: samples are drawn without dropout, and a ratio between two draws of dropout would be
    noise. Gradients flow all the same.
    """

    def __init__(self, policy: MMGPT, critic: RewardModel | None):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.eval()

    def train(self, mode: bool = True) -> "ActorCritic":
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.policy.device


class PolicyTask:
    """A `Stage` for the loop. What is sampled follows from the weights, the seed and the number of the rollout."""

    on_policy = True
    decides = Decides("objective", higher_is_better=True)

    def __init__(self, recipe: PolicyRecipe):
        """Raises ConfigError without rewards, and for a critic that cannot read what the policy writes; MMGPTError
        without prompts."""
        if not recipe.rewards:
            raise ConfigError("rewards: name some, like rewards=FILE.py:FUNCTION or rewards=FOLDER of a reward model")
        self.recipe = recipe
        self.errors = ErrorCounter()
        language = recipe.language()
        policy, self.processor = build_model(language, None)
        self.prompts, self.held_out = self._open()
        self.pretraining = None
        if recipe.pretraining:
            self.pretraining = LanguageTask(language, built=(policy, self.processor))
        critic = self._critic(policy) if recipe.advantage == "gae" else None
        self.model = ActorCritic(policy, critic)
        self._language = language
        self._frozen: dict[str, Tensor] = {}
        self._critic_frozen: dict[str, Tensor] = {}
        self.average: WeightAverage | None = None
        self.experience: Experience | None = None
        self._step = -1
        if self.errors.total:
            logger.warning(self.errors.summary())

    def _open(self) -> tuple[Comparisons, Comparisons]:
        recipe, folder = self.recipe, Path(self.recipe.data)
        prompts = Comparisons.open(recipe.sources, folder, self.errors)
        if recipe.validation:
            held_out = Comparisons.open(recipe.validation, folder, self.errors)
        else:
            prompts, held_out = prompts.split(recipe.holdout, recipe.train.seed)
        for name, found in (("train", prompts), ("validate", held_out)):
            if not len(found):
                raise MMGPTError(f"no prompt to {name} on: {self.errors.summary()}")
        return prompts, held_out

    def _critic(self, policy: MMGPT) -> RewardModel:
        recipe = self.recipe
        folder = recipe.critic
        models = [reward.source for reward in recipe.rewards if is_reward_model(reward.source)]
        if folder is None and len(models) == 1:
            folder = models[0]
        if folder is None:
            logger.info("the critic begins as the policy with a new head: no reward model is named")
            critic = RewardModel(build_model(self._plain_language(), None)[0])
            nn.init.zeros_(critic.head.weight)
            return critic
        critic, processor = load_reward_model(folder)
        _check_reads(processor, critic.model, self.processor, policy, folder)
        if recipe.lora is not None and critic.model.config.lora is None and recipe.decoder != "full":
            critic.model.add_lora(recipe.lora)
        return critic

    def _plain_language(self) -> LanguageRecipe:
        return self.recipe.language()

    # ---- what is trained ----

    def prepare(self) -> list[ParameterGroup]:
        recipe, policy, critic = self.recipe, self.model.policy, self.model.critic
        groups, self._frozen = prepare_language(policy, self._language)
        if critic is not None:
            own, self._critic_frozen = prepare_language(critic.model, self._language)
            parameters = [p for group in own for p in group.parameters] + list(critic.head.parameters())
            groups.append(ParameterGroup("critic", parameters, recipe.critic_lr))
        if not any(p.requires_grad for group in groups[:1] for p in group.parameters) and not recipe.train_connector:
            raise ConfigError("nothing of the policy is trained: give lora.rank and lora.alpha, or decoder=full")
        self.reference = Reference(policy)
        if recipe.ema is not None:
            self.average = WeightAverage(policy, recipe.ema)
        self.rewards = Rewards(recipe.rewards, device=self.model.device)
        precise = use_bf16(recipe.train.precision, self.model.device)
        self.actor = Actor(self.model.policy, self.model.critic, self.processor, self.reference, recipe, bf16=precise)
        return groups

    # ---- what it is trained on ----

    @property
    def updates(self) -> int:
        """Steps that are taken on a rollout."""
        return self.recipe.epochs * self.recipe.minibatches

    def micro_batches(self, step: int, count: int) -> list[PolicyBatch]:
        recipe, self._step = self.recipe, step
        iteration, place = divmod(step, self.updates)
        if self.experience is None or self.experience.iteration != iteration:
            self.experience = self._sample(iteration)
        epoch, part = divmod(place, recipe.minibatches)
        groups = recipe.minibatches * count
        order = epoch_order(groups, recipe.train.seed, iteration * recipe.epochs + epoch)
        batches = [self.experience.batch(number, groups) for number in order[part * count : (part + 1) * count]]
        if self.pretraining is not None and recipe.pretraining_weight:
            extra = self.pretraining.micro_batches(step, count)
            batches = [dataclasses.replace(b, pretraining=e) for b, e in zip(batches, extra, strict=True)]
        return batches

    def _sample(self, iteration: int) -> Experience:
        """The rollout of this rank."""
        recipe, (rank, world) = self.recipe, ranks()
        size = recipe.prompts
        first = (iteration * world + rank) * size
        experience = self.actor.sample(self.prompts, range(first, first + size), iteration, self.errors)
        self.actor.judge(experience, self.rewards)
        return experience

    def data_state(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = {"prompts": self.prompts.digest}
        if self.pretraining is not None:
            state["pretraining"] = self.pretraining.data_state(step)
        return state

    def load_data_state(self, state: dict[str, Any]) -> None:
        if state.get("prompts") != self.prompts.digest:
            raise MMGPTError("the prompts are no longer those that the run began with")
        if self.pretraining is not None:
            self.pretraining.load_data_state(state["pretraining"])

    def state_tensors(self) -> dict[str, Tensor]:
        """The average of weights, and a rollout that is not learned to its end."""
        tensors = {} if self.average is None else self.average.state_tensors()
        if self.experience is not None and (self._step + 1) % self.updates:
            tensors |= self.experience.tensors()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.average is not None:
            self.average.load_state_tensors(tensors)
        if any(name.startswith("rollout.") for name in tensors):
            self.experience = self.actor.restore(self.prompts, tensors)

    # ---- what is learned ----

    def counts(self, batch: PolicyBatch) -> dict[str, float]:
        recipe = self.recipe
        policy = losses.aggregate_count(recipe.aggregation, batch.mask, max_tokens=recipe.max_new_tokens)
        counts: dict[str, float] = {"policy": policy}
        if recipe.beta and recipe.kl_in == "loss":
            counts["kl"] = policy
        if self.model.critic is not None and recipe.value_weight:
            counts["value"] = float(batch.mask.sum())
        if batch.pretraining is not None:
            counts["pretraining"] = count_targets(batch.pretraining)
        return counts

    def loss(self, batch: PolicyBatch) -> dict[str, Term]:
        recipe, completions, mask = self.recipe, batch.completions, batch.mask
        found, entropies = logprobs_and_entropy(
            self.model.policy, completions.batch, temperature=recipe.temperature, images=batch.images
        )
        logp, _ = token_values(completions, found)
        entropy, _ = token_values(completions, entropies)
        # One step on a rollout: the old policy is this one, and ratios are exactly 1.
        old = logp.detach() if self.updates == 1 else batch.old
        clipped = losses.policy_loss(
            logp,
            old,
            batch.advantages,
            mask,
            clip_low=recipe.clip_low,
            clip_high=recipe.clip_high,
            dual_clip=recipe.dual_clip,
            level=recipe.ratio,
            kind=recipe.policy_loss,
        )
        weights = losses.sampler_weights(recipe.correction, batch.old, batch.sampler, mask)
        terms = {"policy": self._term(clipped.loss * weights, mask, 1.0)}
        tokens = float(mask.sum())
        if batch.ref is not None:
            kl = losses.kl_estimate(recipe.kl, logp, batch.ref)
            weight = recipe.beta if recipe.kl_in == "loss" else 0.0
            terms["kl"] = self._term(kl, mask, weight)
        if self.model.critic is not None:
            assert batch.values is not None
            assert batch.returns is not None
            values, _ = token_values(completions, self.model.critic.values(completions.batch))
            own = losses.value_loss(values, batch.values, batch.returns, mask, clip=recipe.value_clip)
            terms["value"] = Term(own.loss.sum(), tokens, recipe.value_weight)
            terms["value_clip_ratio"] = Term(own.is_clipped.sum(), tokens, 0.0)
        if batch.pretraining is not None:
            total, count = self.model.policy.loss(batch.pretraining)
            terms["pretraining"] = Term(total, int(count), recipe.pretraining_weight)
        with torch.no_grad():
            terms["entropy"] = Term(entropy[mask].sum(), tokens, 0.0)
            terms["clip_ratio"] = Term(clipped.is_clipped.sum(), tokens, 0.0)
            ratio = (logp - old)[mask].clamp(-losses.MAX_LOG_RATIO, losses.MAX_LOG_RATIO)
            terms["ratio"] = Term(ratio.exp().sum(), tokens, 0.0)
            terms["approx_kl"] = Term(losses.kl_estimate("k3", old[mask], logp[mask]).sum(), tokens, 0.0)
        return terms

    def _term(self, loss: Tensor, mask: Tensor, weight: float) -> Term:
        total, count = losses.aggregate(self.recipe.aggregation, loss, mask, max_tokens=self.recipe.max_new_tokens)
        return Term(total, count, weight)

    def after_step(self) -> dict[str, float]:
        if self.average is not None:
            self.average.update()
        assert self.experience is not None
        return self.experience.metrics(is_first=self._step % self.updates == 0)

    # ---- how it is judged ----

    def validate(self) -> dict[str, float]:
        """Of sampled answers to held-out prompts, the same draws each time: the mean reward, the KL divergence from the
        start (k1, nats an answer), and `objective`, the reward less beta times it; with pretraining data, its held-out
        loss in nats per token."""
        with self._averaged():
            values = dict(self._judged()[1])
            if self.pretraining is not None:
                values["pretraining"] = self.pretraining.validate()["loss"]
        return {"loss": -values["objective"], **values}

    def _judged(self, limit: int | None = None) -> tuple[Experience, Mapping[str, float]]:
        recipe = self.recipe
        count = min(len(self.held_out), limit or recipe.validation_prompts)
        found = self.actor.sample(self.held_out, range(count), None, self.errors, samples=1)
        self.actor.judge(found, self.rewards, alone=True)
        return found, found.summary(recipe.beta)

    def samples(self) -> list[str]:
        """Answers to the first validation prompts, with their rewards."""
        with self._averaged():
            return self._judged(4)[0].texts()

    def _averaged(self) -> Any:
        return nullcontext() if self.average is None else self.average.active()

    def save(self, folder: Path) -> None:
        with self._averaged():
            save_model(self.model.policy, self.processor, folder, frozen=self._frozen)
        if self.model.critic is not None:
            (folder / "critic").mkdir()
            save_reward_model(self.model.critic, self.processor, folder / "critic", frozen=self._critic_frozen)


def _check_reads(theirs: Processor, critic: MMGPT, ours: Processor, policy: MMGPT, folder: str) -> None:
    """Raises ConfigError when a critic cannot read the policy's tokens and images as they are."""
    pairs = {
        "tokenizer": (theirs.tokenizer.fingerprint, ours.tokenizer.fingerprint),
        "vocabulary": (theirs.vocab_size, ours.vocab_size),
        "image settings": (theirs.config.image, ours.config.image),
        "way to cut images": (theirs.config.tiling, ours.config.tiling),
        "tokens of an image": (critic.tokens_per_image, policy.tokens_per_image),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise ConfigError(f"{folder}: a critic reads the policy's own tokens, but its {what} is another")
