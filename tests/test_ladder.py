"""Ladders: sizes and settings, their runs, predictions that are filed before, and verdicts (mm_gpt.scaling)."""

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_picture, make_tokenizer
from ladder_data import RULES, fake_run, fake_rungs, law, text_recipe, write_texts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.flops import parameter_counts
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig, collate
from mm_gpt.scaling import registration
from mm_gpt.scaling.ladder import FORMULAS, LadderConfig, LadderPlan, Settings, flops_per_token, make_plan, table
from mm_gpt.scaling.points import CannotTell
from mm_gpt.scaling.registration import register, verdicts
from mm_gpt.scaling.runs import read_run, read_runs, train_runs
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

WIDTHS = (4, 8, 12, 16, 24)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def plan(texts: Path) -> LadderPlan:
    config = LadderConfig(widths=WIDTHS, targets=(32,), **RULES)
    return make_plan(text_recipe(texts), config, timed=False)


@pytest.fixture
def ladder(plan: LadderPlan, tmp_path: Path) -> Path:
    """A plan's file, with finished rungs beside it."""
    plan.save(tmp_path / "plan.json")
    fake_rungs(tmp_path, plan)
    return tmp_path / "plan.json"


# ---- Plans ----


def test_settings_are_functions_of_size_alone(plan: LadderPlan) -> None:
    """Check 8: lr, batch, warm-up and tokens are pure functions of N and D, and the plan states them."""
    config = LadderConfig(widths=(16,), lr=4e-3, batch_tokens=1000, tokens_per_parameter=10)
    at = Settings.of(100_000, config)
    assert (at.lr, at.batch_tokens, at.tokens, at.warmup_tokens) == (4e-3, 1000, 1e6, 1e5)
    larger = Settings.of(800_000, config)
    assert larger.lr == pytest.approx(2e-3)  # 8 ** (-1 / 3)
    assert larger.batch_tokens == pytest.approx(4000)  # 8 ** (2 / 3)
    assert Settings.of(800_000, config, budget=2.0).tokens == 2 * larger.tokens
    assert Settings.of(800_000, config, budget=2.0).lr == larger.lr
    for run in plan.runs:
        settings = Settings.of(run.parameters, plan.ladder)
        assert run.lr == settings.lr
        assert run.tokens == pytest.approx(settings.tokens, rel=0.05)  # in whole steps
    assert plan.formulas == FORMULAS


def test_sizes_are_counted_with_and_without_embeddings_and_vision(plan: LadderPlan) -> None:
    """Check 8: N is printed with and without embeddings and vision tower, as a model counts itself."""
    for run in plan.runs:
        model = MMGPT(plan.recipe_of(run).model)  # type: ignore[arg-type]
        counts = parameter_counts(model)
        assert (run.blocks, run.parameters) == (counts.decoder, counts.decoder + counts.head)
        assert run.parameters + run.embedding + run.vision == sum(p.numel() for p in model.parameters())
    printed = table(plan)
    assert f"{plan.runs[0].blocks:,}" in printed
    assert f"{plan.runs[0].parameters:,}" in printed


def test_every_optimizer_is_timed(texts: Path) -> None:
    """Muon asks where each parameter belongs."""
    base = text_recipe(texts)
    base = replace(base, train=replace(base.train, optimizer="muon"))
    made = make_plan(base, LadderConfig(widths=(8,), targets=(16,), **RULES))
    assert all(run.seconds is not None and run.seconds > 0 for run in made.runs)


@pytest.mark.parametrize("gated", [True, False])
def test_flops_are_those_of_a_counted_pass(gated: bool) -> None:
    """Check 8: 6 N D and attention and vision, within 2 % of what a counted forward and backward pass takes."""
    tower = ViTConfig(image_size=32, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64)
    tokenizer = make_tokenizer()
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        width=48,
        num_layers=2,
        num_heads=3,
        num_kv_heads=3,
        head_size=16,
        mlp_width=128,
        gated_mlp=gated,
        max_length=256,
    )
    config = ModelConfig(
        decoder=decoder, vision=VisionConfig(model=tower, image_size=32), connector=ConnectorConfig(kind="linear")
    )
    image = ImageTransformConfig(size=32)
    base = replace(text_recipe(Path()), model=config, image=image, vision_blocks=None)
    model = MMGPT(config)
    settings = ProcessorConfig(image=image, tokens_per_image=model.tokens_per_image, max_length=256)
    processor = Processor(tokenizer, settings, vocab_size=tokenizer.vocab_size)
    example = processor(Document((Image(make_picture()), Text("a red circle on a blue ground " * 6))))
    batch = collate([[example]], processor.pixels([example]))
    per_token, attention, vision = flops_per_token(base, config, [batch])
    tokens = batch.input_ids.numel()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        model.loss(batch)[0].backward()
    assert per_token * tokens == pytest.approx(counter.get_total_flops(), rel=0.02)
    counts = parameter_counts(model)
    supervised = int((batch.labels >= 0).sum())
    products = 6.0 * (counts.decoder * tokens + counts.head * supervised)  # 6 N D, with the head where it is used
    assert products + (attention + vision) * tokens == pytest.approx(per_token * tokens, rel=0.02)


