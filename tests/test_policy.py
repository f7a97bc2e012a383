"""PPO, RLOO and GRPO with images: exact first steps, exact gradients, exact resumption, and that they learn."""

import dataclasses
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny
from forked_ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from toy_stage import logged, losses, one_step

from mm_gpt.alignment import losses as formulas
from mm_gpt.alignment.completions import completion_batch, sampled_document, token_logprobs, token_values
from mm_gpt.alignment.experience import PolicyBatch
from mm_gpt.alignment.policy import PolicyTask
from mm_gpt.alignment.policy_recipe import PolicyRecipe
from mm_gpt.alignment.reward_model import RewardModel, load_reward_model, save_reward_model
from mm_gpt.alignment.rewards import RewardConfig
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.training.distributed import process_group
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.rollouts import Sample
from mm_gpt.training.stage import Term
from mm_gpt.training.train_config import TrainConfig

REWARDS = """
import math

def short(completions, **columns):
    "The fewer characters, the better."
    return [-len(answer[0]["content"]) / 10 for answer in completions]

def odd(prompts, completions, colour, **columns):
    "What the row says, and nothing for answers of an even length."
    return [None if len(c[0]["content"]) % 2 == 0 else float(len(name)) for c, name in zip(completions, colour)]

def letters(completions, **columns):
    return [sum(c.isalpha() for c in answer[0]["content"]) / 7 for answer in completions]

def same(completions, **columns):
    return [1.0] * len(completions)

def nothing(completions, **columns):
    return [math.nan] * len(completions)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts with none, one or three images, and some text to stay good at."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = []
    for n in range(12):
        images = [f"{n}-{i}.png" for i in range((0, 1, 3)[n % 3])]
        for i, name in enumerate(images):
            make_picture(10 * n + i).save(folder / name)
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        parts.append({"type": "text", "text": "Describe the image in one sentence."[: 12 + 2 * n]})
        rows.append(
            {"prompt": [{"role": "user", "content": parts}], "images": images, "colour": ["red", "green"][n % 2]}
        )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.txt").write_text("\n\n".join("A red circle on a blue ground. " * (n + 2) for n in range(30)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    model, processor = make_tiny(seed=5)
    save_reward_model(RewardModel(model), processor, folder)
    return folder


def make_recipe(data: Path, start: Path, **changes: Any) -> PolicyRecipe:
    train_changes = changes.pop("train", {})
    reward = changes.pop("reward", f"{data}/rewards.py:short")
    values: dict[str, Any] = {
        "train": TrainConfig(
            **{"steps": 4, "lr": 1e-3, "precision": "fp32", "device": "cpu", "log_every": 1, **train_changes}
        ),
        "start": str(start),
        "sources": (SourceConfig(path="prompts.jsonl"),),
        "rewards": tuple(RewardConfig(source=str(s)) for s in (reward if isinstance(reward, list) else [reward])),
        "holdout": 0.2,
        "validation_prompts": 2,
        "prompts": 4,
        "samples": 3,
        "max_new_tokens": 7,
        "temperature": 0.7,
        "lora": LoRAConfig(rank=2, alpha=4, dropout=0.5),
        "data": changes.pop("folder", str(data)),
    }
    return PolicyRecipe(**(values | changes))


PPO: dict[str, Any] = {"advantage": "gae", "samples": 1, "minibatches": 2, "epochs": 2}


def prepared(recipe: PolicyRecipe, *, ends: Sequence[int] = ()) -> tuple[PolicyTask, torch.optim.Optimizer]:
    """`ends`: further tokens that end an answer, so that answers are of several lengths."""
    task = PolicyTask(recipe)
    tokenizer = task.processor.tokenizer
    tokenizer.end_ids = (*tokenizer.end_ids, *(id for id in ends if id not in tokenizer.end_ids))
    return task, make_optimizer(task.prepare(), recipe.train)


def gradients(task: PolicyTask, terms: dict[str, Term], names: tuple[str, ...]) -> list[Tensor]:
    """Of the named terms together, each over its own count."""
    task.model.zero_grad()
    sum(terms[n].total * (terms[n].weight / terms[n].count) for n in names).backward()  # type: ignore[union-attr]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in task.model.policy.parameters()]


@pytest.mark.parametrize("method", ["gae", "rloo", "grpo", "dr_grpo", "batch_std"])
def test_the_first_update_is_on_policy(data: Path, tiny_model_folder: Path, method: str) -> None:
    """No, one and three images, answers of several lengths, temperature 0.7, dropout in the configuration: ratios are
    1, nothing is clipped, and the policy is its reference; the sampler's probabilities are the trainer's."""
    samples = 1 if method == "gae" else 3
    changes: dict[str, Any] = {"advantage": method, "samples": samples, "epochs": 2, "prompts": 6}
    recipe = make_recipe(data, tiny_model_folder, **changes, train={"accumulate": 2})
    task, optimizer = prepared(recipe, ends=range(0, 400, 7))
    task.model.train()
    images = set()
    for batch in task.micro_batches(0, 2):
        terms = task.loss(batch)
        completions = batch.completions.batch
        images |= set(torch.bincount(completions.image_rows, minlength=len(completions.input_ids)).tolist())
        assert float(terms["ratio"].total) == pytest.approx(terms["ratio"].count, rel=1e-6)
        assert float(terms["clip_ratio"].total) == 0
        assert abs(float(terms["approx_kl"].total)) < 1e-6
        assert abs(float(terms["kl"].total.detach())) < 1e-5
        assert terms["kl"].weight == 0
        assert torch.isfinite(terms["policy"].total)
        wanted = {"policy", "value"} if method == "gae" else {"policy"}
        assert set(task.counts(batch)) == wanted
    assert images == {0, 1, 3}
    assert task.experience is not None
    assert task.experience.mismatch() < 1e-5
    assert len({len(ids) for ids in task.experience.ids}) > 1
    metrics = one_step(task, optimizer, recipe.train, 0)
    more = task.after_step()
    assert math.isfinite(metrics["loss"])
    assert more["seconds/generation"] > 0
    assert more["seconds/scoring"] > 0
    assert more["seconds/learning"] > 0
    one_step(task, optimizer, recipe.train, 1)
    assert task.after_step()["seconds/generation"] == 0  # the same rollout once more
    later = task.loss(task.micro_batches(1, 2)[0])
    assert abs(float(later["kl"].total.detach())) > 0


def test_one_step_on_a_rollout_needs_no_old_policy(data: Path, tiny_model_folder: Path) -> None:
    """The gradient is the policy gradient: minus the advantage times that of each log-probability, over all tokens."""
    task, _ = prepared(make_recipe(data, tiny_model_folder, advantage="rloo", beta=0.0))
    (batch,) = task.micro_batches(0, 1)
    assert batch.ref is None
    found = gradients(task, task.loss(batch), ("policy",))
    task.model.zero_grad()
    logp, mask = token_values(
        batch.completions, token_logprobs(task.model.policy, batch.completions.batch, temperature=0.7)
    )
    (-(batch.advantages * logp)[mask].sum() / mask.sum()).backward()
    for mine, parameter in zip(found, task.model.policy.parameters(), strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-5 for g in found)


def test_advantages_of_groups(data: Path, tiny_model_folder: Path) -> None:
    """Each prompt's answers against each other, by the rewards that the function gave; less beta times the KL."""
    task, optimizer = prepared(make_recipe(data, tiny_model_folder, advantage="rloo", beta=0.5, train={"lr": 0.05}))
    for step in range(2):
        one_step(task, optimizer, task.recipe.train, step)
    task.micro_batches(2, 1)
    experience = task.experience
    assert experience is not None
    rewards = torch.tensor([-len(answer) / 10 for answer in experience.answers])
    torch.testing.assert_close(experience.rewards, rewards)
    assert experience.kl().abs().max() > 1e-3
    worth = (rewards - 0.5 * experience.kl()).view(-1, 3)
    others = (worth.sum(dim=1, keepdim=True) - worth) / 2
    expected = (worth - others).flatten()[:, None] * experience.mask
    torch.testing.assert_close(experience.advantages, expected, rtol=1e-4, atol=1e-5)


