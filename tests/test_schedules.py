"""The learning rate of each step, the micro-batches that it has, and where a run ends."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import on_ranks
from toy_stage import ToyStage, logged, losses, toy_config

from mm_gpt.datasets.loading.step_sizes import StepSizes
from mm_gpt.errors import ConfigError
from mm_gpt.model.presets import preset
from mm_gpt.training import checkpoint
from mm_gpt.training.loop import train
from mm_gpt.training.schedules import cycle_ends, learning_rate, step_sizes
from mm_gpt.training.train_config import TrainConfig


def rates(config: TrainConfig, *steps: int, sizes: StepSizes | None = None) -> list[float]:
    return [learning_rate(config, step, sizes=sizes) for step in steps]


# ---- the rate ----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear", "final_lr": 0.1}, {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}),
        ({"schedule": "constant"}, {0: 0.1, 4: 0.5, 10: 1.0, 99: 1.0, 500: 1.0}),
        ({"schedule": "wsd", "decay_share": 0.2}, {4: 0.5, 10: 1.0, 80: 1.0, 85: 0.75, 90: 0.5, 100: 0.0}),
        ({"schedule": "wsd", "decay_share": 0.2, "final_share": 0.2, "final_lr": 0.5}, {60: 1, 70: 0.75, 80: 0.5}),
        ({"schedule": "cosine", "final_share": 0.5, "final_lr": 0.1}, {10: 1.0, 30: 0.55, 50: 0.1, 99: 0.1}),
        ({"schedule": "wsd", "decay_share": 1.0}, {9: 1.0, 10: 1.0, 55: 0.5, 100: 0.0}),  # never before the warm-up
    ],
)
def test_rates_golden(changes: dict[str, Any], expected: dict[int, float]) -> None:
    config = toy_config(steps=100, lr=1.0, warmup_steps=10, **changes)
    assert rates(config, *expected) == pytest.approx(list(expected.values()), abs=1e-9)


def test_gpt3s_schedule_is_one_of_tokens() -> None:
    """Golden for 125M: half of the peak in the middle of 375M tokens of warm-up, the peak at their end, a tenth from
    260 billion on, to 300; while the batch grows from 32k over 4 billion tokens."""
    found = preset("gpt3-125m")
    config = TrainConfig(steps=1000, step_tokens=found.batch_tokens, **found.training)
    sizes = step_sizes(config, 1000)
    assert (sizes.count(0), sizes.full) == (32, 500)
    in_ramp = next(step for step in range(10**6) if sizes.count(step) == 500)
    assert sizes.before(in_ramp) * 1000 == pytest.approx(4e9, rel=1e-3)
    whole = in_ramp + round((300e9 - sizes.before(in_ramp) * 1000) / 500_000)
    config = dataclasses.replace(config, steps=whole)

    def rate_at(tokens: float) -> float:  # of the step that ends there
        step = next(s for s in range(whole) if sizes.before(s + 1) * 1000 >= tokens)
        return learning_rate(config, step, sizes=sizes)

    assert rate_at(375e6 / 2) == pytest.approx(3e-4, rel=1e-3)
    assert rate_at(375e6) == pytest.approx(6e-4, rel=1e-3)
    end = in_ramp + round((260e9 - sizes.before(in_ramp) * 1000) / 500_000)
    assert rates(config, end - 1, sizes=sizes)[0] > 6e-5
    assert rates(config, end + 1, end + 1000, whole - 1, sizes=sizes) == pytest.approx([6e-5] * 3)


def test_more_steps_move_the_end_of_a_plateau() -> None:
    """`wsd` that has not begun to fall, and `constant`, go on as they are; whatever has begun to fall ends first."""
    short, long = (toy_config(steps=steps, lr=1.0, schedule="wsd", decay_share=0.2) for steps in (100, 200))
    assert cycle_ends(short, 0, []) == [100]
    assert cycle_ends(long, 80, [100]) == [200]
    assert cycle_ends(long, 81, [100]) == [100, 200]
    assert cycle_ends(long, 150, [100, 120]) == [100, 120, 200]
    assert cycle_ends(short, 150, [200]) == [200]  # fewer steps end a run on its schedule
    constant = toy_config(steps=200, lr=1.0, schedule="constant", warmup_steps=5)
    assert cycle_ends(constant, 100, [100]) == [200]
    assert [learning_rate(constant, step, [100, 200]) for step in (3, 4, 100, 150)] == [0.8, 1, 1, 1]
    assert cycle_ends(toy_config(steps=200), 50, [100]) == [100, 200]  # a cosine


def test_a_plateau_goes_on(tmp_path: Path) -> None:
    config = toy_config(steps=10, schedule="wsd", decay_share=0.5, save_every=5)
    train(ToyStage(), dataclasses.replace(config, steps=20), tmp_path / "whole", progress=False)
    train(ToyStage(), config, tmp_path / "short", progress=False)
    (tmp_path / "short/step-000010").rename(tmp_path / "away")  # as if it had been stopped at step 5
    train(ToyStage(), dataclasses.replace(config, steps=20), tmp_path / "short", resume=True, progress=False)
    assert logged(tmp_path / "short", "lr") == logged(tmp_path / "whole", "lr")
    assert losses(tmp_path / "short") == losses(tmp_path / "whole")


# ---- how many micro-batches ----


def test_steps_grow_linearly_in_multiples_of_the_first() -> None:
    sizes = StepSizes(10, first=2, growth=40)
    counts = [sizes.count(step) for step in range(14)]
    assert counts == [2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 8, 10, 10, 10]
    assert [sizes.before(step) for step in range(14)] == [sum(counts[:step]) for step in range(14)]
    assert sizes.before(1_000_000) == sum(counts) + 10 * (1_000_000 - 14)
    plain = StepSizes(3)
    assert [(plain.count(step), plain.before(step)) for step in (0, 1, 7)] == [(3, 0), (3, 3), (3, 21)]


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_ramp_is_one_of_tokens(parts: int) -> None:
    """Stops: on another number of ranks other steps, since each was rounded to micro-batches."""
    config = toy_config(step_tokens=600, ramp_from=60, ramp_tokens=6000)
    one, many = step_sizes(config, 60 // parts), step_sizes(config, 60)
    assert many.full == 10
    for step in range(200):
        assert one.count(step) == parts * many.count(step)


def test_step_tokens_set_accumulate() -> None:
    assert step_sizes(toy_config(step_tokens=500_000), 8192) == StepSizes(62)  # rounded up
    assert step_sizes(toy_config(step_tokens=5), 8192) == StepSizes(1)
    assert step_sizes(toy_config(accumulate=4), 8192) == StepSizes(4)
    assert step_sizes(toy_config(accumulate=4, ramp_from=100, ramp_tokens=1000), 100) == StepSizes(4, 1, 10)


def impossible_steps() -> list[tuple[Callable[[], Any], str]]:
    return [
        (lambda: toy_config(step_tokens=10, accumulate=2), "give step_tokens=10 or accumulate=2"),
        (lambda: toy_config(step_tokens=10**23), "step_tokens must be at most 1,000,000,000, not 1"),
        (lambda: toy_config(accumulate=10**23), "accumulate must be at most 1,000,000, not 1"),
        (lambda: toy_config(trackers=("wandb", "wandb")), "trackers has wandb twice"),
        (lambda: step_sizes(toy_config(step_tokens=90, ramp_from=50, ramp_tokens=9), 100), "a larger step_tokens"),
        (lambda: toy_config(ramp_from=5), "ramp_from and ramp_tokens go together"),
        (lambda: toy_config(patience=0), "patience must be at least 1"),
        (lambda: toy_config(schedule="wsd", decay_share=0.6, final_share=0.5), "are more than the run"),
        (lambda: StepSizes(100, 1, 10**9), "would take up to 1,000,000,000 steps"),
        (lambda: StepSizes(0), "full must be at least 1"),
    ]


@pytest.mark.parametrize(("make", "message"), impossible_steps())
def test_impossible_steps(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_stage_that_does_not_count_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give accumulate here"):
        train(ToyStage(), toy_config(step_tokens=100), tmp_path / "run", progress=False)


# ---- where a run ends ----

FALLS_AND_RISES = [3.0, 1.0, 2.0, 1.5, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1]


def test_patience_ends_a_run_with_its_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, config = tmp_path / "run", toy_config(steps=10, validate_every=1, save_every=100, patience=3)
    with caplog.at_level(logging.INFO, logger="mm_gpt"):
        train(ToyStage(validation=FALLS_AND_RISES), config, out, progress=False)
    assert max(losses(out)) == 5
    assert (checkpoint.latest(out) or Path()).name == "step-000005"  # saved like a last step
    assert "step 5 ends the run: 3 validations without a better loss" in caplog.text
    assert f"the best loss, 1 at step 2, is {out / 'best'}" in caplog.text
    plain = tmp_path / "two"
    train(ToyStage(validation=FALLS_AND_RISES), toy_config(steps=10, validate_every=2), plain, progress=False)
    steps = {json.loads(line)["step"] for line in (plain / "log.jsonl").read_text().splitlines()}
    assert max(steps) == 10  # without patience it goes to its end


def test_a_run_out_of_patience_is_not_continued_by_accident(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, config = tmp_path / "run", toy_config(steps=10, validate_every=1, save_every=100, patience=3)
    train(ToyStage(validation=FALLS_AND_RISES), config, out, progress=False)
    before = (out / "log.jsonl").read_text()
    train(ToyStage(), config, out, resume=True, progress=False)
    assert "stopped at step 5, with no better loss in 3 validations: with a larger train.patience it" in caplog.text
    assert (out / "log.jsonl").read_text() == before
    more = dataclasses.replace(config, patience=4)
    train(ToyStage(validation=FALLS_AND_RISES[5:]), more, out, resume=True, progress=False)
    assert max(losses(out)) == 10
    whole = tmp_path / "whole"
    train(ToyStage(validation=FALLS_AND_RISES), dataclasses.replace(config, patience=None), whole, progress=False)
    assert losses(out) == losses(whole)


def test_patience_counts_over_a_stop(tmp_path: Path) -> None:
    """Validations before a run was stopped count: two, then one more, are three."""
    out = tmp_path / "run"
    config = toy_config(steps=4, validate_every=1, save_every=1, patience=3)
    train(ToyStage(validation=FALLS_AND_RISES[:4]), config, out, progress=False)
    longer = dataclasses.replace(config, steps=10)
    train(ToyStage(validation=FALLS_AND_RISES[4:]), longer, out, resume=True, progress=False)
    assert max(losses(out)) == 5


def test_ranks_end_together(tmp_path: Path) -> None:
    """Rank 1 sees other values, and rank 0's decide for both: one that went on alone would wait forever."""
    config = toy_config(steps=10, validate_every=1, patience=3)

    def run(rank: int) -> int:
        stage = ToyStage(validation=FALLS_AND_RISES if rank == 0 else [0.0] * 10)
        train(stage, config, tmp_path / "run", progress=False)
        return len(stage.validation)

    assert on_ranks(run) == [5, 5]
    assert max(losses(tmp_path / "run")) == 5