def test_a_plan_is_a_file(plan: LadderPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "runs/plan.json")
    assert LadderPlan.load(tmp_path / "runs/plan.json") == plan
    with pytest.raises(MMGPTError, match=r"no run 'w5' \(it has: w4, w8"):
        plan.run("w5")
    with pytest.raises(MMGPTError, match="no such plan"):
        LadderPlan.load(tmp_path / "other.json")
    values = json.loads((tmp_path / "runs/plan.json").read_text())
    values["ladder"]["width"] = values["ladder"].pop("widths")
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"bad.json.*did you mean 'widths'"):
        LadderPlan.load(tmp_path / "bad.json")


def test_data_that_would_repeat_are_refused(texts: Path) -> None:
    config = LadderConfig(widths=(4,), targets=(64,), **RULES)
    with pytest.raises(ConfigError, match=r"train.jsonl: w64 reads .* and it has .* data that repeat bend the law"):
        make_plan(text_recipe(texts), config, timed=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": ()}, "widths is empty"),
        ({"widths": (8, 8)}, "different numbers above 0, not 8,8"),
        ({"widths": (8, 16), "targets": (16,)}, "the target 16 must be wider than the widest rung 16"),
        ({"widths": (8,), "lr": float("nan")}, "lr must be"),
        ({"widths": (8,), "budgets": ()}, "budgets is empty"),
    ],
)
def test_rules_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LadderConfig(**wrong)  # type: ignore[arg-type]


def test_a_ladder_starts_from_nothing(texts: Path) -> None:
    for change in ({"start": "default"}, {"decoder": "frozen"}, {"model": None, "start": "default"}):
        with pytest.raises(ConfigError, match="a ladder trains"):
            make_plan(replace(text_recipe(texts), **change), LadderConfig(widths=(8,)), timed=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ({"accumulate": 2}, "accumulate"),
        ({"step_tokens": 4096}, "step_tokens"),
        ({"ramp_from": 256, "ramp_tokens": 5000}, "ramp_from"),
        ({"patience": 1}, "patience"),
        ({"noise_scale": True}, "noise_scale"),
    ],
)
def test_a_ladder_sizes_its_steps_itself(train: dict[str, object], name: str, texts: Path) -> None:
    """Runs with other steps than the plan says would be no points of it, or never be finished."""
    base = text_recipe(texts)
    with pytest.raises(ConfigError, match=rf"leave out train\.{name}"):
        make_plan(replace(base, train=replace(base.train, **train)), LadderConfig(widths=(8,)), timed=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../w4"}, "is no name of a run"),
        ({"name": "w8"}, "two runs are called w8"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"flops": -1.0}, "flops must be above 0"),
    ],
)
def test_an_edited_plan_is_checked(changes: dict[str, object], message: str, plan: LadderPlan, tmp_path: Path) -> None:
    """A folder outside of the plan's would be written to, and a log would count twice."""
    plan.save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    values["runs"][0] |= changes
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"plan.json.*{message}"):
        LadderPlan.load(tmp_path / "plan.json")
    values["runs"] = []
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="a plan needs rungs"):
        LadderPlan.load(tmp_path / "plan.json")


# ---- Runs ----


def test_runs_are_trained_once_and_as_planned(plan: LadderPlan, tmp_path: Path) -> None:
    """What is finished is skipped, what another plan left is refused, tokens and FLOPs are as planned."""
    run = plan.runs[0]
    assert train_runs(plan, tmp_path, [run], progress=False) == []
    finished = read_run(tmp_path / run.name, run)
    assert finished.losses.keys() == {"loss", "loss held_out.jsonl"}
    assert finished.tokens == pytest.approx(run.tokens, rel=0.05)
    assert finished.flops == pytest.approx(run.flops, rel=0.05)
    before = (tmp_path / run.name / "log.jsonl").read_bytes()
    assert train_runs(plan, tmp_path, [run], progress=False) == []
    assert (tmp_path / run.name / "log.jsonl").read_bytes() == before
    with pytest.raises(MMGPTError, match=r"is not the plan's w4: another train\.lr"):
        train_runs(plan, tmp_path, [replace(run, lr=run.lr / 2)], progress=False)


