"""Experience: what a policy answered, what the answers are worth, and what a step of learning needs to know of them.

Shapes: P prompts, k answers to each, R = P k answers (all of a prompt's in a row), N tokens of the longest answer.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm_gpt.alignment import losses
from mm_gpt.alignment.completions import (
    CompletionBatch,
    completion_batch,
    last_positions,
    logprobs_and_entropy,
    prompt_document,
    sampled_document,
    shares_prompts,
    token_values,
)
from mm_gpt.alignment.policy_recipe import PolicyRecipe
from mm_gpt.alignment.reference import Reference
from mm_gpt.alignment.reward_model import RewardModel
from mm_gpt.alignment.rewards import Rewards
from mm_gpt.datasets.comparisons import Comparison, Comparisons
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.document import Document
from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Batch, Processor, collate, stack_pixels
from mm_gpt.training.distributed import sum_over_ranks
from mm_gpt.training.epochs import epoch_order
from mm_gpt.training.rollouts import Sampler, sampling

logger = logging.getLogger(__name__)

VALIDATION_SEED = 2**40
"""Where the seeds of validation begin: far from those of training."""
GROUP = 8
"""Prompts whose images are encoded, and which are judged in validation, side by side."""


@dataclass
class PolicyBatch:
    """A micro-batch: some prompts with all of their answers."""

    completions: CompletionBatch
    mask: Tensor  # (R, N) tokens that are learned
    old: Tensor  # (R, N) log-probabilities of the policy that sampled, as training computes them
    sampler: Tensor  # (R, N) as the sampler gave them
    advantages: Tensor  # (R, N)
    ref: Tensor | None = None  # (R, N) of the reference
    values: Tensor | None = None  # (R, N) of the critic before each token, when sampled
    returns: Tensor | None = None  # (R, N) what the critic learns
    images: list[ImageFeatures] | None = None
    """Of the batch's images, where nothing before the decoder is trained."""
    pretraining: Batch | None = None

    def to(self, device: torch.device | str) -> "PolicyBatch":
        move: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | CompletionBatch | Batch)
        }
        return dataclasses.replace(self, **move)


@dataclass
class PromptRead:
    """A prompt, read: its images are decoded."""

    number: int
    """In its `Comparisons`."""
    comparison: Comparison
    pixels: Tensor  # (N, 3, H, W)
    images: list[ImageFeatures] = field(default_factory=list)
    """As the policy sees them, when it was last asked."""


