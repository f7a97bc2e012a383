"""Reward models: a score is the answer's alone, what is learned is what is judged, and does it look at the picture?"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture, make_tiny, make_tokenizer, tiny_config
from forked_ranks import on_ranks
from reward_data import colour_comparisons, user, write_colours
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_gpt.alignment.completions import completion_batch, completions_document, last_positions, shares_prompts
from mm_gpt.alignment.reward_model import (
    CONFIG,
    WEIGHTS,
    ModelReward,
    RewardModel,
    answer_of,
    fitting_documents,
    load_reward_model,
    read_config,
    save_reward_model,
    score_comparisons,
)
from mm_gpt.alignment.reward_report import (
    PLOT,
    REPORT,
    describe,
    images_of,
    judge,
    pearson,
    with_images_of,
)
from mm_gpt.alignment.reward_training import RewardBatch, RewardRecipe, RewardTask
from mm_gpt.commands.cli import main
from mm_gpt.datasets.comparisons import Comparison, Completion, write_comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Image
from mm_gpt.errors import CheckpointError, ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig, collate
from mm_gpt.training.loop import train, training_step
from mm_gpt.training.recipes import recipe, run_recipe
from mm_gpt.training.stage import Term
from mm_gpt.training.train_config import TrainConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
"""Scores of about 1 in float32: sums of other order differ by 1e-6, a token more or less by 0.1."""


def ranked(*answers: str) -> tuple[Completion, ...]:
    """Best first."""
    return tuple(dataclasses.replace(answer_of(text), rank=rank) for rank, text in enumerate(answers))


def asked(key: str, question: str, *answers: str, seed: int | None = None, margin: float | None = None) -> Comparison:
    image = [] if seed is None else [Image(make_picture(seed))]
    return Comparison(key, (user(*image, question),), ranked(*answers), margin=margin)


# ---- The models ----


def with_pictures(tmp_path: Path) -> tuple[MMGPT, Processor]:
    return make_tiny()


def prefix_lm(tmp_path: Path) -> tuple[MMGPT, Processor]:
    """The prompt is read in both directions: it cannot be shared."""
    model, processor = make_tiny()
    other = MMGPT(dataclasses.replace(model.config, prefix_lm=True)).eval()
    other.load_state_dict(model.state_dict())
    return other, processor


def of_text(tmp_path: Path, **changes: Any) -> tuple[MMGPT, Processor]:
    tokenizer = make_tokenizer()
    decoder = tiny_config(tokenizer.vocab_size).decoder
    assert isinstance(decoder, DecoderConfig)
    torch.manual_seed(0)
    model = MMGPT(ModelConfig(decoder=dataclasses.replace(decoder, **changes))).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5)
    config = ProcessorConfig(max_length=model.decoder.config.max_length)
    return model, Processor(tokenizer, config, vocab_size=tokenizer.vocab_size)


def relative(tmp_path: Path) -> tuple[MMGPT, Processor]:
    """Transformer-XL's distances, which are those of the row."""
    return of_text(tmp_path, positions="relative", num_kv_heads=6, gated_mlp=False, memory_length=128)


def mrope(tmp_path: Path) -> tuple[MMGPT, Processor]:
    """A public family: positions of three components, images of any size, features added to deeper layers."""
    from test_family_qwen_vl import make_theirs

    return load_model(make_theirs(tmp_path / "theirs", "qwen3_vl").folder)


MODELS: list[Callable[[Path], tuple[MMGPT, Processor]]] = [with_pictures, prefix_lm, of_text, relative, mrope]


def reward_of(model: MMGPT) -> RewardModel:
    torch.manual_seed(1)
    reward = RewardModel(model)
    torch.nn.init.normal_(reward.head.bias)
    return reward


