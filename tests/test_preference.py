"""Preference learning: what the losses look at, the reference, pairs of ranked answers, KTO, exact resumption."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_picture
from forked_ranks import on_ranks
from safetensors.torch import load_file
from toy_stage import logged, losses, one_step

import mm_gpt
from mm_gpt.alignment.completions import completion_sums, token_logprobs
from mm_gpt.alignment.losses import PREFERENCE_KINDS
from mm_gpt.alignment.preference import PreferenceLoss, PreferenceRecipe, PreferenceTask
from mm_gpt.config import override
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.document import Document
from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.processor import IGNORE_INDEX, collate
from mm_gpt.training.distributed import process_group
from mm_gpt.training.loop import train
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.recipes import RECIPES, run_recipe
from mm_gpt.training.train_config import TrainConfig

LORA = LoRAConfig(rank=4, alpha=8)
GOOD = ("A red circle", "on a blue ground", "one circle, and a ground that is blue")
BAD = ("ground", "A blue image of user and assistant", "red")


def pair_rows(count: int = 6) -> list[dict[str, Any]]:
    """Pairs about pictures, with answers of several lengths; every third one about no picture."""
    rows = []
    for n in range(count):
        row = {"prompt": f"What is in image {n}?", "chosen": f"{GOOD[n % 3]} {n}", "rejected": BAD[n % 2]}
        images = {} if n % 3 == 2 else {"images": [f"{n}.png"]}
        rows.append({"id": f"pair {n}", **images, **{k: chat(k, v) for k, v in row.items()}})
    return rows


def chat(name: str, text: str) -> list[dict[str, str]]:
    return [{"role": "user" if name == "prompt" else "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for n in range(8):
        make_picture(n).save(folder / f"{n}.png")
    rows = pair_rows(8)
    write_rows(folder / "pairs.jsonl", rows[:6])
    write_rows(folder / "held.jsonl", rows[6:])
    ranked = [
        {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        | {"completions": [chat("", text) for text in (*GOOD, BAD[0])], "ranks": [2, 0, 1, 2]}
        for row in rows
    ]
    write_rows(folder / "ranked.jsonl", ranked)
    single = [
        {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        | {"completion": chat("", f"{(GOOD if n % 2 else BAD)[n % 3]} {n}"), "label": bool(n % 2)}
        for n, row in enumerate(rows)
    ]
    write_rows(folder / "single.jsonl", single)
    return folder


def tiny_recipe(data: Path, start: Path, *kinds: str, train: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "steps": 4,
        "lr": 1e-3,
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
        "validate_every": 3,
        "save_every": 2,
        "seed": 5,
    }
    is_kto = "kto" in kinds
    values: dict[str, Any] = {
        "train": TrainConfig(**(settings | (train or {}))),
        "start": str(start),
        "sources": (SourceConfig(path="single.jsonl" if is_kto else "pairs.jsonl"),),
        "validation": (SourceConfig(path="held.jsonl"),),
        "losses": tuple(PreferenceLoss(kind=kind) for kind in kinds or ("sigmoid",)),
        "label_smoothing": 0.1 if "exo_pair" in kinds else 0.0,
        "batch_size": 2,
        "lora": LORA,
        "data": str(data),
    }
    return PreferenceRecipe(**(values | changes))


def started(recipe: PreferenceRecipe) -> tuple[PreferenceTask, torch.optim.Optimizer]:
    task = PreferenceTask(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train)
    task.model.train()
    return task, optimizer


# ---- what the losses look at ----


def naive_logprob(task: PreferenceTask, comparison: Comparison, number: int) -> torch.Tensor:
    """Of one answer, alone in a batch, written as a whole conversation."""
    messages = [*comparison.prompt, *comparison.completions[number].messages]
    document = task.processor.chat(messages, answer_starts=False)
    example = task.processor(Document(document.segments))
    labels = example.labels
    hidden = task.model(collate([[example]], task.processor.pixels([example])))[0, : len(labels)]
    logs = F.log_softmax(task.model.decoder.logits(hidden), dim=-1)
    learned = labels != IGNORE_INDEX
    return logs[learned].gather(1, labels[learned][:, None]).sum()


def test_the_loss_and_its_gradient_by_hand(data: Path, tiny_model_folder: Path) -> None:
    """Against answers that are read one by one, without branches, and DPO's formula written out."""
    recipe = tiny_recipe(data, tiny_model_folder, lora=None, decoder="full", train_connector=True, batch_size=3)
    task, optimizer = started(recipe)
    rows = [task.rows.comparisons[n] for n in range(6)]
    with torch.no_grad():
        reference = [[naive_logprob(task, row, n) for n in (0, 1)] for row in rows]
    for step in range(3):
        one_step(task, optimizer, recipe.train, step)
    (batch,) = task.micro_batches(3, 1)
    terms = task.loss(batch)
    terms["loss/sigmoid"].total.backward()
    trained = [p for p in task.model.parameters() if p.requires_grad]
    found = [None if p.grad is None else p.grad.clone() for p in trained]
    task.model.zero_grad()
    numbers = [next(n for n, row in enumerate(rows) if row.key == key) for key in batch.completions.keys]
    total, margins = torch.tensor(0.0), []
    for n in numbers:
        ratios = [naive_logprob(task, rows[n], answer) - reference[n][answer] for answer in (0, 1)]
        margins.append(0.1 * (ratios[0] - ratios[1]).item())
        total = total - F.logsigmoid(0.1 * (ratios[0] - ratios[1]))
    total.backward()
    assert terms["loss/sigmoid"].total.item() == pytest.approx(total.item(), rel=1e-5)
    assert terms["rewards/margins"].total.item() == pytest.approx(sum(margins), abs=1e-4)
    assert terms["rewards/accuracies"].total.item() == sum(margin > 0 for margin in margins)
    for mine, parameter in zip(found, trained, strict=True):
        assert (mine is None) == (parameter.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-5)
    assert sum(mine is not None and bool(mine.any()) for mine in found) > 10


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["adaptation", "copy", "precomputed"])
def test_a_policy_that_is_its_reference_loses_exactly_ln_2(
    data: Path, tiny_model_folder: Path, how: str, precision: str
) -> None:
    """And leaves it with the first step: 0.6931 all along is the alarm that nothing is learned. In bf16 a cast of the
    reference's weights must not be taken for the policy's."""
    settings: dict[str, dict[str, Any]] = {
        "adaptation": {},
        "copy": {"lora": None, "decoder": "full"},
        "precomputed": {"reference": how},
    }
    changes = settings[how]
    recipe = tiny_recipe(data, tiny_model_folder, train={"precision": precision, "lr": 3e-3}, **changes)
    task, optimizer = started(recipe)
    first = one_step(task, optimizer, recipe.train, 0)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0
    assert first["grad_norm"] > 1e-3
    second = one_step(task, optimizer, recipe.train, 0)
    assert second["loss"] < math.log(2) - 1e-4
    (batch,) = task.micro_batches(0, 1)
    reference = task._answers(batch).reference
    assert reference is not None
    assert not reference.requires_grad


