"""Rewards: how functions are called, what they may give, how they add up, and what cannot be gained by tricks."""

import asyncio
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mm_gpt.alignment.answer_rewards import ANSWER_REWARDS, boxed_match, exact_match, think_format
from mm_gpt.alignment.graders import GraderConfig
from mm_gpt.alignment.reward_model import RewardModel, save_reward_model
from mm_gpt.alignment.rewards import CONSTANT_AFTER, FunctionReward, RewardConfig, Rewards, load_reward
from mm_gpt.alignment.rule_reward import FittedRules, save_rule_reward
from mm_gpt.alignment.rules import load_rules
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.document import Image
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor


def chat(key: str = "a", *parts: Any, **columns: Any) -> Comparison:
    content = list(parts) or ["What is it?"]
    return Comparison(key, ({"role": "user", "content": content},), columns=columns)


def plain(key: str = "a", text: str = "Once", **columns: Any) -> Comparison:
    return Comparison(key, ({"role": "user", "content": [text]},), is_text=True, columns=columns)


def rewards_of(*functions: Callable[..., Any], weights: Sequence[float] = ()) -> Rewards:
    rewards = Rewards([RewardConfig(source=name) for name in list(ANSWER_REWARDS)[: len(functions)]])
    rewards.rewards = [FunctionReward(function) for function in functions]
    rewards.names = [reward.name for reward in rewards.rewards]
    rewards.weights = list(weights) or [1.0] * len(functions)
    for watch, name in zip(rewards._watch, rewards.names, strict=True):
        watch.name = name
    return rewards


# How functions are called