@torch.no_grad()
def score(reward: RewardModel, processor: Processor, comparisons: list[Comparison], **how: Any) -> Tensor:
    documents = [completions_document(processor, comparison) for comparison in comparisons]
    separate = how.pop("separate", not shares_prompts(reward.model))
    return reward.scores(completion_batch(processor, documents, separate=separate, **how))


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_score_is_the_answers_alone(make: Callable[[Path], tuple[MMGPT, Processor]], tmp_path: Path) -> None:
    """Alone, beside others, padded on either side, with an end mark as padding and inside the prompt, as a branch, in a
    packed row, after saving, and through the door that evaluation uses."""
    model, processor = make(tmp_path)
    reward = reward_of(model)
    sees = model.vision is not None
    end = processor.tokenizer.end_of_turn
    comparisons = [
        asked("a", f"What is {end} here?", "A red circle on it.", "blue", "no", seed=1 if sees else None),
        asked("b", "Describe.", "A circle in one sentence", "red", seed=2 if sees else None),
        asked("c", "system: user: assistant:", "the ground", "image image image"),
    ]
    alone = [dataclasses.replace(c, completions=(answer,)) for c in comparisons for answer in c.completions]
    expected = torch.cat([score(reward, processor, [one]) for one in alone])
    assert expected.shape == (7,)
    assert expected.std() > 0.05
    end_id = processor.tokenizer.end_ids[0]
    for how in (
        {},
        {"pad_left": True},
        {"pad_id": end_id},
        {"pad_id": end_id, "pad_left": True},
        {"separate": True},
        {"separate": True, "pad_left": True, "pad_id": end_id},
    ):
        torch.testing.assert_close(score(reward, processor, comparisons, **how), expected, **CLOSE)
    # Two prompts in one row
    documents = [completions_document(processor, one) for one in alone[2:4]]
    examples = [processor(document) for document in documents]
    with torch.no_grad():
        values = reward.values(collate([examples], processor.pixels(examples)))[0]
    ends = np.cumsum([len(example) for example in examples]) - 1
    torch.testing.assert_close(values[ends], expected[2:4], **CLOSE)
    # Evaluation is the same function, whatever it puts into a batch
    for tokens in (1, 60, 4096):
        found = score_comparisons(reward, processor, comparisons, ErrorCounter(), batch_tokens=tokens)
        torch.testing.assert_close(torch.tensor([s for each in found for s in each.scores]), expected, **CLOSE)
    (tmp_path / "saved").mkdir()
    save_reward_model(reward, processor, tmp_path / "saved")
    again, its_processor = load_reward_model(tmp_path / "saved")
    torch.testing.assert_close(score(again, its_processor, comparisons), expected, **CLOSE)
    asks = [c for c in comparisons for _ in c.completions]
    answers = [answer.text for c in comparisons for answer in c.completions]
    found_again = ModelReward(tmp_path / "saved")(asks, answers)
    torch.testing.assert_close(torch.tensor(found_again), expected, **CLOSE)


def test_the_score_is_read_at_the_end_mark() -> None:
    """And a critic's value there is the score."""
    model, processor = make_tiny()
    reward = reward_of(model)
    comparison = asked("a", "What?", "A red circle.", "blue", seed=1)
    batch = completion_batch(processor, [completions_document(processor, comparison)])
    with torch.no_grad():
        values, scores = reward.values(batch.batch), reward.scores(batch)
    places = last_positions(batch)
    assert set(batch.batch.input_ids[0, places].tolist()) <= set(processor.tokenizer.end_ids)
    torch.testing.assert_close(values[0, places], scores)
    assert values.shape == batch.batch.input_ids.shape
    assert values.dtype == torch.float32


def test_scores_have_no_dropout() -> None:
    """In training neither: the same answer twice in a batch has one score."""
    model, processor = of_text(Path(), dropout=0.5)
    model.add_lora(LoRAConfig(rank=2, alpha=4, dropout=0.5))
    reward = RewardModel(model).train()
    comparison = asked("a", "What?", "A red circle.", "A red circle.")
    first, second = score(reward, processor, [comparison]).tolist()
    assert first == pytest.approx(second, abs=1e-6)


def test_a_decoder_that_looks_ahead_has_no_reward() -> None:
    model, _ = of_text(Path(), causal=False)
    with pytest.raises(ConfigError, match="needs a causal decoder"):
        RewardModel(model)


def test_too_long_for_one_row_is_several_rows() -> None:
    """Completions that fit alone but not together; and one that does not fit is named, never cut."""
    model, processor = make_tiny()
    reward = reward_of(model)
    long = asked("a", "What?", *(word * 60 for word in ("zq ", "jx ", "qk ")), seed=1)
    documents = fitting_documents(processor, long, separate=False)
    assert [len(document.branches) for document in documents] == [1, 1, 1]
    (found,) = score_comparisons(reward, processor, [long], ErrorCounter())
    alone = [dataclasses.replace(long, completions=(answer,)) for answer in long.completions]
    torch.testing.assert_close(torch.tensor(found.scores), torch.cat([score(reward, processor, [a]) for a in alone]))
    too_long = asked("b", "What?", "no", "A red circle. " * 100)
    with pytest.raises(ContextOverflowError, match=r"^b has \d+ tokens"):
        fitting_documents(processor, too_long, separate=False)
    errors = ErrorCounter()
    first, second = score_comparisons(reward, processor, [too_long, long], errors)
    assert first.scores[1] is None
    assert first.scores[0] is not None
    assert second.scores == pytest.approx(found.scores, abs=1e-5)
    assert errors.counts == {"longer than the context": 1}


