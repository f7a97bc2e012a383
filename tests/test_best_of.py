"""The best of n: what is sampled, what is kept, what it brings, and runs that are stopped."""

import itertools
import json
import os
import signal
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import make_picture, make_tiny

from mm_gpt.alignment.best_of import (
    Candidates,
    best_and_worst,
    best_answer,
    best_of_curve,
    best_of_n,
    expected_best,
    sample_candidates,
    samples_path,
)
from mm_gpt.alignment.rewards import FunctionReward, RewardConfig, Rewards
from mm_gpt.commands.cli import main
from mm_gpt.datasets.comparisons import Comparison, Comparisons
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Image
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.engine import Engine
from mm_gpt.inference.generation import GenerationConfig

GENERATION = GenerationConfig(n=4, temperature=1.0, max_new_tokens=6, stop=("e", "o", " "))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*make_tiny(), max_rows=8)


def length_reward() -> Rewards:
    """More characters are better."""

    def length(completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(completion[0]["content"])) for completion in completions]

    return rewards_of(length)


def rewards_of(function: Any) -> Rewards:
    rewards = Rewards([RewardConfig(source="exact_match")])
    rewards.rewards, rewards.names = [FunctionReward(function)], [function.__name__]
    return rewards


def prompts(*texts: str) -> list[Comparison]:
    return [Comparison(f"row {n}", ({"role": "user", "content": [text]},)) for n, text in enumerate(texts)]


# ---- Samples ----


def test_samples_depend_on_place_and_seed_alone(engine: Engine, tmp_path: Path) -> None:
    """Whatever else is sampled at the same time, and before."""
    rows = prompts("One?", "Two?", "One?")
    picture = tmp_path / "picture.png"
    make_picture().save(picture)
    rows.append(Comparison("row 3", ({"role": "user", "content": [Image(picture), "What is it?"]},)))
    whole = [c for g in sample_candidates(engine, rows, range(4), length_reward(), GENERATION) for c in g]
    alone = [c for g in sample_candidates(engine, rows, [2, 3], length_reward(), GENERATION) for c in g]
    assert whole[2:] == alone
    assert all(len(candidates.answers) == 4 for candidates in whole)
    assert len(set(whole[0].answers + whole[2].answers)) > 4  # equal prompts are not sampled alike
    assert [candidates.key for candidates in whole] == ["row 0", "row 1", "row 2", "row 3"]
    for candidates in whole:
        assert candidates.totals == candidates.rewards["length"] == tuple(map(float, map(len, candidates.answers)))


def test_rewards_see_the_sampled_tokens(engine: Engine) -> None:
    seen: list[list[int]] = []

    def judge(completions: Any, completion_ids: list[list[int]]) -> list[float]:
        seen.extend(completion_ids)
        return [0.0] * len(completions)

    (group,) = sample_candidates(engine, prompts("One?"), [0], rewards_of(judge), GENERATION)
    decoded = [engine.processor.tokenizer.decode(ids) for ids in seen]
    assert all(text.startswith(answer) for text, answer in zip(decoded, group[0].answers, strict=True))


def test_a_prompt_that_cannot_be_answered_is_named(engine: Engine, tmp_path: Path) -> None:
    rows = prompts("long " * 300, "One?", "two")
    rows[2] = Comparison("lost", ({"role": "user", "content": [Image(tmp_path / "none.png"), "What?"]},))
    found = [c for g in sample_candidates(engine, rows, range(3), length_reward(), GENERATION) for c in g]
    assert [bool(candidates.error) for candidates in found] == [True, False, True]
    assert "the context holds" in found[0].error or "tokens" in found[0].error
    assert "none.png" in found[2].error
    assert found[2].key == "lost"
    assert len(found[1].totals) == 4
    (none,) = sample_candidates(engine, rows, [0], length_reward(), GENERATION)
    assert none[0].error


def test_samples_at_temperature_0_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="4 answers at temperature 0 are one answer"):
        next(sample_candidates(engine, prompts("One?"), [0], length_reward(), GenerationConfig(n=4)))


# ---- What is kept ----

ROW = Comparison("a", ({"role": "user", "content": ["What?"]},), columns={"level": 2, "label": 1, "margin": 3.0})