def test_dropout_is_off_unless_asked(data: Path, tiny_model_folder: Path) -> None:
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.5)
    found = {}
    for dropout in (False, True):
        task, optimizer = started(tiny_recipe(data, tiny_model_folder, lora=lora, use_dropout=dropout))
        one_step(task, optimizer, task.recipe.train, 0)  # of a fresh adaptation nothing can be dropped
        (batch,) = task.micro_batches(1, 1)
        found[dropout] = [task.loss(batch)["loss/sigmoid"].total.item() for _ in range(2)]
        assert task.model.training
    assert found[False][0] == found[False][1]
    assert found[True][0] != found[True][1]


def test_the_reference_stays_what_it_was(data: Path, tiny_model_folder: Path) -> None:
    """Of an adaptation that the model had already it is a copy, not the model without any."""
    start = tiny_model_folder
    for lora in (LORA, None):
        task, optimizer = started(tiny_recipe(data, start, lora=lora, train={"lr": 3e-3}))
        (batch,) = task.micro_batches(0, 1)
        before = task._answers(batch).reference
        for step in range(3):
            one_step(task, optimizer, task.recipe.train, step)
        after = task._answers(batch)
        assert before is not None
        assert after.reference is not None
        assert torch.equal(before, after.reference)
        assert not torch.allclose(before, after.logps, atol=1e-3)
        start = data / "adapted"
        if lora is not None:
            start.mkdir()
            task.save(start)
    assert load_model(start)[0].config.lora == LORA