def test_an_image_that_does_not_load_spoils_no_other(tmp_path: Path) -> None:
    model, processor = make_tiny()
    reward = reward_of(model)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    comparisons = [
        asked("a", "What?", "red", "blue", seed=1),
        Comparison("b", (user(Image(broken), "What?"),), ranked("red", "blue")),
        asked("c", "What?", "red", "blue", seed=2),
    ]
    errors = ErrorCounter()
    found = list(score_comparisons(reward, processor, comparisons, errors))
    assert found[1].scores == (None, None)
    assert errors.counts == {"image that cannot be read": 1}
    expected = score(reward, processor, [comparisons[0], comparisons[2]])
    torch.testing.assert_close(torch.tensor([*found[0].scores, *found[2].scores]), expected, **CLOSE)


# ---- Folders ----


def test_training_is_not_rounded_away(tmp_path: Path) -> None:
    """Stops: weights in half precision, whose scores differ in the third digit."""
    model, processor = make_tiny()
    reward = reward_of(model)
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)
    save_reward_model(reward, processor, tmp_path, shift=0.25, centred_on=3)
    again, _ = load_reward_model(tmp_path)
    for name, parameter in reward.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    assert torch.equal(again.head.bias, reward.head.bias + 0.25)
    assert read_config(tmp_path).centred_on == 3
    assert not again.training