def test_the_critic_sees_what_the_policy_writes(data: Path, tiny_model_folder: Path, reward_folder: Path) -> None:
    """The critic begins as the reward model; its values are those before each token; returns and whitened advantages
    follow from them by GAE, with what is still to come behind an answer that was cut off."""
    recipe = make_recipe(data, tiny_model_folder, **PPO, reward=reward_folder, whiten=False, lam=0.9, value_clip=None)
    task, _ = prepared(recipe)
    task.micro_batches(0, 1)
    experience, critic = task.experience, load_reward_model(reward_folder)[0]
    assert experience is not None
    assert experience.values is not None
    assert experience.returns is not None
    assert experience.ref is not None
    assert not experience.finished.all()
    for n, prompt in enumerate(experience.prompts):
        document = sampled_document(task.processor, prompt.comparison, experience.ids[n : n + 1])
        alone = completion_batch(task.processor, [document])
        with torch.no_grad():
            values = critic.values(alone.batch)
        own, mask = token_values(alone, values)
        length = int(mask.sum())
        torch.testing.assert_close(experience.values[n, :length], own[0], rtol=1e-4, atol=1e-4)
        rewards = -recipe.beta * (experience.old - experience.ref)[n, :length]
        rewards[-1] += experience.rewards[n]
        after = torch.zeros(1) if experience.finished[n] else values[:, -1]
        advantages, returns = formulas.gae(rewards[None], own, mask, gamma=1.0, lam=0.9, bootstrap=after)
        torch.testing.assert_close(experience.advantages[n, :length], advantages[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(experience.returns[n, :length], returns[0], rtol=1e-3, atol=1e-3)
    white, _ = prepared(dataclasses.replace(recipe, whiten=True))
    white.micro_batches(0, 1)
    assert white.experience is not None
    inside = white.experience.advantages[white.experience.mask]
    assert abs(float(inside.mean())) < 1e-5
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("truncated", ["keep", "mask", "penalise"])
def test_answers_that_were_cut_off(data: Path, tiny_model_folder: Path, truncated: str) -> None:
    """Rewarded like others, left out, or penalised: never two of these."""
    recipe = make_recipe(
        data, tiny_model_folder, advantage="dr_grpo", beta=0.0, truncated=truncated, truncation_penalty=3.0, samples=8
    )
    task, _ = prepared(recipe)
    (batch,) = task.micro_batches(0, 1)
    experience = task.experience
    assert experience is not None
    cut = ~experience.finished
    assert int(cut.sum()) > 0
    assert all(len(ids) == 7 for ids, is_cut in zip(experience.ids, cut, strict=True) if is_cut)
    scores = experience.rewards - (3.0 * cut if truncated == "penalise" else 0.0)
    scores = scores.where(~cut, torch.nan) if truncated == "mask" else scores
    expected = formulas.group_advantages("dr_grpo", scores.view(-1, 8)).flatten()
    torch.testing.assert_close(experience.advantages[:, 0], expected)
    learned = batch.mask.any(dim=1)
    assert torch.equal(learned, ~cut if truncated == "mask" else torch.ones_like(cut))
    assert task.counts(batch)["policy"] == float(batch.mask.sum())


def test_rewards_that_say_nothing_and_groups_that_are_equal(data: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(data, tiny_model_folder, advantage="grpo", beta=0.0, reward=f"{data}/rewards.py:odd")
    task, _ = prepared(recipe)
    (batch,) = task.micro_batches(0, 1)
    experience = task.experience
    assert experience is not None
    silent = torch.tensor([len(answer) % 2 == 0 for answer in experience.answers])
    assert silent.any()
    assert torch.equal(experience.rewards.isnan(), silent)
    assert torch.equal(~batch.mask.any(dim=1), silent)
    assert not experience.advantages.any()  # of one prompt, all that have a reward have the same
    task, _ = prepared(dataclasses.replace(recipe, drop_equal_groups=True))
    (batch,) = task.micro_batches(0, 1)
    assert task.counts(batch) == {"policy": 0.0}
    assert task.experience is not None
    assert task.experience.metrics(is_first=True)["frac_reward_zero_std"] == 1.0


def test_without_any_reward_no_checkpoint_is_judged(data: Path, tiny_model_folder: Path) -> None:
    silent = f"{data}/rewards.py:nothing"
    recipe = make_recipe(data, tiny_model_folder, advantage="grpo", reward=[f"{data}/rewards.py:short", silent])
    assert not any("nothing" in name for name in prepared(recipe)[0].validate()), "NaN is no JSON"
    task, _ = prepared(dataclasses.replace(recipe, rewards=(RewardConfig(source=silent),)))
    with pytest.raises(MMGPTError, match=r"no answer to 2 held-out prompts has a reward: .*reward of nothing is nan"):
        task.validate()


def test_a_pretraining_term_beside_ppo(data: Path, tiny_model_folder: Path) -> None:
    """gamma = 0 is PPO bit for bit; above it, the gradient is PPO's and gamma times that of the next tokens."""
    texts = (SourceConfig(path="texts.txt"),)
    common: dict[str, Any] = {**PPO, "row_length": 64, "pretraining_rows": 2}
    plain, _ = prepared(make_recipe(data, tiny_model_folder, **common))
    without, _ = prepared(make_recipe(data, tiny_model_folder, **common, pretraining=texts, pretraining_weight=0.0))
    mixed, _ = prepared(make_recipe(data, tiny_model_folder, **common, pretraining=texts, pretraining_weight=0.25))
    (a,), (b,), (c,) = (task.micro_batches(0, 1) for task in (plain, without, mixed))
    assert a.pretraining is None
    assert b.pretraining is None
    assert c.pretraining is not None
    of_plain = gradients(plain, plain.loss(a), ("policy", "value"))
    of_without = gradients(without, without.loss(b), ("policy", "value"))
    assert all(torch.equal(x, y) for x, y in zip(of_plain, of_without, strict=True))
    terms = mixed.loss(c)
    assert mixed.counts(c)["pretraining"] == terms["pretraining"].count > 0
    whole = gradients(mixed, terms, ("policy", "value", "pretraining"))
    mixed.model.zero_grad()
    total, count = mixed.model.policy.loss(c.pretraining)
    (0.25 * total / count).backward()
    for mine, ppo, parameter in zip(whole, of_plain, mixed.model.policy.parameters(), strict=True):
        extra = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, ppo + extra, rtol=1e-4, atol=1e-6)
    values = mixed.validate()
    assert values["pretraining"] > 0
    assert values["objective"] == pytest.approx(values["reward"] - 0.02 * values["kl"])


def resumable(data: Path, start: Path) -> PolicyRecipe:
    """Two rollouts of two steps each, and the first step on a third one."""
    return make_recipe(
        data,
        start,
        **(PPO | {"epochs": 1}),
        ema=0.9,
        pretraining=(SourceConfig(path="texts.txt"),),
        row_length=64,
        train={"steps": 5, "validate_every": 3, "accumulate": 2},
    )


@pytest.fixture(scope="module")
def whole_run(data: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    recipe = resumable(data, tiny_model_folder)
    train(PolicyTask(recipe), recipe.train, out, progress=False)
    return out


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_continues_between_rollout_and_update(
    data: Path, tiny_model_folder: Path, whole_run: Path, tmp_path: Path, stop: int
) -> None:
    """Stopped after the first of two updates on a rollout, or at its end: samples, losses, critic, average of weights
    and optimizer go on bit for bit."""
    recipe = resumable(data, tiny_model_folder)
    stopped = PolicyTask(recipe)
    plain, calls = stopped.loss, iter(range(1, 100))

    def loss(batch: PolicyBatch) -> dict[str, Term]:
        if next(calls) == 2 * (stop - 1) + 1:
            signal.raise_signal(signal.SIGINT)
        return plain(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {stop}"):
        train(stopped, recipe.train, tmp_path / "stopped", progress=False)
    train(PolicyTask(recipe), recipe.train, tmp_path / "stopped", resume=True, progress=False)
    for key in ("loss", "reward", "value", "pretraining", "kl"):
        assert logged(tmp_path / "stopped", key) == logged(whole_run, key), key
    assert len(losses(whole_run)) == 5
    for name in ("model.safetensors", "critic/reward_head.safetensors", "training_state/rank-0-of-1.safetensors"):
        one, other = (load_file(run / "step-000005" / name) for run in (whole_run, tmp_path / "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_what_is_saved_can_be_loaded(whole_run: Path) -> None:
    load_model(whole_run / "best")
    load_reward_model(whole_run / "best" / "critic")


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "gae"])
def test_it_learns_what_is_rewarded(data: Path, tiny_model_folder: Path, advantage: str) -> None:
    """Letters, of which a random model writes some: the reward rises by far more than it wavers."""
    changes: dict[str, Any] = {"advantage": advantage, "beta": 0.001, "reward": f"{data}/rewards.py:letters"}
    changes |= {"decoder": "full", "lora": None, "temperature": 1.0, "samples": 8, "train": {"lr": 0.03}}
    task, optimizer = prepared(make_recipe(data, tiny_model_folder, **changes))
    found = []
    for step in range(20):
        one_step(task, optimizer, task.recipe.train, step)
        found.append(task.after_step()["reward"])
    assert sum(found[-6:]) / 6 > sum(found[:3]) / 3 + 0.1


@pytest.mark.parametrize("advantage", ["gae", "batch_std"])
def test_two_ranks_are_one_with_as_many_prompts(data: Path, tiny_model_folder: Path, advantage: str) -> None:
    """The same samples, rewards, whitened advantages and steps, where each rank has half of the prompts."""
    samples = 2 if advantage == "gae" else 3

    def two_steps(prompts: int) -> list[Tensor]:
        recipe = make_recipe(data, tiny_model_folder, advantage=advantage, samples=samples, epochs=2, prompts=prompts)
        with process_group(torch.device("cpu")):
            task, optimizer = prepared(recipe)
            for step in range(2):
                one_step(task, optimizer, recipe.train, step)
            assert task.experience is not None
            return [*(p.detach() for p in task.model.parameters() if p.requires_grad), task.experience.rewards]

    alone = two_steps(4)
    both = on_ranks(lambda rank: [t.tolist() for t in two_steps(2)])
    assert not isinstance(both[0], str), both
    rewards = torch.cat([torch.tensor(found[-1]) for found in both])
    torch.testing.assert_close(rewards, alone[-1])
    for mine, one, other in zip(alone[:-1], both[0][:-1], both[1][:-1], strict=True):
        assert one == other
        torch.testing.assert_close(torch.tensor(one), mine, rtol=1e-3, atol=1e-4)


def test_images_reach_the_policy_and_its_critic(data: Path, tiny_model_folder: Path) -> None:
    """With the connector trained, images are encoded with a gradient in every step; else once a rollout."""
    recipe = make_recipe(data, tiny_model_folder, **PPO, train_connector=True)
    task, _ = prepared(recipe)
    found = False
    for batch in (task.micro_batches(step, 1)[0] for step in range(2)):
        assert batch.images is None
        task.model.zero_grad()
        terms = task.loss(batch)
        (terms["policy"].total + terms["value"].total).backward()
        if len(batch.completions.batch.pixel_values):
            assert task.model.policy.connector is not None
            assert task.model.critic is not None
            for connector in (task.model.policy.connector, task.model.critic.model.connector):
                assert connector is not None
                found = found or any(p.grad is not None and p.grad.any() for p in connector.parameters())
    assert found
    frozen, _ = prepared(make_recipe(data, tiny_model_folder, **PPO))
    batches = [frozen.micro_batches(step, 1)[0] for step in range(2)]
    assert any(batch.images for batch in batches)
    for batch in batches:
        with torch.no_grad():
            again = frozen.loss(dataclasses.replace(batch, images=None))["policy"].total
            torch.testing.assert_close(again, frozen.loss(batch)["policy"].total, atol=1e-5, rtol=1e-5)


ENDS = range(0, 400, 7)


def step_gradients(task: PolicyTask, config: TrainConfig) -> tuple[dict[str, float], list[Tensor]]:
    """What a step of the loop gives the optimizer."""
    found: list[Tensor] = []
    trained = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    optimizer.param_groups[0]["lr_scale"] = 0.0

    def keep(*_: Any) -> None:
        found.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)

    optimizer.register_step_pre_hook(keep)
    return one_step(task, optimizer, dataclasses.replace(config, clip=1e9), 0), found


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": "gae", "samples": 2, "aggregation": "token"},
        {"advantage": "grpo", "aggregation": "sequence", "beta": 0.3, "kl_in": "loss", "kl": "k3"},
        {"advantage": "dr_grpo", "aggregation": "constant", "truncated": "mask"},
    ],
    ids=lambda changes: changes["aggregation"],
)
def test_micro_batches_are_one_batch(data: Path, tiny_model_folder: Path, changes: dict[str, Any]) -> None:
    """However a rollout is cut, answers of other lengths weigh what they weigh in one batch."""
    found = []
    for count in (1, 4):
        recipe = make_recipe(data, tiny_model_folder, **changes, train={"accumulate": count})
        task, _ = prepared(recipe, ends=ENDS)
        with torch.no_grad():  # away from the reference
            for name, parameter in task.model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        found.append(step_gradients(task, recipe.train))
        assert task.experience is not None
        assert len(set(map(len, task.experience.ids))) > 2
    (one, whole), (other, parts) = found
    for name in ("loss", "policy", "kl", "entropy"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in whole) > 1e-3


def test_the_reward_is_that_of_the_last_token_that_was_generated(data: Path, tiny_model_folder: Path) -> None:
    """Of answers that end with one mark or another one, that are cut off, and where an end mark is what fills rows up.
    Without discounting nothing, a return is a token's own reward."""
    changes: dict[str, Any] = {
        "advantage": "gae",
        "gamma": 0.0,
        "beta": 0.0,
        "whiten": False,
        "prompts": 2,
        "samples": 4,
    }
    task, _ = prepared(make_recipe(data, tiny_model_folder, **changes))
    eos, other = task.processor.tokenizer.end_ids[0], 0  # rows are filled up with 0
    task.processor.tokenizer.end_ids = (eos, other)
    answers = [(40, 41, eos), (42, other), (43, 44, 45, 46, 47, 48, 49), (eos,)]
    finished = [True, True, False, True]
    drawn = [Sample(ids, (0.0,) * len(ids), ended) for ids, ended in zip(answers, finished, strict=True)]
    task.actor.sampler = lambda documents, k, seeds, images: [drawn] * len(documents)  # type: ignore[assignment, misc]
    task.recipe = task.actor.recipe = dataclasses.replace(task.recipe, max_mismatch=1e9)
    (batch,) = task.micro_batches(0, 1)
    experience = task.experience
    assert experience is not None
    assert experience.returns is not None
    assert experience.values is not None
    for n, ids in enumerate(answers * 2):
        wanted = [0.0] * (len(ids) - 1) + [float(experience.rewards[n])] + [0.0] * (7 - len(ids))
        assert experience.rewards[n] == -len(experience.answers[n]) / 10
        assert experience.returns[n].tolist() == pytest.approx(wanted, abs=1e-6)
        labels, mask = token_values(batch.completions, batch.completions.batch.labels.double())
        assert tuple(labels[n][mask[n]].long().tolist()) == ids
    assert experience.rewards[2] < 0


def test_answers_that_do_not_fit_side_by_side(data: Path, tiny_model_folder: Path) -> None:
    """Each is then a row of its own, with all images of its prompt; its log-probabilities are those of it alone."""
    changes: dict[str, Any] = {"advantage": "rloo", "samples": 6, "max_new_tokens": 40, "prompts": 3}
    task, _ = prepared(make_recipe(data, tiny_model_folder, **changes))
    (batch,) = task.micro_batches(0, 1)
    experience = task.experience
    assert experience is not None
    assert len(batch.completions.batch.input_ids) == 18
    assert {len(prompt.images) for prompt in experience.prompts} >= {0, 3}
    assert batch.images is not None
    for n in range(0, 18, 2):
        prompt = experience.prompts[n // 6]
        alone = completion_batch(
            task.processor, [sampled_document(task.processor, prompt.comparison, experience.ids[n : n + 1])]
        )
        with torch.no_grad():
            own, mask = token_values(alone, token_logprobs(task.model.policy, alone.batch, temperature=0.7))
        torch.testing.assert_close(experience.old[n][: mask.shape[1]], own[0], rtol=1e-4, atol=1e-4)


def test_images_that_are_told_in_words_change_with_the_words(data: Path, tiny_model_folder: Path) -> None:
    """Concepts are embedded by the decoder: where that is trained, what was seen before a step is of other weights."""
    changes: dict[str, Any] = {"advantage": "rloo", "lora": None, "decoder": "full"}
    task, _ = prepared(make_recipe(data, tiny_model_folder, **changes))
    assert not task.actor._images_are_trained
    task.model.policy.concepts = torch.nn.Identity()  # type: ignore[assignment]
    assert task.actor._images_are_trained
    task.model.policy.decoder.requires_grad_(False)
    assert not task.actor._images_are_trained


def test_a_run_that_is_killed_samples_the_same_again(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL between a rollout and the first update on it, with the rollout in no checkpoint, and between two updates
    on it, with the rollout in the last one."""
    recipe = make_recipe(
        data, tiny_model_folder, advantage="rloo", epochs=2, prompts=2, train={"steps": 4, "save_every": 1}
    )

    def run(out: Path, kill_at: int | None = None) -> list[tuple[int, list[tuple[int, ...]]]]:
        """Of each step, its number and what was sampled."""
        task, seen = PolicyTask(recipe), []
        plain = task.loss

        def loss(batch: PolicyBatch) -> dict[str, Term]:
            assert task.experience is not None
            seen.append((task._step, task.experience.ids))
            if task._step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(batch)

        task.loss = loss  # type: ignore[method-assign]
        train(task, recipe.train, out, resume=True, progress=False)
        return seen

    whole = run(tmp_path / "whole")
    for kill_at in (2, 3):
        out = tmp_path / f"killed {kill_at}"
        process = multiprocessing.get_context("fork").Process(target=run, args=(out, kill_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert run(out) == whole[kill_at:]
        assert losses(out) == losses(tmp_path / "whole")


def test_ranks_go_on_with_their_own_rollouts(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Each with what it had sampled, of the checkpoint that rank 0 wrote."""
    recipe = make_recipe(data, tiny_model_folder, advantage="rloo", epochs=2, prompts=2)

    def run(rank: int) -> list[Any]:
        with process_group(torch.device("cpu")):
            task, optimizer = prepared(recipe)
            one_step(task, optimizer, recipe.train, 0)
            if rank == 0:
                save_file({n: t.contiguous() for n, t in task.state_tensors().items()}, tmp_path / "state.safetensors")
            dist.barrier()
            again, _ = prepared(recipe)
            again.load_state_tensors(load_file(tmp_path / "state.safetensors"))
            found = []
            for each in (task, again):
                (batch,) = each.micro_batches(1, 1)
                assert each.experience is not None
                found.append([each.experience.ids, batch.advantages.tolist(), batch.old.tolist()])
            return found

    both = on_ranks(run)
    assert not isinstance(both[0], str), both
    for before, after in both:
        assert before == after
    assert both[0][0] != both[1][0]
    assert {"rollout.ids", "rollout1.ids"} <= load_file(tmp_path / "state.safetensors").keys()
    alone, _ = prepared(recipe)
    with pytest.raises(CheckpointError, match="that of 2 ranks, and these are 1"):
        alone.load_state_tensors(load_file(tmp_path / "state.safetensors"))


def test_pretraining_holds_the_language(data: Path, tiny_model_folder: Path) -> None:
    """The held-out loss of the next tokens rises less with the pretraining term than without it, for a like reward."""
    texts = (SourceConfig(path="texts.txt"),)
    changes: dict[str, Any] = {"decoder": "full", "lora": None, "temperature": 1.0, "train": {"lr": 0.01}}
    changes |= {"advantage": "gae", "samples": 2, "beta": 0.0, "reward": f"{data}/rewards.py:letters"}
    changes |= {"row_length": 64, "pretraining_rows": 2, "pretraining": texts}
    rises = []
    for weight in (0.0, 1.0):
        task, optimizer = prepared(make_recipe(data, tiny_model_folder, **changes, pretraining_weight=weight))
        assert task.pretraining is not None
        with torch.no_grad():
            before = task.pretraining.validate()["loss"]
        for step in range(6):
            one_step(task, optimizer, task.recipe.train, step)
        with torch.no_grad():
            rises.append(task.pretraining.validate()["loss"] - before)
    assert rises[0] > rises[1] + 0.1


def test_prompts_that_cannot_be_read_are_counted(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """A broken image, and a prompt that leaves no room for an answer: others take their places."""
    rows = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    rows[1]["images"] = ["broken.png"]
    rows[2] = {"prompt": [{"role": "user", "content": "word " * 300}]}
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    for row in rows:
        for name in row.get("images", []):
            if name != "broken.png":
                (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(data, tiny_model_folder, advantage="rloo", folder=str(tmp_path), holdout=0.1)
    task, _ = prepared(recipe)
    for step in range(3):
        (batch,) = task.micro_batches(step, 1)
        assert len(batch.completions) == 12
    summary = task.errors.summary()
    assert "prompt that cannot be read" in summary
    assert "the context holds 256" in summary


def test_what_does_not_fit_is_refused(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"advantage": "grpo", "samples": 1}, "samples must be at least 2"),
        ({"advantage": "grpo", "critic": "x"}, "grpo has no critic"),
        ({"minibatches": 3}, "prompts must be a multiple of minibatches"),
        ({"sources": ()}, "give sources of prompts"),
        ({"ratio": "sequence"}, "goes with aggregation=sequence"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"kl_in": "loss"}, "kl=k1 has no gradient in the loss"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            make_recipe(data, tiny_model_folder, **changes)
    with pytest.raises(ConfigError, match="rewards: name some"):
        PolicyTask(make_recipe(data, tiny_model_folder, rewards=()))
    with pytest.raises(ConfigError, match="nothing of the policy is trained"):
        prepared(make_recipe(data, tiny_model_folder, lora=None))
    other, processor = make_tiny(seed=1)
    processor.config = dataclasses.replace(
        processor.config, image=dataclasses.replace(processor.config.image, mean=(0.4, 0.5, 0.6))
    )
    folder = tmp_path / "other"
    folder.mkdir()
    save_reward_model(RewardModel(other), processor, folder)
    with pytest.raises(ConfigError, match="its image settings is another"):
        PolicyTask(make_recipe(data, tiny_model_folder, **PPO, critic=str(folder)))
    task, _ = prepared(make_recipe(data, tiny_model_folder, advantage="rloo", max_mismatch=1e-12))
    with pytest.raises(MMGPTError, match="above max_mismatch"):
        task.micro_batches(0, 1)