def test_images_matter(data: Path, tiny_model_folder: Path) -> None:
    """With each other's pictures, answers have other probabilities; and the connector has a gradient."""
    task, _ = started(tiny_recipe(data, tiny_model_folder, train_connector=True, batch_size=6))
    (batch,) = task.micro_batches(0, 1)
    completions = batch.completions
    with torch.no_grad():
        own = completion_sums(token_logprobs(task.model, completions.batch), completions)
        completions.batch.pixel_values = completions.batch.pixel_values.roll(1, dims=0)
        swapped = completion_sums(token_logprobs(task.model, completions.batch), completions)
    with_image = torch.tensor([n % 3 != 2 for n in range(6)])
    asked = torch.tensor([int(key.split()[1]) for key in completions.keys])
    changed = (own - swapped).abs() > 1e-3
    assert torch.equal(changed, with_image[asked][completions.prompts])
    task.loss(batch)["loss/sigmoid"].total.backward()
    assert task.model.connector is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in task.model.connector.parameters())


def test_ranked_answers_give_all_their_pairs(data: Path, tiny_model_folder: Path) -> None:
    """Equal ranks are not compared, and what none is better than is learned by itself."""
    recipe = tiny_recipe(
        data, tiny_model_folder, sources=(SourceConfig(path="ranked.jsonl"),), sft_weight=0.5, batch_size=2
    )
    task, _ = started(recipe)
    (batch,) = task.micro_batches(0, 1)
    pairs = set(zip(batch.better.tolist(), batch.worse.tolist(), strict=True))
    own = {(1, 0), (1, 2), (1, 3), (2, 0), (2, 3)}
    assert pairs == own | {(better + 4, worse + 4) for better, worse in own}
    assert len(batch.better) == 10
    assert batch.best.tolist() == [False, True, False, False] * 2
    assert task.counts(batch)["loss/sigmoid"] == 10
    answers = task._answers(batch)
    terms = task.loss(batch)
    assert terms["nll"].total.item() == pytest.approx(-answers.logps[[1, 5]].sum().item(), rel=1e-6)
    assert terms["nll"].count == task.counts(batch)["nll"] == int(answers.lengths[[1, 5]].sum())


@pytest.mark.parametrize("kinds", [*((kind,) for kind in PREFERENCE_KINDS), ("kto",), ("sigmoid", "ipo", "simpo")])
def test_micro_batches_are_one_batch(data: Path, tiny_model_folder: Path, kinds: tuple[str, ...]) -> None:
    """Answers of unequal lengths, and a term with a denominator of its own beside the pairs."""
    found, gradients = [], []
    for size, accumulate in ((4, 1), (1, 4)):
        settings = {"accumulate": accumulate, "clip": 1e-9, "lr": 1e-2}
        recipe = tiny_recipe(data, tiny_model_folder, *kinds, train=settings, batch_size=size, sft_weight=0.3)
        task, optimizer = started(recipe)
        kept: list[torch.Tensor] = []
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_, kept=kept, trained=trained: kept.extend(p.grad.clone() for p in trained if p.grad is not None)
        )
        for step in range(2):  # away from the reference
            kept.clear()
            metrics = one_step(task, optimizer, recipe.train, step)
        found.append(metrics)
        gradients.append([gradient * (metrics["grad_norm"] / 1e-9) for gradient in kept])  # before they were clipped
    for name, value in found[0].items():
        if name not in ("seconds", "targets_per_s", "lr"):
            assert found[1][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert len(gradients[0]) > 4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6 * max(1.0, found[0]["grad_norm"]))
    terms = [found[0][f"loss/{kind}"] for kind in kinds]
    assert found[0]["loss"] == pytest.approx(sum(terms) + 0.3 * found[0]["nll"], rel=1e-5)


def test_preferred_answers_become_likelier(data: Path, tiny_model_folder: Path) -> None:
    recipe = tiny_recipe(data, tiny_model_folder, train={"lr": 5e-3, "steps": 12}, batch_size=3)
    task, optimizer = started(recipe)
    metrics = [one_step(task, optimizer, recipe.train, step) for step in range(12)]
    assert metrics[-1]["rewards/accuracies"] == 1
    assert metrics[-1]["loss"] < 0.5
    with torch.no_grad():
        values = task.validate()
    assert {"loss", "loss/sigmoid", "rewards/accuracies", "rewards/margins", "logps/chosen", "entropy"} <= values.keys()
    assert values["loss"] != pytest.approx(math.log(2))


# ---- the reference that is known ----