def test_folders_that_are_no_reward_models(tmp_path: Path, tiny_model_folder: Path) -> None:
    model, processor = make_tiny()
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    save_reward_model(reward_of(model), processor, run / "best")
    assert ModelReward(run).name == ModelReward(run / "best").name == "run"
    with pytest.raises(CheckpointError, match="not the folder of a reward model"):
        load_reward_model(tiny_model_folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_reward_model(tmp_path / "nowhere")
    weights = load_file(run / "best" / WEIGHTS)
    for tensors, said in (
        ({"weight": weights["weight"]}, "holds weight, not weight and bias"),
        (weights | {"weight": weights["weight"][:, :-1].contiguous()}, r"weight has shape \(1, 47\), not \(1, 48\)"),
        (weights | {"bias": torch.tensor([math.nan])}, "no finite numbers"),
    ):
        save_file(tensors, run / "best" / WEIGHTS)
        with pytest.raises(CheckpointError, match=said):
            load_reward_model(run / "best")
    (run / "best" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: no such file"):
        load_reward_model(run / "best")
    (run / "best" / CONFIG).write_text('{"centered_on": 1}')
    with pytest.raises(ConfigError, match="centred_on"):
        load_reward_model(run / "best")


def test_a_head_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    model, processor = make_tiny()
    reward = reward_of(model)
    with torch.no_grad():
        reward.head.weight[0, 3] = math.inf
    with pytest.raises(CheckpointError, match="no finite numbers"):
        save_reward_model(reward, processor, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- What is learned ----


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "colours", 40)


def small_recipe(start: Path, data: Path, **changes: Any) -> RewardRecipe:
    train_changes = changes.pop("train", {})
    config: dict[str, Any] = {"steps": 2, "lr": 1e-3, "precision": "fp32", "device": "cpu", "log_every": 1}
    values: dict[str, Any] = {
        "train": TrainConfig(**(config | train_changes)),
        "start": str(start),
        "sources": (SourceConfig(path="."),),
        "holdout": 0.3,
        "decoder": "full",
        "data": str(data),
    }
    return RewardRecipe(**(values | changes))


class Given(RewardModel):
    """Scores that somebody has chosen."""

    def __init__(self, scores: list[float]):
        super().__init__(make_tiny()[0])
        self.given = torch.tensor(scores, requires_grad=True)

    def scores(self, batch: Any, images: Any = None) -> Tensor:
        return self.given


def loss_of(task: RewardTask, comparisons: list[Comparison], scores: list[float], **changes: Any) -> dict[str, Term]:
    task.model = Given(scores)
    task.recipe = dataclasses.replace(task.recipe, **changes)
    documents = [completions_document(task.processor, comparison) for comparison in comparisons]
    batch = RewardBatch.of(comparisons, completion_batch(task.processor, documents))
    terms = task.loss(batch)
    assert {name: term.count for name, term in terms.items() if term.weight} == task.counts(batch)
    return terms


def value_of(terms: dict[str, Term]) -> float:
    return float(sum(term.weight * term.total.detach() / term.count for term in terms.values()))


def test_loss_by_hand(tiny_model_folder: Path, colours: Path) -> None:
    task = RewardTask(small_recipe(tiny_model_folder, colours))
    pair = asked("a", "What?", "red", "blue")
    four = asked("b", "What?", "red", "blue", "image", "ground")
    assert value_of(loss_of(task, [pair], [1.5, 0.5])) == pytest.approx(0.31326169, abs=1e-7)
    assert value_of(loss_of(task, [pair], [7.5, 6.5])) == pytest.approx(0.31326169, abs=1e-6)  # differences alone
    assert value_of(loss_of(task, [pair], [2.0, 2.0])) == pytest.approx(math.log(2), abs=1e-7)
    margin = dataclasses.replace(pair, margin=0.3)
    assert value_of(loss_of(task, [margin], [1.5, 0.5])) == pytest.approx(0.40318605, abs=1e-7)
    assert value_of(loss_of(task, [pair], [1.5, 0.5], centring=0.01)) == pytest.approx(0.35326169, abs=1e-7)
    terms = loss_of(task, [four], [2.0, 1.0, 0.5, -1.0], centring=0.0)
    assert value_of(terms) == pytest.approx(0.22761343, abs=1e-7)
    assert value_of({"accuracy": dataclasses.replace(terms["rewards/accuracies"], weight=1.0)}) == 1.0
    # A prompt counts once, however many pairs it has
    both = value_of(loss_of(task, [four, pair], [2.0, 1.0, 0.5, -1.0, 1.5, 0.5]))
    assert both == pytest.approx((0.22761343 + 0.31326169) / 2, abs=1e-7)
    # Completions of one rank are not compared
    tied = dataclasses.replace(
        four, completions=tuple(dataclasses.replace(c, rank=min(c.rank, 1)) for c in four.completions)
    )
    expected = np.mean([math.log1p(math.exp(-(2.0 - worse))) for worse in (1.0, 0.5, -1.0)])
    assert value_of(loss_of(task, [tied], [2.0, 1.0, 0.5, -1.0])) == pytest.approx(expected, abs=1e-6)


def test_micro_batches_are_one_batch(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Prompts of two to four completions and other lengths: the gradient of a step does not depend on how it is cut."""
    comparisons = [
        asked(
            str(n), f"What {'is it ' * n}?", *["red", "A blue circle.", "no " * (n + 1), "image"][: 2 + n % 3], seed=n
        )
        for n in range(8)
    ]
    (tmp_path / "data").mkdir()
    write_comparisons(comparisons, tmp_path / "data" / "comparisons.jsonl")
    grads = []
    for size, count in ((4, 1), (1, 4), (2, 2)):
        made = small_recipe(
            tiny_model_folder, tmp_path / "data", comparisons=size, train={"accumulate": count}, centring=0.01
        )
        task = RewardTask(made)
        groups = task.prepare()
        optimizer = torch.optim.SGD([p for g in groups for p in g.parameters if p.requires_grad], lr=0.0)
        for group in optimizer.param_groups:
            group["lr_scale"] = 0.0
        kept: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(
            lambda *_, task=task, kept=kept: kept.update(
                {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
            )
        )
        config = dataclasses.replace(made.train, clip=1e9)
        values = training_step(task, task.micro_batches(0, count), optimizer, config, 0, torch.device("cpu"))
        grads.append((values["loss"], kept))
    for loss, kept in grads[1:]:
        assert loss == pytest.approx(grads[0][0], abs=1e-6)
        assert kept.keys() == grads[0][1].keys()
        for name, grad in kept.items():
            torch.testing.assert_close(grad, grads[0][1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_picture_has_a_gradient(tiny_model_folder: Path, colours: Path) -> None:
    """Every weight between the picture and the score: without one, nothing could be learned from pictures."""
    task = RewardTask(small_recipe(tiny_model_folder, colours, vision_blocks=None))
    task.prepare()
    (batch,) = task.micro_batches(0, 1)
    assert len(batch.completions.batch.pixel_values) == task.recipe.comparisons
    task.loss(batch)["pairwise"].total.backward()
    model = task.model.model
    assert model.connector is not None
    assert model.vision is not None
    assert model.image_marks is not None
    for name, parameter in [*model.connector.named_parameters(), ("marks", model.image_marks)]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name  # noqa: PT018
    seen = [p.grad.abs().max() for p in model.vision.parameters() if p.grad is not None]
    assert seen
    assert max(seen) > 0


def test_other_pictures_give_other_scores() -> None:
    model, processor = make_tiny()
    reward = reward_of(model)
    first, second = asked("a", "What?", "red", "blue", seed=1), asked("b", "What?", "red", "blue", seed=2)
    swapped = with_images_of(first, second)
    assert images_of(swapped) == images_of(second)
    assert swapped.completions == first.completions
    own, other = score(reward, processor, [first]), score(reward, processor, [swapped])
    assert (own - other).abs().min() > 1e-3
    torch.testing.assert_close(other, score(reward, processor, [second]))


# ---- A run ----


def test_a_run(tiny_model_folder: Path, colours: Path, tmp_path: Path) -> None:
    """Learns what only who sees can know, says so, and centres its scores on the better answers."""
    steps = {"steps": 16, "validate_every": 16, "save_every": 16}
    made = small_recipe(tiny_model_folder, colours, train=steps, centre_on=1000, validation_comparisons=10)
    out = tmp_path / "run"
    run_recipe(made, out, progress=False)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"pairwise", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= rows[0].keys()
    values = rows[-1]["validation"]
    assert values["accuracy"] >= 0.9
    assert values["accuracy_images_shuffled"] <= values["accuracy_images"] - 0.2
    report = json.loads((out / "best" / REPORT).read_text())
    assert report["accuracy"] == values["accuracy"]
    assert report["prompts"] == 10
    assert (out / "best" / PLOT).stat().st_size > 1000
    assert {CONFIG, WEIGHTS} <= {path.name for path in (out / "best").iterdir()}
    reward, processor = load_reward_model(out / "best")
    task = RewardTask(made)
    training = [task.comparisons[n] for n in range(len(task.comparisons))]
    chosen = [dataclasses.replace(c, completions=c.completions[:1]) for c in training]
    scores = [s for each in score_comparisons(reward, processor, chosen, ErrorCounter()) for s in each.scores]
    assert np.mean(scores) == pytest.approx(0.0, abs=1e-4)
    assert read_config(out / "best").centred_on == len(chosen)
    # The loaded model is the one that was judged, but for the bias
    again, _ = judge(reward, processor, task.held_out, ErrorCounter())
    assert again.accuracy == report["accuracy"]
    assert again.margin == pytest.approx(report["margin"], abs=1e-4)
    # And a reward model goes on with its head
    further = RewardTask(dataclasses.replace(made, start=str(out / "best")))
    assert torch.equal(further.model.head.weight, reward.head.weight)


def test_demonstrations_are_the_zero(tiny_model_folder: Path, colours: Path, tmp_path: Path) -> None:
    demonstrations = [asked(str(n), "What?", f"A red circle {n}.", seed=n) for n in range(3)]
    (colours / "shown").mkdir()
    write_comparisons(demonstrations, colours / "shown" / "shown.jsonl")
    made = small_recipe(
        tiny_model_folder,
        colours,
        sources=(SourceConfig(path="comparisons.jsonl"),),
        demonstrations=(SourceConfig(path="shown/shown.jsonl"),),
    )
    task = RewardTask(made)
    task.prepare()
    (tmp_path / "saved").mkdir()
    task.save(tmp_path / "saved")
    reward, processor = load_reward_model(tmp_path / "saved")
    assert float(score(reward, processor, demonstrations).mean()) == pytest.approx(0, abs=1e-5)
    assert not (tmp_path / "saved" / REPORT).exists()  # nobody has judged these weights


def test_a_run_that_was_stopped_goes_on(tiny_model_folder: Path, colours: Path, tmp_path: Path) -> None:
    steps = {"steps": 4, "validate_every": 2, "save_every": 2}
    made = small_recipe(tiny_model_folder, colours, train=steps, comparisons=2, validation_comparisons=2, centre_on=2)
    train(RewardTask(made), made.train, tmp_path / "whole", progress=False)
    stopping = RewardTask(made)
    asked_for = stopping.micro_batches

    def stop(step: int, count: int) -> Any:
        if step == 3:  # while the second checkpoint is the newest
            raise KeyboardInterrupt
        return asked_for(step, count)

    stopping.micro_batches = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(stopping, made.train, tmp_path / "parts", progress=False)
    train(RewardTask(made), made.train, tmp_path / "parts", progress=False, resume=True)
    one, other = (load_file(tmp_path / run / "step-000004/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    heads = [load_file(tmp_path / run / "step-000004" / WEIGHTS) for run in ("whole", "parts")]
    assert torch.equal(heads[0]["weight"], heads[1]["weight"])
    assert torch.equal(heads[0]["bias"], heads[1]["bias"])


def test_two_ranks_learn_what_one_does(tiny_model_folder: Path, colours: Path, tmp_path: Path) -> None:
    made = small_recipe(tiny_model_folder, colours, comparisons=2, validation_comparisons=2, centre_on=0)

    def run(rank: int) -> None:
        train(RewardTask(made), made.train, tmp_path / "two", progress=False)

    assert on_ranks(run) == [None, None]
    one = dataclasses.replace(made, comparisons=4)
    train(RewardTask(one), one.train, tmp_path / "one", progress=False)
    ours, theirs = (load_file(tmp_path / name / "step-000002/model.safetensors") for name in ("one", "two"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_low_rank_adaptation(tiny_model_folder: Path, colours: Path, tmp_path: Path) -> None:
    """A new one where the model has none; its own goes on."""
    lora = LoRAConfig(rank=2, alpha=4)
    made = small_recipe(tiny_model_folder, colours, decoder="frozen", lora=lora)
    task = RewardTask(made)
    train(task, made.train, tmp_path / "run", progress=False)
    again, _ = load_reward_model(tmp_path / "run/best")
    assert again.model.config.lora == lora
    names = {n for n, p in task.model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} <= names
    assert not any("decoder" in name and "lora" not in name for name in names)
    further = RewardTask(dataclasses.replace(made, start=str(tmp_path / "run/best"), lora=LoRAConfig(rank=8, alpha=8)))
    assert further.model.model.config.lora == lora


def test_what_cannot_be_learned_is_counted(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Too long, no picture, nothing better: each is named once, and others take their places."""
    data = tmp_path / "data"
    good = colour_comparisons(write_colours(data, 6), 6)
    (data / "comparisons.jsonl").unlink()
    broken = data / "broken.png"
    broken.write_bytes(good[0].prompt[0]["content"][0].source.read_bytes()[:60])
    tied = tuple(dataclasses.replace(answer, rank=0) for answer in ranked("red", "blue"))
    bad = [
        asked("long", "What?", "no", "A red circle. " * 100),
        Comparison("broken", (user(Image(broken), "What?"),), ranked("red", "blue")),
        Comparison("tied", (user("What?"),), tied),
        asked("alone", "Why?", "red"),
    ]
    write_comparisons([*good, *bad], data / "all.jsonl")
    write_comparisons(good[:2], data / "held.jsonl")
    made = small_recipe(
        tiny_model_folder,
        data,
        sources=(SourceConfig(path="all.jsonl"),),
        validation=(SourceConfig(path="held.jsonl"),),
        holdout=0.0,
        comparisons=9,
    )
    task = RewardTask(made)
    for step in range(3):
        (batch,) = task.micro_batches(step, 1)
        assert batch.prompts == 9
        assert set(batch.completions.keys) == {comparison.key for comparison in good}
    reasons = dict(task.errors.counts)
    assert reasons.pop("longer than the context") == 1
    assert reasons.pop("no answer is better than another") == 1
    assert reasons.pop("fewer than two completions") == 1
    assert sum(reasons.values()) == 1
    assert task.errors.total == 4


def test_nothing_to_learn_is_said_at_once(tiny_model_folder: Path, tmp_path: Path) -> None:
    long = [asked(str(n), f"What {n}?", "no", "A red circle. " * 100) for n in range(8)]
    write_comparisons(long, tmp_path / "long.jsonl")
    write_comparisons([asked("a", "What?", "no", "red")], tmp_path / "fits.jsonl")
    made = small_recipe(tiny_model_folder, tmp_path, sources=(SourceConfig(path="long.jsonl"),))
    with pytest.raises(
        MMGPTError, match=r"none of 3 comparisons to validate on can be used: .*longer than the context"
    ):
        RewardTask(made)
    task = RewardTask(dataclasses.replace(made, holdout=0.0, validation=(SourceConfig(path="fits.jsonl"),)))
    with pytest.raises(MMGPTError, match=r"none of 8 comparisons can be learned: .*longer than the context"):
        task.micro_batches(0, 1)
    with pytest.raises(MMGPTError, match="no comparison can be judged"):
        judge(task.model, task.processor, long, ErrorCounter())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"holdout": 0.0}, "validation sources or a holdout"),
        ({"sources": ()}, "give sources"),
        ({"comparisons": 0}, "comparisons"),
        ({"centring": -1.0}, "centring"),
        ({"train": {"batch_tokens": 100}}, "batch_tokens"),
    ],
)
def test_impossible_recipes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small_recipe(Path("start"), Path("data"), **changes)