@dataclass
class Experience:
    """Answers to some prompts, and what is known of them. All tensors are (R, N) or (R,), on the CPU."""

    iteration: int
    prompts: list[PromptRead]
    k: int
    ids: list[tuple[int, ...]]
    answers: list[str]
    finished: Tensor  # (R,)
    sampler: Tensor  # (R, N)
    mask: Tensor  # (R, N) True at the answer's tokens
    learned: Tensor  # (R,) whether an answer is learned
    old: Tensor  # (R, N)
    entropy: Tensor  # (R, N)
    rewards: Tensor  # (R,) NaN where no reward applies
    each: dict[str, Tensor]
    """The rewards by their names, (R,)."""
    advantages: Tensor  # (R, N)
    ref: Tensor | None
    values: Tensor | None
    returns: Tensor | None
    pack: "Pack"
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)
    _batches: "dict[tuple[int, int], tuple[CompletionBatch, list[ImageFeatures] | None]]" = field(default_factory=dict)

    # ---- what is learned from it ----

    def rows(self, number: int, groups: int) -> slice:
        """The answers in part `number` of `groups` of the same size, by prompts; the last may be smaller."""
        size = -(-len(self.prompts) // groups)
        return slice(number * size * self.k, min((number + 1) * size, len(self.prompts)) * self.k)

    def packed(self, number: int, groups: int) -> "tuple[CompletionBatch, list[ImageFeatures] | None]":
        """The prompts and answers of a part, made once: what is judged and what is learned are the same batch."""
        if (number, groups) not in self._batches:
            rows = self.rows(number, groups)
            prompts = self.prompts[rows.start // self.k : rows.stop // self.k]
            self._batches[number, groups] = self.pack(prompts, self.ids[rows])
        return self._batches[number, groups]

    def batch(self, number: int, groups: int) -> PolicyBatch:
        """Part `number` of `groups` for a step of learning."""
        rows = self.rows(number, groups)
        completions, images = self.packed(number, groups)
        longest = max(map(len, self.ids[rows]))
        cut = lambda values: None if values is None else values[rows, :longest]  # noqa: E731
        return PolicyBatch(
            completions,
            mask=self.mask[rows, :longest] & self.learned[rows, None],
            old=self.old[rows, :longest],
            sampler=self.sampler[rows, :longest],
            advantages=self.advantages[rows, :longest],
            ref=cut(self.ref),
            values=cut(self.values),
            returns=cut(self.returns),
            images=images,
        )

    # ---- in a checkpoint ----

    def tensors(self) -> dict[str, Tensor]:
        """What `Actor.restore` takes."""
        longest = self.mask.shape[1]
        ids = torch.tensor([[*own, *[0] * (longest - len(own))] for own in self.ids])
        return {
            "iteration": torch.tensor(self.iteration),
            "numbers": torch.tensor([prompt.number for prompt in self.prompts]),
            "ids": ids,
            **{f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)},
            **{f"each.{name}": values for name, values in self.each.items()},
        }

    # ---- what is said of it ----

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)

    def kl(self) -> Tensor:
        """(R,), nats of each answer: log p(policy) - log p(reference), whose mean is KL(policy || reference)."""
        assert self.ref is not None
        return ((self.old - self.ref) * self.mask).sum(dim=1)

    def mismatch(self) -> float:
        """Mean |log p(sampler) - log p(trainer)| of a token, in nats."""
        return float((self.sampler - self.old)[self.mask].abs().mean())

    def summary(self, beta: float) -> dict[str, float]:
        """Means over the answers; those of rewards over the answers that have one."""
        known = ~self.rewards.isnan()
        reward = float(self.rewards[known].mean()) if known.any() else float("nan")
        kl = float(self.kl().mean()) if self.ref is not None else 0.0
        return {
            "objective": reward - beta * kl,
            "reward": reward,
            **{f"rewards/{name}/mean": float(v.nanmean()) for name, v in self.each.items() if not v.isnan().all()},
            **({"kl": kl} if self.ref is not None else {}),
            "entropy": float(self.entropy[self.mask].mean()),
            "completions/mean_length": float(self.lengths.double().mean()),
            "completions/clipped_ratio": float((~self.finished).double().mean()),
        }

    def metrics(self, *, is_first: bool) -> dict[str, float]:
        """What is logged of a step on it. `is_first`: the step before which it was sampled."""
        by_prompt = self.rewards.view(-1, self.k)
        known = self.rewards[~self.rewards.isnan()]
        spread = by_prompt.nan_to_num(-torch.inf).amax(dim=1) - by_prompt.nan_to_num(torch.inf).amin(dim=1)
        now = time.perf_counter()
        learning, self._began = now - self._began, now
        spent = {name: seconds if is_first else 0.0 for name, seconds in self.seconds.items()} | {"learning": learning}
        values = {
            "reward": float(known.mean()) if len(known) else 0.0,
            "reward_std": float(known.std(correction=0)) if len(known) else 0.0,
            "frac_reward_zero_std": float((spread <= 0).double().mean()),
            **{f"rewards/{name}/mean": float(v.nanmean().nan_to_num()) for name, v in self.each.items()},
            "completions/mean_length": float(self.lengths.double().mean()),
            "completions/clipped_ratio": float((~self.finished).double().mean()),
            "mismatch": self.mismatch(),
            **{f"seconds/{name}": value for name, value in spent.items()},
        }
        if self.ref is not None:
            values["kl_of_answers"] = float(self.kl().mean())
        return values

    def texts(self) -> list[str]:
        return [
            f"{self.prompts[at // self.k].comparison.key}: {answer} ({reward:.3g})"
            for at, (answer, reward) in enumerate(zip(self.answers, self.rewards.tolist(), strict=True))
        ]


Pack = Callable[[Sequence[PromptRead], Sequence[tuple[int, ...]]], tuple[CompletionBatch, list[ImageFeatures] | None]]
"""Prompts and the ids of their answers to a batch, and its images' features where nothing of them is trained."""