def test_stored_log_probabilities_are_used(data: Path, tiny_model_folder: Path) -> None:
    rows = pair_rows()
    for n, row in enumerate(rows):
        row |= {"ref_chosen_logps": -10.0 - n, "ref_rejected_logps": -20.0 - n}
    del rows[3]["ref_chosen_logps"]
    write_rows(data / "stored.jsonl", rows)
    sources = (SourceConfig(path="stored.jsonl"),)
    task, _ = started(tiny_recipe(data, tiny_model_folder, sources=sources, validation=sources, reference="stored"))
    assert task.reference is None
    for step in range(3):
        (batch,) = task.micro_batches(step, 1)
        answers = task._answers(batch)
        asked = [int(key.split()[1]) for key in batch.completions.keys]
        assert 3 not in asked
        assert answers.reference is not None
        assert answers.reference.tolist() == [value for n in asked for value in (-10.0 - n, -20.0 - n)]
        ratio = answers.logps - answers.reference
        expected = 0.1 * (ratio[batch.better] - ratio[batch.worse]).sum()
        assert task.loss(batch)["rewards/margins"].total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "no log-probability of the reference" in task.errors.summary()


def test_precomputed_is_what_the_model_says(data: Path, tiny_model_folder: Path) -> None:
    """For ranked answers too, whose number differs, and long after the weights have changed."""
    sources = (SourceConfig(path="pairs.jsonl"), SourceConfig(path="ranked.jsonl"))
    found = {}
    for reference in ("model", "precomputed"):
        recipe = tiny_recipe(data, tiny_model_folder, sources=sources, reference=reference, train={"lr": 3e-3})
        task, optimizer = started(recipe)
        metrics = [one_step(task, optimizer, recipe.train, step) for step in range(5)]
        with torch.no_grad():
            found[reference] = [one["loss"] for one in metrics], task.validate()
    assert found["precomputed"][0] == pytest.approx(found["model"][0], rel=1e-4)
    assert found["precomputed"][1] == pytest.approx(found["model"][1], rel=1e-3, abs=1e-5)


def test_without_a_reference_there_is_none(data: Path, tiny_model_folder: Path) -> None:
    task, _ = started(tiny_recipe(data, tiny_model_folder, "simpo", gamma=0.5, beta=2.0))
    (batch,) = task.micro_batches(0, 1)
    answers = task._answers(batch)
    assert task.reference is None
    assert answers.reference is None
    mean = answers.logps / answers.lengths
    expected = -F.logsigmoid(2.0 * (mean[batch.better] - mean[batch.worse]) - 0.5).sum()
    assert task.loss(batch)["loss/simpo"].total.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- KTO ----


def test_kto_by_hand(data: Path, tiny_model_folder: Path) -> None:
    """The zero point is the mean movement of answers to other prompts, over the whole step, and no gradient's."""
    recipe = tiny_recipe(
        data, tiny_model_folder, "kto", train={"lr": 2e-2, "accumulate": 2}, undesirable_weight=1.3, beta=0.5
    )
    task, optimizer = started(recipe)
    assert task.on_policy
    first = one_step(task, optimizer, recipe.train, 0)
    assert first["kl"] == 0
    assert 0.5 < first["loss"] < 0.65  # sigma(0), weighted
    for step in range(1, 6):
        one_step(task, optimizer, recipe.train, step)
    batches = task.micro_batches(6, 2)
    rows = {row.key: row for row in task.rows.comparisons}
    moved = []
    for batch in batches:
        assert batch.other is not None
        assert batch.other.keys == batch.completions.keys
        assert task.reference is not None
        with torch.no_grad():
            policy = completion_sums(token_logprobs(task.model, batch.other.batch), batch.other)
            with task.reference.active():
                moved += (policy - completion_sums(token_logprobs(task.model, batch.other.batch), batch.other)).tolist()
        for row, key in enumerate(batch.other.keys):
            labels = batch.other.batch.labels[row]
            written = task.processor.tokenizer.decode(labels[labels != IGNORE_INDEX].tolist())
            assert rows[key].completions[0].text not in written
            assert any(other.completions[0].text in written for other in rows.values())
    kl = max(0.0, sum(moved) / len(moved))
    for batch in batches:
        assert batch.kl == pytest.approx(kl, abs=1e-4)
        answers = task._answers(batch)
        assert answers.reference is not None
        gain = 0.5 * (answers.logps - answers.reference - batch.kl)
        expected = torch.where(batch.labels, (-gain).sigmoid(), 1.3 * gain.sigmoid()).sum()
        assert task.loss(batch)["loss/kto"].total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert batch.labels.tolist() == [rows[key].completions[0].label for key in batch.completions.keys]