def test_a_run_that_fails_does_not_stop_the_others(plan: LadderPlan, tmp_path: Path) -> None:
    bad, good = replace(plan.runs[0], name="bad", lr=1e30), plan.runs[0]
    assert train_runs(plan, tmp_path, [bad, good], progress=False) == ["bad"]
    assert read_run(tmp_path / good.name, good).losses["loss"] > 0


def test_only_finished_schedules_are_points(plan: LadderPlan, tmp_path: Path) -> None:
    run = plan.runs[1]
    with pytest.raises(CannotTell, match=r"w8: not finished \(step 0 of \d+\)"):
        read_run(tmp_path / run.name, run)
    fake_run(tmp_path, plan, run, 2.0)
    assert read_run(tmp_path / run.name, run).losses["loss"] == 2.0
    log = tmp_path / run.name / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]))  # a validation that never came
    with pytest.raises(CannotTell, match="not finished"):
        read_run(tmp_path / run.name, run)
    log.write_text("".join([*lines[:-1], lines[-1][:20]]))  # cut off by a full disk
    with pytest.raises(CannotTell, match="not finished"):
        read_run(tmp_path / run.name, run)
    worse = [json.dumps({"step": run.steps - 1, "loss": 5.0}) + "\n"] * 5
    log.write_text("".join([*lines[:-1], *worse, lines[-1]]))
    with pytest.raises(CannotTell, match=r"diverged .*: lower the ladder's lr"):
        read_run(tmp_path / run.name, run)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 1, "loss": "low"}, "line 1 is no row of a log"),
        ({"step": 1, "loss": None}, "line 1 is no row of a log"),
        ({"step": 1, "loss": 2.0, "flops": 10**400}, "line 1 is no row of a log"),
        ({"step": 1, "validation": []}, "line 1 is no row of a log"),
        ({"step": 1, "validation": {"loss": "low"}}, "line 1 is no row of a log"),
        ({"step": 1, "loss": float("nan")}, "diverged"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_log_is_one_line(row: dict[str, object] | None, message: str, plan: LadderPlan, ladder: Path) -> None:
    log = ladder.parent / "w8/log.jsonl"
    first = b"\xff\xfe" if row is None else json.dumps(row).encode()
    log.write_bytes(first + b"\n" + log.read_bytes())
    with pytest.raises(MMGPTError, match=f"w8.*{message}"):
        read_runs(plan, ladder.parent, plan.of_role("rung"))


def test_only_the_plans_own_runs_are_points(plan: LadderPlan, ladder: Path) -> None:
    """A run by other settings, in a folder of the right name, would bend the law without a word."""
    path = ladder.parent / "w8/recipe.json"
    values = json.loads(path.read_text())
    del values["train"]["shard"]  # as before there was such a setting
    path.write_text(json.dumps(values))
    assert len(read_runs(plan, ladder.parent, plan.of_role("rung"))) == len(WIDTHS)
    values["train"]["weight_decay"] = 0.5
    path.write_text(json.dumps(values))
    with pytest.raises(MMGPTError, match=r"is not the plan's w8: another train\.weight_decay"):
        register(ladder, "w32", ladder.parent / "filed.json")
    path.unlink()
    with pytest.raises(MMGPTError, match=r"w8: no recipe.json"):
        register(ladder, "w32", ladder.parent / "filed.json")


# ---- Predictions ----


def test_a_prediction_is_filed_and_judged(plan: LadderPlan, ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that follow a law are predicted by it; the verdict fits nothing."""
    filed = ladder.parent / "filed.json"
    values = register(ladder, "w32", filed)
    target = plan.run("w32")
    assert values["predictions"]["loss"]["loss"] == pytest.approx(law(target), rel=1e-4)
    assert abs(values["predictions"]["loss"]["held out"]["error"]) < 1e-4
    assert values["predictions"]["loss"]["fit"]["coefficients"]["c"] == pytest.approx(1.5, rel=1e-3)
    for key in ("time", "commit", "form", "inputs", "digest"):
        assert key in values
    assert len(values["inputs"]) == 1 + 2 * len(WIDTHS)
    fake_run(ladder.parent, plan, target, law(target) * 1.02)
    monkeypatch.setattr(registration, "predict_run", None)
    both = verdicts(filed, ladder)
    assert [each.metric for each in both] == ["loss", "loss held_out.jsonl"]
    assert both[0].error == pytest.approx(1 / 1.02 - 1, rel=1e-3)
    assert not both[0].is_inside
    assert "outside the interval" in str(both[0])


def test_what_has_begun_is_not_predicted(plan: LadderPlan, ladder: Path) -> None:
    fake_run(ladder.parent, plan, plan.run("w32"), 2.0)
    with pytest.raises(MMGPTError, match="w32 has begun: a prediction is made before"):
        register(ladder, "w32", ladder.parent / "filed.json")
    assert not (ladder.parent / "filed.json").exists()


def test_a_prediction_is_filed_once(ladder: Path) -> None:
    register(ladder, "w32", ladder.parent / "filed.json")
    with pytest.raises(MMGPTError, match="filed once"):
        register(ladder, "w32", ladder.parent / "filed.json")
    with pytest.raises(MMGPTError, match=r"w8 is a rung of the ladder, not a target \(it has: w32\)"):
        register(ladder, "w8", ladder.parent / "other.json")


@pytest.mark.parametrize("edited", ["plan.json", "w8/log.jsonl", "w24/recipe.json", "filed.json", "gone"])
def test_an_edited_input_is_not_registered(edited: str, plan: LadderPlan, ladder: Path) -> None:
    """Check 9: editing any input after registration changes the hash, and the report says "not registered"."""
    filed = ladder.parent / "filed.json"
    register(ladder, "w32", filed)
    fake_run(ladder.parent, plan, plan.run("w32"), 2.0)
    assert verdicts(filed, ladder)
    if edited == "gone":
        (ladder.parent / "w4/log.jsonl").unlink()
    elif edited == "filed.json":
        values = json.loads(filed.read_text())
        values["predictions"]["loss"]["loss"] = 2.0
        filed.write_text(json.dumps(values))
    else:
        path = ladder.parent / edited
        path.write_text(path.read_text() + "\n")
    with pytest.raises(MMGPTError, match=r"^not registered: "):
        verdicts(filed, ladder)


@pytest.mark.parametrize(
    "changes",
    [{"inputs": []}, {"inputs": {"plan.json": 1}}, {"target": "w32"}, {"time": "yesterday"}]
    + [{"predictions": each} for each in ([], {"loss": 1}, {"loss": {"loss": 1.0}}, {"loss": {"loss": "x"}})],
)
def test_what_is_no_registration_is_one_line(changes: dict[str, object], ladder: Path) -> None:
    filed = ladder.parent / "filed.json"
    values = register(ladder, "w32", filed) | changes
    filed.write_text(json.dumps(values | {"digest": registration.digest(values)}))
    with pytest.raises(MMGPTError, match=r"filed\.json: no registration"):
        verdicts(filed, ladder)


def test_a_target_by_other_settings_is_not_judged(plan: LadderPlan, ladder: Path) -> None:
    register(ladder, "w32", ladder.parent / "filed.json")
    fake_run(ladder.parent, plan, replace(plan.run("w32"), lr=0.5), 2.0)
    with pytest.raises(MMGPTError, match=r"is not the plan's w32: another train\.lr"):
        verdicts(ladder.parent / "filed.json", ladder)


def test_a_target_that_began_before_is_not_registered(plan: LadderPlan, ladder: Path) -> None:
    filed = ladder.parent / "filed.json"
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    register(ladder, "w32", filed, now=lambda: later)
    fake_run(ladder.parent, plan, plan.run("w32"), 2.0)
    with pytest.raises(MMGPTError, match=r"not registered: .* had begun before"):
        verdicts(filed, ladder)


def test_nothing_is_predicted_without_a_rung(plan: LadderPlan, ladder: Path) -> None:
    """A rung that diverged or is missing is named; a ladder that is too short gives no number."""
    (ladder.parent / "w12/log.jsonl").unlink()
    with pytest.raises(CannotTell, match="w12: not finished"):
        register(ladder, "w32", ladder.parent / "filed.json")


def test_a_ladder_that_is_too_short_gives_no_number(texts: Path, tmp_path: Path) -> None:
    """Check 6: with fewer than three rungs, or less than 1.5 decades, there is no prediction."""
    short = make_plan(text_recipe(texts), LadderConfig(widths=(4, 8), targets=(32,), **RULES), timed=False)
    short.save(tmp_path / "plan.json")
    fake_rungs(tmp_path, short)
    with pytest.raises(CannotTell):
        register(tmp_path / "plan.json", "w32", tmp_path / "filed.json")
    assert not (tmp_path / "filed.json").exists()


def test_a_metric_that_cannot_be_told_is_filed_as_such(plan: LadderPlan, ladder: Path) -> None:
    """The law of the whole holds although one source's losses follow none."""
    for number, run in enumerate(plan.of_role("rung")):
        fake_run(ladder.parent, plan, run, law(run), text_loss=2.0 + number)  # grows with compute
    values = register(ladder, "w32", ladder.parent / "filed.json")
    assert "loss" in values["predictions"]["loss"]
    assert "cannot tell" in values["predictions"]["loss held_out.jsonl"]