def test_functions_are_called_as_trl_does() -> None:
    got: dict[str, Any] = {}

    def judge(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **others: Any) -> list[float]:
        got.update(locals())
        return [0.0, 1.0]

    picture = PILImage.new("RGB", (4, 3), "red")
    rows = [chat("a", "What is it?", answer="cat"), chat("b", Image(picture), "And this?", answer="dog", level=3)]
    assert FunctionReward(judge)(rows, ["A cat", "A dog"], [(5, 2), (6, 2)]) == [0.0, 1.0]
    assert got["prompts"] == [
        [{"role": "user", "content": "What is it?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]}],
    ]
    assert got["completions"] == [
        [{"role": "assistant", "content": "A cat"}],
        [{"role": "assistant", "content": "A dog"}],
    ]
    assert got["completion_ids"] == [[5, 2], [6, 2]]
    assert got["answer"] == ["cat", "dog"]
    assert got["others"]["level"] == [None, 3]
    images = got["others"]["images"]
    assert [len(each) for each in images] == [0, 1]
    assert images[1][0].getpixel((0, 0)) == (255, 0, 0)
    assert images[1][:][0].size == (4, 3)


def test_text_is_given_as_strings() -> None:
    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        assert prompts == ["Once"]
        return [float(len(completions[0]))]

    assert FunctionReward(judge)([plain()], [" upon"]) == [5.0]


def test_images_are_decoded_only_when_they_are_looked_at(tmp_path: Path) -> None:
    broken = chat("a", Image(tmp_path / "none.jpg"), "What is it?")
    assert FunctionReward(lambda completions, images: [float(len(each)) for each in images])([broken], ["x"]) == [1.0]
    with pytest.raises(MMGPTError, match=r"reward <lambda>: ImageError.*none\.jpg"):
        FunctionReward(lambda completions, images: [images[0][0]])([broken], ["x"])


def test_async_functions() -> None:
    async def judge(completions: Any) -> list[float]:
        await asyncio.sleep(0)
        return [2.0]

    async def fails(completions: Any) -> list[float]:
        raise KeyError("x")

    assert FunctionReward(judge)([chat()], ["x"]) == [2.0]

    async def inside() -> list[float | None]:  # where an event loop runs already
        with pytest.raises(MMGPTError, match="reward fails: KeyError"):
            FunctionReward(fails)([chat()], ["x"])
        return FunctionReward(judge)([chat()], ["x"])

    assert asyncio.run(inside()) == [2.0]


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(MMGPTError, match=r"reward judge: needs 'solution'.*columns: answer, level"):
        FunctionReward(judge_by_solution)([chat(answer="x", level=1)], ["x"])
    with pytest.raises(MMGPTError, match="needs 'completion_ids'"):
        FunctionReward(lambda completion_ids: [1.0])([chat()], ["x"])


def judge(completions: Any, solution: Any) -> list[float]:
    return [1.0] * len(completions)


judge_by_solution = judge


def test_functions_of_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helping.py").write_text("FACTOR = 3\n")
    (tmp_path / "mine.py").write_text(
        "from helping import FACTOR\n\n\ndef shouts(completions, **columns):\n"
        "    return [FACTOR * float(c[0]['content'].isupper()) for c in completions]\n\n\n"
        "def breaks(completions, **columns):\n    return [1 / 0 for _ in completions]\n"
    )
    source = f"{tmp_path / 'mine.py'}:shouts"
    reward = load_reward(source)
    assert reward.name == "shouts"
    assert reward([chat(), chat()], ["HO", "ho"]) == [3.0, 0.0]
    with pytest.raises(MMGPTError, match=r"reward breaks: ZeroDivisionError at mine\.py:9: division by zero"):
        load_reward(f"{tmp_path / 'mine.py'}:breaks")([chat()], ["x"])
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(3)\n")
    with pytest.raises(MMGPTError, match=r"script\.py cannot be run \(SystemExit: 3\)"):
        load_reward(f"{tmp_path / 'script.py'}:shouts")
    with pytest.raises(MMGPTError, match=r"unknown function 'shout'; did you mean 'shouts'"):
        load_reward(source[:-1])
    with pytest.raises(MMGPTError, match=r"none\.py"):
        load_reward(f"{tmp_path / 'none.py'}:shouts")
    with pytest.raises(MMGPTError, match="did you mean 'exact_match'"):
        load_reward("exactmatch")
    with pytest.raises(MMGPTError, match="reward max: does not say what it takes"):
        load_reward("builtins:max")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("mine:shouts")([chat()], ["HO"]) == [3.0]
    sys.modules.pop("mine", None)
    sys.modules.pop("helping", None)


def test_folders(tmp_path: Path, tiny: tuple[MMGPT, Processor], caplog: pytest.LogCaptureFixture) -> None:
    """A reward model, the run that it is in, rules that were fitted beside another model, and neither."""
    model, processor = tiny
    folder = tmp_path / "runs" / "best"
    folder.mkdir(parents=True)
    save_reward_model(RewardModel(model), processor, folder)
    rewards = Rewards([RewardConfig(source=str(folder))])
    assert load_reward(str(tmp_path / "runs")).name == "runs"
    rows = [chat("a"), chat("b", Image(tmp_path / "none.png"), "What is it?")]
    scored = rewards(rows, ["Red.", "Red."])
    assert scored.each["runs"].isnan().tolist() == [False, True]
    assert rewards.errors.total == 2  # the image that is not there, and that nothing else judges its answer
    assert rewards.errors.counts["answer that no reward applies to"] == 1

    rules = load_rules()
    zero = {kind: dict.fromkeys(rules.feature_names("propositions", kind), 0.0) for kind in ("hard_refuse", "comply")}
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(question):\n    return None\n")
    fitted = FittedRules(
        form="propositions", grader=GraderConfig(source=f"{judge}:judge"), weights=zero, beside="x", checksum="0"
    )
    save_rule_reward(rules, fitted, tmp_path / "rules")
    with caplog.at_level(logging.WARNING):
        both = Rewards([RewardConfig(source=str(tmp_path / "rules")), RewardConfig(source=str(folder))])
    assert both.names == ["rules", "runs"]
    assert "its weights hold for another scale" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(MMGPTError, match=r"empty: neither a reward model nor a rule-based reward"):
        load_reward(str(tmp_path / "empty"))


# What they give


def test_rewards_add_up() -> None:
    def first(completions: Any) -> list[float | None]:
        return [1.0, None, 3.0, None]

    def second(completions: Any) -> list[float | None]:
        return [True, 2, None, None]

    rewards = rewards_of(first, second, weights=[2.0, 0.5])
    scored = rewards([chat(key) for key in "abcd"], ["x"] * 4)
    assert scored.total[:3].tolist() == [2.5, 1.0, 6.0]
    assert scored.total[3].isnan()
    assert scored.each["first"].isnan().tolist() == [False, True, False, True]
    assert scored.each["second"][:2].tolist() == [1.0, 2.0]
    assert rewards.errors.counts == {"answer that no reward applies to": 1}
    assert rewards.errors.examples["answer that no reward applies to"] == ["d"]
    # One that is only logged gives no answer a reward
    gauge = rewards_of(first, second, weights=[1.0, 0.0])([chat(key) for key in "abcd"], ["x"] * 4)
    assert gauge.total[[0, 2]].tolist() == [1.0, 3.0]
    assert gauge.total.isnan().tolist() == [False, True, False, True]
    assert gauge.each["second"][:2].tolist() == [1.0, 2.0]
    with pytest.raises(ConfigError, match="every reward has weight 0"):
        Rewards([RewardConfig(source="exact_match", weight=0)])


@pytest.mark.parametrize(
    "values", [torch.tensor([1.0, 2.0]), np.array([1, 2]), (np.float32(1), 2), [torch.tensor(1), 2]]
)
def test_numbers_of_all_kinds(values: Any) -> None:
    assert rewards_of(lambda completions: values)([chat(), chat()], ["x", "y"]).total.tolist() == [1.0, 2.0]


def test_what_is_no_finite_number_is_counted_and_is_no_reward() -> None:
    rewards = rewards_of(lambda completions: [math.nan, math.inf, -math.inf, 1.0])
    scored = rewards([chat(key) for key in "abcd"], ["x"] * 4)
    assert scored.total.isnan().tolist() == [True, True, True, False]
    assert rewards.errors.counts["reward of <lambda> is nan"] == 1
    assert rewards.errors.examples["reward of <lambda> is -inf"] == ["c"]
    large = rewards_of(lambda completions: [1e300, 10**400])([chat("a"), chat("b")], ["x"] * 2)
    assert large.total.isnan().all(), "float32 does not hold them"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1.0], "reward <lambda>: gives 1 values for 2 answers"),
        ([1.0, 2.0, 3.0], "gives 3 values for 2 answers"),
        (1.0, "gives float, not a list"),
        (None, "gives NoneType, not a list"),
        ({"a": 1}, "gives dict, not a list"),
        ([1.0, "good"], "gives 'good' for b, not a number or None"),
        ([1.0, [2.0]], r"gives \[2.0\] for b"),
    ],
)
def test_wrong_values_are_refused(values: Any, line: str) -> None:
    with pytest.raises(MMGPTError, match=line):
        rewards_of(lambda completions: values)([chat("a"), chat("b")], ["x", "y"])