def test_kto_takes_pairs_apart(data: Path, tiny_model_folder: Path) -> None:
    task, _ = started(tiny_recipe(data, tiny_model_folder, "kto", sources=(SourceConfig(path="pairs.jsonl"),)))
    (batch,) = task.micro_batches(0, 1)
    assert batch.labels.tolist() == [True, False] * 2
    assert task.counts(batch) == {"loss/kto": 4}
    with torch.no_grad():
        values = task.validate()
    assert values["loss"] == 0.5
    assert values["rewards/margins"] == values["kl"] == 0


# ---- runs ----


@pytest.mark.parametrize("changes", [{}, {"reference": "precomputed"}, {"kinds": ("kto",)}])
def test_resumes_bit_by_bit(tmp_path: Path, data: Path, tiny_model_folder: Path, changes: dict[str, Any]) -> None:
    kinds = changes.get("kinds", ("sigmoid",))
    own = {key: value for key, value in changes.items() if key != "kinds"}
    recipe = tiny_recipe(data, tiny_model_folder, *kinds, **own)
    train(PreferenceTask(recipe), recipe.train, tmp_path / "whole", progress=False)
    stopped = PreferenceTask(recipe)
    plain, calls = stopped.loss, iter(range(1, 100))

    def loss(batch: Any) -> Any:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return plain(batch)

    stopped.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        train(stopped, recipe.train, tmp_path / "stopped", progress=False)
    train(PreferenceTask(recipe), recipe.train, tmp_path / "stopped", resume=True, progress=False)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert logged(tmp_path / "stopped", "rewards/chosen") == logged(tmp_path / "whole", "rewards/chosen")
    for name in ("step-000004/model.safetensors", "step-000004/training_state/rank-0-of-1.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    task = PreferenceTask(recipe)
    with pytest.raises(MMGPTError, match="no longer those that the run began with"):
        task.load_data_state({"comparisons": "others"})
    if recipe.reference == "precomputed":
        with pytest.raises(CheckpointError, match="no log-probabilities of the reference"):
            task.load_state_tensors({})


@pytest.mark.parametrize("changes", [{}, {"reference": "precomputed"}, {"kinds": ("kto",)}])
def test_ranks_learn_what_one_process_does(data: Path, tiny_model_folder: Path, changes: dict[str, Any]) -> None:
    kinds = changes.get("kinds", ("sigmoid",))
    own = {key: value for key, value in changes.items() if key != "kinds"}

    def run(size: int) -> list[float]:
        recipe = tiny_recipe(data, tiny_model_folder, *kinds, batch_size=size, train={"lr": 5e-3}, **own)
        with process_group(torch.device("cpu")):
            task, optimizer = started(recipe)
            return [one_step(task, optimizer, recipe.train, step)["loss"] for step in range(3)]

    together, alone = on_ranks(lambda rank: run(1)), run(2)
    assert together[0] == together[1]
    assert together[0] == pytest.approx(alone, rel=1e-4)


def test_an_epoch_shows_every_comparison_once(data: Path, tiny_model_folder: Path) -> None:
    task, _ = started(tiny_recipe(data, tiny_model_folder))
    shown = [key for step in range(6) for batch in task.micro_batches(step, 1) for key in batch.completions.keys]
    assert sorted(shown[:6]) == sorted(shown[6:]) == sorted(f"pair {n}" for n in range(6))
    assert shown[:6] != shown[6:]


# ---- what cannot be used ----


def test_rows_that_cannot_be_learned_are_counted_and_left_out(data: Path, tiny_model_folder: Path) -> None:
    """A picture that does not load, a prompt longer than the context, answers of one rank: named once, the rest goes
    on."""
    rows = pair_rows()
    (data / "broken.png").write_bytes((data / "0.png").read_bytes()[:200])
    rows[0]["images"] = ["broken.png"]
    rows[1]["prompt"] = chat("prompt", "circle " * 400)
    tied = {k: v for k, v in rows[4].items() if k not in ("chosen", "rejected")}
    rows[4] = tied | {"completions": [chat("", "red"), chat("", "blue")], "ranks": [0, 0]}
    write_rows(data / "bad.jsonl", rows)
    task, _ = started(tiny_recipe(data, tiny_model_folder, sources=(SourceConfig(path="bad.jsonl"),)))
    shown = {key for step in range(9) for batch in task.micro_batches(step, 1) for key in batch.completions.keys}
    assert shown == {"pair 2", "pair 3", "pair 5"}
    summary = task.errors.summary()
    assert task.errors.total == 3, summary
    for said in ("longer than the context", "no answer that is better"):
        assert said in summary
    write_rows(data / "bad.jsonl", [rows[4]])
    task, _ = started(tiny_recipe(data, tiny_model_folder, sources=(SourceConfig(path="bad.jsonl"),)))
    with pytest.raises(MMGPTError, match=r"none of 1 comparisons can be learned from: .*no answer that is better"):
        task.micro_batches(0, 1)


def test_kto_needs_two_prompts(data: Path, tiny_model_folder: Path) -> None:
    write_rows(data / "alone.jsonl", [json.loads((data / "single.jsonl").read_text().splitlines()[0])])
    task, _ = started(tiny_recipe(data, tiny_model_folder, "kto", sources=(SourceConfig(path="alone.jsonl"),)))
    with pytest.raises(MMGPTError, match="no answer to another prompt"):
        task.micro_batches(0, 1)


def test_answers_that_do_not_fit_in_one_row_have_several(data: Path, tiny_model_folder: Path) -> None:
    row = json.loads((data / "ranked.jsonl").read_text().splitlines()[0])
    row["completions"] = [chat("", f"{text} " + "circle " * 35) for text in (*GOOD, *BAD)]
    row["ranks"] = [0, 1, 2, 3, 4, 5]
    row["prompt"] = chat("prompt", "circle " * 20)
    write_rows(data / "long.jsonl", [row])
    task, _ = started(tiny_recipe(data, tiny_model_folder, sources=(SourceConfig(path="long.jsonl"),), batch_size=1))
    (batch,) = task.micro_batches(0, 1)
    assert len(batch.completions.batch.input_ids) > 1
    assert len(batch.completions) == 6
    assert len(batch.better) == 15
    answers = task._answers(batch)
    expected = [naive_logprob(task, task.rows.comparisons[0], n).item() for n in range(6)]
    assert answers.logps.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("kinds", "changes", "said"),
    [
        (("dpo",), {}, "did you mean"),
        (("sigmoid", "sigmoid"), {}, "give each loss once"),
        (("kto", "sigmoid"), {}, "does not go with losses of pairs"),
        (("kto",), {"reference": "precomputed"}, "reference must be model"),
        (("hinge",), {"label_smoothing": 0.1}, "has no label_smoothing"),
        (("sigmoid",), {"undesirable_weight": 2.0}, "are of kto"),
        (("sigmoid",), {"beta": 0.0}, "beta"),
        (("sigmoid",), {"holdout": 0.1}, "either validation sources or a holdout"),
    ],
)
def test_what_cannot_be_is_refused(kinds: tuple[str, ...], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_recipe(Path("."), Path("x"), *kinds, **changes)


def test_losses_are_named_on_the_command_line() -> None:
    recipe = override(tiny_recipe(Path("."), Path("x")), ["losses=sigmoid,ipo", "beta=0.2"])
    assert [loss.kind for loss in recipe.losses] == ["sigmoid", "ipo"]


def test_nothing_to_train_is_said(data: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is trained: give lora"):
        PreferenceTask(tiny_recipe(data, tiny_model_folder, lora=None)).prepare()


def test_samples_answer_held_out_prompts(data: Path, tiny_model_folder: Path) -> None:
    task, _ = started(tiny_recipe(data, tiny_model_folder))
    assert [sample.partition(":")[0] for sample in task.samples()] == ["pair 6", "pair 7"]
    assert task.model.training


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_recipes_run_and_go_on(name: str, tmp_path: Path, data: Path, tiny_model_folder: Path) -> None:
    """From a recipe's name to a model that answers; without validation sources some prompts are held out."""
    settings = ("steps=2", "warmup_steps=1", "log_every=1", "precision=fp32", "device=cpu")
    changes = [f"start={tiny_model_folder}", "sources=ranked.jsonl", "holdout=0.3", "batch_size=2"]
    recipe = override(RECIPES[name](str(data)), [*(f"train.{setting}" for setting in settings), *changes])
    run_recipe(recipe, tmp_path / "run", progress=False)
    assert mm_gpt.load(tmp_path / "run/best").caption(data / "0.png") is not None
    run_recipe(override(recipe, ["train.steps=3"]), tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run").keys() == {1, 2, 3}
    assert {"rewards/chosen", "logps/rejected"} <= json.loads(
        (tmp_path / "run/log.jsonl").read_text().splitlines()[0]
    ).keys()