class Actor:
    """Samples answers, and judges them: everything that is done without a gradient."""

    def __init__(
        self,
        policy: MMGPT,
        critic: RewardModel | None,
        processor: Processor,
        reference: Reference,
        recipe: PolicyRecipe,
        *,
        bf16: bool,
    ):
        """`bf16`: products are computed under autocast, as in training."""
        self.policy, self.critic, self.processor = policy, critic, processor
        self.reference, self.recipe, self.bf16 = reference, recipe, bf16
        self.sampler = Sampler(policy, processor, max_new_tokens=recipe.max_new_tokens, temperature=recipe.temperature)

    # ---- sampling ----

    def sample(
        self,
        comparisons: Comparisons,
        places: Iterable[int],
        iteration: int | None,
        errors: ErrorCounter,
        *,
        samples: int | None = None,
    ) -> Experience:
        """Answers to the prompts at `places` of an endless order of `comparisons`, or of the first ones as they come
        for no `iteration`: validation. A prompt that cannot be read is counted, and another one takes its place.

        Raises MMGPTError when none of the prompts can be read."""
        recipe, k = self.recipe, samples or self.recipe.samples
        places = list(places)
        read = self._read(comparisons, places, errors, in_order=iteration is None)
        begin = time.perf_counter()
        documents = [prompt_document(self.processor, prompt.comparison) for prompt in read]
        # By the place in the order of all prompts: as many prompts on more ranks are the same samples.
        base = VALIDATION_SEED if iteration is None else recipe.train.seed * 1_000_003
        seeds = [(base + 1) * 100_003 + place for place in places]
        with self._quiet():
            self._see(documents, read)
            images = [image for prompt in read for image in prompt.images]
            drawn = self.sampler(documents, k, [seed % 2**63 for seed in seeds], images=images or None)
        flat = [sample for own in drawn for sample in own]
        longest = max(len(sample.ids) for sample in flat)
        lengths = torch.tensor([len(sample.ids) for sample in flat])
        mask = torch.arange(longest) < lengths[:, None]
        sampler = torch.zeros(mask.shape)
        sampler[mask] = torch.tensor([value for sample in flat for value in sample.logprobs])
        nothing = torch.zeros(mask.shape)
        return Experience(
            iteration=-1 if iteration is None else iteration,
            prompts=read,
            k=k,
            ids=[sample.ids for sample in flat],
            answers=[self._answer(sample.ids) for sample in flat],
            finished=torch.tensor([sample.finished for sample in flat]),
            sampler=sampler,
            mask=mask,
            learned=torch.ones(len(flat), dtype=torch.bool),
            old=nothing,
            entropy=nothing,
            rewards=torch.zeros(len(flat)),
            each={},
            advantages=nothing,
            ref=None,
            values=None,
            returns=None,
            pack=self._pack,
            seconds={"generation": time.perf_counter() - begin},
        )

    def _read(
        self, comparisons: Comparisons, places: Iterable[int], errors: ErrorCounter, *, in_order: bool
    ) -> list[PromptRead]:
        count, read = len(comparisons), list[PromptRead]()
        for place in places:
            epoch, at = divmod(place, count)
            order = range(count) if in_order else epoch_order(count, self.recipe.train.seed, epoch)
            for number in (order[(at + more) % count] for more in range(count)):
                try:
                    read.append(self._prompt(comparisons, number))
                    break
                except BadRecordError as error:
                    errors.add(str(error), f"prompt {number}")
                except MMGPTError as error:
                    errors.add("prompt that cannot be read", str(error))
            else:
                raise MMGPTError(f"none of {count} prompts can be read: {errors.summary()}")
        return read

    def _prompt(self, comparisons: Comparisons, number: int) -> PromptRead:
        comparison = dataclasses.replace(comparisons[number], completions=())
        example = self.processor(prompt_document(self.processor, comparison))
        room = self.processor.config.max_length - len(example)
        if room < self.recipe.max_new_tokens + 1:
            raise MMGPTError(
                f"{comparison.key}: {len(example)} tokens leave {max(0, room)} of the context for an answer of "
                f"{self.recipe.max_new_tokens}"
            )
        return PromptRead(number, comparison, self.processor.pixels([example]))

    def _see(self, documents: Sequence[Document], read: Sequence[PromptRead]) -> None:
        """Encode the images of all prompts, some prompts side by side."""
        for first in range(0, len(read), GROUP):
            group = read[first : first + GROUP]
            pixels = [prompt.pixels for prompt in group if len(prompt.pixels)]
            if not pixels:
                continue
            examples = [self.processor(document) for document in documents[first : first + GROUP]]
            batch = collate([[example] for example in examples], torch.cat(pixels)).to(self.policy.device)
            found = iter(self.policy.image_tokens(batch))
            for prompt, example in zip(group, examples, strict=True):
                prompt.images = [next(found) for _ in example.images]

    def _answer(self, ids: Sequence[int]) -> str:
        """What sampled ids say, without an end mark."""
        tokenizer = self.processor.tokenizer
        return tokenizer.decode([id for id in ids if id not in tokenizer.end_ids]).strip()

    # ---- judging ----

    def judge(self, experience: Experience, rewards: Rewards, *, alone: bool = False) -> None:
        """Fill in rewards, log-probabilities, values and advantages; `alone`: for validation, without advantages.

        Raises MMGPTError for a sampler that is not the trainer's policy."""
        recipe, begin = self.recipe, time.perf_counter()
        comparisons = [prompt.comparison for prompt in experience.prompts for _ in range(experience.k)]
        scored = rewards(comparisons, experience.answers, experience.ids)
        experience.rewards, experience.each = scored.total.float().cpu(), scored.each
        parts = recipe.minibatches * recipe.train.accumulate
        parts = -(-len(experience.prompts) // GROUP) if alone else parts
        self._score(experience, parts, with_reference=alone or bool(recipe.beta), with_critic=not alone)
        experience.seconds["scoring"] = time.perf_counter() - begin
        if alone:
            return
        if (found := experience.mismatch()) > recipe.max_mismatch:
            raise MMGPTError(
                f"the sampler's log-probabilities are {found:.3f} nats a token from the trainer's, above max_mismatch "
                f"{recipe.max_mismatch}: what is learned would not be what was sampled"
            )
        self._advantages(experience)
        experience._began = time.perf_counter()

    def _score(self, experience: Experience, parts: int, *, with_reference: bool, with_critic: bool) -> None:
        """Log-probabilities and values, in the micro-batches that are learned: the first ratios are then exactly 1."""
        shape = experience.mask.shape
        names = ["old", "entropy"] + ["ref"] * with_reference
        names += ["values", "after"] * (with_critic and self.critic is not None)
        found = {name: torch.zeros(shape) for name in names}
        for number in range(parts):
            rows = experience.rows(number, parts)
            if rows.start >= rows.stop:
                continue
            with self._quiet():
                completions, images = experience.packed(number, parts)
                for name, values in self._known(completions.to(self.policy.device), images, names):
                    found[name][rows, : values.shape[1]] = values.float().cpu()
        experience.old, experience.entropy = found["old"], found["entropy"]
        experience.ref = found.get("ref")
        if "values" in found:
            experience.values = found["values"]
            experience.returns = found["after"]  # of cut answers what is still to come; `_advantages` replaces it

    def _known(
        self, completions: CompletionBatch, images: list[ImageFeatures] | None, names: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        batch, temperature = completions.batch, self.recipe.temperature
        logp, entropy = logprobs_and_entropy(self.policy, batch, temperature=temperature, images=images)
        yield "old", token_values(completions, logp)[0]
        yield "entropy", token_values(completions, entropy)[0]
        if "ref" in names:
            with self.reference.active():
                ref, _ = logprobs_and_entropy(self.policy, batch, temperature=temperature, images=images)
            yield "ref", token_values(completions, ref)[0]
        if "values" in names:
            assert self.critic is not None
            values = self.critic.values(batch)  # (B, T)
            yield "values", token_values(completions, values)[0]
            yield "after", values[completions.rows, last_positions(completions)][:, None]

    def _advantages(self, experience: Experience) -> None:
        recipe, mask = self.recipe, experience.mask
        scores, cut = experience.rewards.clone(), ~experience.finished
        if recipe.truncated == "penalise":
            scores -= recipe.truncation_penalty * cut
        learned = ~scores.isnan()
        if recipe.truncated == "mask":
            learned &= ~cut
        kl = torch.zeros(mask.shape)
        if recipe.beta and recipe.kl_in == "reward":
            assert experience.ref is not None
            kl = losses.kl_estimate(recipe.kl, experience.old, experience.ref) * mask
        reduce = functools.partial(sum_over_ranks, device=self.policy.device)
        if recipe.advantage == "gae":
            assert experience.values is not None
            assert experience.returns is not None
            rewards = losses.token_rewards(scores.nan_to_num(), kl, mask, beta=recipe.beta)
            after = experience.returns[:, 0] * cut  # an answer that ended has nothing more to come
            advantages, experience.returns = losses.gae(
                rewards, experience.values, mask, gamma=recipe.gamma, lam=recipe.lam, bootstrap=after
            )
            if recipe.whiten:
                advantages = losses.whiten(advantages, mask & learned[:, None], reduce=reduce)
        else:
            whole = (scores - recipe.beta * kl.sum(dim=1)).where(learned, torch.nan).view(-1, experience.k)
            group = losses.group_advantages(recipe.advantage, whole, reduce=reduce).flatten()
            advantages = group[:, None] * mask
            if recipe.drop_equal_groups:
                learned &= (group.view(-1, experience.k) != 0).any(dim=1).repeat_interleave(experience.k)
        experience.advantages, experience.learned = advantages, learned

    # ---- batches ----

    def _pack(
        self, prompts: Sequence[PromptRead], ids: Sequence[tuple[int, ...]]
    ) -> tuple[CompletionBatch, list[ImageFeatures] | None]:
        k = len(ids) // len(prompts)
        documents = [
            sampled_document(self.processor, prompt.comparison, ids[at * k : (at + 1) * k])
            for at, prompt in enumerate(prompts)
        ]
        room = self.processor.config.max_length
        longest = max(
            len(self.processor(prompt_document(self.processor, prompt.comparison)))
            + sum(len(own) + 1 for own in ids[at * k : (at + 1) * k])
            for at, prompt in enumerate(prompts)
        )
        separate = not shares_prompts(self.policy) or longest > room
        times = k if separate else 1
        pixels = [tiles for prompt in prompts for tiles in [prompt.pixels] * times if len(tiles)]
        pixel_values = torch.cat(pixels) if pixels else stack_pixels([], self.processor.config.image)
        batch = completion_batch(self.processor, documents, separate=separate, pixel_values=pixel_values)
        images = [image for prompt in prompts for _ in range(times) for image in prompt.images]
        return batch, images if images and not self._images_are_trained else None

    @property
    def _images_are_trained(self) -> bool:
        """Whether what an image gives the decoder changes from step to step."""
        policy = self.policy
        parts = [policy.vision, policy.connector, policy.concepts]
        trained = [p for part in parts if part is not None for p in part.parameters()]
        trained += [mark for mark in (policy.image_newline,) if mark is not None]
        if policy.concepts is not None:  # they are told in the decoder's own words
            trained += list(policy.decoder.embedding.parameters())
        return any(p.requires_grad for p in trained)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No gradient, no dropout, and the precision of training."""
        device = self.policy.device
        with torch.no_grad(), sampling(self.policy), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def restore(self, comparisons: Comparisons, tensors: Mapping[str, Tensor]) -> Experience:
        """A rollout out of a checkpoint; its prompts are read again. Raises CheckpointError when they cannot be."""
        own = tensors
        try:
            read = [self._prompt(comparisons, number) for number in own["numbers"].tolist()]
            with self._quiet():
                self._see([prompt_document(self.processor, prompt.comparison) for prompt in read], read)
            lengths = own["mask"].sum(dim=1).tolist()
            ids = [tuple(row[:length]) for row, length in zip(own["ids"].tolist(), lengths, strict=True)]
            return Experience(
                iteration=int(own["iteration"]),
                prompts=read,
                k=len(ids) // len(read),
                ids=ids,
                answers=[self._answer(one) for one in ids],
                each={name.removeprefix("each."): t for name, t in own.items() if name.startswith("each.")},
                pack=self._pack,
                seconds={"generation": 0.0, "scoring": 0.0},
                finished=own["finished"],
                sampler=own["sampler"],
                mask=own["mask"],
                learned=own["learned"],
                old=own["old"],
                entropy=own["entropy"],
                rewards=own["rewards"],
                advantages=own["advantages"],
                ref=own.get("ref"),
                values=own.get("values"),
                returns=own.get("returns"),
            )
        except (KeyError, IndexError, BadRecordError, MMGPTError, ZeroDivisionError) as error:
            raise CheckpointError(f"the rollout in the checkpoint cannot be taken up again ({error})") from None