def test_a_constant_reward_is_said_once_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    def same(completions: Any) -> list[float]:
        return [0.5] * len(completions)

    def varies(completions: Any) -> list[float]:
        return [float(n == 5) for n in range(len(completions))]

    rewards = rewards_of(same, varies)
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * CONSTANT_AFTER // 16):
            rewards([chat()] * 16, ["x"] * 16)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"reward same: 0.5 for each of the first {CONSTANT_AFTER} answers"]


def test_a_reward_that_says_nothing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def silent(completions: Any) -> list[None]:
        return [None] * len(completions)

    rewards = rewards_of(silent)
    for _ in range(3 * CONSTANT_AFTER // 16):
        rewards([chat()] * 16, ["x"] * 16)
    said = [record.getMessage() for record in caplog.records if "skipped" not in record.getMessage()]
    assert said == [f"reward silent: none for any of the first {CONSTANT_AFTER} answers"]


def test_a_mistake_stops_the_run_but_ctrl_c_is_none() -> None:
    def stops(completions: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FunctionReward(stops)([chat()], ["x"])


def test_rewards_of_one_name_are_logged_by_their_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def judge(completions):\n    return [1.0] * len(completions)\n")
    sources = [f"{tmp_path / name}.py:judge" for name in ("a", "b")]
    rewards = Rewards([RewardConfig(source=source) for source in sources])
    assert list(rewards([chat()], ["x"]).each) == rewards.names == sources
    with pytest.raises(ConfigError, match="given twice"):
        Rewards([RewardConfig(source=sources[0])] * 2)
    with pytest.raises(ConfigError, match="at least one"):
        Rewards([])
    with pytest.raises(ConfigError, match="weight"):
        RewardConfig(source="x", weight=math.nan)


# Rewards that cannot be had by tricks

TRICKS = (
    "",
    " ",
    "A or B or C",
    "cat or dog",
    "cat cat cat",
    "cat\ncat",
    "The answer is cat or dog",
    "\\boxed{cat} \\boxed{cat}",
    "\\boxed{7} or \\boxed{8}",
    "\\boxed{7} \\boxed{7}",
    "\\boxed{}",
    "\\boxed{ }",
    "\\boxed{\\boxed{7}}",
    "\\boxed{7",
    "\\boxed{7, 8}",
    "<think></think>",
    "<think></think>a",
    "<think> \n</think>a",
    "<think>a</think>",
    "<think>a</think> </think>b",
    "<think><think>a</think>b",
    "<think>a</think>b<think>c</think>",
    "a<think>b</think>c",
    "9" * 10_000,
    "\\boxed{" * 3000,
    "\\boxed{" + "9" * 10_000 + "}",
    "<think>" * 3000,
)


@pytest.mark.parametrize("name", sorted(ANSWER_REWARDS))
def test_no_trick_earns_a_reward(name: str) -> None:
    for truth in ("cat", "A", "7", "yes", 7):
        for trick in TRICKS:
            assert load_reward(name)([chat(answer=truth)], [trick]) == [0.0], (truth, trick[:40])


@pytest.mark.parametrize("truth", [None, "", " ", [], ["cat", None], {"a": 1}, True, math.nan])
def test_where_the_truth_is_unknown_nothing_is_said(truth: Any) -> None:
    for name in ("exact_match", "boxed_match"):
        assert load_reward(name)([chat(answer=truth)], ["\\boxed{cat}"]) == [None]
        assert load_reward(name)([chat()], ["cat"]) == [None]


@pytest.mark.parametrize("truth", ["\\boxed{}", "\\boxed{7", "\\boxed{7} \\boxed{8}", "$$"])
def test_a_truth_that_cannot_be_read_is_unknown(truth: str) -> None:
    for answer in ("\\boxed{7}", "\\boxed{}", truth):
        assert boxed_match([answer], solution=[truth]) == [None]


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("A cat.", "a cat", 1.0),
        ("a  CAT", ["dog", "A cat"], 1.0),
        ("7", 7, 1.0),
        ("A cat on a mat", "cat", 0.0),
    ],
)
def test_exact_match(answer: str, truth: Any, reward: float) -> None:
    assert exact_match([answer], answer=[truth]) == [reward]


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("So it is \\boxed{7}.", "7", 1.0),
        ("\\boxed{7.0}", 7, 1.0),
        ("\\boxed{1,234}", "1234", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{-\\frac{1}{2}}", "-1/2", 1.0),
        ("\\boxed{x^{2}}", "$\\boxed{x^{2}}$", 1.0),
        ("\\boxed{1/0}", "1/0", 1.0),
        ("\\boxed{8}", "7", 0.0),
        ("7", "7", 0.0),
    ],
)
def test_boxed_match(answer: str, truth: Any, reward: float) -> None:
    assert boxed_match([[{"role": "assistant", "content": answer}]], solution=[truth]) == [reward]


def test_think_format() -> None:
    assert think_format(["<think>Two legs.</think>\nA bird.", "A bird."]) == [1.0, 0.0]