def candidates_of(*answers: tuple[str, float | None], cut_off: tuple[int, ...] = ()) -> Candidates:
    return Candidates(
        place=0,
        key="a",
        answers=tuple(text for text, _ in answers),
        totals=tuple(total for _, total in answers),
        finished=tuple(n not in cut_off for n in range(len(answers))),
    )


def test_the_best_is_kept() -> None:
    found = best_answer(ROW, candidates_of(("bad", 0.0), ("good", 2.0), ("none", None), ("as good", 2.0)))
    assert found is not None
    assert [completion.text for completion in found.completions] == ["good"]
    assert found.columns == {"level": 2, "reward": 2.0}
    pair = best_and_worst(ROW, candidates_of(("fine", 1.0), ("bad", 0.0), ("good", 2.0), ("none", None)))
    assert pair is not None
    assert [(completion.text, completion.rank) for completion in pair.completions] == [("good", 0), ("bad", 1)]
    assert pair.columns["reward_rejected"] == 0.0


def test_what_cannot_be_learned_from_is_not_kept() -> None:
    assert best_answer(ROW, candidates_of(("none", None))) is None
    assert best_answer(ROW, candidates_of((" ", 1.0))) is None
    cut = best_answer(ROW, candidates_of(("cut off", 9.0), ("whole", 1.0), cut_off=(0,)))
    assert cut is not None
    assert cut.completions[0].text == "whole"
    assert best_answer(ROW, candidates_of(("good", 2.0)), keep_above=2.0) is None
    assert best_answer(ROW, candidates_of(("good", 2.0)), keep_above=1.9) is not None
    assert best_and_worst(ROW, candidates_of(("one", 1.0), ("other", 1.0))) is None
    assert best_and_worst(ROW, candidates_of(("same", 2.0), ("same ", 1.0))) is None
    assert best_and_worst(ROW, candidates_of(("one", 1.0))) is None
    assert best_and_worst(ROW, candidates_of(("good", 2.0), ("bad", 1.0)), keep_above=2.0) is None


# ---- What it brings ----


def test_the_expected_best_is_the_mean_over_all_choices() -> None:
    rewards = [0.3, -1.0, 2.5, 0.3, 7.0]
    for k in range(1, 6):
        mean = fmean(max(chosen) for chosen in itertools.combinations(rewards, k))
        assert expected_best(rewards, k) == pytest.approx(mean)
    assert expected_best([0.0, 1.0] * 512, 1024) == 1.0


def test_the_curve() -> None:
    curve = best_of_curve([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, 1.0], [5.0]])
    assert [point["n"] for point in curve] == [1, 2, 4, 5]
    assert [point["prompts"] for point in curve] == [3, 2, 2, 2]
    assert curve[0]["reward"] == pytest.approx((2 + 1 + 5) / 3)
    assert curve[-1]["reward"] == pytest.approx((4 + 1) / 2)
    assert curve[2]["kl"] == pytest.approx(0.636294, abs=1e-6)
    assert "interval" in curve[0]
    assert best_of_curve([]) == []
    assert "interval" not in best_of_curve([[1.0, 2.0]])[0]