def test_the_recipe_by_its_name() -> None:
    made = recipe("reward", "folder")
    assert isinstance(made, RewardRecipe)
    assert made.data == "folder"


# ---- The report ----


def report_of(
    comparisons: list[Comparison], score_of: Callable[[Comparison, Completion], float], monkeypatch: Any
) -> Any:
    """The report about scores by a rule."""
    from mm_gpt.alignment import reward_report
    from mm_gpt.alignment.reward_model import Scored

    def scores(model: Any, processor: Any, asked_for: Any, errors: Any, batch_tokens: int) -> Any:
        for comparison in asked_for:
            own = tuple(score_of(comparison, answer) for answer in comparison.completions)
            yield Scored(own, tuple(len(answer.text) for answer in comparison.completions))

    monkeypatch.setattr(reward_report, "score_comparisons", scores)
    return judge(None, None, comparisons, ErrorCounter())  # type: ignore[arg-type]


def colour_in(comparison: Comparison) -> str:
    r, _, b = images_of(comparison)[0].load().getpixel((0, 0))
    return "red" if r > b else "blue"


def test_a_reward_that_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons = colour_comparisons(tmp_path, 40)
    report, judged = report_of(comparisons, lambda c, answer: float(colour_in(c) in answer.text), monkeypatch)
    assert report.accuracy == report.accuracy_images == 1.0
    assert report.image_prompts == report.prompts == report.pairs == 40
    assert 0.2 < report.accuracy_images_shuffled < 0.8
    assert report.image_gain_interval[0] > 0
    assert not report.findings
    assert report.margin == 1.0
    assert len(judged) == 40
    assert "with its own images 1.000" in "\n".join(describe(report))


