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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mm_gpt.alignment import losses
from mm_gpt.alignment.completions import logprobs_and_entropy, token_values
from mm_gpt.alignment.experience import Actor, Experience, PolicyBatch
from mm_gpt.alignment.policy_recipe import PolicyRecipe
from mm_gpt.alignment.reference import Reference
from mm_gpt.alignment.reward_model import RewardModel, is_reward_model, load_reward_model, save_reward_model
from mm_gpt.alignment.rewards import Rewards
from mm_gpt.datasets.comparisons import Comparisons
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import save_model
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.training.averaging import WeightAverage
from mm_gpt.training.distributed import gather_over_ranks, ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.language import LanguageTask, build_model, count_targets, prepare_language
from mm_gpt.training.stage import Decides, ParameterGroup, Term
from mm_gpt.training.train_config import use_bf16

logger = logging.getLogger(__name__)


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
        self._rollouts: list[dict[str, Tensor]] = []
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
            critic = RewardModel(build_model(recipe.language(), None)[0])
            nn.init.zeros_(critic.head.weight)
            return critic
        critic, processor = load_reward_model(folder)
        _check_reads(processor, critic.model, self.processor, policy, folder)
        if recipe.lora is not None and critic.model.config.lora is None and recipe.decoder != "full":
            critic.model.add_lora(recipe.lora)
        return critic

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
        self._keep(experience)
        return experience

    def _keep(self, experience: Experience) -> None:
        """The rollouts of all ranks, for the checkpoints that rank 0 writes before they are learned to their end."""
        if self.updates == 1:
            return
        own = experience.tensors()
        self._rollouts = [own]
        if ranks()[1] > 1:
            written = save_tensors({name: tensor.contiguous() for name, tensor in own.items()})
            self._rollouts = [load_tensors(each) for each in gather_over_ranks(written, self.model.device)]

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
        """The average of weights, and the rollouts of all ranks where they are not learned to their end."""
        tensors = {} if self.average is None else self.average.state_tensors()
        if self.experience is not None and (self._step + 1) % self.updates:
            for rank, rollout in enumerate(self._rollouts):
                tensors |= {_rollout_of(rank) + name: tensor for name, tensor in rollout.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.average is not None:
            self.average.load_state_tensors(tensors)
        rollouts = [of_rank for rank in range(len(tensors)) if (of_rank := _under(_rollout_of(rank), tensors))]
        if not rollouts:
            return
        rank, world = ranks()
        if len(rollouts) != world:
            raise CheckpointError(
                f"the rollout in the checkpoint is that of {len(rollouts)} ranks, and these are {world}: go on with as "
                "many, or from a checkpoint between two rollouts"
            )
        self.experience, self._rollouts = self.actor.restore(self.prompts, rollouts[rank]), rollouts

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
        loss in nats per token. Raises MMGPTError when no answer has a reward."""
        with self._averaged():
            found, means = self._judged()
            if found.rewards.isnan().all():  # no checkpoint could be the best one
                told = self.rewards.errors.summary()
                raise MMGPTError(f"no answer to {len(found.rewards)} held-out prompts has a reward: {told}")
            values = dict(means)
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


def _rollout_of(rank: int) -> str:
    """Before the names of a rank's rollout in a checkpoint."""
    return f"rollout{rank or ''}."


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


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