# ---- Runs ----


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Six prompts, one of them too long, one with a picture."""
    make_picture().save(tmp_path / "picture.png")
    rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": f"What is {n}?"}]} for n in range(4)]
    rows.append({"prompt": [{"role": "user", "content": "long " * 300}], "id": "too long"})
    rows.append({"prompt": [{"role": "user", "content": "What is it?"}], "images": ["picture.png"], "level": 2})
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def comparisons_in(path: Path) -> Comparisons:
    return Comparisons.open([SourceConfig(path=str(path))], Path(), ErrorCounter())


def test_a_run_that_fails_is_continued_and_ends_like_one_that_did_not(
    engine: Engine, prompt_file: Path, tmp_path: Path
) -> None:
    rows = comparisons_in(prompt_file)

    def run(out: Path, rewards: Rewards, **options: Any) -> Any:
        return best_of_n(engine, rows, rewards, GENERATION, out, about={"model": "tiny"}, progress=False, **options)

    whole = run(tmp_path / "whole.jsonl", length_reward())
    assert (whole.prompts, whole.skipped, whole.stopped) == (6, 1, False)
    assert "too long" in whole.errors
    calls = 0

    def breaks(completions: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("out of order")
        return [float(len(completion[0]["content"])) for completion in completions]

    breaks.__name__ = "length"
    out = tmp_path / "parts.jsonl"
    with pytest.raises(MMGPTError, match="reward length: RuntimeError"):
        run(out, rewards_of(breaks))
    assert not out.exists()
    with samples_path(out).open("ab") as file:
        file.write(b'{"place": 2, "key"')  # a kill in the middle of a line
    assert run(out, length_reward()) == whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert samples_path(out).read_bytes() == samples_path(tmp_path / "whole.jsonl").read_bytes()

    def never(completions: Any) -> list[float]:
        raise AssertionError("nothing is left to do")

    assert run(out, rewards_of(never)) == whole
    pairs = run(out, rewards_of(never), pairs=True)  # from the same samples
    assert pairs.kept
    assert all(len(comparison.completions) == 2 for comparison in comparisons_in(out))
    with pytest.raises(MMGPTError, match="samples of a run with other model"):
        best_of_n(engine, rows, length_reward(), GENERATION, out, about={"model": "other"}, progress=False)
    samples_path(out).write_text("[1]\n")
    with pytest.raises(MMGPTError, match="not the samples of a run; --overwrite"):
        run(out, length_reward())
    samples_path(out).write_text('{"model": "tiny"}\nx\n')
    with pytest.raises(MMGPTError, match="other"):
        run(out, length_reward())
    assert run(out, length_reward(), overwrite=True) == whole


def test_the_command(
    tiny_model_folder: Path, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the first prompts, then the rest; the picture comes along."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import os\nimport signal\nfrom pathlib import Path\n\nONCE = Path(__file__).with_name('once')\n\n\n"
        "def length(completions, images, **columns):\n"
        "    if ONCE.exists():\n        ONCE.unlink()\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [len(c[0]['content']) + 10 * len(i) for c, i in zip(completions, images)]\n"
    )
    (tmp_path / "once").touch()
    out = tmp_path / "new" / "best.jsonl"
    command = ["best-of", str(prompt_file), "--reward", f"{judge}:length=0.5", "-o", str(out), "-n", "16"]
    command += ["--model", str(tiny_model_folder), "--max-new-tokens", "6", "--stop", "e", "--stop", " "]
    assert main(command) == 130
    assert not out.exists()
    assert "the same command continues" in capsys.readouterr().err
    assert main(command) == 3  # one prompt is too long
    told = capsys.readouterr()
    assert "best of 16: reward" in told.out
    assert "KL 1.835 nats (5 prompts)" in told.out
    assert "1 skipped" in told.out
    assert "too long" in told.err
    kept = comparisons_in(out)
    samples = [json.loads(line) for line in samples_path(out).read_text().splitlines()[1:]]
    assert [sample["place"] for sample in samples] == list(range(6))
    assert len(kept) == 5
    last = kept[4]
    assert last.columns == {"level": 2, "reward": max(samples[5]["totals"])}
    assert [image.size() for image in last.prompt[0]["content"] if isinstance(image, Image)] == [(30, 40)]
    assert main([*command, "--keep-above", "1e9", "--pairs"]) == 3
    assert "0 of 6 prompts kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--reward", "exactmatch"], 1, "did you mean 'exact_match'"),
        (["--reward", "exact_match=x"], 1, "'x' is no number"),
        (["--reward", "exact_match", "--temperature", "-1"], 1, "temperature cannot be -1.0"),
        (["--reward", "exact_match", "--keep-above", "nan"], 2, "is no number"),
        (["--reward", "exact_match", "-o", "best.csv"], 2, "what is written is .jsonl"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    options: list[str], code: int, line: str, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["best-of", str(prompt_file), "-o", str(tmp_path / "best.jsonl"), "--model", "/none", *options]
    if code == 2:
        with pytest.raises(SystemExit) as error:
            main(command)
        assert error.value.code == 2
    else:
        assert main(command) == code
    assert line in capsys.readouterr().err


def test_signals_are_what_they_were(engine: Engine, prompt_file: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    best_of_n(
        engine,
        comparisons_in(prompt_file),
        length_reward(),
        GENERATION,
        tmp_path / "out.jsonl",
        about={},
        progress=False,
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert os.path.exists(tmp_path / "out.jsonl")