def test_a_reward_that_does_not_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It prefers the longer answer, and is told so, too."""
    comparisons = colour_comparisons(tmp_path, 40)
    report, _ = report_of(comparisons, lambda c, answer: float(len(answer.text)), monkeypatch)
    assert report.accuracy == 0.5 == report.accuracy_images_shuffled
    assert report.image_effect == 0
    assert any("ignores the images" in finding for finding in report.findings)
    assert any("no better than chance" in finding for finding in report.findings)
    assert report.length_correlation == pytest.approx(1)
    assert report.prefers_longer == 1
    longer = [asked(str(n), "What?", "A red circle.", "no") for n in range(20)]
    report, _ = report_of(longer, lambda c, answer: float(len(answer.text)), monkeypatch)
    assert report.accuracy == report.longer_is_better == 1
    assert any("preferring the longer answer is right as often" in finding for finding in report.findings)
    assert report.accuracy_images is None


def test_a_constant_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = report_of(colour_comparisons(tmp_path, 6), lambda c, answer: 0.7, monkeypatch)
    assert report.accuracy == 0.5
    assert report.length_correlation is None
    assert report.findings == ("the reward is constant: every answer has 0.7",)
    assert report.loss == pytest.approx(math.log(2))


def test_the_same_picture_is_not_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts about one picture, as files or as bytes: there is nothing to shuffle."""
    picture = tmp_path / "one.png"
    make_picture().save(picture)
    for source in (picture, picture.read_bytes()):
        comparisons = [
            Comparison(str(n), (user(Image(source), f"What {n}?"),), ranked("red", "blue")) for n in range(4)
        ]
        report, _ = report_of(comparisons, lambda c, answer: float("red" in answer.text), monkeypatch)
        assert report.image_prompts == 0
        assert report.accuracy_images_shuffled is None


def test_pearson() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert pearson(a, np.ones(50)) is None


# ---- As a reward ----


def test_answers_of_several_prompts(tmp_path: Path) -> None:
    """In any order; what does not fit has none, and nobody else suffers."""
    model, processor = make_tiny()
    folder = tmp_path / "judge"
    folder.mkdir()
    save_reward_model(reward_of(model), processor, folder)
    reward = ModelReward(folder)
    assert reward.name == "judge"
    one, two = asked("a", "What?", seed=1), asked("b", "Why?")
    found = reward([one, two, one, two], ["red", "no", "A circle. " * 100, "blue"], ids=[[1], [2], [3], [4]])
    assert found[2] is None
    assert reward.errors.counts == {"longer than the context": 1}
    expected = [float(score(reward.model, processor, [dataclasses.replace(c, completions=(answer_of(t),))]))
                for c, t in ((one, "red"), (two, "no"), (two, "blue"))]  # fmt: skip
    assert [found[0], found[1], found[3]] == pytest.approx(expected, abs=1e-5)
    assert reward([], []) == []


# ---- The command ----


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    model, processor = make_tiny()
    save_reward_model(reward_of(model), processor, folder)
    return folder


def test_command(judge_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One answer is a number; several are a table, best first."""
    reward = ModelReward(judge_folder)
    comparison = Comparison("a", (user(Image(picture_file), "What is it?"),))
    answers = ["A red circle.", "blue\nground", "no"]
    expected = dict(zip(answers, reward([comparison] * 3, answers), strict=True))
    best = sorted(answers, key=lambda answer: -(expected[answer] or 0.0))
    words = ["reward", str(picture_file), "What is it?"]
    assert main([*words, answers[0], "--model", str(judge_folder)]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(expected[answers[0]], abs=1e-3)
    assert main([*words, *answers, "--model", str(judge_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [" ".join(answer.split()) for answer in best]
    assert main([*words, *answers, "--model", str(judge_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["answer"] for row in found["answers"]] == best
    for row in found["answers"]:
        assert row["score"] == pytest.approx(expected[row["answer"]], abs=1e-4)
    assert main(["reward", "Why?", "Because.", "-m", str(judge_folder)]) == 0  # of text alone
    assert math.isfinite(float(capsys.readouterr().out))


def test_command_measures(judge_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparisons = [asked(str(n), f"What is number {n}?", "A red circle.", "blue", seed=n) for n in range(4)]
    path = tmp_path / "held.jsonl"
    write_comparisons(comparisons, path)
    command = ["reward", "--comparisons", str(path), "-m", str(judge_folder)]
    assert main([*command, "-o", str(tmp_path / "report"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "report" / REPORT).read_text())
    assert said["prompts"] == said["image_prompts"] == 4
    assert (tmp_path / "report" / PLOT).is_file()
    write_comparisons([*comparisons, asked("long", "What?", "no", "A circle. " * 200)], path)
    assert main(command) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith(f"accuracy {said['accuracy']:.3f}")
    assert "1 longer than the context (long: " in captured.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["What?"], 2, "an answer is missing after 'What?'"),
        ([], 2, "to follow the images"),
        (["nowhere.jpg", "What?", "no"], 1, "nowhere.jpg"),
        (["What?", "nowhere.jpg", "no"], 2, "nowhere.jpg comes after 'What?': images are to stand before the prompt"),
        (["-", "-", "What?", "no"], 2, "standard input can be read once"),
        ([" ", "no"], 2, "the prompt is empty"),
        (["What?", "no", "-o", "report"], 2, "--out is for the report"),
        (["What?", "no", "--comparisons", "a.jsonl"], 2, "either a prompt with answers or --comparisons"),
        (["--comparisons", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
        (["What?", "A red circle. " * 100], 1, "longer than the context"),
    ],
)
def test_command_mistakes(
    words: list[str], code: int, said: str, judge_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["reward", *words, "-m", str(judge_folder)])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == code
    assert said in capsys.readouterr().err


def test_command_without_a_reward_model(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "What?", "no", "-m", str(tiny_model_folder)]) == 1
    assert f"{tiny_model_folder}: not the folder of a reward model" in capsys.readouterr().err
